"""Decide: from a captured program, a budget and a policy to a Plan.

Combinations of these choices are completed, and the one that fits with the shortest modelled step is taken:

1. keep all activations, or recompute every block or a quarter, half, three quarters of them, unless the user
   says which; around the best of all combinations, then, a few blocks more or fewer;
2. copy one chunk ahead, or, where nothing else fits, on demand;
3. under "auto", keep as many chunks on the device as the program's peak leaves room for: first the weights
   that compute, which saves two copies a step for two bytes each, then whole training states. With our own
   optimizer, a share of those that remain on the host may travel through the device to be updated there;
4. compute the loss over the vocabulary in pieces, unless the user says whether. That is tried where the logits
   are more than a tenth of the peak with them, or nothing fits with them. It computes the logits twice, so it
   is taken where the memory saved makes up for that, or nothing else fits.

Where nothing fits, the refusal names the smallest budget that would, and what takes the space.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ...passes.program.plan import MemoryEstimate, Placement, Plan, Residency
from ...passes.program.program import Program, type_of
from ...runtime.distributed.ranks import Ranks
from ...runtime.isa.errors import BudgetError
from ...runtime.isa.layout import STREAMED_GRADIENTS, ChunkLayout, longest_of_each_kind
from ...runtime.isa.units import format_bytes
from .communication import exchange_bytes
from .liveness import Liveness, analyse
from .rates import Rates
from .simulate import StepTime

LOGITS_SHARE = 0.1
"""The share of a plan's peak from which on it is worth a look whether logits are needed."""

SHARES = 4
"""Into so many shares blocks are divided for a first look at how many to recompute."""

STREAMED_SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
"""Shares of the chunks that may be updated on the device although their states lie on the host."""

Lower = Callable[[Plan], Program]
"""Runs the passes over a copy of the captured program, up to where instructions are in their final place."""


@dataclass(frozen=True)
class Limits:
    """What a plan must keep to, in bytes, and how fast the machine is.

    `device_bytes` is the budget (None: no limit), of which `reserve_bytes` are not the tensors': the driver's
    context and libraries. `host_bytes` is what the host may hold. `hole_share` is the share of a program's largest
    storage that the device's allocator may lose to holes too small for it: 0 where it cannot fragment, as the arena.
    """

    device_bytes: int | None
    reserve_bytes: int
    host_bytes: int
    rates: Rates
    hole_share: float = 0.0

    def allow(self, plan: Plan) -> bool:
        """Whether a plan fits both the device and the host."""
        return self.allow_on_device(plan) and plan.memory.host_bytes <= self.host_bytes

    def allow_on_device(self, plan: Plan) -> bool:
        return self.device_bytes is None or plan.peak_bytes <= self.device_bytes

    def agreed(self, ranks: Ranks) -> "Limits":
        """What every rank can keep to, so that all make the same plan; ranks on one machine share its memory."""
        found = ranks.gather((self.device_bytes, self.reserve_bytes, self.host_bytes))
        budgets, reserves, hosts = zip(*found, strict=True)
        device_bytes = min((budget for budget in budgets if budget is not None), default=None)
        host_bytes = min(hosts) // ranks.on_this_host
        return replace(self, device_bytes=device_bytes, reserve_bytes=max(reserves), host_bytes=host_bytes)


@dataclass(frozen=True)
class Wishes:
    """What the user has decided already: the policy, the blocks to recompute (None: the planner's choice),
    whether the loss is computed in pieces (likewise), and, for a further program of a model in training, the
    masters that are on the device for good, and those that are streamed through it. `logits_bytes` is what a
    fused loss would save, 0 where there is none."""

    placement: Placement
    recompute: tuple[str, ...] | None
    blocks: tuple[str, ...]
    masters: frozenset[int] | None = None
    streamed: frozenset[int] = frozenset()
    fuse_loss: bool | None = None
    logits_bytes: int = 0


@dataclass(frozen=True)
class Solution:
    """A plan, the program it was made for, and the modelled seconds of a step."""

    plan: Plan
    program: Program
    step_s: float


class HostBudgetError(BudgetError):
    """The training state does not fit the host."""


