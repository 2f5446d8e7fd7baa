"""The stopwatch, by a clock that stands still but for what runs."""

from collections import deque
from collections.abc import Callable

import pytest
import torch
from geminifx.compiler.rates.stopwatch import Load, seconds_behind, seconds_each


class Clock:
    """Launching takes no time; waiting takes as long as what was launched, `warm_up` runs of it twice as long."""

    def __init__(self, each_s: float, warm_up: int = 0) -> None:
        self.now_s, self.each_s, self.warm_up, self.launched, self.runs = 0.0, each_s, warm_up, 0, 0

    def run(self) -> None:
        self.launched += 1

    def wait(self) -> None:
        for _ in range(self.launched):
            self.runs += 1
            self.now_s += self.each_s * (2 if self.runs <= self.warm_up else 1)
        self.launched = 0

    def take(self) -> int:
        """How many runs have been launched since the last time."""
        launched, self.launched = self.launched, 0
        self.runs += launched
        return launched

    def now(self) -> float:
        return self.now_s


def each(clock: Clock, at_least_s: float) -> float:
    return seconds_each(clock.run, clock.wait, at_least_s, clock.now)


def test_bursts_double_for_half_of_the_time_and_windows_fill_as_much_again() -> None:
    clock = Clock(0.5)
    assert each(clock, 18.0) == 0.5
    assert clock.runs == 1 + (1 + 2 + 4 + 8 + 16) + 9 * 2, "a first one, bursts of 15.5 s, and windows of a second"


def test_what_is_slower_at_first_does_not_count() -> None:
    assert each(Clock(0.25, warm_up=8), 10.0) == 0.25
    assert each(Clock(0.25, warm_up=10**6), 10.0) == 0.5, "what stays slow does"


def test_a_few_windows_that_something_disturbs_do_not_count() -> None:
    """Where nearly half of them are slower, more are looked at."""
    slow = iter([1.0] * 16 + [1.0, 3.0, 3.0, 3.0, 1.0, 1.0, 3.0, 1.0, 1.0] + [1.0] * 200)
    clock = Clock(0.0)
    clock.wait = lambda: setattr(clock, "now_s", clock.now_s + sum(next(slow) for _ in range(clock.take())))  # type: ignore[method-assign]
    assert each(clock, 18.0) == 1.0
    assert clock.runs == 1 + (1 + 2 + 4 + 8) + 3 * 9


@pytest.mark.parametrize("choose, expected", [(min, 0.5), (max, 1.0)])
def test_something_else_than_the_median_may_be_chosen(choose: Callable[[list[float]], float], expected: float) -> None:
    clock = Clock(0.5, warm_up=1 + 15 + 4)
    assert seconds_each(clock.run, clock.wait, 18.0, clock.now, choose) == expected


def test_what_takes_longer_than_asked_runs_twice() -> None:
    clock = Clock(100.0)
    assert each(clock, 1.0) == 100.0 and clock.runs == 2


class Event:
    """Done when it is told so."""

    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done


class Engine:
    """Notes what was waited for."""

    def __init__(self) -> None:
        self.finished: list[Event] = []

    def finish(self, arrival: Event) -> None:
        self.finished.append(arrival)


def test_a_load_keeps_two_pieces_of_work_under_way() -> None:
    events, engine = deque[Event](), Engine()

    def launch() -> Event:
        events.append(Event())
        return events[-1]

    load = Load(launch, engine)  # type: ignore[arg-type]
    load.keep()
    load.keep()
    assert len(events) == 2
    events[0].done = True
    load.keep()
    assert len(events) == 3
    load.end()
    assert engine.finished == list(events)[1:]


def test_elsewhere_than_on_cuda_nothing_is_launched_ahead() -> None:
    runs: list[None] = []
    seconds_behind(lambda: pytest.fail("no load"), lambda: runs.append(None), 300, torch.device("cpu"))
    assert len(runs) == 3
