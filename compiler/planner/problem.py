"""Planning: from a captured program to a plan, the user's or the planner's, for the optimizer there is."""

import warnings
from collections.abc import Callable
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
NO_LOSS = "fuse_loss: there is no loss over a vocabulary here whose logits nothing else reads"


@dataclass(frozen=True)
class _Formats:
    """What training state may consist of: as `model.optimizer(...)` declared it, or, before that, torch's, and ours
    where that may help."""

    declared: OwnFormat | None
    torchs: StateFormat
    ours: StateFormat | None = None


@dataclass
class Planning:
    """Decides for one model: its `parameters`, the dtypes that these compute in, and the names of its `blocks`. What
    ranks have `agreed` on is as good as a plan of the user's, but for microbatches, of which each has its own."""

    options: Options
    limits: Limits
    mesh: Mesh
    lowering: Lowering
    parameters: dict[str, nn.Parameter]
    dtypes: dict[str, torch.dtype]
    blocks: tuple[str, ...]
    agreed: Plan | None = None
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
        asked = self.asked
        if asked is None or not captured.trains:
            return fewest(find, captured.examples)
        if self.options.microbatches == "auto":
            asked = self._as_far_as_it_divides(asked, captured.examples)
        try:
            return find(asked)
        except SplitError as error:
            raise SplitError(f"microbatches={asked}: {error}; or leave microbatches out") from error

    @staticmethod
    def _as_far_as_it_divides(planned: int, examples: int) -> int:
        """A plan is for the batch that it was made for: another, as a loader's last one, is run as fewer microbatches
        where it does not divide into as many."""
        count = next(count for count in range(planned, 0, -1) if examples % count == 0)
        if count != planned:
            warnings.warn(
                f"a batch of {examples} examples does not divide into the plan's {planned} microbatches, and is run as "
                f"{count}; microbatches={planned} refuses such batches, drop_last=True leaves them out",
                stacklevel=2,
            )
        return count

    def _decide(self, captured: Captured, microbatches: int, before: Plan | None, fixed: bool,
                format: OwnFormat | None) -> Decision:  # fmt: skip
        """A plan for so many microbatches. Raises SplitError where the batch cannot be divided so."""
        runs = self.blocks if microbatches > 1 else ()
        given, options, lower = self.options.plan or self.agreed, self.options, partial(self._lower, captured)
        torchs = TorchFormat(options.optimizer_state_bytes)
        if given is not None:
            request = self._request(given.request.policy)
            if given.microbatches != microbatches:
                given = replace(given, microbatches=microbatches, blocks=runs)
            given = replace(given, request=request, mesh=self.mesh, notes=captured.notes)
            if before is None:  # parameters may be frozen afterwards
                check_plan(given, self.parameters, self.blocks, self.dtypes)
            accept = partial(self._accept, lower)
            kinds = _Formats(format, torchs, given.format) if given.format.beside else _Formats(format, given.format)
            return self._either(accept, given, kinds, BudgetError)
        layout = before.layout if before else self._layout(captured.program)
        fuse_loss = None if options.fuse_loss == "auto" else bool(options.fuse_loss)
        fusible = fuse_loss is not False and not self.mesh.tensor_axes
        saves = microbatches * logits_bytes(captured.by(microbatches).program) if fusible else 0
        notes = (*captured.notes, *([NO_LOSS] if fuse_loss and captured.differentiable and not saves else []))
        draft = replace(self.shared(), layout=layout, notes=notes, microbatches=microbatches, blocks=runs)
        placed = before.homes if before and fixed else None
        recompute, offload = (self._blocks(name, getattr(options, name)) for name in ("recompute", "offload"))
        constraints = Constraints(recompute, self.blocks, placed, fuse_loss, saves, offload)
        ours = OwnFormat() if any(chunk.casts for chunk in layout.chunks) else None
        find = lambda plan: solve(plan, lower, self.limits, constraints)  # noqa: E731
        return self._either(find, draft, _Formats(format, torchs, ours), HostBudgetError)

    def _accept(self, lower: Callable[[Plan], Program], plan: Plan) -> Solution:
        try:
            return check(plan, lower, self.limits)
        except BudgetError as refusal:
            if self.agreed is not None:
                refusal.args = (
                    f"{refusal}. That is by the plan that all ranks keep to since their first training step: begin "
                    "with the largest batch",
                )
            raise

    def forget(self) -> None:
        """Training has begun: programs are lowered once each from here on."""
        self._lowered.clear()

    def _layout(self, program: Program) -> Layout:
        return divide(pack(program, self.parameters, self.blocks, self.dtypes, self.mesh), self.shared().shards)

    @staticmethod
    def _either(find: Callable[[Plan], Solution], plan: Plan, formats: "_Formats",
                excused: type[BudgetError]) -> Decision:  # fmt: skip
        """Decide for the optimizer there is. A torch optimizer's state may be too large where `ours` is not: whether
        that is to be used is told only after compiling, and until then steps are refused. So they are where chunks
        are divided, whose training state is of no other kind."""
        declared, ours = formats.declared, formats.ours
        if declared is None and any(chunk.shards > 1 for chunk in plan.layout.chunks):
            return find(replace(plan, format=ours or OwnFormat())), StateError(NOT_DIVIDED.format(plan.request.zero))
        try:
            return find(replace(plan, format=declared or formats.torchs)), None
        except excused as refusal:
            if declared is not None or ours is None:
                raise
            return find(replace(plan, format=ours, notes=(*plan.notes, ONLY_OURS))), refusal

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
