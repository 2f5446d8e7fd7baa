"""What must hold of a program: structure, types, and the facts that passes establish.

A fact is a check `(program, plan) -> violation or None`. A pass names the facts it requires and gives. After each pass
the manager checks every fact given so far, so that the pass that breaks one is the pass that is blamed.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...runtime.isa.errors import VerificationError
from ...runtime.isa.instructions import (
    ARRIVE,
    COLLECTIVES,
    DEPART,
    FETCH,
    FINISH_COLLECTIVE,
    FINISH_RECEIVE,
    FINISH_SEND,
    OFFLOAD,
    RECEIVE,
    REDUCE,
    RELEASE,
    RELOAD,
    SEND,
    START_ALL_REDUCE,
    START_RECEIVE,
    STARTS,
    TURN,
    WAIT,
)
from ...runtime.isa.mesh import of_gradient, parse_placements, placements_text
from .chunk_places import gradient_chains, misplaced
from .names import is_identifier
from .plan import Plan
from .program import Program, aliased_inputs, annotate, is_noted, note, overwritten_inputs, type_of
from .text import _context, call_text, target_text
from .types import Type, infer, type_text
from .violation import Violation


@dataclass(frozen=True)
class Fact:
    """A named property of programs."""

    name: str
    check: Callable[[Program, Plan], Violation | None]

    def __str__(self) -> str:
        return self.name


def fact(check: Callable[[Program, Plan], Violation | None]) -> Fact:
    return Fact(check.__name__, check)


Known = dict[fx.Node, tuple[Any, ...]]
"""For each node that passed the type check, the operator, arguments and type it had then. These objects are replaced
and never mutated: a node that still has the same ones is well typed, as long as its arguments keep their types."""


def verify(program: Program, plan: Plan, facts: tuple[Fact, ...], pass_name: str, known: Known | None = None) -> None:
    """Check structure, types and facts. Raises VerificationError naming the pass and the node.

    `known` carries results over from earlier calls on this program, so that only nodes changed since are inferred
    again.
    """
    known = {} if known is None else known
    well_typed = lambda program, plan: _well_typed(program, known)  # noqa: E731
    checks = {_well_formed.__name__: _well_formed, _well_typed.__name__: well_typed}
    for rule, check in (*checks.items(), *((fact.name, fact.check) for fact in facts)):
        offence = check(program, plan)
        if offence is not None:
            raise VerificationError(_message(program, offence, pass_name, rule))
    for function in program.functions.values():
        verify(function, plan, (), pass_name)


def _message(program: Program, offence: Violation, pass_name: str, rule: str) -> str:
    nodes = program.nodes
    at = nodes.index(offence.node)
    window = [f"    {'>' if n is offence.node else ' '} {_line(n)}" for n in nodes[max(0, at - 1) : at + 2]]
    return "\n".join([
        f"after pass '{pass_name}', {program.name!r} breaks '{rule.strip('_')}' at {offence.node.name!r}"
        f" ({_origin(program, offence.node)})",
        f"    found:    {offence.found}",
        f"    expected: {offence.expected}",
        *window,
        f"    The pass '{pass_name}' is at fault; compile(..., dump=DIR) keeps the program before and after it.",
    ])  # fmt: skip


def _origin(program: Program, node: fx.Node) -> str:
    source = program.sources.get(note(node).module)
    return f"{_context(note(node))}, {source}" if source else _context(note(node))


def _line(node: fx.Node) -> str:
    text = call_text(node) if node.op == "call_function" else node.op
    return f"{node.name}: {type_text(type_of(node))} = {text}"[:160]


def _well_formed(program: Program, plan: Plan) -> Violation | None:
    seen: set[fx.Node] = set()
    for name in (program.name, *program.functions):  # the text is executed: an invalid name would become code
        if not is_identifier(name):
            return Violation(program.output, f"a function called {name!r}", "a name by program.names.identifier")
    for node in program.graph.nodes:
        if not is_identifier(node.name) or node.name in program.functions:
            if not is_noted(node):
                annotate(node)
            return Violation(node, f"called {node.name!r}", "a name by program.names.identifier, of no function")
        if not is_noted(node):
            annotate(node)  # an empty note lets the message show the node
            return Violation(node, "made without a type", "nodes made by Program.emit, which infers it")
        for value in node.all_input_nodes:
            if value not in seen:
                return Violation(node, f"reads {value.name}, which is made later", "a value made earlier")
        seen.add(node)
    try:
        program.graph.lint()
    except RuntimeError as error:
        return Violation(program.output, str(error).splitlines()[0], "a graph that torch.fx accepts")
    return None


def _well_typed(program: Program, known: Known) -> Violation | None:
    retyped: set[fx.Node] = set()
    for node in program.graph.nodes:
        stated, before = type_of(node), known.get(node)
        found = (node.target, node.args, node.kwargs, stated)
        is_as_before = before is not None and all(map(operator.is_, before, found))
        if before is None or before[-1] is not stated:
            retyped.add(node)
        if is_as_before and node.op != "call_module" and retyped.isdisjoint(node.all_input_nodes):
            continue
        try:
            inferred = _inferred(program, node)
        except Exception as error:
            return Violation(node, f"{type(error).__name__}: {error}"[:300], "arguments the operator takes")
        if stated != inferred:
            return Violation(node, f"annotated {type_text(stated)}", f"{type_text(inferred)}, as inferred")
        known[node] = found
    return None


def _inferred(program: Program, node: fx.Node) -> Type:
    """The type inferred for a node. Inputs and results are not inferred; theirs is the annotated one."""
    if node.op == "call_module":
        return tuple(type_of(v) for v in program.functions[str(node.target)].results)
    if node.op != "call_function":
        return type_of(node)
    if node.target is operator.getitem:
        source = type_of(node.args[0])
        assert isinstance(source, tuple)
        return source[node.args[1]]
    return infer(node.target, node.args, node.kwargs, type_of)


# -- facts -------------------------------------------------------------------------------------------------

NO_OPS = (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.lift_fresh_copy.default)
"""Operators that return their argument or a copy of it, which is the same as long as nothing overwrites values."""


@fact
def canonical(program: Program, plan: Plan) -> Violation | None:
    """There are no no-ops, and each parameter has one input."""
    for node in program.graph.nodes:
        if node.target in NO_OPS:
            return Violation(node, f"the no-op {node.target}", "its argument read directly")
        if node.op == "placeholder" and note(node).tied:
            return Violation(node, f"a second input for {note(node).tied}", "one input per shared parameter")
    return None


@fact
def sharded(program: Program, plan: Plan) -> Violation | None:
    """Gradients lie on the mesh like their parameters, as partial sums over the replicas; all other results are
    replicated."""
    parameters, axes = program.inputs("parameter"), plan.mesh.tensor_axes
    for role, node in program.results.items():
        kind, _, name = role.partition(":")
        expected, found = "R", note(node).placement or "R"
        if kind == "gradient" and name in parameters:
            parameter = parse_placements(note(parameters[name]).placement or "R", axes)
            expected = placements_text(of_gradient(parameter, axes), axes)
        if axes and found != expected:
            return Violation(node, f"{role}, which lies on {found}", f"the placement {expected}")
    return None


@fact
def turned(program: Program, plan: Plan) -> Violation | None:
    """All forward nodes precede the turn, and all backward nodes follow it. Without a turn there are no backward
    nodes."""
    turns = program.calls(TURN)
    if len(turns) > 1:
        return Violation(turns[1], "a second turn", "one turn from forward to backward")
    past = not turns
    for node in program.computes:
        if node.target is TURN:
            past = True
        elif note(node).phase == "backward" and (not past or not turns):
            return Violation(node, "a backward node before the turn", "forward nodes only")
        elif note(node).phase == "forward" and past and turns:
            return Violation(node, "a forward node after the turn", "backward nodes only")
    return None


@fact
def overlapped(program: Program, plan: Plan) -> Violation | None:
    """Every collective is started and waited for once, in one phase. Only its finish reads the buffer that it fills or
    sums in."""
    for node in program.computes:
        if node.target in COLLECTIVES:
            return Violation(node, "a collective in one piece", "its start, and geminifx.finish_collective")
        if node.target is FINISH_COLLECTIVE and getattr(node.args[0], "target", None) not in STARTS:
            return Violation(node, f"waits for {node.args[0]}", "the start of a collective")
        offence = _collective(node) if node.target in STARTS else None
        if offence is not None:
            return offence
    return None


def _collective(start: fx.Node) -> Violation | None:
    part, overwrites = start.args[0], start.target is START_ALL_REDUCE
    finish, *others = start.users or [None]
    if finish is None or others or finish.target is not FINISH_COLLECTIVE:
        return Violation(start, f"read by {', '.join(user.name for user in start.users) or 'nobody'}",
                       "one reader, its finish")  # fmt: skip
    if note(finish).phase != note(start).phase:
        return Violation(finish, f"waits for {start.name} of the other phase", "the finish before the turn")
    kept, sent = list(finish.args[1:]), [] if overwrites else [part]
    if kept != sent:
        text = lambda values: f"keeps {', '.join(map(str, values)) or 'nothing'}"  # noqa: E731
        return Violation(finish, text(kept), f"{text(sent)}: what is sent, unless it is what is filled")
    if overwrites and (part.op == "placeholder" or len(part.users) > 1):
        return Violation(start, f"overwrites {part.name}, which others read", "a copy")
    return None


@fact
def posted(program: Program, plan: Plan) -> Violation | None:
    """Every receive is started and waited for once, in one phase. Only its finish reads what arrives."""
    for node in program.computes:
        if node.target is RECEIVE:
            return Violation(node, "a receive in one piece", "its start, and geminifx.finish_receive")
        if node.target is FINISH_RECEIVE and getattr(node.args[0], "target", None) is not START_RECEIVE:
            return Violation(node, f"waits for {node.args[0]}", "the start of a receive")
        if node.target is START_RECEIVE and [user.target for user in node.users] != [FINISH_RECEIVE]:
            readers = ", ".join(user.name for user in node.users) or "nobody"
            return Violation(node, f"read by {readers}", "one reader, its finish")
        if node.target is FINISH_RECEIVE and note(node).phase != note(node.args[0]).phase:
            return Violation(node, f"waits for {node.args[0].name} of the other phase", "the finish before the turn")
    return None


@fact
def chunked(program: Program, plan: Plan) -> Violation | None:
    """Parameters come out of chunks and gradients go into them."""
    for node in program.placeholders:
        if note(node).role.startswith("parameter:"):
            return Violation(node, "a parameter as an input", "geminifx.fetch, wait and view")
    for node in program.calls(WAIT):
        if getattr(node.args[0], "target", None) is not FETCH or node.args[0].args[0] != node.args[1]:
            return Violation(node, "a wait for something other than its chunk's fetch", "geminifx.wait(fetch, chunk)")
    for fetch in program.calls(FETCH):
        if len(fetch.users) != 1 or next(iter(fetch.users)).target is not WAIT:
            return Violation(fetch, f"{len(fetch.users)} readers", "one reader, its wait")
    return misplaced(program, plan) or gradient_chains(program, plan)


@fact
def released(program: Program, plan: Plan) -> Violation | None:
    """Every chunk waited for is released exactly once, after its last reader and before its reduce."""
    order = program.positions()
    reduces = {node.args[1]: order[node] for node in program.calls(REDUCE)}
    for wait in program.calls(WAIT):
        readers = all_readers(wait)
        releases = [node for node in readers if node.target is RELEASE]
        if len(releases) != 1:
            return Violation(wait, f"{len(releases)} releases", "exactly one release of the chunk")
        last = max(readers, key=order.__getitem__)
        if last is not releases[0]:
            return Violation(last, f"reads {wait.name} after its release", "the release after the last reader")
        chunk = wait.args[1]
        if note(wait).phase == "backward" and reduces.get(chunk, len(order)) < order[releases[0]]:
            return Violation(releases[0], f"chunk {chunk} is reduced before its release", "release, then reduce")
    return None


@fact
def offloaded(program: Program, plan: Plan) -> Violation | None:
    """An offloaded value is copied to the host once, is not overwritten before it has departed nor read after that, and
    comes back once."""
    came_from = {DEPART: (1, OFFLOAD), RELOAD: (0, OFFLOAD), ARRIVE: (0, RELOAD)}
    for node in program.computes:
        position, expected = came_from.get(node.target, (0, None))
        if expected is not None and getattr(node.args[position], "target", None) is not expected:
            return Violation(node, f"reads {node.args[position]}", f"what {target_text(expected)} returned")
    order, gone = program.positions(), dict[fx.Node, fx.Node]()
    for node in program.calls(OFFLOAD):
        value = node.args[0]
        if value in gone:
            return Violation(node, f"offloads {value.name} again, as {gone[value].name} does", "one offload of a value")
        gone[value] = node
        offence = _round_trip(node, order) or _left_alone(node, order)
        if offence is not None:
            return offence
    return None


def _round_trip(offload: fx.Node, order: dict[fx.Node, int]) -> Violation | None:
    steps = sorted(offload.users, key=order.__getitem__)
    if [step.target for step in steps] != [DEPART, RELOAD, ARRIVE]:
        text = ", ".join(target_text(step.target) for step in steps) or "nobody"
        return Violation(offload, f"used by: {text}", "depart, reload, arrive")
    depart, reload, arrive = steps
    if depart.args[0] is not offload.args[0]:
        return Violation(depart, f"lets {depart.args[0]} depart", f"{offload.args[0]}, which is offloaded")
    if list(reload.users) != [arrive]:
        readers = ", ".join(user.name for user in reload.users) or "nobody"
        return Violation(reload, f"read by {readers}", "one reader, its arrive")
    if note(depart).sweep == note(reload).sweep:
        return Violation(reload, "on one side of the turn with its depart", "the turn, or a round, between them")
    return None


def _left_alone(offload: fx.Node, order: dict[fx.Node, int]) -> Violation | None:
    value, readers = offload.args[0], all_readers(offload.args[0])
    depart = next(user for user in offload.users if user.target is DEPART)
    for reader in sorted(readers, key=order.__getitem__):
        if order[reader] > order[depart]:
            return Violation(
                reader, f"reads {value.name}, which is offloaded to the host", "what geminifx.arrive returned"
            )
        overwrites = any(item is value or item in readers for item in overwritten_inputs(reader))
        if order[reader] > order[offload] and reader.target not in (DEPART, SEND, FINISH_SEND) and overwrites:
            return Violation(reader, f"overwrites {value.name} on its way to the host", "geminifx.depart before that")
    return None


def all_readers(value: fx.Node) -> set[fx.Node]:
    """All nodes that read a value, such as a waited-for chunk, directly or through views of it."""
    readers: set[fx.Node] = set()
    frontier = [value]
    while frontier:
        value = frontier.pop()
        for user in value.users:
            readers.add(user)
            if value in aliased_inputs(user):
                frontier.append(user)
    return readers
