"""Calls of a model, the programs that run them, and the caches that map one to the other.

Nothing here makes decisions or changes a model's setup.
"""

import hashlib
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, TypeVar
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...passes.program.manager import Record
from ...passes.program.plan import Plan
from ...passes.program.program import Program, tensor_type
from ...passes.program.text import print_program
from ...runtime.distributed.point_to_point import Channel
from ...runtime.distributed.ranks import Exchanges
from ...runtime.executor import Executor, Outlets
from ...runtime.isa.instructions import AVERAGE, BROADCAST, FETCH, REDUCE, SEND, START_RECEIVE
from ...runtime.isa.schedule import Action
from ..capture.arguments import leaf_key
from ..capture.guards import Guard, forwards_of
from ..capture.numbers import can_be_input
from ..capture.refusals import hooks_of
from ..capture.trace import Captured
from .members import Members

Key = tuple[Hashable, ...]
_V = TypeVar("_V")


@dataclass(frozen=True)
class Compiled:
    """One program, for one mode and set of input shapes. `flat` is the form whose memory was planned, `absent` the
    positions of outputs that it does not compute, and `outlets` describes the others to autograd."""

    captured: Captured
    plan: Plan
    flat: Program
    program: Program
    records: tuple[Record, ...]
    executor: Executor
    absent: frozenset[int]
    outlets: Outlets

    @property
    def trains(self) -> bool:
        return self.captured.trains

    @cached_property
    def written(self) -> tuple[str, ...]:
        """The names of the buffers that it writes to."""
        return tuple(self.captured.program.results_of("mutation"))

    @property
    def expected(self) -> torch.dtype:
        """The dtype of the gradient that a backward starts from if it does not wait for the caller's."""
        return next(tensor_type(node).dtype for node in self.program.inputs("expected").values())


