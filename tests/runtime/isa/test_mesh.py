"""The mesh: what the processes along an axis have in common follows from its kind, wherever it stands."""

from itertools import permutations

import pytest
from geminifx.compiler.parallel import Parallel
from geminifx.passes.sharding.modes import MODES
from geminifx.runtime.isa.mesh import (
    Axis,
    AxisKind,
    Mesh,
    names_of,
    of_gradient,
    parse_placements,
    placements_text,
    taken_together,
)

AXES = (Axis("data", 2, "data"), Axis("depth", 3, "replica"), Axis("row", 2, "tensor"), Axis("col", 2, "tensor"))
MESH = Mesh(AXES)
ORDERS = pytest.mark.parametrize("mesh", [Mesh(axes) for axes in permutations(AXES)], ids=str)

# Every axis of a kind is called by another kind's name: whoever went by names would fail here.
KINDS: dict[AxisKind, Axis] = {
    "data": Axis("tensor", 2, "data"),
    "replica": Axis("data", 3, "replica"),
    "tensor": Axis("depth", 5, "tensor"),
    "expert": Axis("tp", 7, "expert"),
    "pipeline": Axis("a", 11, "pipeline"),
}
EVERY_KIND = Mesh(tuple(KINDS.values()))


@ORDERS
def test_those_along_several_axes_number_in_the_order_of_their_ranks(mesh: Mesh) -> None:
    replicas = names_of(mesh.replica_axes)
    places = {rank: (mesh.coordinate(rank, "row"), mesh.coordinate(rank, "col")) for rank in range(mesh.size)}
    assert set(replicas) == {"data", "depth"} and mesh.ranks_over(replicas) == 6
    for place in set(places.values()):
        same = [rank for rank in range(mesh.size) if places[rank] == place]
        assert [mesh.number(rank, replicas) for rank in same] == list(range(6))


@ORDERS
def test_a_batch_is_for_all_that_do_not_differ_along_data(mesh: Mesh) -> None:
    assert mesh.data_size == 2
    assert all(mesh.data_rank(rank) == mesh.coordinate(rank, "data") for rank in range(mesh.size))


@pytest.mark.parametrize("axes", [(), (Axis("tp", 4, "tensor"),)])
def test_without_such_axes_everybody_is_its_own_replica(axes: tuple[Axis, ...]) -> None:
    mesh = Mesh(axes)
    assert (mesh.replica_axes, mesh.data_size, mesh.ranks_over(())) == ((), 1, 1)
    assert [mesh.number(rank, ()) for rank in range(mesh.size)] == [0] * mesh.size


@pytest.mark.parametrize(
    ("axes", "kinds"),
    [
        (EVERY_KIND.tensor_axes, ["replica", "tensor"]),
        (EVERY_KIND.weight_axes, ["tensor"]),
        (EVERY_KIND.replica_axes, ["data", "replica", "expert"]),
        (EVERY_KIND.batch_axes, ["data", "expert"]),
    ],
    ids=["tensors", "weights", "replicas", "batches"],
)
def test_what_an_axis_is_for_follows_from_its_kind_alone(axes: tuple[Axis, ...], kinds: list[AxisKind]) -> None:
    assert axes == tuple(KINDS[kind] for kind in kinds)


def test_a_kind_that_there_is_not_is_told_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"axis 'x' has the kind 'dta'; expected one of data, tensor, .*expert"):
        Axis("x", 2, "dta")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
def test_axes_on_which_a_mode_shards_the_batch_alone_are_replicas(mode: str) -> None:
    size = {"1d": 4, "2d": 4, "2.5d": 8, "3d": 8}[mode]
    mesh = Parallel(data=2, mode=mode, size=size, depth=2 if mode == "2.5d" else 1).mesh(None, 1)
    alone = [name for name, role in MODES[mode].items() if (role.activation, role.weight) == ("batch", None)]
    assert names_of(mesh.replica_axes) == ("data", *alone)
    assert names_of(mesh.tensor_axes) == tuple(MODES[mode])
    assert mesh.batch_axes == (Axis("data", 2, "data"),)


def test_a_gradient_is_partial_over_the_replicas() -> None:
    axes = MESH.tensor_axes
    parameter = parse_placements("row=S1 col=S0", axes)
    assert placements_text(of_gradient(parameter, axes), axes) == "depth=P row=S1 col=S0"


def test_a_gradient_is_summed_over_the_axes_along_which_its_parameter_is_whole() -> None:
    assert MESH.reduction_axes("row=S1 col=S0") == MESH.reduction_axes("R") == ("data", "depth")
    assert EVERY_KIND.reduction_axes("R") == ("tensor", "data", "tp")
    assert EVERY_KIND.reduction_axes("tp=S0 depth=S1") == ("tensor", "data"), "an expert's, of which each has others"
    assert taken_together(("tensor", "data")) == "tensor x data"
