"""Make functions of the compute between chunk instructions; equal segments share one.

    before                                       after
    w0 = geminifx.wait(c0, 0)                    def layers_forward(x, w): ...
    q = geminifx.view(w0, 0, [4, 4])
    y = aten.mm.default(x, q)                    w0 = geminifx.wait(c0, 0)
    geminifx.release(w0, 0)                      box = [x, w0]
    w1 = geminifx.wait(c1, 1)                    results = layers_forward(box)
    q_1 = geminifx.view(w1, 0, [4, 4])           y = results[0]
    y_1 = aten.mm.default(y, q_1)                geminifx.release(w0, 0)
    geminifx.release(w1, 1)                      ... the same with w1 ...

A model of many equal layers then reads as one function per kind of segment and a short main program.
Operators keep their order, and a value inside a function dies where it died before.
"""

import operator
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain, count, takewhile
from typing import Any

from torch import fx

from ..runtime.isa.instructions import PLACED, TURN
from .program.manager import graph_pass
from .program.names import identifier
from .program.plan import Plan
from .program.program import Note, Phase, Program, annotate, note, type_of
from .program.types import freeze
from .program.verify import offloaded, overlapped, released

SHORTEST = 4
"""Segments with fewer operators stay where they are: a call would be harder to read than they are."""

PHASES: dict[str, Phase] = {"F": "forward", "B": "backward", "I": "backward", "W": "backward"}
"""Of the actions of a pipeline, whose backward begins in front of the turn."""


@graph_pass(requires=(released,), breaks=(overlapped, offloaded))  # what starts in one function may end in another
def cluster(program: Program, plan: Plan) -> None:
    kinds: dict[Any, list[_Segment]] = defaultdict(list)
    for segment in _segments(program):
        kinds[segment.structure].append(segment)
    for segments in kinds.values():
        if len(segments) > 1:
            name = _function_name(program, segments)
            program.functions[name] = _function(program, name, segments[0])
            for segment in segments:
                _call(program, name, segment)


@dataclass(frozen=True)
class _Segment:
    """Consecutive operators that the plan does not place."""

    nodes: tuple[fx.Node, ...]

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """What it reads from outside, in order of first use."""
        inside = set(self.nodes)
        return tuple(dict.fromkeys(v for node in self.nodes for v in node.all_input_nodes if v not in inside))

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """What is read outside of it."""
        inside = set(self.nodes)
        return tuple(node for node in self.nodes if any(user not in inside for user in node.users))

    @property
    def structure(self) -> Any:
        """Equal for segments that one function can serve: operators, arguments, types and results."""
        numbers: dict[fx.Node, int] = {node: i for i, node in enumerate((*self.inputs, *self.nodes))}
        rows = tuple(
            (node.target, freeze((node.args, node.kwargs), numbers.__getitem__), type_of(node), note(node).phase,
             note(node).recomputed)
            for node in self.nodes
        )  # fmt: skip
        return tuple(map(type_of, self.inputs)), rows, tuple(map(numbers.__getitem__, self.outputs))


def _segments(program: Program) -> list[_Segment]:
    found, current = list[_Segment](), list[fx.Node]()
    for node in [*program.computes, None]:
        inside = node is not None and node.op == "call_function" and node.target not in PLACED and not _at_turn(node)
        if current and not (inside and note(node).action == note(current[-1]).action):
            found.append(_Segment(tuple(current)))
            current = []
        if inside:
            current.append(node)
    return [segment for segment in found if len(segment.nodes) >= SHORTEST]


def _at_turn(node: fx.Node) -> bool:
    return node.target is TURN or (node.target is operator.getitem and node.args[0].target is TURN)


def _function(program: Program, name: str, segment: _Segment) -> Program:
    function = Program(name)
    function.set_results([])
    home = _home(segment)
    values: dict[fx.Node, fx.Node] = {}
    for value in segment.inputs:
        values[value] = function.add_input(value.name, type_of(value), "")
    for node in segment.nodes:
        values[node] = function.copy_node(node, values.__getitem__, before=function.output)
        annotate(values[node], module=_relative(note(node).module, home), action="")
    function.set_results([values[node] for node in segment.outputs])
    within = {note(node).module for node in segment.nodes} & program.sources.keys()
    function.sources = {_relative(module, home): program.sources[module] for module in within}
    return function


def _call(program: Program, name: str, segment: _Segment) -> None:
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
        element.name = node.name  # free now, and the name that readers know from the earlier texts


def _home(segment: _Segment) -> str:
    """The module that most of the segment belongs to: the longest path that holds all of it."""
    paths = [note(node).module.split(".") for node in segment.nodes if note(node).module]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared)


def _relative(module: str, home: str) -> str:
    return module.removeprefix(home).removeprefix(".")


def _function_name(program: Program, segments: list[_Segment]) -> str:
    origin: Note = note(segments[0].nodes[0])
    parts = [part for part in _home(segments[0]).split(".") if part and not part.isdigit()]
    phase = "recompute" if origin.recomputed else PHASES.get(origin.action[:1], origin.phase)
    base = identifier("_".join([*parts[-1:], phase]) if parts else f"shared_{phase}")
    taken = {*program.functions, *(node.name for node in program.nodes)}
    return next(name for name in chain([base], (f"{base}_{i}" for i in count(2))) if name not in taken)
