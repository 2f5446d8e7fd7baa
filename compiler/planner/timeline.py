"""A program as the clock reads it: the instructions that something other than the device carries out, or that wait for
it, and what the device computes in front of each.

One thread launches the device's operators and may run ahead of the device, never behind: an operator runs once it is
launched and all operators before it are done. Instructions take that thread's time, too.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property, reduce
from typing import NamedTuple

from torch import fx

from ...passes.program.plan import Plan
from ...passes.program.program import Program, tensor_type, type_of
from ...passes.program.types import freeze
from ...runtime.isa import instructions as isa
from ..rates.rates import Rates
from .communication import traffic_of
from .costs import is_free, kernel_s, launch_weight, operators


class Carrier(Enum):
    """What moves bytes while the device computes."""

    UP = "bus up"
    DOWN = "bus down"
    NETWORK = "network"


@dataclass(frozen=True)
class Transfer:
    """Bytes that an instruction starts to move, in `count` pieces. What waits for them names the same number."""

    number: int
    carrier: Carrier
    num_bytes: int
    count: int = 1


Subject = int | Transfer
"""A chunk's index, a transfer to start, or the number of the transfer to wait for."""


class Stretch(NamedTuple):
    """Operators that run one after the other: the seconds for which the device works, those that the launching thread
    takes, and those until both are done where the device waits for nothing but launches."""

    device_s: float = 0.0
    launching_s: float = 0.0
    done_s: float = 0.0

    @classmethod
    def of(cls, device_s: float) -> "Stretch":
        """A stretch that is launched ahead of the device."""
        return cls(device_s, 0.0, device_s)

    def then(self, other: "Stretch") -> "Stretch":
        """Both, one behind the other."""
        done_s = max(self.done_s + other.device_s, self.launching_s + other.done_s)
        return Stretch(self.device_s + other.device_s, self.launching_s + other.launching_s, done_s)

    def slowed(self, factor: float) -> "Stretch":
        return Stretch(*(seconds * factor for seconds in self))


Instruction = tuple[Stretch, fx.node.Target, Subject]
"""What is computed since the instruction before, the instruction's operator, and what it is about."""

Timed = tuple[float, fx.node.Target, Subject]
"""Seconds of compute before an instruction, its operator, and what it is about."""


AWAITED = frozenset({isa.AVERAGE, isa.BROADCAST})
"""Exchanges that end where they begin."""

ABOUT_CHUNKS = frozenset({isa.FETCH, isa.WAIT, isa.REDUCE, isa.ACCUMULATE_GRAD})
"""Instructions about a chunk; all others are about transfers."""


@dataclass(frozen=True)
class Work:
    """An operator that the device runs for `device_s`; its launch takes as long as `launch_weight` usual ones."""

    device_s: float
    launch_weight: int


Event = Work | tuple[fx.node.Target, Subject]
"""What the clock reads of one operator: the device's work, or an instruction."""


@dataclass(frozen=True)
class Timeline:
    """A program's instructions, and what is computed behind the last one. It takes `compute_s` if it waits for nothing
    but launches. Of that the device works for `busy_s`, and the launching thread for `launching_s`."""

    instructions: list[Instruction]
    rest: Stretch

    @classmethod
    def at(cls, timed: Iterable[Timed], compute_s: float) -> "Timeline":
        """A program of `compute_s` in which the device works throughout and nothing waits for launches."""
        made, passed_s = list[Instruction](), 0.0
        for at_s, target, about in timed:
            made.append((Stretch.of(at_s - passed_s), target, about))
            passed_s = at_s
        return cls(made, Stretch.of(compute_s - passed_s))

    @cached_property
    def timed(self) -> list[Timed]:
        """The instructions, with the seconds before each where the program waits for nothing but launches."""
        made, whole = list[Timed](), Stretch()
        for stretch, target, about in self.instructions:
            whole = whole.then(stretch)
            made.append((whole.done_s, target, about))
        return made

    @cached_property
    def _whole(self) -> Stretch:
        return reduce(Stretch.then, (stretch for stretch, *_ in self.instructions), Stretch()).then(self.rest)

    @property
    def compute_s(self) -> float:
        return self._whole.done_s

    @property
    def busy_s(self) -> float:
        return self._whole.device_s

    @property
    def launching_s(self) -> float:
        return self._whole.launching_s

    def slowed(self, factor: float) -> "Timeline":
        """The same program where the device and the launching thread are slower by `factor`."""
        instructions = [(stretch.slowed(factor), target, about) for stretch, target, about in self.instructions]
        return Timeline(instructions, self.rest.slowed(factor))


