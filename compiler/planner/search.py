"""Decide: from a captured program, a budget and a policy to a Plan.

Combinations of these choices are completed, and the one that fits with the shortest modelled step is taken:

1. keep all activations, or recompute every block or a quarter, half, three quarters of them, unless the user
   says which; around the best of all combinations, then, a few blocks more or fewer;
2. copy one chunk ahead, or, where nothing else fits, on demand;
3. under "auto", keep as many chunks on the device as the program's peak leaves room for: first the weights
   that compute, which saves two copies a step for two bytes each, then whole training states. With our own
   optimizer, a share of those that remain on the host may travel through the device to be updated there;
4. offload activations to the host, unless the user says which. Where nothing fits, that is tried of all blocks as they
   are recomputed, and, where all are more than it takes, of fewer. Where recomputing is best, so is offloading where
   the recomputed blocks begin, and a share of them kept on the host instead;
5. compute the loss over the vocabulary in pieces, unless the user says whether. That is tried where the logits
   are more than a tenth of the peak with them, or nothing fits with them. It computes the logits twice, so it
   is taken where the memory saved makes up for that, or nothing else fits.

Where nothing fits, the refusal names the smallest budget that would, and what takes the space.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ...passes.program.plan import Plan
from ...passes.program.program import Program
from ...runtime.isa.homes import Home, Homes, Where, moved, resident
from .communication import collectives
from .liveness import analyse
from .memory import Limits, Memory
from .refusal import refusal
from .simulate import StepTime

LOGITS_SHARE = 0.1
"""The share of a plan's peak from which on it is worth a look whether logits are needed."""

SHARES = 4
"""Into so many shares blocks are divided for a first look at how many to recompute."""

KEPT_SHARES = (0.125, 0.25, 0.5, 1.0)
"""Shares of the blocks that are recomputed at first, and whose activations may be kept on the host instead."""

OFFLOAD_GAIN = 0.05
"""The share of a step's time that activations on the host must save where everything fits without."""

STREAMED_SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
"""Shares of the chunks that may be updated on the device although their states lie on the host."""

Lower = Callable[[Plan], Program]
"""Runs the passes over a copy of the captured program, up to where instructions are in their final place."""


@dataclass(frozen=True)
class Constraints:
    """What is decided already, besides a plan's request: the blocks to recompute and those to offload (None: the
    planner's choice), whether the loss is computed in pieces (likewise), and, for a further program of a model in
    training, where states are, which stay there (`placed`). `logits_bytes` is what a fused loss would save, 0 where
    there is none."""

    recompute: tuple[str, ...] | None
    blocks: tuple[str, ...]
    placed: Homes | None = None
    fuse_loss: bool | None = None
    logits_bytes: int = 0
    offload: tuple[str, ...] | None = ()


@dataclass(frozen=True)
class Solution:
    """A plan, and the program it was made for."""

    plan: Plan
    program: Program


def solve(draft: Plan, lower: Lower, limits: Limits, given: Constraints) -> Solution:
    """Complete `draft` (request, layout, mesh, notes) so that it fits. Raises BudgetError where nothing does."""
    refused: list[Solution] = []
    for ahead in (1, 0):
        plan = replace(draft, prefetch=ahead, offload=given.offload or ())
        found: list[Solution] = []
        for recompute in [given.recompute] if given.recompute is not None else _shares(given.blocks):
            found += _with_loss(replace(plan, recompute=recompute), lower, limits, given)
        best = _best(found, limits)
        if best is not None:
            best = best if given.recompute is not None else _refined(best, lower, limits, given)
            return best if given.offload is not None else _offloaded_instead(best, lower, limits, given)
        if given.offload is None:
            found += _offloaded_beside(found[-1].plan, lower, limits, given)
        best = _best(found, limits)
        if best is not None:
            return best
        refused += [one for one in found if given.offload is not None or not _lacks_host(one, limits)]
    raise _refused(refused, limits)


def _lacks_host(solution: Solution, limits: Limits) -> bool:
    """Whether what was tried to be offloaded is more than the host has room for: no reason to refuse the rest."""
    return bool(solution.plan.offload) and solution.plan.estimate.host_bytes > limits.host_bytes


def _best(found: list[Solution], limits: Limits) -> Solution | None:
    return min((solution for solution in found if limits.allow(solution.plan)), key=_step_s, default=None)


