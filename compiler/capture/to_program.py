"""Converts the graph that torch traces into a Program."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...passes.program.names import identifier
from ...passes.program.program import Note, Phase, Program, annotate
from ...passes.program.types import NumberType, type_of_value
from ...runtime.isa import torch_private as private
from ...runtime.isa.errors import CaptureError
from .numbers import is_taken_out
from .roles import input_role, result_role, without_prefix


def to_program(graph_module: fx.GraphModule, model: nn.Module, names: list[str], leaves: list[int],
                originals: Mapping[int, Tensor], numbers: Mapping[int, NumberType]) -> Program:  # fmt: skip
    """Converts a traced graph.

    `names` and `leaves` are the names and flat positions of the tensor arguments. `originals` maps the id of a traced
    copy of a tensor to the model's own. `numbers` maps positions of number arguments to their types.
    """
    program = Program("captured")
    program.set_results({})
    values: dict[fx.Node, fx.Node] = {}
    tied = _tied(model)
    nodes = list(graph_module.graph.nodes)
    for node in nodes:
        if node.op == "placeholder":
            role, name = input_role(node.meta["desc"], names, leaves)
            type = type_of_value(node.meta["val"])
            kind, _, position = role.partition(":")
            if kind == "input" and int(position) in numbers:
                role, type = f"number:{position}", numbers[int(position)]
            values[node] = program.add_input(name, type, role, tied.get(role.removeprefix("parameter:"), ""))
        elif node.op == "get_attr":
            values[node] = _add_constant(program, node, getattr(graph_module, str(node.target)), originals)
    calls, backward = [node for node in nodes if node.op == "call_function"], set[fx.Node]()
    for node in calls:
        if "backward" in str(node.meta.get("partitioner_tag", "")) or not backward.isdisjoint(node.all_input_nodes):
            backward.add(node)
    for node in sorted(calls, key=backward.__contains__):  # all of the forward first: torch makes views of outputs last
        if is_taken_out(node):
            values[node] = values[node.args[0]]
        else:
            values[node] = _add_call(program, node, "backward" if node in backward else "forward", values)
    output = next(node for node in nodes if node.op == "output")
    program.set_results({
        result_role(description, names, leaves): values[value]
        for value, description in zip(output.args[0], output.meta["desc"], strict=True)
        if value is not None  # no gradient for this input or parameter
    })  # fmt: skip
    return program


def _add_call(program: Program, node: fx.Node, phase: Phase, values: dict[fx.Node, fx.Node]) -> fx.Node:
    if not hasattr(node.target, "_schema") and getattr(node.target, "__module__", "") != "_operator":
        raise CaptureError(
            f"{private.module_of(node) or 'the model'}: {node.target} has no schema, so its effects are unknown; "
            "expected operators that torch or torch.library defines"
        )
    origin = Note(phase=phase, module=without_prefix(private.module_of(node)))
    args, kwargs = fx.map_arg(node.args, values.__getitem__), fx.map_arg(node.kwargs, values.__getitem__)
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    return program.emit(node.target, args, kwargs, before=program.output, like=origin, name=node.name)


def _add_constant(program: Program, node: fx.Node, value: Any, originals: Mapping[int, Tensor]) -> fx.Node:
    if isinstance(value, nn.Parameter):
        raise CaptureError(
            f"{private.module_of(node) or 'the model'} computes with a parameter of shape {list(value.shape)} that "
            "was not found through the model's modules: it is not among model.parameters(), because its module is in "
            "a plain list, dict or tuple, or a function holds it. Keep it in nn.ModuleList, nn.ModuleDict, "
            "nn.ParameterList or an attribute, and read it from there in the forward"
        )
    if not isinstance(value, Tensor) or isinstance(value, private.FakeTensor):
        raise CaptureError(f"the model holds {node.target}, which is not a tensor with values; register it as a buffer")
    name, original = identifier(str(node.target).lstrip("_")), originals.get(id(value), value)
    if original.requires_grad and torch.is_grad_enabled():
        raise CaptureError(
            f"{private.module_of(node) or 'the model'} computes with a tensor of shape {list(value.shape)} that comes "
            "from outside the forward and requires a gradient, which it would not get. Make it an nn.Parameter of a "
            "module, compute it from parameters in the forward, or .detach() it if it is a constant"
        )
    program.constants[name] = original
    placeholder = program.add_input(name, type_of_value(value), f"constant:{name}")
    annotate(placeholder, module=without_prefix(private.module_of(node)))
    return placeholder


def _tied(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    names = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in names if first.setdefault(id(p), name) != name}
