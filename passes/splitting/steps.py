"""The steps of a schedule: when ranks do what, if each action took one step and began as soon as all it needs was done.

What a rank waits for in a step others do in earlier steps. So it never waits for a rank that waits for it, whatever
actions really take. Places are those among a rank's actions, with its turn as one of them.
"""

from math import inf

from ...runtime.isa.schedule import Action, Schedule


class Steps:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._ends = _ends(schedule)

    def ends(self, rank: int, place: int) -> int:
        """The step with which the action at a rank's place ends."""
        return self._ends[self.schedule.ranks[rank][place - (place > self.schedule.turn(rank))]]

    def begins(self, rank: int, place: int) -> int:
        """The step with which all is done that may come before the action at a rank's place."""
        return self.ends(rank, place) - 1

    def next_place(self, rank: int, first: float, step: int) -> float:
        """A rank's first place behind its turn, from `first` on, before which `step` has ended; infinity if there is
        none."""
        if first == inf:
            return inf
        places = range(max(self.schedule.turn(rank) + 1, int(first)), len(self.schedule.ranks[rank]) + 1)
        return next((place for place in places if self.begins(rank, place) >= step), inf)


def _ends(schedule: Schedule) -> dict[Action, int]:
    """The step with which each action ends, of those that can run."""
    reached, found, before = [0] * len(schedule.ranks), dict[Action, int](), -1
    while before < len(found):
        before = len(found)
        for rank, actions in enumerate(schedule.ranks):
            while reached[rank] < len(actions):
                place = reached[rank]
                needs = [*actions[max(place - 1, 0) : place], *schedule.needs(actions[place])]
                if any(need not in found for need in needs):
                    break
                found[actions[place]] = 1 + max((found[need] for need in needs), default=0)
                reached[rank] += 1
    return found