@dataclass
class _Reading:
    """The plan of the program that is being read, and the numbers of the transfers started so far."""

    plan: Plan
    begun: dict[fx.Node, int] = field(default_factory=dict)

    def begin(self, node: fx.Node, carrier: Carrier, num_bytes: int, count: int = 1) -> Transfer:
        number = self.begun.setdefault(node, len(self.begun))
        return Transfer(number, carrier, num_bytes, count)


def _chunk(node: fx.Node, _: _Reading) -> Subject | None:
    return int(node.args[isa.CHUNK_NUMBER[node.target]])


def _exchange(node: fx.Node, reading: _Reading) -> Subject | None:
    traffic = traffic_of(node, reading.plan)
    if traffic is None:
        return None
    return reading.begin(node, Carrier.NETWORK, traffic.received_bytes, traffic.count)


def _copy(carrier: Carrier) -> Callable[[fx.Node, _Reading], Subject | None]:
    return lambda node, reading: reading.begin(node, carrier, tensor_type(node).num_bytes)


def _begun(argument: int) -> Callable[[fx.Node, _Reading], Subject | None]:
    return lambda node, reading: reading.begun.get(node.args[argument])


FOLLOWED: dict[object, Callable[[fx.Node, _Reading], Subject | None]] = {
    **dict.fromkeys(ABOUT_CHUNKS, _chunk),
    isa.START_ALL_GATHER: _exchange,
    isa.START_REDUCE_SCATTER: _exchange,
    isa.START_ALL_REDUCE: _exchange,
    isa.FINISH_COLLECTIVE: _begun(0),
    isa.OFFLOAD: _copy(Carrier.DOWN),
    isa.DEPART: _begun(1),
    isa.RELOAD: _copy(Carrier.UP),
    isa.ARRIVE: _begun(0),
    isa.AVERAGE: _exchange,
    isa.BROADCAST: _exchange,
    isa.START_RECEIVE: _exchange,
    isa.FINISH_RECEIVE: _begun(0),
}
"""What an instruction is about, by operator; None where it does nothing in this plan."""


def timeline(program: Program, plan: Plan, rates: Rates) -> Timeline:
    return laid_out((event for _, event in events(program, plan, rates)), rates.launch_s)


def events(program: Program, plan: Plan, rates: Rates) -> Iterator[tuple[fx.Node, Event]]:
    """What the clock reads of each operator, in order; operators that neither take time nor wait are left out."""
    reading, known = _Reading(plan), dict[object, Work]()
    for node in operators(program):
        about = FOLLOWED[node.target](node, reading) if node.target in FOLLOWED else None
        if about is not None:
            yield node, (node.target, about)
        elif not is_free(node):
            kind = node.target, freeze((node.args, node.kwargs), type_of)
            if kind not in known:
                known[kind] = Work(kernel_s(node, rates), launch_weight(node.target))
            yield node, known[kind]


def laid_out(found: Iterable[Event], launch_s: float) -> Timeline:
    """The timeline of events; a usual operator takes `launch_s` of the launching thread."""
    instructions, device_s, launching_s, done_s = list[Instruction](), 0.0, 0.0, 0.0
    for event in found:
        if isinstance(event, Work):
            launching_s += launch_s * event.launch_weight
            device_s += event.device_s
            done_s = max(done_s, launching_s) + event.device_s
        else:
            launching_s += launch_s * launch_weight(event[0])
            instructions.append((Stretch(device_s, launching_s, max(done_s, launching_s)), *event))
            device_s, launching_s, done_s = 0.0, 0.0, 0.0
    return Timeline(instructions, Stretch(device_s, launching_s, max(done_s, launching_s)))
