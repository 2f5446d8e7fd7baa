"""Simulates a schedule: what each rank does when, how long it is idle, and what it holds for its backwards."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

from ....runtime.isa.errors import ArgumentError, wrong_argument
from ....runtime.isa.schedule import Action, Schedule, Weights
from .check import check_schedule, runnable


@dataclass(frozen=True)
class StageCosts:
    """What one stage takes for one microbatch.

    Fields:
        forward_s, input_s, weight_s: seconds of the forward and of the backward's two parts.
        backward_s: seconds of a whole backward, which may be less than its two parts take together.
        message_s: seconds to send its outputs to the next stage on another rank, or their gradients back; for the last
            stage, to send the loss to all ranks.
        activation_bytes: what it holds from its forward to the end of its backward.
    """

    forward_s: float
    input_s: float
    weight_s: float
    backward_s: float
    message_s: float = 0.0
    activation_bytes: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise wrong_argument(field.name, value, "0 or more")

    def seconds(self, action: Action) -> float:
        match action.kind:
            case "F":
                return self.forward_s
            case "I":
                return self.input_s
            case "W":
                return self.weight_s
        return self.backward_s

    def behind_s(self, action: Action, weights: Weights) -> float:
        """Seconds of an action behind what other stages wait for: a whole backward computes gradients of weights last
        where `weights` live on the hosts."""
        return min(self.weight_s, self.backward_s) if action.kind == "B" and weights == "host" else 0.0


class Event(NamedTuple):
    """An action that runs on a rank."""

    rank: int
    action: Action
    begin_s: float
    end_s: float


class Message(NamedTuple):
    """An action's result on its way to the action that reads it on another rank."""

    action: Action
    reader: Action
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Simulated:
    """One simulated step: events in the order in which they begin, and messages in the order in which they arrive."""

    schedule: Schedule
    costs: tuple[StageCosts, ...]
    events: tuple[Event, ...]
    messages: tuple[Message, ...]

    @cached_property
    def step_s(self) -> float:
        return max(event.end_s for event in self.events)

    @cached_property
    def idle_s(self) -> tuple[float, ...]:
        """Seconds of the step in which each rank has nothing to do."""
        busy_s: dict[int, float] = defaultdict(float)
        for event in self.events:
            busy_s[event.rank] += event.end_s - event.begin_s
        return tuple(self.step_s - busy_s[rank] for rank in range(len(self.schedule.ranks)))

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they are idle."""
        return sum(self.idle_s) / (self.step_s * len(self.idle_s)) if self.step_s else 0.0

    @cached_property
    def in_flight(self) -> tuple[int, ...]:
        """The most microbatches whose activations each rank holds at once, counted per stage and added up."""
        return self._peaks([1] * self.schedule.stages)

    @cached_property
    def activation_bytes(self) -> tuple[int, ...]:
        """The most bytes of activations that each rank holds."""
        return self._peaks([stage.activation_bytes for stage in self.costs])

    def _peaks(self, held: Sequence[int]) -> tuple[int, ...]:
        """The peak of what each rank holds, given `held` by stage. Where weights live on the hosts, activations wait
        there for the backward, and a rank holds only those of its current action."""
        if self.schedule.weights == "host":
            return tuple(max((held[action.stage] for action in actions), default=0) for actions in self.schedule.ranks)
        return tuple(_peak(actions, held) for actions in self.schedule.ranks)


def simulate(schedule: Schedule, costs: Sequence[StageCosts], *, loss_awaited: bool = False) -> Simulated:
    """Simulates one step; `costs` are by stage.

    A rank computes while it sends, but sends its messages to one other rank one after another. `loss_awaited`: at its
    turn each rank waits for the loss, as it must where the training loop reads it before it calls `backward()`.

    Raises:
        ArgumentError: the schedule cannot run, or there is not one cost per stage.
    """
    check_schedule(schedule)
    if len(costs) != schedule.stages:
        raise ArgumentError(
            f"costs of {len(costs)} stages were given for the schedule {schedule.name}, which has {schedule.stages}; "
            "expected one cost per stage"
        )
    clock, turns = _Clock(schedule, tuple(costs)), [schedule.turn(rank) for rank in range(len(schedule.ranks))]
    behind = {action for rank, turn in enumerate(turns) for action in schedule.ranks[rank][turn:]}
    order = list(runnable(schedule))
    clock.run((rank, action) for rank, action in order if action not in behind)
    if loss_awaited:
        clock.await_loss()
    clock.run((rank, action) for rank, action in order if action in behind)
    events = sorted(clock.events.values(), key=lambda event: (event.begin_s, event.rank, event.end_s))
    messages = sorted(clock.messages.values(), key=lambda message: (message.end_s, message.action))
    return Simulated(schedule, clock.costs, tuple(events), tuple(messages))


class _Clock:
    """The times at which each rank, and each link from one rank to another, is free."""

    def __init__(self, schedule: Schedule, costs: tuple[StageCosts, ...]) -> None:
        self.schedule, self.costs = schedule, costs
        self.free_s = [0.0] * len(schedule.ranks)
        self.way_free_s: dict[tuple[int, int], float] = defaultdict(float)
        self.events: dict[Action, Event] = {}
        self.messages: dict[Action, Message] = {}

    def run(self, order: Iterable[tuple[int, Action]]) -> None:
        """Runs the next actions of all ranks, given in an order in which each comes after all that it needs."""
        for rank, action in order:
            # Without a message, a result was made on this rank or left on a host, and is there already.
            there_s = [self.messages[need].end_s for need in self.schedule.needs(action) if need in self.messages]
            begin_s = max([self.free_s[rank], *there_s])
            end_s = self.free_s[rank] = begin_s + self.costs[action.stage].seconds(action)
            self.events[action] = Event(rank, action, begin_s, end_s)
            reader = self.schedule.reader(action)
            if reader is not None and self.schedule.runner(reader) != rank:
                self._send(action, reader, end_s - self.costs[action.stage].behind_s(action, self.schedule.weights))

    def await_loss(self) -> None:
        """Makes all ranks wait for the loss, which exists once the last stage's forwards are done."""
        last = self.schedule.stages - 1
        there_s = max(
            event.end_s for action, event in self.events.items() if (action.stage, action.kind) == (last, "F")
        )
        makers = {self.events[action].rank for action in self.events if (action.stage, action.kind) == (last, "F")}
        for rank, free_s in enumerate(self.free_s):
            way_s = self.costs[last].message_s if {rank} != makers else 0.0
            self.free_s[rank] = max(free_s, there_s + way_s)

    def _send(self, action: Action, reader: Action, after_s: float) -> None:
        way = self.schedule.runner(action), self.schedule.runner(reader)
        begin_s = max(after_s, self.way_free_s[way])
        end_s = begin_s + self.costs[min(action.stage, reader.stage)].message_s
        self.way_free_s[way] = end_s
        self.messages[action] = Message(action, reader, begin_s, end_s)


def _peak(actions: Sequence[Action], held: Sequence[int]) -> int:
    """The peak of what one rank holds: `held`, by stage, from each forward to the end of its backward."""
    now = most = 0
    for action in actions:
        if action.kind == "F":
            now += held[action.stage]
            most = max(most, now)
        elif action.kind in "BW":
            now -= held[action.stage]
    return most