@dataclass(frozen=True)
class Call:
    """A call of the model, or of its submodule `entry` alone.

    Fields:
        entry: the submodule's name; "" for the model.
        args, kwargs: the arguments.
        backward: whether a backward is wanted.
        state: the model's modes in words, for messages, with a digest of which parameters are trained.
        setting: the part of `key` that does not come from the arguments.
        leaves: the arguments' pytree leaves.
        inputs: positions of numbers among the leaves that are inputs of programs.
    """

    entry: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    backward: bool
    state: str
    setting: Key
    leaves: list[Any]
    inputs: frozenset[int] = frozenset()

    @cached_property
    def key(self) -> Key:
        """The key of the programs for this call; guards tell which of those fits the model as it is."""
        return *self.setting, *(leaf_key(leaf, i in self.inputs) for i, leaf in enumerate(self.leaves))

    @cached_property
    def kind(self) -> Key:
        """The key shared by all calls that differ only in numbers."""
        return self.taking(frozenset(self.numbers)).key

    @cached_property
    def numbers(self) -> dict[int, float]:
        """The numbers among the arguments, by their positions among the leaves."""
        return {i: leaf for i, leaf in enumerate(self.leaves) if can_be_input(leaf)}

    def taking(self, inputs: frozenset[int]) -> "Call":
        """The call, with the numbers at these positions as inputs."""
        return self if inputs == self.inputs else replace(self, inputs=inputs)

    def __str__(self) -> str:
        """Describes the call; ranks that share a batch must agree on it."""
        leaves = pytree.tree_leaves_with_path((self.args, self.kwargs))
        told = (f"{pytree.keystr(path[1:])} {_leaf_text(leaf)}" for path, leaf in leaves)
        kind = "a training step" if self.backward else "an evaluation"
        return f"{kind} of {self.entry or 'the model'} ({', '.join(told)}; {self.state})"

    @classmethod
    def of(cls, members: Members, entry: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        """The call in the model's present modes. Raises ArgumentError for an argument that no program can take."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        trained = tuple(parameter.requires_grad for parameter in members.parameters.values())
        asked = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)
        backward = torch.is_grad_enabled() and (asked or any(trained))
        modules = members.modules.values()
        modes = tuple(module.training for module in modules)
        own = hooks_of(modules), forwards_of(modules)
        which = f"{sum(trained)} parameters trained ({crc32(bytes(trained)):08x})"
        state = f"{sum(modes)} of {len(modes)} modules in training, {which}"
        setting = entry, backward, trained, modes, members.identities, own, spec
        return cls(entry, args, kwargs, backward, state, setting, leaves)


def exchanged(program: Program, plan: Plan) -> Exchanges:
    """Digests of everything that decides what a process exchanges with others when it runs a program.

    Ranks that do not share a batch must agree only on the chunks and the order in which they are exchanged, since their
    batches may have any shape. Ranks that share a batch must agree on the whole program: nearly every instruction
    exchanges sharded tensors.
    """
    layout, mesh = plan.layout, plan.mesh
    divided = {chunk.index for chunk in layout.chunks if chunk.shards > 1}
    order = [
        (str(node.target), node.args[0 if node.target is FETCH else 1 :])
        for node in program.computes
        if node.target in (REDUCE, AVERAGE, BROADCAST) or (node.target is FETCH and node.args[0] in divided)
    ]
    return Exchanges(
        inside=_digest(print_program(program)) if mesh.shares_batches else "",
        between=_digest(f"{state_alike(plan)} {chunks_alike(plan)} {order}") if order and mesh.data_size > 1 else "",
        common=f"{state_alike(plan)} {plan.stages} {plan.schedule}" if mesh.pipeline_axes else "",
    )


def messages(program: Program) -> tuple[dict[int, str], dict[int, str]]:
    """The messages that a process sends to, and receives from, other pipeline ranks: dtypes and shapes, by rank."""
    sent, received = defaultdict[int, str](str), defaultdict[int, str](str)
    for node in program.computes:
        if node.target is SEND:
            type = tensor_type(node.args[0])
            sent[node.args[1]] += f"{type.dtype}{list(type.shape)} "
        elif node.target is START_RECEIVE:
            received[node.args[3]] += f"{node.args[2]}{list(node.args[0])} "
    return dict(sent), dict(received)


def channels(plan: Plan, programs: Iterable[Compiled]) -> set[Channel]:
    """The pairs of pipeline ranks, (sender, receiver), that may exchange something. What a forward sends one way comes
    back in a backward, the rank with the loss tells all others, and ranks that share a parameter exchange its
    gradients."""
    if plan.schedule is None:
        return set()
    schedule, ranks = plan.schedule, range(len(plan.schedule.ranks))
    teller = schedule.runner(Action(schedule.stages - 1, schedule.microbatches - 1, "F"))
    pairs = {(one, other) for each in plan.layout.owners.values() for one in each for other in each}
    pairs |= {(teller, rank) for rank in ranks}
    for compiled in programs:
        pairs |= {(plan.line, other) for told in messages(compiled.flat) for other in told}
    return {channel for one, other in pairs for channel in ((one, other), (other, one)) if one != other}


def state_alike(plan: Plan) -> str:
    """A digest of the parts of the training state that all ranks must agree on before any program runs."""
    return _digest(f"{plan.request.zero} {plan.request.reduce_dtype} {plan.layout.owned}")


def chunks_alike(plan: Plan) -> str:
    """A digest of the chunks, which ranks with the same layers must agree on, too."""
    return _digest(str(plan.layout))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _leaf_text(leaf: Any) -> str:
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)


class Recaptures:
    """Warns if the model is captured over and over, and names the argument or the model's attribute that causes it."""

    MOST = 4

    def __init__(self) -> None:
        self._values: dict[tuple[Key, str], set[Hashable]] = defaultdict(set)  # by kind of call and argument path
        self._changes: Counter[str] = Counter()

    def note(self, call: Call, changed: str) -> None:
        """Records a call that is captured; `changed` is the label of the attribute that has changed; "" if none has."""
        for i, (path, leaf) in enumerate(pytree.tree_leaves_with_path((call.args, call.kwargs))):
            values = self._values[call.kind, pytree.keystr(path[1:])]
            is_constant = not isinstance(leaf, Tensor) and i not in call.inputs
            if is_constant and len(values) < self.MOST and leaf_key(leaf) not in values:
                values.add(leaf_key(leaf))
                if len(values) == self.MOST:
                    self._warn(f"the argument {pytree.keystr(path[1:])} came with a {self.MOST}th value, {leaf!r}")
        self._changes[changed] += 1
        if changed and self._changes[changed] == self.MOST - 1:
            self._warn(f"{changed} of the model has a {self.MOST}th value")

    @staticmethod
    def _warn(what: str) -> None:
        warnings.warn(
            f"{what}, and the model is captured again for each; pass a number that changes from step to step as a "
            "zero-dimensional tensor (an argument or a buffer), or as an argument that is used only in arithmetic",
            stacklevel=2,
        )


class Recent(Generic[_V]):
    """A least-recently-used cache of at most `most` values."""

    most = 64

    def __init__(self) -> None:
        self._values: OrderedDict[Key, _V] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._values

    def __getitem__(self, key: Key) -> _V:
        self._values.move_to_end(key)
        return self._values[key]

    def get(self, key: Key) -> _V | None:
        if key not in self:
            return None
        return self[key]

    def __setitem__(self, key: Key, value: _V) -> None:
        self._values[key] = value
        if len(self._values) > self.most:
            self._values.popitem(last=False)

    def __len__(self) -> int:
        return len(self._values)

    def items(self) -> list[tuple[Key, _V]]:
        """All items, the least recently used first."""
        return list(self._values.items())


class GuardedKeys:
    """Maps the key of a call to the states of the model that its programs were captured in, the most recent first."""

    most = 8

    def __init__(self) -> None:
        self._states: Recent[list[tuple[int, tuple[Guard, ...], list[nn.Module]]]] = Recent()
        self._count = 0

    def key(self, call: Key) -> Key:
        """The key of the program for a call with the model in its present state: the call's key, and a number that is
        None if there is no such program yet."""
        found = (number for number, guards, _ in self._states.get(call) or () if all(guard.holds() for guard in guards))
        return call, next(found, None)

    def add(self, call: Key, guards: tuple[Guard, ...], modules: Iterable[nn.Module]) -> None:
        """Records what a capture for this call has read. `modules` are kept alive, because their ids are part of the
        call's key."""
        if self.key(call)[1] is None:
            self._count += 1
            self._states[call] = [(self._count, guards, list(modules)), *(self._states.get(call) or ())][: self.most]

    def changed(self, call: Key) -> str:
        """What has changed since the last capture for this call; "" if nothing has, or there was none."""
        last = (guard for _, guards, _ in (self._states.get(call) or ())[:1] for guard in guards)
        return next((guard.label for guard in last if not guard.holds()), "")
