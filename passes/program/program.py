"""The Program: a typed torch.fx graph of one whole training step, and the only module that annotates nodes.

A program's inputs and results have *roles* instead of positions::

    parameter:<name>  buffer:<name>  input:<i>  number:<i>  constant:<name>  tangent:<i>  expected:<i>    inputs
    output:<i>  gradient:<name or input:i>  mutation:<buffer>                        results

In a pipeline, and for a batch that runs in rounds, the backward begins before the turn, with the tangent `expected`
instead of the one that the caller sends.

Every node carries one frozen `Note`. New calls go through `Program.emit`, which infers their type; a program is
therefore well typed at every moment, and no pass ever computes a shape.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import fx

from ...runtime.isa.instructions import MICROBATCH, PLACED
from ...runtime.isa.torch_private import set_arguments
from .names import identifier
from .types import TensorType, Type, infer

Phase = Literal["forward", "backward"]
ROUND_SWEEPS = ("F.", "B.")
"""Prefixes of the actions of rounds: F.1 is the second round's forward."""
_KEY = "geminifx"


@dataclass(frozen=True, slots=True)
class Note:
    """What is known about a node besides its operator and arguments.

    Fields:
        type: the type of the node's value.
        phase: "forward" or "backward"; for a node with an action, the side of the turn that it is on.
        module: fully qualified name of the model's module that the node comes from, "" if unknown.
        role: an input's role, "" on all other nodes.
        tied: the parameter that an input shares its storage with, or "".
        chunk: index of the chunk that the value lives in, or None.
        recomputed: whether the node is a copy of a forward node in the backward.
        action: the entry of a pipeline's schedule that the node belongs to, such as "B1.0", or of a round, such as
            "B.0".
        placement: how a sharded program's value lies on the mesh, such as "row=S0 col=S1".
    """

    type: Type = None
    phase: Phase = "forward"
    module: str = ""
    role: str = ""
    tied: str = ""
    chunk: int | None = None
    recomputed: bool = False
    action: str = ""
    placement: str = ""

    @property
    def sweep(self) -> str:
        """The forward or backward pass that the node belongs to. Chunks are fetched and released once per sweep. A
        sweep is one side of the turn or, for a batch that runs in rounds, the forward or backward of one round."""
        return self.action if self.action.startswith(ROUND_SWEEPS) else self.phase


def note(node: fx.Node) -> Note:
    return node.meta[_KEY]


def is_noted(node: fx.Node) -> bool:
    return _KEY in node.meta


def annotate(node: fx.Node, **changes: Any) -> None:
    """Replace fields of a node's note."""
    node.meta[_KEY] = replace(node.meta.get(_KEY, Note()), **changes)


def type_of(node: fx.Node) -> Type:
    return note(node).type


def tensor_type(node: fx.Node) -> TensorType:
    """The type of a node that must be a tensor."""
    type = type_of(node)
    assert isinstance(type, TensorType)
    return type


