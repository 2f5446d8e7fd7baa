"""Estimates what training a model takes, in several formats of training state. Plans on `meta`; runs nothing."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..models.adapters import blocks
from ..models.low_rank import adapted
from ..passes.program.plan import Plan
from ..runtime.isa.errors import ArgumentError, BudgetError, CaptureError, as_cause
from ..runtime.isa.formats import OwnFormat
from ..runtime.isa.quantized import Quantized
from ..runtime.isa.units import parse_bytes
from .capture.trace import Captured
from .memory.device import gpu_budget, gpu_limits
from .options import Options
from .planner.lengthened import Lengthened, Part
from .planner.sections import NotRepeatedError
from .planner.shortened import kinds, leave_out
from .programs.collector import resting_collector
from .programs.programs import Call
from .rates.rates import Rates
from .session import Session

RANK = 16
"""The rank of the LoRA adapters in estimates with frozen weights."""


@dataclass(frozen=True)
class Machine:
    """The machine to estimate for: its budgets in bytes (None for the device: no limit) and its rates."""

    device_bytes: int | None
    host_bytes: int
    rates: Rates

    @classmethod
    def of(cls, device_budget: str | None, host_budget: str, rates: Rates) -> "Machine":
        """Parses budgets. Raises ValueError for text that cannot be read, and for percentages, as the machine is not
        here."""
        device_bytes = None if device_budget is None else parse_bytes(device_budget)
        return cls(device_bytes, parse_bytes(host_budget), rates)


@dataclass(frozen=True)
class Estimated:
    """The estimate for one format of training state.

    Fields:
        state: the format's name.
        parameters, trained: how many parameters the model has, and how many of them are trained.
        plan: the plan that would be used; None if nothing fits.
        lacking: if nothing fits, the tier that is too small, "device" or "host", and the smallest budget, in bytes,
            that would do.
        reason: why this format is not possible for the model at all; "" if it is.
    """

    state: str
    parameters: int
    trained: int
    plan: Plan | None
    lacking: tuple[str, int] | None = None
    reason: str = ""

    def to_dict(self, tokens: int) -> dict[str, Any]:
        """For JSON; `tokens` is the number of tokens in a step, for the rate."""
        told: dict[str, Any] = {"state": self.state, "parameters": self.parameters, "trained": self.trained}
        if self.plan is None:
            tier, smallest_bytes = self.lacking or ("", 0)
            return told | {"fits": False, "lacking": tier, "smallest_bytes": smallest_bytes, "reason": self.reason}
        expected = self.plan.estimate
        return told | {
            "fits": True, "device_bytes": self.plan.peak_bytes, "host_bytes": expected.host_bytes,
            "step_s": expected.step_s, "tokens_per_s": tokens / expected.step_s if expected.step_s else None,
            "binds": expected.binds, "recomputed_blocks": len(self.plan.recompute),
            "microbatches": self.plan.microbatches, "rates": expected.rates,
        }  # fmt: skip


@dataclass(frozen=True)
class _Row:
    state: str
    format: OwnFormat
    is_adapted: bool = False
    frozen: Quantized | None = None


ROWS = (
    _Row("exact", OwnFormat(in_backward=True)),
    _Row("bf16 moments", OwnFormat(in_backward=True, stored="bf16")),
    _Row("int8 moments", OwnFormat(in_backward=True, stored="int8")),
    _Row("int8 moments, bf16 masters", OwnFormat(in_backward=True, stored="int8", masters="bf16-stochastic")),
    _Row(f"LoRA of rank {RANK}, frozen bf16", OwnFormat(in_backward=True), is_adapted=True),
    _Row(f"LoRA of rank {RANK}, frozen nf4", OwnFormat(in_backward=True), is_adapted=True, frozen="nf4"),
)


def estimates(build: Callable[[], nn.Module], batch: Mapping[str, Any], machine: Machine,
              whole: bool = False) -> Iterator[Estimated]:  # fmt: skip
    """Plans an AdamW step on `batch` for each format, from the one that needs most memory to the one that needs least.
    `build` makes the model on `meta`; the step computes in bfloat16 on a GPU. Only a part of the model is captured,
    unless all of it is asked for (`whole`) or its blocks are not alike."""
    steps: dict[tuple[bool, Quantized | None], _Step] = {}
    for row in ROWS:
        kind = row.is_adapted, row.frozen
        try:
            if kind not in steps:
                steps[kind] = _Step(_Source(build, row.is_adapted, row.frozen), batch, machine, whole)
            yield steps[kind].estimated(row.state, row.format)
        except (ArgumentError, CaptureError) as refusal:
            if not row.is_adapted:
                raise
            source = _Source(build, row.is_adapted).model()
            yield Estimated(row.state, *_parameters(source), plan=None, reason=str(refusal))


def _parameters(model: nn.Module) -> tuple[int, int]:
    """The number of parameters, and how many of them are trained."""
    numels = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(numel for numel, _ in numels), sum(numel for numel, is_trained in numels if is_trained)


@dataclass(frozen=True)
class _Source:
    """Makes a model by `build`, whole or with its first blocks alone, with adapters if `is_adapted`."""

    build: Callable[[], nn.Module]
    is_adapted: bool
    frozen: Quantized | None = None

    def model(self, count: int | None = None) -> nn.Module:
        made = self.build()
        if count is not None:
            leave_out(made, blocks(made)[count:])
        return adapted(made, blocks(made), RANK) if self.is_adapted else made

    def session(self, machine: Machine, count: int | None = None) -> Session:
        options = {"device": "cpu", "precision": "bf16", "host_budget": machine.host_bytes, "frozen": self.frozen}
        return Session(self.model(count), Options.of(options))


class _Step:
    """A training step, captured once to be planned in several formats: a part of it, or the whole where that does not
    tell what the whole takes."""

    @resting_collector()
    def __init__(self, source: _Source, batch: Mapping[str, Any], machine: Machine, whole: bool) -> None:
        self.source, self.batch, self.machine = source, batch, machine
        self.session = source.session(machine)
        self.parameters, self.trained = _parameters(self.session.source)
        self.planning = self.session.planning
        self.planning.limits = gpu_limits(machine.device_bytes, machine.host_bytes, machine.rates)
        names = self.planning.blocks
        if not whole:
            alike = kinds(self.session.source, names)
            parameters, dtypes = self.planning.parameters, self.planning.dtypes
            self.planning.lengthened = Lengthened(names, alike, parameters, dtypes, self._part, self.planning.lowering)

    def _part(self, count: int) -> Part:
        try:
            session = self.source.session(self.machine, count)
            return Part(self._captured(session), session.planning.blocks)
        except Exception as error:  # of the model's own Python, which may count on all blocks
            raise NotRepeatedError(f"the model does not run with {count} blocks: {error}") from as_cause(error)

    def _captured(self, session: Session) -> Captured:
        with torch.enable_grad():
            call = Call.of(session.census.now(), "", (), dict(self.batch))
            return session.captures.of(session.captures.taken(call))[1]

    @resting_collector()
    def estimated(self, state: str, format: OwnFormat) -> Estimated:
        told = Estimated(state, self.parameters, self.trained, None)
        try:
            return replace(told, plan=self._plan(format))
        except BudgetError as refusal:
            smallest_bytes = refusal.smallest_bytes or 0
            if refusal.tier == "host":
                return replace(told, lacking=("host", smallest_bytes))
            tensors_bytes = smallest_bytes - self.planning.limits.reserve_bytes
            return replace(told, lacking=("device", gpu_budget(tensors_bytes)))

    def _plan(self, format: OwnFormat) -> Plan:
        lengthened = self.planning.lengthened
        if lengthened is not None:
            try:
                return self.planning.decide(lengthened.captured, None, False, format)[0].plan
            except NotRepeatedError:
                self.planning.lengthened = None
                self.planning.forget()
        return self.planning.decide(self._captured(self.session), None, False, format)[0].plan