def _with_loss(plan: Plan, lower: Lower, limits: Limits, given: Constraints) -> list[Solution]:
    """A plan with the loss in pieces or whole, or with both where it is worth a look."""
    if given.logits_bytes and given.fuse_loss:
        return [_complete(replace(plan, fuse_loss=True), lower, limits, given)]
    whole = _complete(plan, lower, limits, given)
    if given.fuse_loss is None and _worth_a_look(whole, limits, given):
        return [whole, _complete(replace(plan, fuse_loss=True), lower, limits, given)]
    return [whole]


def _refined(best: Solution, lower: Lower, limits: Limits, given: Constraints) -> Solution:
    """Recompute some blocks more or fewer than the best of the shares, half as many each time, where that is faster."""
    apart = -(-len(given.blocks) // SHARES)
    while apart > 1:
        apart = -(-apart // 2)
        count = len(best.plan.recompute)
        for near in (count - apart, count + apart):
            if 0 <= near <= len(given.blocks):
                best = _faster(best, replace(best.plan, recompute=given.blocks[:near]), lower, limits, given)
    return best


def _offloaded_beside(plan: Plan, lower: Lower, limits: Limits, given: Constraints) -> list[Solution]:
    """A plan that does not fit, with activations offloaded: of all blocks, and then, as long as it fits, of fewer."""
    found = []
    for offload in reversed(_shares(given.blocks)[1:]):
        found.append(_complete(replace(plan, offload=offload), lower, limits, given))
        if not limits.allow(found[-1].plan):
            break
    return found


def _offloaded_instead(best: Solution, lower: Lower, limits: Limits, given: Constraints) -> Solution:
    """Where blocks are recomputed, offload where they begin if that is faster, and then, evenly spread over them, keep
    a share on the host instead."""
    recomputed = best.plan.recompute
    if recomputed:
        best = _much_faster(best, replace(best.plan, offload=recomputed), lower, limits, given)
    begins = best.plan.offload
    for share in KEPT_SHARES if given.recompute is None else ():
        kept = tuple(block for i, block in enumerate(recomputed) if _every(i, share))
        if not kept:
            continue
        again = tuple(block for block in recomputed if block not in kept)
        plan = replace(best.plan, recompute=again, offload=begins or kept)
        better = _much_faster(best, plan, lower, limits, given)
        if better is best:
            break
        best = better
    return best


def _faster(best: Solution, plan: Plan, lower: Lower, limits: Limits, given: Constraints) -> Solution:
    """The best so far, or what another plan is completed to where that fits and is faster."""
    solution = _complete(plan, lower, limits, given)
    return min(best, solution, key=_step_s) if limits.allow(solution.plan) else best


def _much_faster(best: Solution, plan: Plan, lower: Lower, limits: Limits, given: Constraints) -> Solution:
    """The same, but only where that is worth copies that the bus may have less time for than is modelled."""
    found = _faster(best, plan, lower, limits, given)
    return found if _step_s(found) < (1 - OFFLOAD_GAIN) * _step_s(best) else best


def _complete(plan: Plan, lower: Lower, limits: Limits, given: Constraints) -> Solution:
    """The program of a plan and homes for its chunks: as much as fits, or, where nothing does, the least."""
    program = lower(plan)
    memory, time = Memory(plan, analyse(program), limits), StepTime.of(program, plan, limits.rates)
    found: Iterable[Homes] = [_least(plan, given)]
    if plan.request.policy == "auto" and memory.fits(_least(plan, given)):
        found = _candidates(plan, memory, given)
    timed = [(memory.beyond_host(homes), time.seconds(plan, homes), homes) for homes in found]
    if given.placed is None:
        best = min(timed, key=_order)[-1]
        apart = _landing_apart(plan, best)
        if apart != best:
            timed.append((memory.beyond_host(apart), time.seconds(plan, apart), apart))
    homes = min(timed, key=_order)[-1]
    return _solution(replace(plan, homes=homes), program, memory, time)


def _order(candidate: tuple[int, float, Homes]) -> tuple[int, float]:
    """Homes that fit the host, then those of the faster step; of equal ones the first."""
    return candidate[:2]


def _step_s(solution: Solution) -> float:
    return solution.plan.estimate.step_s


def _solution(plan: Plan, program: Program, memory: Memory, time: StepTime) -> Solution:
    """A plan in which everything is decided, with all that it is expected to take."""
    timing = time.timing(plan, plan.homes)
    estimate = replace(
        memory.estimate(plan.homes), step_s=timing.step_s, busy_s=timing.busy_s, rates=time.rates.name,
        collectives=collectives(program, plan),
    )  # fmt: skip
    return Solution(replace(plan, estimate=estimate), program)


def _shares(blocks: tuple[str, ...]) -> list[tuple[str, ...]]:
    """None of the blocks, some, or all. The first ones: what the last ones keep is freed first in the backward."""
    counts = (-(-len(blocks) * share // SHARES) for share in range(SHARES + 1))
    return [blocks[:count] for count in dict.fromkeys(counts)]


def _worth_a_look(unfused: Solution, limits: Limits, given: Constraints) -> bool:
    share = given.logits_bytes > LOGITS_SHARE * unfused.plan.peak_bytes
    return given.logits_bytes > 0 and (share or not limits.allow(unfused.plan))


def check(plan: Plan, lower: Lower, limits: Limits) -> Solution:
    """Accept a plan that was made by hand or before, estimated anew. Raises BudgetError where it does not fit."""
    program = lower(plan)
    time = StepTime.of(program, plan, limits.rates)
    solution = _solution(plan, program, Memory(plan, analyse(program), limits), time)
    if not limits.allow(solution.plan):
        raise _refused([solution], limits)
    return solution


def _refused(solutions: list[Solution], limits: Limits) -> Exception:
    return refusal([(solution.plan, solution.program) for solution in solutions], limits)


# -- homes -------------------------------------------------------------------------------------------------


def _least(plan: Plan, given: Constraints) -> Homes:
    """What the policy puts on the device whatever the room."""
    cuda = plan.request.policy == "cuda"
    homes = given.placed or (Home(Where.DEVICE if cuda else Where.HOST),) * len(plan.layout.chunks)
    stays = [cuda and chunk.shards > 1 and plan.request.zero != 3 for chunk in plan.layout.chunks]
    return tuple(replace(home, resident=stay) for home, stay in zip(homes, stays, strict=True))


def _candidates(plan: Plan, memory: Memory, given: Constraints) -> list[Homes]:
    """Ways to fill the device: as it is, and with a share of what the host holds updated on the device."""
    least = _least(plan, given)
    found = [_filled(plan, memory, least, given)]
    if given.placed is None and memory.beyond_host(found[0]):
        found.append(_filled(plan, memory, _relieved(plan, memory, least), given))
    if not plan.format.beside or given.placed is not None:
        return found
    for share in STREAMED_SHARES:
        # What is streamed is decided first, since its buffers take room; chunks that then fit whole, stay.
        spread = tuple(
            replace(home, where=Where.STREAMED) if chunk.trainable and _every(chunk.index, share) else home
            for chunk, home in plan.placed(least)
        )
        found.append(_filled(plan, memory, spread, given))
    return [homes for homes in found if memory.fits(homes)]


def _filled(plan: Plan, memory: Memory, homes: Homes, given: Constraints) -> Homes:
    """Keep more on the device, chunk by chunk, as long as it fits: first weights, then whole states."""
    for chunk in plan.layout.chunks:
        if plan.request.zero == 3 and chunk.shards > 1:
            continue
        grown = resident(homes, chunk.index)
        homes = grown if memory.fits(grown) else homes
    if given.placed is None:
        for index, home in enumerate(homes):
            grown = moved(homes, index, replace(home, where=Where.DEVICE))
            homes = grown if memory.fits(grown) else homes
    return homes


def _relieved(plan: Plan, memory: Memory, homes: Homes) -> Homes:
    """States on the device, as far as it has room, until the host has room for the others."""
    for index, home in enumerate(homes):
        if not memory.beyond_host(homes):
            break
        grown = moved(homes, index, replace(home, where=Where.DEVICE))
        homes = grown if memory.fits(grown) else homes
    return homes


def _landing_apart(plan: Plan, homes: Homes) -> Homes:
    """The same homes, but that no gradient on its way to the host waits for a place there."""
    shares = plan.format.shares_landing
    return tuple(replace(home, lands_apart=True) if shares(chunk, home) else home for chunk, home in plan.placed(homes))


def _every(index: int, share: float) -> bool:
    """Whether chunk `index` is one of the `share` of all that is picked, evenly spread."""
    return int((index + 1) * share) > int(index * share)
