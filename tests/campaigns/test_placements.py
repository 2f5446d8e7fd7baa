"""shard: any operator, in any mode, whose arguments lie in any way, has the whole call's results."""

import random
from collections.abc import Iterator

import pytest
import torch
from geminifx.passes.sharding.engine import divides
from geminifx.passes.sharding.modes import MODES, SEQUENCE
from geminifx.runtime.isa.errors import ShardingError
from geminifx.runtime.isa.mesh import PARTIAL, REPLICATE, Axis, Placements, Shard
from lowering import Lowered
from one_call import CALLS
from sharding import declared, plan_for

SIZE = 20_000
WAYS = {
    "1d x 2": (declared("1d", 2), MODES["1d"]),
    "1d x 4": (declared("1d", 4), MODES["1d"]),
    "1d x 2, sequence": (declared("1d", 2, sequence=True), SEQUENCE),
    "2d": (declared("2d", 4), MODES["2d"]),
    "2.5d": (declared("2.5d", 8, depth=2), MODES["2.5d"]),
    "3d": (declared("3d", 8), MODES["3d"]),
}


def lies(chance: random.Random, shape: tuple[int, ...], axes: tuple[Axis, ...], partial: bool) -> Placements:
    """Any placements that divide a tensor of this shape."""
    shards = [Shard(dim, sections) for dim in range(len(shape)) for sections in (1, 2)]
    choices = [REPLICATE, *([PARTIAL] if partial else []), *shards]
    while True:
        found = tuple(chance.choice(choices) for _ in axes)
        if divides(shape, found, axes):
            return found


def check(number: int) -> bool:
    """Whether the case came about: some number of heads is not divisible."""
    chance = random.Random(number)
    call, (parallel, roles) = CALLS[chance.choice(list(CALLS))], chance.choice(list(WAYS.values()))
    axes = plan_for(parallel).mesh.tensor_axes
    tensors = enumerate(call.tensors())
    inputs = [lies(chance, tuple(t.shape), axes, t.is_floating_point() and i not in call.fixed) for i, t in tensors]
    try:
        Lowered(call, inputs, axes, roles).check()
    except ShardingError as refused:
        if "number of heads is not divisible" not in str(refused):
            raise
        return False
    return True


@pytest.mark.campaign
def test_however_arguments_lie_results_are_those_of_the_whole(cases: Iterator[int], part: int) -> None:
    torch.manual_seed(part)
    done = 0
    for number in cases:
        try:
            done += check(number)
        except Exception as error:
            error.add_note(f"in case {number}")
            raise
    assert done > 0.9 * SIZE / 20
