"""Chooses a plan: from a captured program, a budget and a policy to a Plan.

The search completes combinations of these choices and takes the one that fits with the shortest modelled step:

1. Recompute no block, every block, or, unless the user says which, the number of blocks that an integer program finds
   from the costs of the first two. The best combination is then refined by recomputing a few blocks more or fewer.
2. Copy one chunk ahead, or, where nothing else fits, on demand. The best combination is then tried with copies that
   start earlier, and refined again where they do.
3. Under "auto", give chunks the homes that an integer program finds for the room that the program's peak leaves
   (`home_program`): weights and training states on the device, on the host, or, with our own optimizer, on the host and
   streamed through the device to be updated there. Room that is left over is filled afterwards.
4. Offload activations to the host, unless the user says which. Where nothing fits, the search first offloads all blocks
   in addition to recomputing them, then fewer. Where recomputing is best, it also tries to offload the inputs of the
   recomputed blocks, and to keep the activations of a share of them on the host instead of recomputing them.
5. Compute the loss over the vocabulary in pieces, unless the user decides. This is tried where the logits are more than
   a tenth of the peak with them, or nothing fits with them. It computes the logits twice, so it is taken only where the
   memory saved makes up for that, or nothing else fits.

Single chunks of the best plan then move to other homes as long as that shortens the step. The next-best plans are
recorded as its alternatives. Where nothing fits, the refusal names the least budget that would, and what takes space.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from ...passes.program.estimate import Alternative
from ...passes.program.plan import Plan
from ...passes.program.program import Program
from ...runtime.isa.errors import BudgetError
from ...runtime.isa.homes import Homes
from ...runtime.isa.precision import accumulate_dtype
from ..lowering import Flat
from .home_choice import best_nearby, candidates, fitting, is_picked, least
from .home_program import ASSUMED, FIRST_LOOK, Assumed, Blocks, HomeProgram
from .memory import Limits
from .refusal import refusal
from .solution import Solution, solution_of, step_s
from .weighed import Lower, Weighed

LOGITS_SHARE = 0.1
"""Logits above this share of a plan's peak make it worth trying the loss in pieces."""

LOOKS = 4
"""At most this many programs with some blocks recomputed are lowered to find how many blocks to recompute."""

NEIGHBOURS = 16
"""The number of recomputed blocks is refined in steps of one NEIGHBOURS-th of all blocks."""

NEAR = 0.1
"""A plan that is slower than another by no more than this share may become the faster one when it is refined."""

SHARES = 4
"""The number of blocks to offload is tried in steps of one SHARES-th of all blocks."""

KEPT_SHARES = (0.125, 0.25, 0.5, 1.0)
"""The shares of the recomputed blocks to keep on the host instead, tried in this order while the step gets faster."""

SUMS_SHARE = 0.5
"""Gradient sums are kept on the device between rounds only where they take less than this share of its budget."""

FURTHER, AHEAD_GAIN = (2, 3), 0.05
"""So many chunks ahead copies may start where that saves this share: the clock is up to 8 % too quick with them."""

OFFLOAD_GAIN = 0.05
"""The share of a step's time that offloading must save where everything fits without it. The margin covers the clock's
error: the copies that replace compute share the bus with weights, gradients and states, and each late copy stalls the
device, while the time of recomputing is certain. A plan that looks better by less than the error observed on the clock
may be worse."""


@dataclass(frozen=True)
class Constraints:
    """What is already decided, besides the plan's request.

    Fields:
        recompute, offload: the blocks to recompute and to offload; None leaves them to the planner.
        blocks: the names of all blocks that may be recomputed or offloaded.
        placed: for a further program of a model in training, where its states are; they stay there.
        fuse_loss: whether the loss is computed in pieces; None leaves it to the planner.
        logits_bytes: what a fused loss would save; 0 where no loss can be fused.
        otherwise: the blocks to recompute where `recompute` does not fit; None where there is no other choice.
    """

    recompute: tuple[str, ...] | None
    blocks: tuple[str, ...]
    placed: Homes | None = None
    fuse_loss: bool | None = None
    logits_bytes: int = 0
    offload: tuple[str, ...] | None = ()
    otherwise: tuple[str, ...] | None = None


