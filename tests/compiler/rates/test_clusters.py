"""Clusters: what is described is what exchanges are priced by, and a description that makes no sense is refused."""

from pathlib import Path
from typing import Any

import geminifx
import pytest
from geminifx.compiler.rates.clusters import CLUSTERS, Cluster, Link, given_cluster
from geminifx.compiler.rates.presets import preset
from geminifx.runtime.isa.errors import ArgumentError
from torch import nn

FAST, SLOW = Link(1e-6, 100e9), Link(1e-5, 40e9)
TWO_NODES = Cluster("two nodes", 2, 8, None, FAST, SLOW)


@pytest.mark.parametrize(
    "stride, size, bytes_per_s",
    [
        (1, 8, 100e9),  # one node's devices
        (4, 2, 100e9),  # two halves of one
        (1, 16, 40e9),  # one ring over all, which enters a node once
        (2, 8, 20e9),  # two of them share the way between nodes
        (8, 2, 5e9),  # eight
    ],
)
def test_rings_share_the_way_between_nodes(stride: int, size: int, bytes_per_s: float) -> None:
    assert TWO_NODES.ring(stride, size).bytes_per_s == bytes_per_s


def test_messages_between_stages_share_the_way_between_nodes() -> None:
    assert TWO_NODES.hop(4, 2) == FAST
    assert TWO_NODES.hop(4, 4) == Link(1e-5, 10e9)
    assert TWO_NODES.hop(8, 2) == Link(1e-5, 5e9)


def test_no_link_is_faster_than_the_one_inside() -> None:
    assert Cluster("", 2, 8, None, Link(0.0, 1e9), Link(0.0, 1e12)).ring(8, 2).bytes_per_s == 1e9


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_goes_by_its_name(name: str) -> None:
    assert given_cluster(name) == CLUSTERS[name]


def test_what_is_left_out_is_that_of_the_one_it_is_like(tmp_path: Path) -> None:
    found = given_cluster({"like": "4x8-infiniband", "nodes": 128, "card": "a100-sxm"})
    assert found is not None and (found.size, found.rates) == (1024, preset("a100-sxm"))
    assert found.between == CLUSTERS["4x8-infiniband"].between
    file = tmp_path / "cluster.toml"
    file.write_text('like = "4x8-infiniband"\nnodes = 128\ncard = "a100-sxm"\n')
    assert given_cluster(file) == found


def test_a_cluster_of_this_device_needs_links_alone() -> None:
    found = given_cluster({"devices": 4, "within": {"latency_s": 1e-5, "bytes_per_s": 1e10}})
    assert found is not None and (found.size, found.rates) == (4, None)


@pytest.mark.parametrize(
    "given, told",
    [
        ("8-nvlnk", "did you mean '8-nvlink'"),
        ("nowhere.toml", "cannot be read"),
        (8, "expected the name of a cluster"),
        ({"nods": 2}, "did you mean 'nodes'"),
        ({"like": "8-nvlink", "card": "h300"}, "unknown card 'h300'"),
        ({"like": "9-nvlink"}, "like='9-nvlink', which does not exist"),
        ({"like": "8-nvlink", "nodes": 0}, "nodes is 0"),
        ({"like": "8-nvlink", "within": {"latency_s": 0}}, "bytes_per_s"),
        ({"like": "8-nvlink", "within": {"latency_s": 0, "bytes_per_s": 0}}, "above 0"),
        ({"like": "8-nvlink", "host_memory": "much"}, "host_memory"),
        ({"devices": 4}, "no 'within'"),
        ({"nodes": 2, "devices": 4, "within": {"latency_s": 0, "bytes_per_s": 1}}, "no 'between'"),
    ],
)
def test_what_makes_no_sense_is_refused(given: Any, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        given_cluster(given)


def test_a_cluster_of_another_size_than_the_world_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"world_size=4, but the cluster has 1 x 8"):
        geminifx.compile(nn.Linear(2, 2), world_size=4, cluster="8-nvlink")