def solve(draft: Plan, lower: Lower, limits: Limits, wishes: Wishes) -> Solution:
    """Complete `draft` (layout, notes) so that it fits. Raises BudgetError where nothing does."""
    refused: list[Solution] = []
    for ahead in (1, 0):
        plan = replace(draft, prefetch=ahead)
        found: list[Solution] = []
        for recompute in [wishes.recompute] if wishes.recompute is not None else _shares(wishes.blocks):
            found += _with_loss(replace(plan, recompute=recompute), lower, limits, wishes)
        fitting = [solution for solution in found if limits.allow(solution.plan)]
        if fitting:
            best = min(fitting, key=lambda solution: solution.step_s)
            return best if wishes.recompute is not None else _refined(best, lower, limits, wishes)
        refused += found
    raise _refusal(refused, limits)


def _with_loss(plan: Plan, lower: Lower, limits: Limits, wishes: Wishes) -> list[Solution]:
    """A plan with the loss in pieces or whole, or with both where it is worth a look."""
    if wishes.logits_bytes and wishes.fuse_loss:
        return [_complete(replace(plan, fuse_loss=True), lower, limits, wishes)]
    whole = _complete(plan, lower, limits, wishes)
    if wishes.fuse_loss is None and _worth_a_look(whole, limits, wishes):
        return [whole, _complete(replace(plan, fuse_loss=True), lower, limits, wishes)]
    return [whole]


