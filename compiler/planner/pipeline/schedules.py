"""The available schedules, by name: what each rank of a pipeline does, in order.

    gpipe         all forwards, then all backwards: holds the activations of all microbatches
    1f1b          alternates forwards and backwards as soon as it can: holds at most as many microbatches as ranks
    interleaved   1f1b with several stages per rank: a smaller bubble, somewhat more activations
    zb1p          backwards in two parts: a rank computes weight gradients while others wait for input gradients
    zbv           zb1p with two stages per rank, the first counted from one end and the second from the other

In each of them a stage computes gradients in the order of the microbatches, so their sum is the same as without stages.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ....runtime.isa.errors import ArgumentError
from ....runtime.isa.schedule import Action, Schedule
from ....runtime.isa.torch_private import pipeline_table
from .check import check_schedule


@dataclass(frozen=True)
class Shape:
    """The numbers of ranks, of stages on each, and of microbatches."""

    ranks: int
    microbatches: int
    stages_per_rank: int = 1

    @property
    def stages(self) -> int:
        return self.ranks * self.stages_per_rank


Ranks = tuple[tuple[Action, ...], ...]


@dataclass(frozen=True)
class Kind:
    """A kind of schedule: what its ranks do, and why a shape does not fit and what would ("": it fits)."""

    ranks: Callable[[Shape], Ranks]
    misfit: Callable[[Shape], str]


def make_schedule(name: str, shape: Shape) -> Schedule:
    """Makes a schedule by name. Raises ArgumentError for an unknown name or for a shape that does not fit."""
    if name not in KINDS:
        raise ArgumentError(f"there is no schedule {name!r}; expected one of {', '.join(KINDS)}")
    for count, of in (
        (shape.ranks, "ranks"), (shape.microbatches, "microbatches"), (shape.stages_per_rank, "stages per rank")
    ):  # fmt: skip
        if count < 1:
            raise ArgumentError(f"a schedule of {count} {of}; expected 1 or more")
    why_not = misfit(name, shape)
    if why_not:
        raise ArgumentError(f"the schedule {name} does not fit: {why_not}")
    schedule = Schedule(name, shape.stages, shape.microbatches, KINDS[name].ranks(shape))
    check_schedule(schedule)  # torch's tables differ between its versions
    return schedule


def misfit(name: str, shape: Shape) -> str:
    """Why a known schedule does not fit a shape; "" where it does."""
    return KINDS[name].misfit(shape)


def _gpipe(shape: Shape) -> Ranks:
    """Each rank runs all microbatches through one of its stages before the next."""
    microbatches = range(shape.microbatches)

    def actions(stages: range) -> tuple[Action, ...]:
        forwards = (Action(stage, microbatch, "F") for stage in stages for microbatch in microbatches)
        backwards = (Action(stage, microbatch, "B") for stage in reversed(stages) for microbatch in microbatches)
        return *forwards, *backwards

    return tuple(actions(range(rank, shape.stages, shape.ranks)) for rank in range(shape.ranks))


def _1f1b(shape: Shape) -> Ranks:
    """Our own, since the last rank of torch's leaves out its first microbatch."""

    def actions(rank: int) -> tuple[Action, ...]:
        forwards = [Action(rank, microbatch, "F") for microbatch in range(shape.microbatches)]
        backwards = [Action(rank, microbatch, "B") for microbatch in range(shape.microbatches)]
        ahead = min(shape.ranks - 1 - rank, shape.microbatches)
        alternating = [action for pair in zip(forwards[ahead:], backwards, strict=False) for action in pair]
        return *forwards[:ahead], *alternating, *backwards[shape.microbatches - ahead :]

    return tuple(actions(rank) for rank in range(shape.ranks))


def _of_torch(name: str) -> Callable[[Shape], Ranks]:
    def ranks(shape: Shape) -> Ranks:
        table = pipeline_table(name, shape.ranks, shape.microbatches, shape.stages_per_rank)
        return tuple(tuple(Action(*action) for action in actions) for actions in table)

    return ranks


def _any(shape: Shape) -> str:
    return ""


def _one_stage(shape: Shape) -> str:
    several = f"it has 1 stage per rank, not {shape.stages_per_rank}; interleaved, zb1p and gpipe have several"
    return several if shape.stages_per_rank > 1 else ""


def _two_stages(shape: Shape) -> str:
    found = f"it has 2 stages per rank, not {shape.stages_per_rank}; zb1p has any number"
    return found if shape.stages_per_rank != 2 else ""


def _several_stages_in_rounds(shape: Shape) -> str:
    single = "it has 2 stages per rank or more, not 1; 1f1b has one"
    return single if shape.stages_per_rank == 1 else _in_rounds(shape)


def _in_rounds(shape: Shape) -> str:
    """Misfits of schedules that work in rounds. In each round a rank runs its stages for a group of microbatches; all
    groups have the same size, the number of ranks or somewhat more."""
    if shape.microbatches < shape.ranks:
        return f"{shape.microbatches} microbatches are too few for {shape.ranks} ranks; expected {shape.ranks} or more"
    if _divides(shape.ranks, shape.microbatches):
        return ""
    fewer = next(count for count in range(shape.microbatches, 0, -1) if _divides(shape.ranks, count))
    more = next(count for count in range(shape.microbatches, 2 * shape.microbatches) if _divides(shape.ranks, count))
    rounds = shape.microbatches // shape.ranks
    return (
        f"{shape.microbatches} microbatches on {shape.ranks} ranks make {rounds} rounds of unequal size; "
        f"expected {fewer} or {more}, or any multiple of {shape.ranks}"
    )


def _divides(ranks: int, microbatches: int) -> bool:
    """Whether all rounds have equally many microbatches."""
    return microbatches % (microbatches // ranks) == 0


KINDS = {
    "gpipe": Kind(_gpipe, _any),
    "1f1b": Kind(_1f1b, _one_stage),
    "interleaved": Kind(_of_torch("Interleaved1F1B"), _several_stages_in_rounds),
    "zb1p": Kind(_of_torch("InterleavedZeroBubble"), _in_rounds),
    "zbv": Kind(_of_torch("ZBVZeroBubble"), _two_stages),
}
