"""Planning: from a captured program to a plan, the user's or the planner's, for the optimizer in use."""

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import gcd, inf
from typing import Any

import torch
from torch import nn

from ...passes.canonicalize import canonicalize
from ...passes.program.plan import Plan
from ...passes.program.program import Program
from ...passes.program.request import Policy, Request
from ...runtime.isa.errors import ArgumentError, BudgetError, SplitError
from ...runtime.isa.formats import OwnFormat, TorchFormat
from ...runtime.isa.layout import Layout
from ...runtime.isa.mesh import Mesh
from ...runtime.isa.schedule import ROUND_ROBIN, Schedule
from ..capture.results import logits_bytes
from ..capture.trace import Captured
from ..lowering import Lowering
from ..options import Options
from .check import check_cut, check_plan
from .format_choice import ANY_TIER, HOST_ALONE, LEANER, Formats, decided
from .lengthened import Lengthened
from .memory import Limits
from .microbatches import Decision, fewest, in_rounds
from .packing import Spread, Together, divide, pack, thawed, uses
from .pipeline.asked import asked_schedule
from .pipeline.cuts import begins, owners
from .pipeline.stage_costs import suited
from .search import LOGITS_SHARE, Constraints, check, solve, sum_bytes, sums_stay
from .solution import Solution
from .weighed import Lower, Weighed

NO_LOSS = "fuse_loss: the model has no loss over a vocabulary whose logits are used for nothing else"


