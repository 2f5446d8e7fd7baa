"""Moves segments of a program into functions; equal segments share one function."""

import operator
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, count, takewhile
from typing import Any

from torch import fx

from .names import identifier
from .program import Note, Phase, Program, annotate, note, type_of
from .types import freeze

PHASES: dict[str, Phase] = {"F": "forward", "B": "backward", "I": "backward", "W": "backward"}
"""Phase by the first letter of an action. The backwards of pipelines and rounds begin before the turn, where a note's
`phase` is "forward"."""


def outline(program: Program, segments: Iterable["Segment"], *, fused: bool = False) -> None:
    """Make one function for each group of equal segments, and call it where each segment ends. Without `fused`, a
    segment without an equal stays inline; with it every segment becomes a function, compiled as a whole."""
    kinds: dict[Any, list[Segment]] = defaultdict(list)
    for segment in segments:
        kinds[segment.structure].append(segment)
    for equal in kinds.values():
        if len(equal) > 1 or fused:
            name = _name(program, equal)
            function = program.functions[name] = _body(program, name, equal[0])
            function.is_fused = fused
            for segment in equal:
                _call(program, name, segment)


@dataclass(frozen=True)
class Segment:
    """Operators in program order, none of them placed by the plan. Nodes between them must not read their results."""

    nodes: tuple[fx.Node, ...]

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The values it reads from outside, in order of first use."""
        inside = set(self.nodes)
        return tuple(dict.fromkeys(v for node in self.nodes for v in node.all_input_nodes if v not in inside))

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The values that are read outside of it."""
        inside = set(self.nodes)
        return tuple(node for node in self.nodes if any(user not in inside for user in node.users))

    @property
    def structure(self) -> Any:
        """A key that is equal for segments that can share a function: operators, arguments, types and results."""
        numbers: dict[fx.Node, int] = {node: i for i, node in enumerate((*self.inputs, *self.nodes))}
        rows = tuple(
            (node.target, freeze((node.args, node.kwargs), numbers.__getitem__), type_of(node), note(node).phase,
             note(node).recomputed)
            for node in self.nodes
        )  # fmt: skip
        return tuple(map(type_of, self.inputs)), rows, tuple(map(numbers.__getitem__, self.outputs))


def _body(program: Program, name: str, segment: Segment) -> Program:
    function = Program(name)
    function.set_results([])
    home = _home(segment)
    values: dict[fx.Node, fx.Node] = {}
    for value in segment.inputs:
        values[value] = function.add_input(value.name, type_of(value), "")
    for node in segment.nodes:
        values[node] = function.copy_node(node, values.__getitem__, before=function.output)
        annotate(values[node], module=_relative(note(node).module, home), action="")
    called = [node.target for node in segment.nodes if node.op == "call_module"]
    function.set_results([values[node] for node in segment.outputs])
    function.functions = {name: program.functions[name] for name in map(str, called)}
    within = {note(node).module for node in segment.nodes} & program.sources.keys()
    function.sources = {_relative(module, home): program.sources[module] for module in within}
    return function


def _call(program: Program, name: str, segment: Segment) -> None:
    first, last = segment.nodes[0], segment.nodes[-1]
    with program.graph.inserting_after(last):
        call = program.graph.create_node("call_module", name, segment.inputs, {}, name="results")
    types = tuple(type_of(node) for node in segment.outputs)
    origin, inside = note(first), set(segment.nodes)
    annotate(call, type=types, phase=origin.phase, module=_home(segment), recomputed=origin.recomputed,
             action=origin.action)  # fmt: skip
    elements: dict[fx.Node, fx.Node] = {}
    for i, node in reversed(list(enumerate(segment.outputs))):
        with program.graph.inserting_after(call):
            element = program.graph.create_node("call_function", operator.getitem, (call, i), {})
        element.meta.update(node.meta)
        annotate(element, module=_home(segment), recomputed=origin.recomputed)
        for user in [user for user in node.users if user not in inside]:
            user.replace_input_with(node, element)
        elements[element] = node
    for node in reversed(segment.nodes):
        program.graph.erase_node(node)
    for element, node in elements.items():
        element.name = node.name  # free now, and the name known from the texts of earlier passes


def _home(segment: Segment) -> str:
    """The innermost module that holds the whole segment."""
    modules = {note(node).module for node in segment.nodes}
    paths = [module.split(".") for module in modules if module]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared)


def _relative(module: str, home: str) -> str:
    return module.removeprefix(home).removeprefix(".")


def _name(program: Program, segments: list[Segment]) -> str:
    origin: Note = note(segments[0].nodes[0])
    parts = [part for part in _home(segments[0]).split(".") if part and not part.isdigit()]
    phase = "recompute" if origin.recomputed else PHASES.get(origin.action[:1], origin.phase)
    base = identifier("_".join([*parts[-1:], phase]) if parts else f"shared_{phase}")
    taken = {*program.functions, *(node.name for node in program.nodes)}
    return next(name for name in chain([base], (f"{base}_{i}" for i in count(2))) if name not in taken)
