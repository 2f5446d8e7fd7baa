"""A schedule for weights that live on the hosts: ranks take turns in working on a few layers, wherever these were last.

A slot is a run of stages that take about as long as any other slot's, for all microbatches; ranks take slots one after
the other, forwards first and then backwards. A backward takes longer, so that its slots have fewer stages. While a rank
still works on the last microbatches of a slot the next one has begun with the first of them: where there are as many
microbatches as ranks nobody waits but in the beginning and at the end. The last stage's backward follows its forward at
once, and as it makes the loss and takes longer than others, its microbatches are divided between several slots.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from ....runtime.isa.errors import ArgumentError
from ....runtime.isa.schedule import ROUND_ROBIN, Action, Schedule
from .cuts import balanced
from .simulate import StageCosts, simulate

MOST_ACTIONS = 2**18
"""Of all schedules that are tried."""

EVEN = StageCosts(forward_s=1.0, input_s=1.0, weight_s=1.0, backward_s=3.0)
"""Of stages that were cut to take equally long, and compute their activations again in the backward."""

Slot = tuple[Action, ...]


@dataclass(frozen=True)
class Slots:
    """How many there are of forwards, of backwards, and of the last stage."""

    forwards: int
    backwards: int
    last: int


def round_robin(costs: Sequence[StageCosts], ranks: int, microbatches: int) -> Schedule:
    """The fastest of those with several numbers of slots; `costs` are by stage.

    Raises ArgumentError for no stages, ranks or microbatches, and where there is not a slot for every rank.
    """
    for count, what in ((len(costs), "stages"), (ranks, "ranks"), (microbatches, "microbatches")):
        if count < 1:
            raise ArgumentError(f"a round-robin schedule of {count} {what}; expected 1 or more")
    most = 2 * (len(costs) - 1) + microbatches
    if ranks > most:
        raise ArgumentError(
            f"{len(costs)} stages with {microbatches} microbatches make {most} slots, fewer than there are ranks, "
            f"{ranks}; expected {most} ranks or fewer"
        )
    found = list(dict.fromkeys(slots for slots in _numbers(costs, microbatches) if _total(slots) >= ranks))
    found = found[: max(1, MOST_ACTIONS // (2 * len(costs) * microbatches))]
    made = [_schedule(costs, slots, ranks, microbatches) for slots in found]
    return min(made, key=lambda schedule: simulate(schedule, costs).step_s)


def _total(slots: Slots) -> int:
    return slots.forwards + slots.backwards + slots.last


def _numbers(costs: Sequence[StageCosts], microbatches: int) -> Iterator[Slots]:
    """Of backwards a slot for each stage, or for two or three; of forwards about as many as take as long each;
    and as many as there can be of all."""
    stages = len(costs) - 1
    forward_s, backward_s = (sum(seconds) for seconds in (_forwards(costs), _backwards(costs)))
    last_s = costs[-1].forward_s + costs[-1].backward_s
    for together, more, longer in product((1, 2, 3), (1.0, 1.25, 1.5), (1.0, 1.5, 2.0)):
        backwards = -(-stages // together)
        slot_s = backward_s / backwards if backwards else 0.0
        forwards = round(more * forward_s / slot_s) if slot_s else stages
        last = round(longer * last_s / slot_s) if slot_s else 1
        yield Slots(min(max(forwards, min(stages, 1)), stages), backwards, min(max(last, 1), microbatches))
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
    turns = tuple(tuple(action for slot in found[rank::ranks] for action in slot) for rank in range(ranks))
    return Schedule(ROUND_ROBIN, len(costs), microbatches, turns, "host")


def _runs(seconds: list[float], count: int) -> list[range]:
    """So many runs of neighbours, of which the longest takes as little as can be."""
    if not seconds:
        return []
    begins = balanced(seconds, count)
    return [range(begin, end) for begin, end in zip(begins, [*begins[1:], len(seconds)], strict=True)]
