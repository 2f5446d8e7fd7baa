"""Parts of parameters on a mesh: every element of the whole is found where the regions say, on some process."""

from itertools import pairwise
from math import prod

import pytest
import torch
from geminifx.runtime.distributed.local_shards import LocalShards
from geminifx.runtime.distributed.ranks import Ranks
from geminifx.runtime.isa.layout import Slot
from geminifx.runtime.isa.mesh import Axis, Mesh, Replicate, Shard, placements_text
from hypothesis import given
from hypothesis import strategies as st

AXES = (Axis("row", 2, "tensor"), Axis("col", 3, "tensor"))
MESH = Mesh((Axis("data", 2, "data"), *AXES))
PLACEMENTS = st.sampled_from([Replicate(), Shard(0), Shard(1), Shard(0, 3), Shard(1, 2)])


def slot_of(whole: torch.Tensor, placements: tuple, offset: int = 64) -> Slot:
    sharded = [(p.dim, axis.size) for p, axis in zip(placements, AXES, strict=True) if isinstance(p, Shard)]
    shape = [size // prod(n for dim, n in sharded if dim == d) for d, size in enumerate(whole.shape)]
    return Slot("w", offset, tuple(shape), placements_text(placements, AXES))


@given(first=PLACEMENTS, second=PLACEMENTS, cuts=st.lists(st.integers(0, 64 + 36 * 12), max_size=2))
def test_regions_of_all_processes_are_the_whole(first, second, cuts: list[int]) -> None:
    whole = torch.arange(36.0 * 12).view(36, 12)
    slot, found = slot_of(whole, (first, second)), torch.full_like(whole, -1.0)
    bounds = [0, *sorted(min(cut, 64 + slot.numel) for cut in cuts), 64 + slot.numel]
    for rank in range(MESH.size):
        parts = LocalShards(Ranks(MESH, rank, launched=False))
        assert parts.whole_shape(slot) == (36, 12)
        chunk = torch.zeros(64 + slot.numel)
        chunk[64:] = parts.take(whole, slot).flatten()
        for lo, hi in pairwise(bounds):
            regions = parts.regions(slot, (lo, hi))
            assert sum(prod(region.sizes) for region in regions) == max(0, hi - max(lo, 64))
            for region in regions:
                at = tuple(slice(o, o + n) for o, n in zip(region.offsets, region.sizes, strict=True))
                assert torch.equal(whole[at], region.of(chunk[lo:hi]))
                found[at] = region.of(chunk[lo:hi])
    assert torch.equal(found, whole)


def test_a_whole_parameter_is_one_region() -> None:
    parts = LocalShards(Ranks(MESH, 4, launched=False))
    (region,) = parts.regions(Slot("w", 8, (3, 4)))
    assert (region.offsets, region.sizes, region.start) == ((0, 0), (3, 4), 8)
    (scalar,) = parts.regions(Slot("s", 8, ()))
    assert scalar.of(torch.arange(10.0)) == 8.0
    assert parts.regions(Slot("none", 8, (0, 4))) == ()


def test_replicas_are_counted_over_the_axes_that_share_a_batch() -> None:
    parts = LocalShards(Ranks(MESH, 0, launched=False))
    assert [parts.replicas(Slot("w", 0, (4,), text)) for text in ("", "row=S0", "row=S0 col=S0")] == [6, 3, 1]


def test_another_shape_than_the_parameters_is_refused() -> None:
    parts = LocalShards(Ranks(MESH, 0, launched=False))
    with pytest.raises(ValueError, match=r"parameter w has shape \(4, 3\), but the value has shape \(2, 3\)"):
        parts.take(torch.zeros(2, 3), Slot("w", 0, (2, 3), "row=S0"))