def solve(draft: Plan, lower: Lower, limits: Limits, given: Constraints) -> Solution:
    """Completes `draft` (request, layout, mesh, notes) so that it fits. Gradient sums stay on the device between rounds
    where they fit there; otherwise they wait on the host. Raises BudgetError where nothing fits."""
    if draft.rounds > 1:
        if sums_stay(sum_bytes(draft), limits):
            with suppress(BudgetError):
                return _Search(lower, limits, given).solve(draft)
        draft = replace(draft, offload_sums=("", *draft.blocks))
    return _Search(lower, limits, given).solve(draft)


def sum_bytes(plan: Plan) -> int:
    """Bytes of all gradient sums that are kept between two rounds."""
    trained = (chunk for chunk in plan.layout.chunks if chunk.trainable)
    return sum(chunk.numel * accumulate_dtype(chunk.dtype).itemsize for chunk in trained)


def sums_stay(sums_bytes: int, limits: Limits) -> bool:
    """Whether it is worth trying to keep the gradient sums on the device."""
    return limits.device_bytes is None or sums_bytes < SUMS_SHARE * limits.device_bytes


@dataclass
class _Search:
    """One search, with the plans it has `weighed` so far."""

    lower: Lower
    limits: Limits
    given: Constraints
    weighed: list[Plan] = field(default_factory=list)
    again_s: float = 0.0
    """Seconds to recompute one block; 0 until that is known."""

    def solve(self, draft: Plan) -> Solution:
        given, refused = self.given, list[Solution]()
        for ahead in (1, 0):
            plan = replace(draft, prefetch=ahead, offload=given.offload or ())
            found = self._recomputing(plan)
            best = self._best(found)
            if best is not None:
                best = best if given.recompute is not None else self._refined_of_each_loss(found)
                return self._with_alternatives(best if given.offload is not None else self._offloaded_instead(best))
            if given.offload is None:
                found += self._offloaded_beside(found[-1].plan)
                if plan.rounds > 1 and found[0].plan.recompute != found[-1].plan.recompute:
                    # Of one round's activations, offloading them may leave less than recomputing them.
                    found += self._offloaded_beside(replace(found[-1].plan, recompute=found[0].plan.recompute))
            best = self._best(found)
            if best is not None:
                return self._with_alternatives(best)
            refused += [one for one in found if given.offload is not None or not self._lacks_host(one)]
            if self._is_beyond_copies(refused):
                break
        raise _refused(refused, self.limits, self._are_placed)

    def _lacks_host(self, solution: Solution) -> bool:
        """Whether offloading needs more host memory than there is. Such a plan is left out of the refusal."""
        return bool(solution.plan.offload) and solution.plan.estimate.host_bytes > self.limits.host_bytes

    def _is_beyond_copies(self, refused: list[Solution]) -> bool:
        """Whether the host lacks more memory than copying on demand can free: on the device it saves one chunk's
        weights, and moving a state into that room frees no more than twice as many bytes on the host."""
        plans = [one.plan for one in refused if self.limits.allow_on_device(one.plan)]
        largest_bytes = max((chunk.compute_bytes for plan in plans[:1] for chunk in plan.layout.chunks), default=0)
        lacking_bytes = [plan.estimate.host_bytes - self.limits.host_bytes for plan in plans]
        return min(lacking_bytes, default=0) > 2 * largest_bytes

    def _best(self, found: list[Solution]) -> Solution | None:
        return min((one for one in found if self.limits.allow(one.plan)), key=step_s, default=None)

    def _with_loss(self, plan: Plan) -> list[Solution]:
        """A plan with the loss in pieces or whole, or both where that is worth a look."""
        if self.given.logits_bytes and self.given.fuse_loss:
            return [self._complete(replace(plan, fuse_loss=True))]
        whole = self._complete(plan)
        if self.given.fuse_loss is None and self._worth_a_look(whole):
            return [whole, self._complete(replace(plan, fuse_loss=True))]
        return [whole]

    def _worth_a_look(self, unfused: Solution) -> bool:
        share = self.given.logits_bytes > LOGITS_SHARE * unfused.plan.peak_bytes
        return self.given.logits_bytes > 0 and (share or not self.limits.allow(unfused.plan))

    def _recomputing(self, plan: Plan) -> list[Solution]:
        """Plans that recompute the given blocks, or else the other given ones; or, where none are given, no block, all
        blocks, and a number that the integer program finds from these two."""
        given = self.given
        if given.recompute is not None or not given.blocks:
            found = self._with_loss(replace(plan, recompute=given.recompute or ()))
            if given.otherwise is None or self._best(found) is not None:
                return found
            return found + self._with_loss(replace(plan, recompute=given.otherwise))
        whole = self._with_loss(replace(plan, recompute=given.blocks))
        none = self._complete(replace(whole[0].plan, recompute=()))
        between = [self._between(each, self._blocks(whole[0].plan, none.plan)) for each in whole]
        found = [none, *(one for some in between for one in some), *whole]  # the least memory comes last
        if self._best(found) is None:  # of few blocks, what recomputing needs may be more than what it saves
            found[:0] = [self._complete(replace(each.plan, recompute=())) for each in whole[1:]]
        return found

    def _between(self, whole: Solution, blocks: Blocks) -> list[Solution]:
        """Lowers the plan that the integer program suggests, refines the blocks' costs by it, and repeats until the
        suggestion is one already lowered."""
        found: dict[int, Solution] = {blocks.count: whole}
        memory, time = self.lower(whole.plan).on(whole.plan, self.limits)
        program = HomeProgram(whole.plan, memory, time, least(whole.plan, self.given.placed), self._are_placed)
        for _ in range(LOOKS):
            answer = fitting(program, FIRST_LOOK[0], blocks)
            count = blocks.count if answer is None else blocks.count - answer.kept
            if count in found:
                break
            found[count] = self._complete(replace(whole.plan, recompute=self.given.blocks[:count]))
            blocks = self._blocks(whole.plan, found[count].plan)
        return list(found.values())[1:]

    def _blocks(self, whole: Plan, fewer: Plan) -> Blocks:
        """What keeping one block's activations costs and saves, from the difference between two plans."""
        parts = [self.lower(plan).on(plan, self.limits) for plan in (whole, fewer)]
        homes, count = least(whole, self.given.placed), len(whole.recompute) - len(fewer.recompute)
        highest = [memory.beside_states + np.array(memory.highest_parts(homes)) for memory, _ in parts]
        before, after = (highest[1] - highest[0]) / count
        self.again_s = (parts[0][1].program.compute_s - parts[1][1].program.compute_s) / count
        return Blocks(len(whole.recompute), float(before), float(after), self.again_s)

    @property
    def _are_placed(self) -> bool:
        return self.given.placed is not None

    def _refined_of_each_loss(self, found: list[Solution]) -> Solution:
        """The best solution, and the best one with its loss computed in the other way if that is not much slower, each
        refined: the faster of the two."""
        each = [self._best([one for one in found if one.plan.fuse_loss is fused]) for fused in (False, True)]
        fastest_s = min(step_s(one) for one in each if one is not None)
        near = [one for one in each if one is not None and step_s(one) <= (1 + NEAR) * fastest_s]
        return min(map(self._refined, near), key=step_s)

    def _refined(self, best: Solution) -> Solution:
        """Recomputes a few blocks more or fewer as long as that is faster."""
        blocks = self.given.blocks
        apart = -(-len(blocks) // NEIGHBOURS)
        for step in (-apart, apart):
            near, better = len(best.plan.recompute) + step, True
            while better and 0 <= near <= len(blocks):
                before, best = best, self._faster(best, replace(best.plan, recompute=blocks[:near]))
                near, better = near + step, best is not before
        return best

    def _offloaded_beside(self, plan: Plan) -> list[Solution]:
        """A plan that does not fit, with the activations of all blocks offloaded, then of fewer while it still fits."""
        found = []
        for offload in reversed(_shares(self.given.blocks)[1:]):
            found.append(self._complete(replace(plan, offload=offload)))
            if not self.limits.allow(found[-1].plan):
                break
        return found

    def _offloaded_instead(self, best: Solution) -> Solution:
        """Offloads the inputs of the recomputed blocks if that is faster. Then keeps the activations of a share of
        these blocks, evenly spread, on the host instead of recomputing them, as long as that is faster."""
        recomputed = best.plan.recompute
        if not self._may_gain(best):
            return best
        if recomputed:
            best = self._much_faster(best, replace(best.plan, offload=recomputed))
        begins = best.plan.offload
        for share in KEPT_SHARES if self.given.recompute is None else ():
            kept = tuple(block for i, block in enumerate(recomputed) if is_picked(i, share))
            if not kept:
                continue
            again = tuple(block for block in recomputed if block not in kept)
            better = self._much_faster(best, replace(best.plan, recompute=again, offload=begins or kept))
            if better is best:
                break
            best = better
        return best

    def _may_gain(self, best: Solution) -> bool:
        """Whether offloading can gain OFFLOAD_GAIN at all. The integer program gives the bound: as if recomputing took
        no time and activations no room."""
        memory, time = self.lower(best.plan).on(best.plan, self.limits)
        program = HomeProgram(best.plan, memory, time, least(best.plan, self.given.placed), self._are_placed)
        count, assumed = len(best.plan.recompute), FIRST_LOOK[0]
        blocks = Blocks(count, seconds=self.again_s)
        now, then = program.solve(assumed), program.solve(assumed, blocks, -memory.liveness.activation_bytes)
        return now is None or then is None or then.step_s < (1 - OFFLOAD_GAIN) * now.step_s

    def _faster(self, best: Solution, plan: Plan) -> Solution:
        """The faster of the best solution so far and another plan's, if that fits."""
        solution = self._complete(plan)
        return min(best, solution, key=step_s) if self.limits.allow(solution.plan) else best

    def _much_faster(self, best: Solution, plan: Plan) -> Solution:
        """As `_faster`, but replaces the best only by a gain of more than OFFLOAD_GAIN."""
        found = self._faster(best, plan)
        return found if step_s(found) < (1 - OFFLOAD_GAIN) * step_s(best) else best

    def _complete(self, plan: Plan, assumed: Sequence[Assumed] = FIRST_LOOK) -> Solution:
        """Lowers a plan and chooses homes for its chunks: the fastest that fit, or, where none do, the least."""
        weighed = self.lower(plan)
        memory, time = weighed.on(plan, self.limits)
        weigh = lambda homes: (memory.beyond_host(homes), time.seconds(plan, homes))  # noqa: E731
        homes = min(candidates(plan, memory, time, self.given.placed, assumed), key=weigh)
        solution = solution_of(replace(plan, homes=homes), weighed.flat, memory, time)
        self.weighed.append(solution.plan)
        return solution

    def _with_alternatives(self, best: Solution) -> Solution:
        """The best solution with copies that start at the best time and after moves of single chunks, with the
        next-best plans as its alternatives."""
        best = self._further_ahead(self._complete(best.plan, ASSUMED))
        plan = best.plan
        memory, time = self.lower(plan).on(plan, self.limits)
        homes, near = best_nearby(plan, memory, time, self.given.placed)
        best = solution_of(replace(plan, homes=homes), best.flat, memory, time)
        found: list[tuple[str, Alternative]] = [
            (move.kind, Alternative(move.what, move.step_s, memory.peak(move.homes))) for move in near
        ]
        for other in filter(self.limits.allow, self.weighed):
            told = difference(best.plan, other)
            found.append(
                (" ".join(told), Alternative(", ".join(told.values()), other.estimate.step_s, other.peak_bytes))
            )
        return replace(best, plan=replace(best.plan, alternatives=_fastest_of_each_kind(found)))

    def _further_ahead(self, best: Solution) -> Solution:
        """Starts copies more chunks ahead where that is faster: chunks differ in size, and one chunk's compute may not
        hide the next one's copy. Each chunk more that is on its way takes room from homes, and, where activations are
        offloaded, these would stay on the device for longer. Not in a pipeline, whose ranks may meet in fetches of
        weights without having agreed on a plan."""
        plan, estimate = best.plan, best.plan.estimate
        may_gain = estimate.bound_s < (1 - AHEAD_GAIN) * estimate.step_s
        if not may_gain or plan.prefetch == 0 or plan.offload or plan.schedule is not None:
            return best
        others = [self._complete(replace(plan, prefetch=ahead), ASSUMED) for ahead in FURTHER]
        further = self._best(others) or best
        if step_s(further) >= (1 - AHEAD_GAIN) * step_s(best):
            return best
        return further if self.given.recompute is not None else self._refined(further)


def difference(plan: Plan, other: Plan) -> dict[str, str]:
    """How another plan differs, by field, in a few words; homes are left out, since they follow from the rest."""
    told = {
        "recompute": f"recompute {len(other.recompute)} block(s)",
        "offload": f"offload {len(other.offload)} block(s)",
        "prefetch": f"copies {other.prefetch} chunk(s) ahead",
        "fuse_loss": f"the loss {'in pieces' if other.fuse_loss else 'with its logits'}",
    }
    return {name: text for name, text in told.items() if getattr(plan, name) != getattr(other, name)}


def _fastest_of_each_kind(found: list[tuple[str, Alternative]]) -> tuple[Alternative, ...]:
    """The fastest alternative of each kind. The kind "" is left out: it differs from the chosen plan only in homes."""
    fastest: dict[str, Alternative] = {}
    for kind, one in sorted(found, key=lambda pair: pair[1].step_s):
        fastest.setdefault(kind, one)
    return tuple(one for kind, one in fastest.items() if kind)


def _shares(blocks: tuple[str, ...]) -> list[tuple[str, ...]]:
    """None, some and all of the blocks, always the first ones: the backward frees what the last ones keep first."""
    counts = (-(-len(blocks) * share // SHARES) for share in range(SHARES + 1))
    return [blocks[:count] for count in dict.fromkeys(counts)]


def check(plan: Plan, lower: Lower, limits: Limits) -> Solution:
    """Accepts a hand-written or saved plan, with a new estimate. Raises BudgetError where it does not fit."""
    weighed = lower(plan)
    solution = solution_of(plan, weighed.flat, *weighed.on(plan, limits))
    if not limits.allow(solution.plan):
        raise _refused([solution], limits)
    return solution


def rehomed(plan: Plan, program: Program, limits: Limits, placed: Homes | None = None) -> Solution:
    """Chooses new homes for a plan whose program is already running; training states that are `placed` stay where they
    are. Where nothing fits, the result is the plan with the least on the device."""
    weighed = Weighed.of(Flat(program, ()), plan, limits.rates)
    return _Search(lambda _: weighed, limits, Constraints(plan.recompute, (), placed))._complete(plan, ASSUMED)


def _refused(solutions: list[Solution], limits: Limits, are_placed: bool = False) -> Exception:
    return refusal([(solution.plan, solution.program) for solution in solutions], limits, are_placed)
