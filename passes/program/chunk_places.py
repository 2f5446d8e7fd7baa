"""Where instructions read and write chunks: at the places that the layout has."""

from math import prod

from torch import fx

from ...runtime.isa.instructions import (
    ACCUMULATE_GRAD,
    CHUNK_NUMBER,
    GRADIENTS,
    PUT,
    PUT_MM,
    PUT_SUM,
    PUTS,
    REDUCE,
    VIEW,
    WAIT,
    summed_shape,
)
from .plan import Plan
from .program import Program, tensor_type
from .text import target_text
from .violation import Violation


def misplaced(program: Program, plan: Plan) -> Violation | None:
    """A chunk that the layout has not, or a view of weights that is none of its slots."""
    chunks = plan.layout.chunks
    for node in program.computes if chunks else ():
        number = CHUNK_NUMBER.get(node.target)
        if number is not None and not 0 <= node.args[number] < len(chunks):
            return Violation(node, f"chunk {node.args[number]}", f"one of the layout's {len(chunks)}, from 0")
        if node.target is VIEW and node.args[0].target is WAIT:
            chunk, (offset, shape) = chunks[node.args[0].args[1]], node.args[1:]
            if not any((slot.offset, slot.numel) == (offset, prod(shape)) for slot in chunk.slots):
                return Violation(node, f"{shape} at {offset}", f"a parameter of chunk {chunk.index}")
    return None


def gradient_chains(program: Program, plan: Plan) -> Violation | None:
    """A chunk's gradients that are not put, each parameter's once, then reduced and accumulated."""
    order = program.positions()
    for buffer in program.calls(GRADIENTS):
        steps = sorted(buffer.users, key=order.__getitem__)
        # A call of a function that takes the buffer counts as a put.
        kinds = [PUT if step.op == "call_module" else step.target for step in steps]
        if kinds[-2:] != [REDUCE, ACCUMULATE_GRAD] or any(kind not in PUTS for kind in kinds[:-2]) or len(kinds) < 3:
            text = ", ".join(map(target_text, kinds))
            return Violation(buffer, f"gradients used by: {text}", "put..., reduce, accumulate_grad")
        *puts, reduce, accumulate = steps
        if reduce.args[1:] != accumulate.args[1:]:
            return Violation(accumulate, f"{accumulate.args[1:]}", f"{reduce.args[1:]}, as its reduce has")
        if plan.layout.chunks and all(put.op == "call_function" for put in puts):
            places = plan.layout.chunks[reduce.args[1]].slots
            if not all(0 <= i < len(places) for i in reduce.args[2]):
                return Violation(reduce, f"slots {reduce.args[2]}", f"some of the chunk's {len(places)}, from 0")
            slots = [places[i] for i in reduce.args[2]]
            expected = sorted((slot.offset, slot.numel) for slot in slots)
            found = sorted((put.args[1], _put_numel(put)) for put in puts)
            if found != expected:
                return Violation(reduce, f"(offset, numel) of its puts {found}", f"its slots, {expected}")
    return None


def _put_numel(put: fx.Node) -> int:
    """How many elements an instruction writes into a chunk's gradients."""
    if put.target is PUT_MM:
        return tensor_type(put.args[2]).shape[0] * tensor_type(put.args[3]).shape[1]
    shape = tensor_type(put.args[2]).shape
    return prod(summed_shape(shape, put.args[3]) if put.target is PUT_SUM else shape)
