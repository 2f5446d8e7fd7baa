"""What a model would take to train, in each format of its training state: planned on `meta`, nothing is run."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..models.adapters import blocks
from ..models.low_rank import adapted
from ..passes.program.plan import Plan
from ..runtime.isa.errors import ArgumentError, BudgetError, CaptureError
from ..runtime.isa.formats import OwnFormat
from ..runtime.isa.quantized import Quantized
from ..runtime.isa.units import parse_bytes
from .memory.device import gpu_budget, gpu_limits
from .options import Options
from .planner.refusal import HostBudgetError
from .programs.collector import resting_collector
from .programs.programs import Call
from .rates.rates import Rates
from .session import Session

RANK = 16
"""Of the adapters that are estimated beside frozen weights."""


@dataclass(frozen=True)
class Machine:
    """What is estimated for: budgets in bytes (a device's of None is no limit), and rates."""

    device_bytes: int | None
    host_bytes: int
    rates: Rates

    @classmethod
    def of(cls, device_budget: str | None, host_budget: str, rates: Rates) -> "Machine":
        """Raises ValueError for budgets that cannot be read; shares of a machine that is not there are none."""
        device_bytes = None if device_budget is None else parse_bytes(device_budget)
        return cls(device_bytes, parse_bytes(host_budget), rates)


@dataclass(frozen=True)
class Estimated:
    """One format of training state.

    Fields:
        state: what it is called.
        parameters, trained: how many the model has, and how many of them are trained.
        plan: what would be done; None where nothing fits.
        lacking: then the tier, "device" or "host", that is too small, and the smallest budget of it that would do.
        reason: why the model cannot be trained so at all, "" where it can.
    """

    state: str
    parameters: int
    trained: int
    plan: Plan | None
    lacking: tuple[str, int] | None = None
    reason: str = ""

    def to_dict(self, tokens: int) -> dict[str, Any]:
        """For JSON; `tokens` are those of a step."""
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
    _Row(f"LoRA of rank {RANK}, frozen bf16", OwnFormat(in_backward=True), is_adapted=True),
    _Row(f"LoRA of rank {RANK}, frozen nf4", OwnFormat(in_backward=True), is_adapted=True, frozen="nf4"),
)


def estimates(build: Callable[[], nn.Module], batch: Mapping[str, Any], machine: Machine) -> Iterator[Estimated]:
    """Plan AdamW's step on `batch` for each format, from the one that takes most to the one that takes least. `build`
    makes the model on `meta`; the step computes in bfloat16 on a GPU."""
    step = _Captured(build(), batch, machine)
    for row in ROWS:
        if row.is_adapted:
            source = build()
            source = adapted(source, blocks(source), RANK)
            try:
                step = _Captured(source, batch, machine, row.frozen)
            except (ArgumentError, CaptureError) as refusal:
                yield Estimated(row.state, *_parameters(source), plan=None, reason=str(refusal))
                continue
        yield step.estimated(row.state, row.format)


def _parameters(model: nn.Module) -> tuple[int, int]:
    """How many there are, and how many are trained."""
    numels = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(numel for numel, _ in numels), sum(numel for numel, is_trained in numels if is_trained)


class _Captured:
    """A step that was captured once, for all formats."""

    @resting_collector()
    def __init__(self, model: nn.Module, batch: Mapping[str, Any], machine: Machine,
                 frozen: Quantized | None = None) -> None:  # fmt: skip
        self.parameters, self.trained = _parameters(model)
        options = Options.of(
            {"device": "cpu", "precision": "bf16", "host_budget": machine.host_bytes, "frozen": frozen}
        )
        session = Session(model, options)
        self.planning = session.planning
        self.planning.limits = gpu_limits(machine.device_bytes, machine.host_bytes, machine.rates)
        with torch.enable_grad():
            _, self.step = session.captures.of(
                session.captures.taken(Call.of(session.census.now(), "", (), dict(batch)))
            )

    @resting_collector()
    def estimated(self, state: str, format: OwnFormat) -> Estimated:
        told = Estimated(state, self.parameters, self.trained, None)
        try:
            solution, _ = self.planning.decide(self.step, None, False, format)
        except BudgetError as refusal:
            smallest_bytes = refusal.smallest_bytes or 0
            if isinstance(refusal, HostBudgetError):
                return replace(told, lacking=("host", smallest_bytes))
            tensors_bytes = smallest_bytes - self.planning.limits.reserve_bytes
            return replace(told, lacking=("device", gpu_budget(tensors_bytes)))
        return replace(told, plan=solution.plan)
