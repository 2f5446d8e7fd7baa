"""The mesh: which processes are replicas of each other."""

import pytest
from geminifx.passes.sharding.modes import _BATCH, MODES
from geminifx.runtime.distributed.ranks import Ranks
from geminifx.runtime.isa.mesh import DATA, REPLICAS, Axis, Mesh, of_gradient, parse_placements, placements_text

AXES = (Axis("data", 2), Axis("depth", 3), Axis("row", 2), Axis("col", 2))
MESH = Mesh(AXES)


def test_replicas_have_the_same_weights_and_number_in_order() -> None:
    weights = {rank: (MESH.coordinate(rank, "row"), MESH.coordinate(rank, "col")) for rank in range(MESH.size)}
    assert (MESH.replicas, MESH.replica_name, MESH.weight_axes) == (6, "data x depth", AXES[2:])
    for place in set(weights.values()):
        same = [rank for rank in range(MESH.size) if weights[rank] == place]
        assert [Ranks(MESH, rank).replica for rank in same] == list(range(6))


@pytest.mark.parametrize("axes", [(), (Axis("tp", 4),)])
def test_without_such_axes_everybody_is_its_own_replica(axes: tuple[Axis, ...]) -> None:
    mesh = Mesh(axes)
    assert (mesh.replicas, mesh.replica_axes, mesh.replica_name) == (1, (), "")
    assert [Ranks(mesh, rank).replica for rank in range(mesh.size)] == [0] * mesh.size


def test_the_axes_are_those_on_which_modes_shard_the_batch_alone() -> None:
    found = {name for axes in MODES.values() for name, role in axes.items() if role == _BATCH}
    assert {DATA, *found} == set(REPLICAS)


def test_a_gradient_is_partial_over_the_replicas() -> None:
    axes = MESH.tensor_axes
    parameter = parse_placements("row=S1 col=S0", axes)
    assert placements_text(of_gradient(parameter, axes), axes) == "depth=P row=S1 col=S0"
