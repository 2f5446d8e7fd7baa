"""shard: every row of every rule is true, views are followed, parts are moved to where they are wanted."""

from collections.abc import Iterable
from itertools import product
from math import prod

import pytest
import torch
from all_ranks import run_parts, scatter
from geminifx.passes.program.program import Program
from geminifx.passes.program.types import TensorType
from geminifx.passes.sharding.engine import Sharder, Value, divides
from geminifx.passes.sharding.modes import MODES, SEQUENCE, Role
from geminifx.passes.sharding.rules import RULES, Call, Row, rule_for, view_dim
from geminifx.passes.sharding.special import SPECIAL
from geminifx.runtime.isa.errors import ShardingError
from geminifx.runtime.isa.layout import contiguous_stride
from geminifx.runtime.isa.mesh import (
    PARTIAL,
    REPLICATE,
    Axis,
    Mesh,
    Placement,
    Placements,
    Shard,
    local_shape,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lowering import Lowered
from one_call import CALLS
from torch import fx

# -- rules -------------------------------------------------------------------------------------------------


def test_every_operator_with_a_rule_has_a_call() -> None:
    assert RULES.keys() | SPECIAL.keys() <= {call.target for call in CALLS.values()}


def rows_of(node: fx.Node, types: list[TensorType], results: list[TensorType | None]) -> set[Row]:
    """All rows of a call, whichever argument comes sharded along whichever dimension, in whichever sections."""
    rows: set[Row] = set()
    shards = [[REPLICATE, *(Shard(d, n) for d in range(len(t.shape)) for n in (1, 2))] for t in types]
    everything: Iterable[tuple[Placement, ...]] = (
        product(*shards) if len(types) < 3 else ((p,) * len(types) for p in max(shards, key=len))
    )
    for found in everything:
        if all(not isinstance(p, Shard) or p.dim < len(t.shape) for p, t in zip(found, types, strict=True)):
            rule = rule_for(node.target)
            assert rule is not None
            rows |= set(rule(Call(node, tuple(types), tuple(results), found)))
    return rows


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if rule_for(call.target) is not None])
def test_every_row_is_true(name: str, ranks: int) -> None:
    call, axes = CALLS[name], (Axis("tp", ranks, "tensor"),)
    _, node = call.program()
    given = call.given()
    types = [TensorType.of(t) for t in given]
    results = [None if t is None else TensorType.of(t) for t in call.results()]
    for row in rows_of(node, types, results):
        pairs = [*zip(types, row.inputs, strict=True), *zip(results, row.results, strict=True)]
        if not all(type is None or divides(type.shape, (placement,), axes) for type, placement in pairs):
            continue
        if any(p == PARTIAL and t.dtype == torch.bool for p, t in zip(row.inputs, types, strict=True)):
            continue  # there are no sums of truths
        lie = [[(p,) for p, t in zip(row.inputs, given, strict=True) if t is one] for one in call.tensors()]
        inputs = [(PARTIAL,) if (PARTIAL,) in several else several[0] for several in lie]
        lowered = Lowered(call, inputs, axes, {"tp": Role("whole")})
        lowered.sharder.choose = lambda *_, row=row: ([(p,) for p in row.inputs], [(p,) for p in row.results])
        lowered.check(special=False)


# -- views -------------------------------------------------------------------------------------------------


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes of the same numbers of elements: factors, put together in two ways, ones among them."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3, 4]), max_size=5))

    def shape() -> tuple[int, ...]:
        cuts = sorted(draw(st.lists(st.integers(0, len(factors)), max_size=4)))
        bounds = zip([0, *cuts], [*cuts, len(factors)], strict=True)
        return tuple(prod(factors[a:b]) for a, b in bounds)

    return shape(), shape()


