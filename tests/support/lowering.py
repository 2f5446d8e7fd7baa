"""One call on the parts of its arguments, as `shard` lowers it, beside the call on the whole."""

from __future__ import annotations

import torch
from all_ranks import assemble, run_parts, scatter
from geminifx.passes.program.program import annotate, note
from geminifx.passes.program.types import TensorType
from geminifx.passes.sharding.engine import Sharder, Value
from geminifx.passes.sharding.modes import Role
from geminifx.passes.sharding.special import SPECIAL
from geminifx.runtime.isa.layout import contiguous_stride
from geminifx.runtime.isa.mesh import Axis, Mesh, Placements, local_shape
from one_call import OneCall
from torch import Tensor


class Lowered:
    """One call on the parts of its arguments, its results put together again."""

    def __init__(self, call: OneCall, inputs: list[Placements], axes: tuple[Axis, ...], roles: dict[str, Role]) -> None:
        self.call, self.axes = call, axes
        self.program, self.node = call.program()
        self.sharder = Sharder(self.program, axes, roles)
        self.local_shards: dict[str, list[Tensor]] = {}
        for node, tensor, placements in zip(self.program.placeholders, call.tensors(), inputs, strict=True):
            shape = local_shape(tuple(tensor.shape), placements, axes)
            annotate(node, type=TensorType(tensor.dtype, shape, contiguous_stride(shape)))
            self.sharder.values[node] = Value(node, placements)
            self.local_shards[note(node).role] = [part.contiguous() for part in scatter(tensor, placements, axes)]

    def check(self, special: bool = True) -> None:
        """Lower, run on every rank, compare with the whole."""
        old = [node for node in self.program.nodes if node.op == "call_function"]
        for node in old:
            self.sharder.at = node
            lower = SPECIAL.get(node.target, Sharder.lower) if special else Sharder.lower
            lower(self.sharder, node)
        made = {role: self.sharder.values[node] for role, node in self.program.results.items()}
        self.program.set_results({role: value.node for role, value in made.items()})
        for node in reversed(old):
            self.program.graph.erase_node(node)
        self.program.eliminate_dead_code()
        found = run_parts(self.program, Mesh(self.axes), self.local_shards)
        for role, value in made.items():
            expected = self.call.results()[int(role.removeprefix("output:"))]
            assert expected is not None
            if self.call.values:
                whole = assemble(found[role], value.placements, self.axes)
                torch.testing.assert_close(whole, expected)
            else:
                assert {part.shape for part in found[role]} == {
                    local_shape(expected.shape, value.placements, self.axes)
                }
