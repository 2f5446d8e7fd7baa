"""Planning: from a captured program to a plan, the user's or the planner's, for the optimizer there is."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ...passes.program.plan import Plan
from ...passes.program.program import Program
from ...passes.program.request import Policy, Request
from ...runtime.isa.errors import ArgumentError, BudgetError, SplitError, StateError
from ...runtime.isa.formats import OwnFormat, StateFormat, TorchFormat
from ...runtime.isa.layout import Layout
from ...runtime.isa.mesh import Mesh
from ..capture.results import logits_bytes
from ..capture.trace import Captured
from ..lowering import Lowering
from ..options import Options
from .check import check_plan
from .memory import Limits
from .microbatches import Decision, fewest
from .packing import divide, pack
from .refusal import HostBudgetError
from .search import Constraints, Solution, check, solve

ONLY_OURS = "only model.optimizer(...) fits: there is no room for a torch optimizer's training state"
NOT_DIVIDED = (
    "zero={} divides the training state of the model's own optimizer alone: call model.optimizer(torch.optim.AdamW, "
    "lr=...) before the first step and step that, or leave zero out of parallel="
)
LEANER = (
    OwnFormat(),
    OwnFormat(in_backward=True),
    OwnFormat(in_backward=True, stored="bf16"),
    OwnFormat(in_backward=True, stored="int8"),
)
"""What `model.optimizer(...)` may come to declare, from what takes most memory to what takes least."""

NOT_CUT = (
    "the plan does not fit moments={!r}: parameters in its chunks do not begin at multiples of {} elements, which are "
    "updated together; save a plan that was made after model.optimizer(...) had declared them"
)
NO_LOSS = "fuse_loss: there is no loss over a vocabulary here whose logits nothing else reads"


@dataclass(frozen=True)
class _Formats:
    """What training state may consist of: as `model.optimizer(...)` declared it, or, before that, torch's, and ours
    where that may help: the first of them that fits."""

    declared: OwnFormat | None
    torchs: StateFormat
    ours: tuple[StateFormat, ...] = ()


@dataclass
class Planning:
    """Decides for one model: its `parameters`, the dtypes that these compute in, and the names of its `blocks`."""

    options: Options
    limits: Limits
    mesh: Mesh
    lowering: Lowering
    parameters: dict[str, nn.Parameter]
    dtypes: dict[str, torch.dtype]
    blocks: tuple[str, ...]
    _lowered: dict[Any, tuple[Captured, Program]] = field(default_factory=dict)

    def shared(self) -> Plan:
        """What was asked for and the processes that there are, which all plans of the model say alike."""
        return Plan(self._request(self.options.placement), mesh=self.mesh)

    def _request(self, policy: Policy) -> Request:
        options, degrees = self.options, self.options.degrees
        mode = degrees.mode if self.mesh.tensor_axes else None
        return Request(
            policy=policy, budget_bytes=self.limits.device_bytes, outputs=options.outputs, mode=mode or "",
            sequence=degrees.sequence, table=degrees.table, zero=degrees.zero, reduce_dtype=options.reduce_dtype,
        )  # fmt: skip

    @property
    def asked(self) -> int | None:
        """Into how many microbatches a training step's batch is to be divided; None: as it fits."""
        if self.options.plan is not None:
            return self.options.plan.microbatches
        return None if self.options.microbatches == "auto" else self.options.microbatches

    def decide(self, captured: Captured, before: Plan | None, fixed: bool, format: OwnFormat | None) -> Decision:
        """A plan, for our own optimizer's `format` of training state (None: for an optimizer of torch's).

        `before` is the model's plan so far, whose layout stays; where `fixed`, masters stay where it puts them.
        Raises BudgetError where nothing fits, ValueError where the user's plan is not for this model, and SplitError
        where its batch cannot be run as so many microbatches as were asked for.
        """
        find = lambda count: self._decide(captured, count, before, fixed, format)  # noqa: E731
        if self.asked is None or not captured.trains:
            return fewest(find, captured.examples)
        try:
            return find(self.asked)
        except SplitError as error:
            raise SplitError(f"microbatches={self.asked}: {error}; or leave microbatches out") from error

    def _decide(self, captured: Captured, microbatches: int, before: Plan | None, fixed: bool,
                format: OwnFormat | None) -> Decision:  # fmt: skip
        """A plan for so many microbatches. Raises SplitError where the batch cannot be divided so."""
        runs = self.blocks if microbatches > 1 else ()
        given, options, lower = self.options.plan, self.options, partial(self._lower, captured)
        torchs = TorchFormat(options.optimizer_state_bytes)
        if given is not None:
            request = self._request(given.request.policy)
            if format is not None and not given.layout.is_cut_for(format.unit):
                raise ArgumentError(NOT_CUT.format(format.stored, format.unit))
            if given.microbatches != microbatches:
                given = replace(given, microbatches=microbatches, blocks=runs)
            given = replace(given, request=request, mesh=self.mesh, notes=captured.notes)
            if before is None:  # parameters may be frozen afterwards
                check_plan(given, self.parameters, self.blocks, self.dtypes)
            accept = lambda plan: check(plan, lower, self.limits)  # noqa: E731
            kinds = _Formats(format, torchs, (given.format,)) if given.format.beside else _Formats(format, given.format)
            return self._either(accept, given, kinds, BudgetError)
        unit = 1 if format is None else format.unit
        layout = before.layout if before and before.layout.is_cut_for(unit) else self._layout(captured.program, unit)
        fuse_loss = None if options.fuse_loss == "auto" else bool(options.fuse_loss)
        fusible = fuse_loss is not False and not self.mesh.tensor_axes
        saves = microbatches * logits_bytes(captured.by(microbatches).program) if fusible else 0
        notes = (*captured.notes, *([NO_LOSS] if fuse_loss and captured.differentiable and not saves else []))
        draft = replace(self.shared(), layout=layout, notes=notes, microbatches=microbatches, blocks=runs)
        placed = before.homes if before and fixed else None
        recompute, offload = (self._blocks(name, getattr(options, name)) for name in ("recompute", "offload"))
        constraints = Constraints(recompute, self.blocks, placed, fuse_loss, saves, offload)
        ours = LEANER if any(chunk.casts for chunk in layout.chunks) else ()
        find = lambda plan: solve(plan, lower, self.limits, constraints)  # noqa: E731
        return self._either(find, draft, _Formats(format, torchs, ours), HostBudgetError)

    def forget(self) -> None:
        """Training has begun: programs are lowered once each from here on."""
        self._lowered.clear()

    def _layout(self, program: Program, unit: int) -> Layout:
        packed = pack(program, self.parameters, self.blocks, self.dtypes, self.mesh, unit)
        return divide(packed, self.shared().shards, unit)

    @staticmethod
    def _either(find: Callable[[Plan], Solution], plan: Plan, formats: "_Formats",
                excused: type[BudgetError]) -> Decision:  # fmt: skip
        """Decide for the optimizer there is. A torch optimizer's state may be too large where `ours` is not: whether
        that is to be used is told only after compiling, and until then steps are refused. So they are where chunks
        are divided, whose training state is of no other kind."""
        declared, ours = formats.declared, formats.ours
        if declared is None and any(chunk.shards > 1 for chunk in plan.layout.chunks):
            return find(replace(plan, format=next(iter(ours), OwnFormat()))), StateError(
                NOT_DIVIDED.format(plan.request.zero)
            )
        try:
            return find(replace(plan, format=declared or formats.torchs)), None
        except excused as refusal:
            if declared is not None or not ours:
                raise
            return _first_that_fits(find, replace(plan, notes=(*plan.notes, ONLY_OURS)), ours, excused), refusal

    def _lower(self, captured: Captured, plan: Plan) -> Program:
        """The lowered program of a plan, made once until training begins: plans are made anew for an optimizer.

        The first one is verified, for a fault in a pass to be told as such.
        """
        key = (
            id(captured), plan.microbatches, plan.layout, plan.recompute, plan.offload, plan.prefetch, plan.fuse_loss,
        )  # fmt: skip
        if key not in self._lowered:  # with what it was made of, whose id is then nobody else's
            self._lowered[key] = captured, self._flat(captured, plan)
        return self._lowered[key][1]

    def _flat(self, captured: Captured, plan: Plan) -> Program:
        return self.lowering.flat(captured.by(plan.microbatches).program, plan, verified=not self._lowered)

    def _blocks(self, option: str, chosen: str | tuple[str, ...]) -> tuple[str, ...] | None:
        """The blocks that an option names; None leaves them to the planner."""
        if isinstance(chosen, str):
            return {"auto": None, "none": (), "all": self.blocks}[chosen]
        unknown = [name for name in chosen if name not in self.blocks]
        if unknown:
            blocks = ", ".join(self.blocks)
            raise ArgumentError(f"{option} names {unknown[0]!r}, which is no block; the blocks are {blocks}")
        return chosen


def _first_that_fits(find: Callable[[Plan], Solution], plan: Plan, formats: tuple[StateFormat, ...],
                     excused: type[BudgetError]) -> Solution:  # fmt: skip
    """The plan for the first format that fits. Raises what tells of the last one where none does."""
    *others, last = formats
    for format in others:
        with suppress(excused):
            return find(replace(plan, format=format))
    return find(replace(plan, format=last))