def _refined(best: Solution, lower: Lower, limits: Limits, wishes: Wishes) -> Solution:
    """Recompute some blocks more or fewer than the best of the shares, half as many each time, where that is faster."""
    apart = -(-len(wishes.blocks) // SHARES)
    while apart > 1:
        apart = -(-apart // 2)
        count = len(best.plan.recompute)
        for near in (count - apart, count + apart):
            if 0 <= near <= len(wishes.blocks):
                solution = _complete(replace(best.plan, recompute=wishes.blocks[:near]), lower, limits, wishes)
                if limits.allow(solution.plan):
                    best = min(best, solution, key=lambda found: found.step_s)
    return best


def _complete(plan: Plan, lower: Lower, limits: Limits, wishes: Wishes) -> Solution:
    """The program of a plan and the residency for it: as much as fits, or, where nothing does, the least."""
    program = lower(plan)
    memory, time = _Memory(plan, analyse(program), limits), StepTime.of(program, limits.rates)
    found = [_least(plan, wishes)]
    if wishes.placement == "auto" and memory.fits(found[0]):
        found = memory.candidates(found[0], wishes)
    timed = [(memory.beyond_host(residency), time.seconds(plan, residency), residency) for residency in found]
    _, step_s, residency = min(timed, key=lambda candidate: candidate[:2])
    return Solution(plan.with_residency(residency, memory.estimate(residency)), program, step_s)


def _shares(blocks: tuple[str, ...]) -> list[tuple[str, ...]]:
    """None of the blocks, some, or all. The first ones: what the last ones keep is freed first in the backward."""
    counts = (-(-len(blocks) * share // SHARES) for share in range(SHARES + 1))
    return [blocks[:count] for count in dict.fromkeys(counts)]


def _worth_a_look(unfused: Solution, limits: Limits, wishes: Wishes) -> bool:
    share = wishes.logits_bytes > LOGITS_SHARE * unfused.plan.peak_bytes
    return wishes.logits_bytes > 0 and (share or not limits.allow(unfused.plan))


def check(plan: Plan, lower: Lower, limits: Limits) -> Solution:
    """Accept a plan that was made by hand or before. Raises BudgetError where it does not fit."""
    program = lower(plan)
    memory = _Memory(plan, analyse(program), limits)
    plan = plan.with_residency(plan.residency, memory.estimate(plan.residency))
    solution = Solution(plan, program, StepTime.of(program, limits.rates).seconds(plan, plan.residency))
    if not limits.allow(plan):
        raise _refusal([solution], limits)
    return solution


def _least(plan: Plan, wishes: Wishes) -> Residency:
    """What the policy puts on the device whatever the room."""
    everything = frozenset(range(len(plan.layout.chunks))) if wishes.placement == "cuda" else frozenset()
    divided = frozenset(index for index in everything if plan.layout.chunks[index].shards > 1)
    masters = everything if wishes.masters is None else wishes.masters
    return Residency(masters, frozenset() if plan.zero == 3 else divided, wishes.streamed)


class _Memory:
    """Device bytes of one program under any residency."""

    def __init__(self, plan: Plan, liveness: Liveness, limits: Limits) -> None:
        self.plan = plan
        self.chunks = plan.layout.chunks
        self.liveness = liveness
        self.limits = limits
        self.values = liveness.total()

    def fits(self, residency: Residency) -> bool:
        return self.limits.device_bytes is None or self.peak(residency) <= self.limits.device_bytes

    def beyond_host(self, residency: Residency) -> int:
        """Bytes that the host lacks."""
        return max(0, _host_bytes(self.plan, residency) - self.limits.host_bytes)

    def peak(self, residency: Residency) -> int:
        tensors = self.static(residency) + int(self.timeline(residency).max(initial=0))
        return self.limits.reserve_bytes + self.holes() + tensors

    def holes(self) -> int:
        """Bytes that are free in the allocator, but not in one piece where the largest storage needs them so."""
        return int(self.limits.hole_share * self.liveness.largest_bytes)

    def static(self, residency: Residency) -> int:
        per_chunk = (_static_bytes(self.plan, chunk, residency) for chunk in self.chunks)
        return self.liveness.static_bytes + sum(per_chunk) + self.streaming(residency) + exchange_bytes(self.plan)

    def streaming(self, residency: Residency) -> int:
        """Bytes of training states on their way through the device, and of gradients that wait for theirs."""
        updates, kinds = self.plan.updates, longest_of_each_kind(self.chunks[i] for i in residency.streamed)
        if not kinds or updates is None:
            return 0
        waiting = max(map(_waiting_bytes, kinds)) if updates.at_once else 0
        return sum(map(updates.stream_bytes, kinds)) + waiting

    def timeline(self, residency: Residency) -> np.ndarray:
        return self.values + self.in_flight(residency)

    def in_flight(self, residency: Residency) -> np.ndarray:
        """Bytes of weights that are on the device only while they are used."""
        changes = np.zeros(self.liveness.length + 1, dtype=np.int64)
        for interval in self.liveness.fetches:
            chunk = self.chunks[interval.chunk]
            if not _stays(self.plan, chunk, residency):
                changes[interval.start] += chunk.compute_bytes
                changes[interval.end + 1] -= chunk.compute_bytes
        return changes.cumsum()[:-1]

    def candidates(self, least: Residency, wishes: Wishes) -> list[Residency]:
        """Ways to fill the device: as it is, and with a share of what the host holds updated on the device."""
        found = [self.fill(least, wishes)]
        if self.plan.updates is None or wishes.masters is not None:
            return found
        for share in STREAMED_SHARES:
            # What is streamed is decided first, since its buffers take room; chunks that then fit whole, stay.
            spread = {i for i, chunk in enumerate(self.chunks) if chunk.trainable and _every(i, share)}
            filled = self.fill(replace(least, streamed=frozenset(spread)), wishes)
            found.append(replace(filled, streamed=filled.streamed - filled.masters))
        return [residency for residency in found if self.fits(residency)]

    def fill(self, residency: Residency, wishes: Wishes) -> Residency:
        """Keep more on the device, chunk by chunk, as long as it fits."""
        everything = range(len(self.chunks))
        for index in everything:
            if self.plan.zero == 3 and self.chunks[index].shards > 1:
                continue
            grown = replace(residency, weights=residency.weights | {index})
            residency = grown if self.fits(grown) else residency
        if wishes.masters is None:
            for index in everything:
                grown = replace(residency, masters=residency.masters | {index})
                residency = grown if self.fits(grown) else residency
        return residency

    def estimate(self, residency: Residency) -> MemoryEstimate:
        timeline = self.timeline(residency)
        at = int(timeline.argmax()) if len(timeline) else 0
        masters = [chunk for chunk in self.chunks if chunk.index in residency.masters]
        static = self.static(residency)
        state = sum(self.plan.training_state.device_bytes(chunk) for chunk in masters)
        parts = {
            "training state": state,
            "resident weights": sum(map(partial(_resident_bytes, self.plan, residency), self.chunks)),
            "being exchanged": exchange_bytes(self.plan),
            "states on their way": self.streaming(residency),
            "inputs and buffers": self.liveness.static_bytes,
            "weights in flight": int(self.in_flight(residency)[at]) if len(timeline) else 0,
            "driver and libraries": self.limits.reserve_bytes,
            "holes in the allocator": self.holes(),
            **{name: int(array[at]) for name, array in self.liveness.values.items() if len(array)},
        }
        largest = sorted(((name, n) for name, n in parts.items() if n), key=lambda part: -part[1])
        return MemoryEstimate(
            static_bytes=static,
            peak_bytes=self.peak(residency),
            host_bytes=_host_bytes(self.plan, residency),
            reserve_bytes=self.limits.reserve_bytes,
            at_peak=tuple(largest),
        )


def _stays(plan: Plan, chunk: ChunkLayout, residency: Residency) -> bool:
    """Whether using the chunk takes no further memory: it is resident, or computes from its master."""
    computes = (plan.updates is not None or not chunk.casts) and chunk.shards == 1
    return chunk.index in residency.weights or (chunk.index in residency.masters and computes)


def _static_bytes(plan: Plan, chunk: ChunkLayout, residency: Residency) -> int:
    state = plan.training_state.device_bytes(chunk) if chunk.index in residency.masters else 0
    return state + _resident_bytes(plan, residency, chunk)


def _resident_bytes(plan: Plan, residency: Residency, chunk: ChunkLayout) -> int:
    """What the weights take that stay on the device, where they are not a part of the training state there."""
    if chunk.index not in residency.weights:
        return 0
    if chunk.index not in residency.masters or (chunk.casts and plan.updates is None):
        return chunk.compute_bytes
    return chunk.compute_bytes - chunk.shard_bytes


def _waiting_bytes(chunk: ChunkLayout) -> int:
    """Gradients that wait for states on their way: programs' own buffers, or copies of a shard, of the newest too."""
    if chunk.shards == 1:
        return STREAMED_GRADIENTS * chunk.compute_bytes
    return (STREAMED_GRADIENTS + 1) * chunk.shard_bytes


def _host_bytes(plan: Plan, residency: Residency) -> int:
    on_host = [chunk for chunk in plan.layout.chunks if chunk.index not in residency.masters]
    staging = 2 * max((chunk.compute_bytes for chunk in on_host if chunk.trainable), default=0)
    states = sum(plan.training_state.host_bytes(chunk, chunk.index in residency.streamed) for chunk in on_host)
    return states + (staging if plan.updates is None else 0)


def _every(index: int, share: float) -> bool:
    """Whether chunk `index` is one of the `share` of all that is picked, evenly spread."""
    return int((index + 1) * share) > int(index * share)


def _refusal(refused: list[Solution], limits: Limits) -> BudgetError:
    on_device = [solution.plan for solution in refused if limits.allow_on_device(solution.plan)]
    if on_device:
        return _host_refusal(min(plan.memory.host_bytes for plan in on_device), limits)
    nearest = min(refused, key=lambda solution: solution.plan.peak_bytes)
    best = nearest.plan
    inputs = ", ".join(f"{node.name} {type_of(node)}" for node in nearest.program.inputs("input").values())
    taking = ", ".join(f"{name} {format_bytes(n)}" for name, n in best.memory.at_peak[:4])
    advice = "" if best.placement != "cuda" else " placement='auto' or 'cpu' keeps the training state on the host."
    return BudgetError(
        f"a device budget of {limits.device_bytes:,} bytes ({format_bytes(limits.device_bytes or 0)}) is too small "
        f"for placement='{best.placement}'; the smallest that works for these inputs "
        f"({inputs}) is {best.peak_bytes:,} bytes "
        f"({format_bytes(best.peak_bytes)}), at whose peak are: {taking}.{advice} A smaller batch or sequence "
        "needs less; pass the batch you train on as example_inputs=",
        smallest_bytes=best.peak_bytes,
    )


def _host_refusal(host_bytes: int, limits: Limits) -> HostBudgetError:
    return HostBudgetError(
        f"the training state needs {format_bytes(host_bytes)} of host memory, {format_bytes(limits.host_bytes)} may be "
        "used; free host memory, raise host_budget, or raise device_budget so that more of it lies on the device",
        smallest_bytes=host_bytes,
    )
