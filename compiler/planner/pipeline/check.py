"""Checks that a schedule can run: every stage works on every microbatch once, and no rank waits forever.

Ranks run their actions in order. A result that another rank needs is sent as soon as it exists, and the sender goes on;
the receiver waits for it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import dropwhile

from ....runtime.isa.errors import ArgumentError
from ....runtime.isa.schedule import Action, Schedule


@dataclass(frozen=True)
class Violation:
    """A mistake in a schedule: where it is, by rank and action, what was found there, and what is expected."""

    where: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.where}: {self.found}; expected {self.expected}"


def check_schedule(schedule: Schedule) -> None:
    """Raises ArgumentError for a schedule that cannot run."""
    violation = check(schedule)
    if violation is not None:
        raise ArgumentError(f"the schedule {schedule.name} cannot run: {violation}")


def check(schedule: Schedule) -> Violation | None:
    """The first violation in a schedule, if any."""
    return next(_violations(schedule), None)


def _violations(schedule: Schedule) -> Iterator[Violation]:
    """All violations. Each kind of check assumes that those before it found none."""
    yield from _out_of_range(schedule)
    yield from _apart(schedule)
    yield from _not_once(schedule)
    yield from _stuck(schedule)
    if schedule.weights == "host":
        yield from _parted(schedule)
        yield from _late(schedule)


def _out_of_range(schedule: Schedule) -> Iterator[Violation]:
    for count, what in ((schedule.stages, "stages"), (schedule.microbatches, "microbatches")):
        if count < 1:
            yield Violation(what, f"{count} of them", "1 or more")
    for rank, action in _each(schedule):
        if not 0 <= action.stage < schedule.stages:
            yield Violation(_at(rank, action), f"stage {action.stage}", f"stages 0 to {schedule.stages - 1}")
        if not 0 <= action.microbatch < schedule.microbatches:
            expected = f"microbatches 0 to {schedule.microbatches - 1}"
            yield Violation(_at(rank, action), f"microbatch {action.microbatch}", expected)


def _apart(schedule: Schedule) -> Iterator[Violation]:
    """Every rank has stages, and unless weights live on the hosts, all actions of a stage are on one rank."""
    for rank, actions in enumerate(schedule.ranks):
        if not actions:
            yield Violation(f"rank {rank}", "nothing to do", "a stage on every rank, or fewer ranks")
    home: dict[int, int] = {}
    for rank, action in _each(schedule) if schedule.weights == "rank" else ():
        if home.setdefault(action.stage, rank) != rank:
            found = f"stage {action.stage} is on rank {home[action.stage]} as well"
            yield Violation(_at(rank, action), found, "all actions of a stage on one rank, or weights=host")


def _not_once(schedule: Schedule) -> Iterator[Violation]:
    """Each stage runs one forward per microbatch, and one backward, either whole or in two parts."""
    kinds: dict[tuple[int, int], str] = defaultdict(str)
    for rank, action in _each(schedule):
        done = kinds[action.stage, action.microbatch]
        if action.kind in done:
            yield Violation(_at(rank, action), "already done", "each action once")
        kinds[action.stage, action.microbatch] = done + action.kind
        if "B" in done + action.kind and set("IW") & set(done + action.kind):
            yield Violation(
                _at(rank, action), "both a whole backward (B) and a part of it (I or W)", "either B, or I and W"
            )
    for stage in range(schedule.stages):
        for microbatch in range(schedule.microbatches):
            done = kinds[stage, microbatch]
            divided = "I" in done or "W" in done
            for kind in ("F", *("IW" if divided else "B")):
                if kind not in done:
                    found = f"no {kind}{stage}.{microbatch}"
                    yield Violation(_home(schedule, stage), found, "F once, and B, or I and W, once")


def _stuck(schedule: Schedule) -> Iterator[Violation]:
    """Ranks that wait for one another in a circle."""
    reached = Counter(rank for rank, _ in runnable(schedule))
    waiting = [rank for rank, actions in enumerate(schedule.ranks) if reached[rank] < len(actions)]
    if not waiting:
        return
    later = {action: rank for rank, actions in enumerate(schedule.ranks) for action in actions[reached[rank] :]}
    rank, waits = waiting[0], dict[int, str]()
    while rank not in waits:
        action = schedule.ranks[rank][reached[rank]]
        needed = next(need for need in schedule.needs(action) if need in later)
        waits[rank] = f"{action} waits for {needed} of rank {later[needed]}"
        rank = later[needed]
    # Start at the rank that came up twice: no rank in the circle waits for those before it.
    circle = dropwhile(lambda waiter: waiter != rank, waits)
    found = ", ".join(waits[waiter] for waiter in circle)
    action = schedule.ranks[rank][reached[rank]]
    yield Violation(_at(rank, action), found, "every action after those that it waits for")


def _parted(schedule: Schedule) -> Iterator[Violation]:
    """Two parts of one backward on different ranks, which would have to send each other everything it computes."""
    for rank, action in _each(schedule):
        before = schedule.runner(schedule.needs(action)[0]) if action.kind == "W" else rank
        if before != rank:
            yield Violation(_at(rank, action), f"its first part is on rank {before}", "both parts on one rank")


def _late(schedule: Schedule) -> Iterator[Violation]:
    """A forward after its rank's turn, where the loss of all microbatches is handed out."""
    for rank, actions in enumerate(schedule.ranks):
        turn, last = schedule.turn(rank), schedule.last_forward(rank)
        if last >= turn:
            found = f"it comes after {actions[turn]}, which completes the rank's gradients of a stage"
            yield Violation(_at(rank, actions[last]), found, "all forwards of a rank before its last backwards")


def _each(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    return ((rank, action) for rank, actions in enumerate(schedule.ranks) for action in actions)


def _at(rank: int, action: Action) -> str:
    return f"rank {rank} at {action}"


def _home(schedule: Schedule, stage: int) -> str:
    return next((f"rank {rank}" for rank, action in _each(schedule) if action.stage == stage), "no rank")


def runnable(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    """All actions with their ranks, in an order in which they can run. Ends early where no rank can go on."""
    reached, done = [0] * len(schedule.ranks), set[Action]()
    waiters: dict[Action, list[int]] = defaultdict(list)
    ready = list(range(len(schedule.ranks)))
    while ready:
        rank = ready.pop()
        while reached[rank] < len(schedule.ranks[rank]):
            action = schedule.ranks[rank][reached[rank]]
            missing = next((need for need in schedule.needs(action) if need not in done), None)
            if missing is not None:
                waiters[missing].append(rank)
                break
            yield rank, action
            done.add(action)
            reached[rank] += 1
            ready += waiters.pop(action, [])