@given(view=views(), ranks=st.sampled_from([2, 3]))
def test_a_view_of_parts_is_a_part_of_the_view(view: tuple[tuple[int, ...], tuple[int, ...]], ranks: int) -> None:
    source, target = view
    whole = torch.arange(prod(source)).view(source)
    for dim in range(len(source)):
        along = view_dim(source, target, dim)
        if along is None or source[dim] % ranks or target[along] % ranks:
            continue
        shape = [size // ranks if place == along else size for place, size in enumerate(target)]
        parts = [part.reshape(shape) for part in whole.chunk(ranks, dim)]
        assert torch.equal(torch.cat(parts, along), whole.view(target))


@given(view=views())
def test_a_dimension_that_stays_is_always_followed(view: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    source, target = view
    for dim, size in enumerate(source):
        for along, other in enumerate(target):
            if size == other > 1 and prod(source[:dim]) == prod(target[:along]):
                assert view_dim(source, target, dim) == along


# -- collective ----------------------------------------------------------------------------------------------

CUBE = (Axis("a", 2, "replica"), Axis("b", 2, "tensor"), Axis("c", 2, "tensor"))
CUBES_ROLES = {axis.name: Role("whole") for axis in CUBE}


def placements_for(shape: tuple[int, ...], axes: tuple[Axis, ...], partial: bool) -> st.SearchStrategy[Placements]:
    """All that divide a tensor of this shape."""
    shards = [Shard(dim, sections) for dim in range(len(shape)) for sections in (1, 2)]
    one = st.sampled_from([REPLICATE, *([PARTIAL] if partial else []), *shards])
    return st.tuples(*[one] * len(axes)).filter(lambda found: divides(shape, found, axes))


@settings(max_examples=150)
@given(now=placements_for((16, 16), CUBE, True), then=placements_for((16, 16), CUBE, False))
def test_parts_are_moved_from_everywhere_to_everywhere(now: Placements, then: Placements) -> None:
    whole = torch.arange(256.0).view(16, 16)
    program = Program("before")
    shape = local_shape((16, 16), now, CUBE)
    x = program.add_input("x", TensorType(torch.float32, shape, contiguous_stride(shape)), "input:0")
    program.set_results({"output:0": x})
    sharder = Sharder(program, CUBE, CUBES_ROLES)
    sharder.at, sharder.values[x] = program.output, Value(x, now)
    program.set_results({"output:0": sharder.local(x, then)})
    (found,) = run_parts(program, Mesh(CUBE), {"input:0": scatter(whole, now, CUBE)}).values()
    for part, expected in zip(found, scatter(whole, then, CUBE), strict=True):
        assert torch.equal(part, expected)


# -- operators ---------------------------------------------------------------------------------------------

MESHES = {
    "1d": (MODES["1d"], (Axis("tp", 2, "tensor"),)),
    "1d x 4": (MODES["1d"], (Axis("tp", 4, "tensor"),)),
    "sequence": (SEQUENCE, (Axis("tp", 2, "tensor"),)),
    "2d": (MODES["2d"], (Axis("row", 2, "tensor"), Axis("col", 2, "tensor"))),
    "2.5d": (MODES["2.5d"], (Axis("depth", 2, "replica"), Axis("row", 2, "tensor"), Axis("col", 2, "tensor"))),
    "3d": (MODES["3d"], CUBE),
}


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=4)  # the campaign of placements has thousands
@given(data=st.data())
def test_however_the_arguments_lie_the_result_is_right(name: str, data: st.DataObject) -> None:
    call = CALLS[name]
    roles, axes = MESHES[data.draw(st.sampled_from(list(MESHES)))]
    inputs = []
    for i, tensor in enumerate(call.tensors()):
        partial = tensor.is_floating_point() and i not in call.fixed
        inputs.append(data.draw(placements_for(tuple(tensor.shape), axes, partial)))
    lowered = Lowered(call, inputs, axes, roles)
    try:
        lowered.check()
    except ShardingError as refused:
        assume("number of heads is not divisible" not in str(refused))
        raise


def test_a_sum_stays_whole_where_sections_beside_it_would_not_divide() -> None:
    """Of the product's 4 rows axis c has its part of 2 sections: half of them, b's share of the sum, leaves c none."""
    inputs: list[Placements] = [
        (REPLICATE, REPLICATE, REPLICATE), (REPLICATE, REPLICATE, Shard(0, 2)), (REPLICATE, Shard(0), REPLICATE),
    ]  # fmt: skip
    lowered = Lowered(CALLS["addmm"], inputs, CUBE, MODES["3d"])
    lowered.check()