@dataclass
class Program:
    """One captured step or, inside `functions`, one segment of it that several places may call.

    `sources` maps the name of a module to the "file.py:line" of its forward. It serves error messages only and is not
    part of the program's text. A function that `is_fused` is compiled to as few kernels as possible.
    """

    name: str
    graph: fx.Graph = field(default_factory=fx.Graph)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    functions: dict[str, "Program"] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    is_fused: bool = False

    # -- reading -------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[fx.Node]:
        """A snapshot of the nodes in program order: safe to iterate over while rewriting."""
        return list(self.graph.nodes)

    @property
    def computes(self) -> list[fx.Node]:
        """All nodes that are neither inputs nor the output."""
        return [node for node in self.graph.nodes if node.op in ("call_function", "call_module")]

    @property
    def placeholders(self) -> list[fx.Node]:
        return self.graph.find_nodes(op="placeholder")

    def calls(self, target: Callable[..., Any]) -> list[fx.Node]:
        return self.graph.find_nodes(op="call_function", target=target)

    def inputs(self, kind: str) -> dict[str, fx.Node]:
        """The inputs of one kind, by role without its prefix."""
        prefix = kind + ":"
        named = ((note(node).role, node) for node in self.placeholders)
        return {role.removeprefix(prefix): node for role, node in named if role.startswith(prefix)}

    @property
    def output(self) -> fx.Node:
        return next(iter(self.graph.find_nodes(op="output")))

    @property
    def results(self) -> dict[str, fx.Node]:
        """Everything the program returns, by role."""
        return self.output.args[0]

    def results_of(self, kind: str) -> dict[str, fx.Node]:
        """The results of one kind, by role without its prefix."""
        prefix = kind + ":"
        return {r.removeprefix(prefix): n for r, n in self.results.items() if r.startswith(prefix)}

    def positions(self) -> dict[fx.Node, int]:
        """The index of each node in program order."""
        return {node: i for i, node in enumerate(self.graph.nodes)}

    # -- writing -------------------------------------------------------------------------------------------

    def emit(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None,
             *, before: fx.Node, like: Note | None = None, name: str | None = None) -> fx.Node:  # fmt: skip
        """Create a call node in front of `before`. Its provenance comes from `like`, by default the note of
        `before`."""
        kwargs = kwargs or {}
        origin = like if like is not None else note(before)
        schema = getattr(target, "_schema", None)
        name = name or (schema.name.split("::")[-1] if schema is not None else target.__name__)
        with self.graph.inserting_before(before):
            node = self.graph.create_node("call_function", target, name=identifier(name))
        set_arguments(node, args, kwargs)
        if target in PLACED:
            origin = Note(phase=origin.phase, action=origin.action)
        node.meta[_KEY] = replace(origin, type=infer(target, args, kwargs, type_of), role="", chunk=None,
                                  placement="")  # fmt: skip
        return node

    def copy_node(self, node: fx.Node, value: Callable[[fx.Node], fx.Node], before: fx.Node) -> fx.Node:
        """Emit `node` once more in front of `before`, with its node arguments mapped by `value`."""
        if node.op == "call_module":
            return self.repeat_node(node, value, before)
        args = fx.map_arg(node.args, value)
        kwargs = fx.map_arg(node.kwargs, value)
        copy = self.emit(node.target, args, kwargs, before=before, like=note(node), name=node.name)
        annotate(copy, placement=note(node).placement)
        return copy

    def repeat_node(self, node: fx.Node, value: Callable[[fx.Node], fx.Node], before: fx.Node) -> fx.Node:
        """Copy `node` in front of `before`, reading values of the same types, so that its note stays as it is."""
        with self.graph.inserting_before(before):
            return _copied(self.graph, node, value)

    def view_again(self, view: fx.Node, views: set[fx.Node], copies: dict[fx.Node, fx.Node],
                   before: fx.Node) -> fx.Node:  # fmt: skip
        """Emit `view` once more before a reader in a later sweep, and return the copy. `views` are the earlier sweep's
        views that may be emitted again; `copies` maps nodes to their replacements so far, and is extended. A node in
        neither is read as it is."""
        if view not in copies and view in views:
            value = lambda node: self.view_again(node, views, copies, before)  # noqa: E731
            copies[view] = self.copy_node(view, value, before=before)
            reader = note(before)
            annotate(copies[view], phase=reader.phase, action=reader.action, recomputed=reader.recomputed)
        return copies.get(view, view)

    def add_input(self, name: str, type: Type, role: str, tied: str = "") -> fx.Node:
        """Append an input; inputs precede all other nodes."""
        last = self.placeholders
        point = self.graph.inserting_after(last[-1]) if last else self.graph.inserting_before(self._first())
        with point:
            node = self.graph.create_node("placeholder", name, (), {}, name=identifier(name))
        node.target = node.name
        node.meta[_KEY] = Note(type=type, role=role, tied=tied)
        return node

    def _first(self) -> fx.Node:
        return next(iter(self.graph.nodes), self.graph._root)

    def set_results(self, results: Any) -> None:
        """Create or replace the output node."""
        found = self.graph.find_nodes(op="output")
        if found:
            next(iter(found)).args = (results,)
            return
        node = self.graph.create_node("output", "output", (results,), {}, name="output")
        node.meta[_KEY] = Note()

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Redirect every reader of `old` to `new`, and erase `old`."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def eliminate_dead_code(self) -> None:
        """Erase nodes that nobody reads, random operators included; operators that write stay."""
        for node in reversed(self.graph.nodes):  # torch's own checks the whole graph first, which takes longer
            if not node.users and not writes(node):
                self.graph.erase_node(node)

    def copy(self) -> "Program":
        """An independent copy. The constants are shared, because nothing ever writes to them."""
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            values[node] = copy = _copied(graph, node, values.__getitem__)
            if copy.name != node.name:
                copy.name = node.name
        functions = {name: function.copy() for name, function in self.functions.items()}
        return Program(self.name, graph, dict(self.constants), functions, dict(self.sources), self.is_fused)


