"""A schedule for weights that live on the hosts: ranks take turns on a few layers at a time, and own none of them.

A slot is a run of stages for all microbatches; all slots take about as long. The rank that is free first takes the next
slot, forwards first and then backwards. Backwards take longer, so their slots have fewer stages. While one rank still
works on the last microbatches of a slot, the next rank already works on the first ones of the next slot: with as many
microbatches as ranks nobody waits except at the beginning and the end. A backward sends what the next slot waits for
before it computes gradients of weights, which hides the message. The last stage runs each backward right after its
forward. Since it also makes the loss and takes longer than others, its microbatches are divided between several slots.

What remains idle is the ramps: each rank begins, and ends, a microbatch's time in a slot later than the one before it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from ....runtime.isa.errors import ArgumentError
from ....runtime.isa.schedule import ROUND_ROBIN, Action, Schedule
from .cuts import balanced
from .simulate import StageCosts, simulate

MOST_ACTIONS = 2**18
"""The most actions in all schedules that are tried, taken together."""

EVEN = StageCosts(forward_s=1.0, input_s=1.0, weight_s=1.0, backward_s=3.0)
"""Costs of stages that are cut to take equally long and recompute their activations in the backward."""

Slot = tuple[Action, ...]


@dataclass(frozen=True)
class Slots:
    """The numbers of slots: of forwards, of backwards, and of the last stage."""

    forwards: int
    backwards: int
    last: int


def round_robin(costs: Sequence[StageCosts], ranks: int, microbatches: int) -> Schedule:
    """The fastest schedule among several numbers of slots; `costs` are by stage.

    Raises ArgumentError where there are no stages, ranks or microbatches, or fewer slots than ranks.
    """
    for count, what in ((len(costs), "stages"), (ranks, "ranks"), (microbatches, "microbatches")):
        if count < 1:
            raise ArgumentError(f"a round-robin schedule of {count} {what}; expected 1 or more")
    most = 2 * (len(costs) - 1) + microbatches
    if ranks > most:
        raise ArgumentError(
            f"{len(costs)} stages with {microbatches} microbatches fill {most} slots, fewer than the {ranks} ranks; "
            f"expected {most} ranks or fewer"
        )
    found = list(dict.fromkeys(slots for slots in _numbers(costs, microbatches) if _total(slots) >= ranks))
    found = found[: max(1, MOST_ACTIONS // (2 * len(costs) * microbatches))]
    made = [_schedule(costs, slots, ranks, microbatches) for slots in found]
    return min(made, key=lambda schedule: simulate(schedule, costs).step_s)


def _total(slots: Slots) -> int:
    return slots.forwards + slots.backwards + slots.last


def _numbers(costs: Sequence[StageCosts], microbatches: int) -> Iterator[Slots]:
    """The numbers of slots to try. A backward slot has one, two or three stages, and a forward slot up to four times as
    many; last slots are about as many as take as long, or more. The largest possible numbers come last."""
    stages, backward_s = len(costs) - 1, sum(_backwards(costs))
    last_s = costs[-1].forward_s + costs[-1].backward_s
    for together, times, longer in product((1, 2, 3), (3, 4, 2, 1), (1.0, 1.5, 2.0, 2.5, 3.0)):
        backwards = -(-stages // together)
        slot_s = backward_s / backwards if backwards else 0.0
        last = round(longer * last_s / slot_s) if slot_s else 1
        yield Slots(-(-stages // (times * together)), backwards, min(max(last, 1), microbatches))
    yield Slots(stages, stages, microbatches)


def _forwards(costs: Sequence[StageCosts]) -> list[float]:
    return [cost.forward_s for cost in costs[:-1]]


def _backwards(costs: Sequence[StageCosts]) -> list[float]:
    return [cost.backward_s for cost in reversed(costs[:-1])]


def _schedule(costs: Sequence[StageCosts], slots: Slots, ranks: int, microbatches: int) -> Schedule:
    last, every = len(costs) - 1, range(microbatches)
    found = [tuple(Action(i, m, "F") for m in every for i in run) for run in _runs(_forwards(costs), slots.forwards)]
    for part in range(slots.last):
        taken = range(part, microbatches, slots.last)
        found.append(tuple(action for m in taken for action in (Action(last, m, "F"), Action(last, m, "B"))))
    for run in _runs(_backwards(costs), slots.backwards):
        found.append(tuple(Action(last - 1 - i, m, "B") for m in every for i in run))
    return Schedule(ROUND_ROBIN, len(costs), microbatches, _taken(found, costs, ranks, microbatches), "host")


def _taken(slots: list[Slot], costs: Sequence[StageCosts], ranks: int, microbatches: int) -> tuple[Slot, ...]:
    """The actions of each rank, where the one that is free first takes the next slot."""
    turns: list[list[Action]] = [[] for _ in range(ranks)]
    free_s, there_s = [0.0] * ranks, [0.0] * microbatches  # when each rank is free, and each microbatch can go on
    for slot in slots:
        rank = min(range(ranks), key=lambda rank: (free_s[rank], len(turns[rank])))
        turns[rank] += slot
        now_s = free_s[rank]
        for action in slot:
            cost = costs[action.stage]
            now_s = max(now_s, there_s[action.microbatch]) + cost.seconds(action)
            there_s[action.microbatch] = now_s
            if (action.stage, action.kind) == (slot[-1].stage, slot[-1].kind):  # it goes on to another rank
                sender = costs[action.stage - (action.kind == "B")]  # gradients are as large as what was sent forward
                there_s[action.microbatch] += sender.message_s - cost.behind_s(action, "host")
        free_s[rank] = now_s
    return tuple(map(tuple, turns))


def _runs(seconds: list[float], count: int) -> list[range]:
    """`count` runs of neighbours, cut so that the longest one takes as little as possible."""
    if not seconds:
        return []
    begins = balanced(seconds, count)
    return [range(begin, end) for begin, end in zip(begins, [*begins[1:], len(seconds)], strict=True)]
