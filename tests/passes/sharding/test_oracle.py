"""shard: torch's own propagation of placements, DTensor's, finds our rows legal and has the same results."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from geminifx.passes.program.types import TensorType
from geminifx.passes.sharding.rules import Call, rule_for
from geminifx.runtime.isa.mesh import PARTIAL, REPLICATE, Placement, Shard
from one_call import CALLS, OneCall
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._pytree import tree_map

tensor = pytest.importorskip("torch.distributed.tensor")
schema = pytest.importorskip("torch.distributed.tensor._op_schema")
spec = pytest.importorskip("torch.distributed.tensor._dtensor_spec")
fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")

ASKED = ("mm", "bmm", "aten.add.Tensor", "aten.mul.Tensor", "aten.add.Tensor, a row", "aten.relu.default", "t",
         "transpose", "permute", "sum of last", "sum of two", "softmax", "norm", "norm backward",
         "select", "aten.view.default (4, 4, 8) (16, 8)", "unsqueeze")  # fmt: skip


TORCH = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """Two processes of which only this one is there."""
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def theirs(placement: Placement) -> object:
    if isinstance(placement, Shard):
        return tensor.Shard(placement.dim)
    return tensor.Partial() if placement == PARTIAL else tensor.Replicate()


@pytest.mark.parametrize("name", ASKED)
def test_rows_are_legal_for_dtensor(mesh: DeviceMesh, name: str) -> None:
    if name == "aten.mul.Tensor" and TORCH < (2, 13):
        pytest.skip("DTensor of torch before 2.13 gathers a term before it is multiplied by a whole factor")
    call: OneCall = CALLS[name]
    types = tuple(TensorType.of(t) for t in call.given())
    results = tuple(None if t is None else TensorType.of(t) for t in call.results())
    _, node = call.program()
    propagator = tensor.DTensor._op_dispatcher.sharding_propagator
    rows = set()
    for dim in range(max(len(type.shape) for type in types)):
        found = tuple(Shard(dim) if dim < len(t.shape) else REPLICATE for t in types)
        rows |= set(rule_for(call.target)(Call(node, types, results, found)))  # type: ignore[misc,arg-type]
    assert rows
    for row in rows:
        placed = iter(row.inputs)
        args = tree_map(lambda a: _spec(mesh, next(placed), a) if isinstance(a, torch.Tensor) else a, call.args)  # noqa: B023
        info = propagator.op_to_schema_info.get(call.target) or schema.RuntimeSchemaInfo()
        asked = schema.OpSchema(call.target, tuple(args), {}, schema_info=info)
        answer = propagator.propagate_op_sharding_non_cached(asked)
        wanted = answer.redistribute_schema if answer.needs_redistribute else asked  # may have shapes of parts instead
        assert [one.placements for one in wanted.args_spec] == [one.placements for one in asked.args_spec], row
        made = answer.output_spec if isinstance(answer.output_spec, tuple | list) else [answer.output_spec]
        assert [one.placements[0] for one in made if one] == [theirs(p) for p in row.results], row


def _spec(mesh: DeviceMesh, placement: Placement, value: torch.Tensor) -> object:
    meta = spec.TensorMeta(value.shape, value.stride(), value.dtype)
    return spec.DTensorSpec(mesh, (theirs(placement),), tensor_meta=meta)