def _copied(graph: fx.Graph, node: fx.Node, value: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """A copy of `node` in `graph`, with its node arguments mapped by `value`, which may insert nodes before the copy.
    The arguments are set after the node is created: `create_node` searches its arguments for symbolic sizes, which
    takes longer than everything else here."""
    args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value) if node.kwargs else {}
    copy = graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)
    set_arguments(copy, args, kwargs)
    copy.meta.update(node.meta)
    return copy


def writes(node: fx.Node) -> bool:
    """Whether a node must stay even if nobody reads it: inputs, results, calls of functions, and operators that
    write."""
    if node.op in ("placeholder", "output", "call_module"):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def overwritten_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """The argument nodes whose storage a node writes to."""
    schema = getattr(node.target, "_schema", None)
    for i, argument in enumerate(() if schema is None else schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            yield from (item for item in (value if isinstance(value, list | tuple) else [value])
                        if isinstance(item, fx.Node))  # fmt: skip


def belongs(node: fx.Node, block: str) -> bool:
    """Whether a node comes from `block` or from a module inside it."""
    module = note(node).module
    return module == block or module.startswith(block + ".")


def microbatches_of(batch: fx.Node) -> list[fx.Node]:
    """The microbatches that the program reads from a whole-batch input; empty if it does not split it."""
    return [user for user in batch.users if user.target is MICROBATCH]


def is_random(node: fx.Node) -> bool:
    """Whether a node draws from the random generator. A dropout with a rate of 0 does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    rates = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False))
    rates.update(node.kwargs)
    return not any(rates.get(name) == 0.0 for name in ("dropout", "dropout_p", "p") if name in rates)


UNADMITTED_VIEWS = frozenset({
    torch.ops.aten._unsafe_view.default, torch.ops.aten.unsafe_chunk.default, torch.ops.aten.unsafe_split.Tensor,
    torch.ops.aten.unsafe_split_with_sizes.default,
})  # fmt: skip
"""Operators whose results are views of their first argument although their schemas do not say so."""


def aliased_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """The argument nodes whose storage a node's result may share."""
    if node.op != "call_function":
        return
    if not hasattr(node.target, "_schema"):  # operator.getitem: an element of the tuple it reads
        yield from node.all_input_nodes
    elif _is_conjugate_of_real(node):
        yield node.args[0]
    else:
        values = (node.args[i] for i in _aliased_positions(node.target) if i < len(node.args))
        yield from (value for value in values if isinstance(value, fx.Node))


@cache
def _aliased_positions(target: Any) -> tuple[int, ...]:
    """The positions of the arguments whose storage an operator's results may share."""
    schema = target._schema
    if target in UNADMITTED_VIEWS:
        return (0,)
    if not any(result.alias_info for result in schema.returns):
        return ()
    return tuple(i for i, argument in enumerate(schema.arguments) if argument.alias_info is not None)


def _is_conjugate_of_real(node: fx.Node) -> bool:
    """Whether a node conjugates a real tensor, which returns the argument itself."""
    conjugates = node.target is torch.ops.aten.conj_physical.default
    return conjugates and not tensor_type(node.args[0]).dtype.is_complex