@dataclass
class Planning:
    """Makes the plans of one model.

    Fields:
        limits: the machine's limits, corrected as they become known; `asked_bytes` keeps the budget that was asked for.
        parameters, dtypes: the parameters by their first names, and the dtype each computes in.
        blocks: the names of the model's blocks.
        line: this process's rank along the pipeline.
        lengthened: lowers plans of the whole model where only a part of it is captured; None where all of it is.
        agreed: the plan that the ranks agreed on. It counts as given, but for each rank's number of microbatches.
        suited: the round-robin that suits the stages, once these are cut; None for any other schedule.
    """

    options: Options
    limits: Limits
    mesh: Mesh
    lowering: Lowering
    parameters: dict[str, nn.Parameter]
    dtypes: dict[str, torch.dtype]
    blocks: tuple[str, ...]
    line: int = 0
    agreed: Plan | None = None
    lengthened: Lengthened | None = None
    suited: Schedule | None = None
    _lowered: dict[Any, tuple[Captured, Weighed]] = field(default_factory=dict)
    _logits: dict[int, tuple[Captured, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.asked_bytes = self.limits.device_bytes

    @property
    def adapts(self) -> bool:
        """Whether homes may be chosen again during training: not where the user placed states or gave a plan, nor in a
        pipeline, whose ranks each have chunks of their own."""
        return self.options.placement == "auto" and self.options.plan is None and self.schedule is None

    def shared(self) -> Plan:
        """The part that all plans of the model share: the request and the mesh."""
        return Plan(self._request(self.options.placement), mesh=self.mesh)

    def _request(self, policy: Policy) -> Request:
        options, degrees = self.options, self.options.degrees
        mode = degrees.mode if self.mesh.tensor_axes else None
        return Request(
            policy=policy, budget_bytes=self.asked_bytes, outputs=options.outputs, mode=mode or "",
            sequence=degrees.sequence, table=degrees.table, zero=degrees.zero, reduce_dtype=options.reduce_dtype,
            kernels=options.kernels,
        )  # fmt: skip

    @property
    def schedule(self) -> Schedule | None:
        """What each pipeline rank does in a training step; None without a pipeline. Round-robin by name is replaced by
        the one `suited` to its stages once these are cut, be it for an evaluation. Raises ArgumentError for a schedule
        that cannot run or misfits the degrees."""
        return self.suited or self._asked_schedule

    @cached_property
    def _asked_schedule(self) -> Schedule | None:
        return asked_schedule(self.options)

    @property
    def asked(self) -> int | None:
        """The number of microbatches required for a training step's batch; None where the planner chooses."""
        if self.schedule is not None:
            return self.schedule.microbatches
        if self.options.plan is not None:
            return self.options.plan.microbatches
        return None if self.options.microbatches == "auto" else self.options.microbatches

    def decide(self, captured: Captured, before: Plan | None, fixed: bool, format: OwnFormat | None) -> Decision:
        """A plan for our own optimizer's `format` of training state (None: for a torch optimizer).

        `before` is the model's plan so far, whose layout is kept; if `fixed`, masters also stay where it puts them.
        Raises BudgetError where nothing fits, ArgumentError where the user's plan does not fit this model, and
        SplitError where the batch cannot be run as the number of microbatches that was asked for.
        """
        given = 1 if self.options.rounds == "auto" or not captured.trains else self.options.rounds

        def find(count: int, rounds: int = given) -> Decision:
            return self._decide(captured, count, before, fixed, format, gcd(rounds, count))

        if self.schedule is not None and not captured.trains:
            count = self.asked or 1
            return find(count if captured.examples % count == 0 else 1)
        asked = self.asked
        if asked is None or not captured.trains:
            best = fewest(find, captured.examples, self.limits.device_bytes)
            return self._in_rounds(find, best) if captured.trains else best
        if self.options.microbatches == "auto" and self.schedule is None:
            asked = self._as_far_as_it_divides(asked, captured.examples)
        try:
            return self._in_rounds(find, find(asked))
        except SplitError as error:
            raise SplitError(f"microbatches={asked}: {error}; or leave microbatches out") from error

    def thawed(self, plan: Plan, names: Collection[str], format: OwnFormat | None) -> Plan:
        """The plan with a layout in which the parameters `names`, which were frozen, are trained. Raises StateError
        where their chunks cannot be."""
        unit, rules = (1, {}) if format is None else (format.unit, dict(format.rules))
        layout = thawed(plan.layout, names, self.parameters, rules)
        return plan if layout == plan.layout else replace(plan, layout=divide(layout, plan.shards, unit))

    def _in_rounds(self, find: Callable[[int, int], Decision], best: Decision) -> Decision:
        """The best decision for one round, or one for more rounds where that is faster and nobody fixed the number.
        Under ZeRO more rounds are not tried, since ranks meet in every fetch, nor where `recompute` is fixed, since
        recomputed blocks gain nothing from them."""
        options, plan = self.options, best[0].plan
        is_given = options.plan is not None or self.agreed is not None or self.schedule is not None
        if is_given or options.degrees.zero or options.rounds != "auto" or options.recompute != "auto":
            return best
        return in_rounds(lambda rounds: find(plan.microbatches, rounds), best, self._waits_s(plan))

    def _waits_s(self, plan: Plan) -> float:
        """Seconds per direction that the bus is busy with gradient sums between two rounds: 0 where they stay on the
        device, infinite where they do not fit the host either."""
        sums_bytes = sum_bytes(plan)
        if sums_stay(sums_bytes, self.limits):
            return 0.0
        left_bytes = self.limits.host_bytes - plan.estimate.host_bytes + plan.estimate.offloaded_bytes
        return sums_bytes / self.limits.rates.both_bytes_per_s if sums_bytes <= left_bytes else inf

    @staticmethod
    def _as_far_as_it_divides(planned: int, examples: int) -> int:
        """The largest number of microbatches, `planned` or fewer, that divides the batch. A plan is made for one batch
        size; another, such as a loader's last batch, runs as fewer microbatches, with a warning."""
        count = next((count for count in range(planned, 0, -1) if examples % count == 0), planned)
        if count != planned:
            warnings.warn(
                f"a batch of {examples} examples cannot be divided into the plan's {planned} microbatches and runs as "
                f"{count}; to refuse such batches, pass microbatches={planned}; to skip them, load with drop_last=True",
                stacklevel=2,
            )
        return count

    def _decide(self, captured: Captured, microbatches: int, before: Plan | None, fixed: bool,
                format: OwnFormat | None, rounds: int = 1) -> Decision:  # fmt: skip
        """A plan for this number of microbatches and rounds (a given plan brings its own rounds). Raises SplitError
        where the batch cannot be divided this way."""
        runs = self.blocks if microbatches > 1 or self.schedule is not None else ()
        given, options, lower = self.options.plan or self.agreed, self.options, partial(self._lower, captured)
        torchs = TorchFormat(options.optimizer_state_bytes)
        if given is not None:
            if given.line != self.line:
                raise ArgumentError(
                    f"plan= belongs to rank {given.line} of the pipeline, but this process is rank {self.line}; every "
                    "rank has a plan of its own: save and load one on each rank"
                )
            request = self._request(given.request.policy)
            if request.kernels == "exact":
                request = replace(request, kernels=given.request.kernels)
            if format is not None:
                check_cut(given, format)
            if given.microbatches != microbatches:
                given = replace(given, microbatches=microbatches, rounds=gcd(given.rounds, microbatches), blocks=runs)
            if not captured.trains:
                given = replace(given, rounds=1)
            laid_out = given.layout if before is None else before.layout  # parameters may be trained since
            given = replace(given, request=request, layout=laid_out, mesh=self.mesh, notes=captured.notes,
                            schedule=self._scheduled(captured, microbatches, before))  # fmt: skip
            if before is None:  # only at first: parameters may be frozen afterwards
                check_plan(given, self.parameters, self.blocks, self.dtypes, self.line)
                self._check_owned(captured, given)
            accept = partial(self._accept, lower)
            kinds = Formats(format, torchs, (given.format,)) if given.format.beside else Formats(format, given.format)
            return decided(accept, given, kinds, ANY_TIER)
        staged = replace(
            self.shared(), microbatches=microbatches, rounds=rounds, blocks=runs, line=self.line,
            stages=before.stages if before else (), schedule=self._scheduled(captured, microbatches, before),
        )  # fmt: skip
        if staged.schedule is not None and not staged.stages:
            program, rates = self._canonical(captured, staged), self.limits.rates
            staged = replace(staged, stages=begins(program, staged, rates))
            if options.schedule == ROUND_ROBIN:
                even = replace(staged, schedule=self.schedule)
                self.suited = suited(program, even, self._recomputed(staged.stages)[0], rates)
                staged = replace(staged, schedule=self._scheduled(captured, microbatches, before))
        layout = before.layout if before and _is_cut_for(before.layout, format) else None
        layout = layout or self._layout(captured, staged, format)
        fuse_loss = None if options.fuse_loss == "auto" else bool(options.fuse_loss)
        fusible = fuse_loss is not False and not self.mesh.tensor_axes
        saves = microbatches * self._logits_bytes(captured.by(microbatches)) if fusible else 0
        if fuse_loss is None and staged.schedule is not None and staged.schedule.weights == "host":
            # Several ranks run the last stage, and what they exchange depends on it, so all must choose alike.
            fuse_loss = saves > LOGITS_SHARE * (self.asked_bytes or inf)
        notes = (*captured.notes, *([NO_LOSS] if fuse_loss and captured.differentiable and not saves else []))
        draft = replace(staged, layout=layout, notes=notes)
        placed = before.homes if before and fixed else None
        (recompute, otherwise), offload = self._recomputed(staged.stages), self._blocks("offload", options.offload)
        constraints = Constraints(recompute, self.blocks, placed, fuse_loss, saves, offload, otherwise)
        ours = LEANER if any(chunk.casts for chunk in layout.chunks) else ()
        return decided(partial(self._solve, lower, constraints), draft, Formats(format, torchs, ours), HOST_ALONE)

    def _solve(self, lower: Lower, given: Constraints, plan: Plan) -> Solution:
        try:
            return solve(plan, lower, self.limits, given)
        except BudgetError as refusal:
            if given.otherwise is not None and self.options.schedule == ROUND_ROBIN and not refusal.tier:
                refusal.args = (f"{refusal}, and recompute='all' may, too: the round-robin then has other slots",)
            if (
                self.options.fuse_loss == "auto"
                and given.fuse_loss is False
                and given.logits_bytes
                and not refusal.tier
            ):
                refusal.args = (f"{refusal}; so may fuse_loss=True",)
            raise

    def _accept(self, lower: Lower, plan: Plan) -> Solution:
        try:
            return check(plan, lower, self.limits)
        except BudgetError as refusal:
            if self.agreed is not None:
                refusal.args = (
                    f"{refusal}. All ranks keep the plan of their first training step, and this batch does not fit "
                    "it: begin with the largest batch",
                )
            raise

    def forget(self) -> None:
        """Drops the lowered programs. Called when training has begun, after which each program is lowered only once."""
        self._lowered.clear()
        self._logits.clear()

    def _scheduled(self, captured: Captured, microbatches: int, before: Plan | None) -> Schedule | None:
        """The schedule for a captured step: the training schedule, that of the plan `before` if it has one, or its
        forward alone where there is no backward."""
        known = None if before is None else before.schedule
        schedule = known if known is not None and known.trains else self.schedule
        return schedule if schedule is None or captured.trains else schedule.forward_alone(microbatches)

    def _canonical(self, captured: Captured, plan: Plan) -> Program:
        """The canonicalized program that stages are cut out of."""
        program = captured.by(plan.microbatches).program.copy()
        canonicalize.rewrite(program, plan)
        return program

    def _check_owned(self, captured: Captured, given: Plan) -> None:
        """Raises ArgumentError for a plan whose stages and layout disagree on which ranks have a parameter."""
        if given.schedule is None:
            return
        owned = owners(self._canonical(captured, given), given, tuple(self.parameters))
        wrong = next((name for name, each in given.layout.owned if owned.get(name) != each), None)
        if wrong is not None:
            raise ArgumentError(
                f"the plan does not fit this model: by its stages rank(s) {owned.get(wrong)} read {wrong!r}, by its "
                f"layout {given.layout.owners[wrong]} own it; do not change the stages of a plan for several ranks"
            )

    def _layout(self, captured: Captured, plan: Plan, format: OwnFormat | None) -> Layout:
        """The layout of the model's parameters; in a pipeline, of those that this rank's stages read."""
        owned = {}
        together = Together() if format is None else Together(format.unit, dict(format.rules))
        if plan.schedule is not None:
            trains = plan if captured.trains else replace(plan, schedule=self.schedule)
            owned = owners(self._canonical(captured, plan), trains, tuple(self.parameters))
        mine = {name: p for name, p in self.parameters.items() if self.line in owned.get(name, (self.line,))}
        if self.lengthened is not None:
            return self.lengthened.layout(together)
        packed = pack(uses(captured.program), mine, self.blocks, self.dtypes, Spread(self.mesh, owned), together)
        return divide(packed, self.shared().shards, together.unit)

    def _lower(self, captured: Captured, plan: Plan) -> Weighed:
        """The lowered program of a plan. Kept until training begins: plans are made again for each optimizer."""
        rates, key = self.limits.rates, (
            id(captured), plan.microbatches, plan.blocks, plan.stages, plan.layout, plan.recompute, plan.offload,
            plan.prefetch, plan.fuse_loss, plan.rounds, plan.offload_sums,
        )  # fmt: skip
        if key not in self._lowered:  # keep `captured` alive, so that no other object gets its id
            if self.lengthened is None:
                weighed = Weighed.of(self.lowering.flat(captured.by(plan.microbatches).program, plan), plan, rates)
            else:
                weighed = self.lengthened.lower(plan, rates)
            self._lowered[key] = captured, weighed
        return self._lowered[key][1]

    def _logits_bytes(self, captured: Captured) -> int:
        """Bytes of logits that a fused loss would save. Kept, since plans are made again for each format."""
        if id(captured) not in self._logits:
            self._logits[id(captured)] = captured, logits_bytes(captured.program)
        return self._logits[id(captured)][1]

    def _recomputed(self, stages: tuple[str, ...]) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
        """The blocks to recompute (None leaves the choice to the planner), and others where these do not fit."""
        chosen, schedule = self.options.recompute, self.schedule
        if chosen != "auto" or schedule is None or schedule.weights == "rank":
            return self._blocks("recompute", chosen), None
        # What a forward keeps, other ranks' backwards may read, so all ranks must choose alike; nobody else reads what
        # the last stage keeps where each of its backwards is on its forward's rank.
        if stages[-1] == self.blocks[-1] and schedule.returns(schedule.stages - 1):
            return self.blocks[:-1], self.blocks
        return self.blocks, None

    def _blocks(self, option: str, chosen: str | tuple[str, ...]) -> tuple[str, ...] | None:
        """The blocks that an option names; None leaves the choice to the planner."""
        if isinstance(chosen, str):
            return {"auto": None, "none": (), "all": self.blocks}[chosen]
        unknown = [name for name in chosen if name not in self.blocks]
        if unknown:
            blocks = ", ".join(self.blocks)
            raise ArgumentError(f"{option} names {unknown[0]!r}, which is not a block; the blocks are {blocks}")
        return chosen


def _is_cut_for(layout: Layout, format: OwnFormat | None) -> bool:
    """Whether elements that the format updates together lie together in the layout."""
    return format is None or (layout.is_cut_for(format.unit) and layout.follows(dict(format.rules)))
