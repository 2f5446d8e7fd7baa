"""Clusters: nodes of equal devices, and the links between devices within a node and between nodes."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from ...runtime.isa.errors import ArgumentError, check_path, did_you_mean, wrong_argument
from ...runtime.isa.units import parse_bytes
from .presets import CARDS, preset
from .rates import Rates


@dataclass(frozen=True)
class Link:
    """A link with a fixed latency per exchange and a bandwidth."""

    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        if not (self.latency_s >= 0 and self.bytes_per_s > 0):
            raise ArgumentError(
                f"cluster: a link of latency_s={self.latency_s!r} and bytes_per_s={self.bytes_per_s!r}; expected "
                "seconds, 0 or more, and a number of bytes above 0"
            )

    def seconds(self, count: float, received_bytes: float) -> float:
        """Seconds of `count` exchanges in sequence in which a device receives `received_bytes` in total."""
        return count * self.latency_s + received_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal devices, numbered node by node.

    Fields:
        name: what plans call it.
        nodes, devices: number of nodes, and of devices in each.
        rates: the rates of every device; None: this machine's.
        within: link from a device to the others of its node, one per device.
        between: link from a node to the others, shared by all of its devices.
        host_bytes: memory of a node's host; None: unknown.
    """

    name: str
    nodes: int
    devices: int
    rates: Rates | None
    within: Link
    between: Link
    host_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, count in (("nodes", self.nodes), ("devices", self.devices)):
            if type(count) is not int or count < 1:
                raise ArgumentError(f"cluster: {name} is {count!r}; expected a whole number, 1 or more")

    @property
    def size(self) -> int:
        return self.nodes * self.devices

    def ring(self, stride: int, size: int) -> Link:
        """The link by which each of `size` devices, `stride` apart, receives while all such groups run a ring
        collective at once. Each ring enters every node once."""
        if self._is_inside(stride * size):
            return self.within
        members = self.devices // stride if self.devices % stride == 0 else 1
        return self._shared_by(self.devices // max(members, 1))

    def hop(self, stride: int, size: int) -> Link:
        """The slowest link from a device to the one `stride` after it, in rows of `size`, while all such rows send."""
        return self.within if self._is_inside(stride * size) else self._shared_by(min(stride, self.devices))

    def _is_inside(self, span: int) -> bool:
        """Whether `span` consecutive devices, aligned, always lie in one node."""
        return self.nodes == 1 or self.devices % span == 0

    def _shared_by(self, groups: int) -> Link:
        bytes_per_s = min(self.within.bytes_per_s, self.between.bytes_per_s / groups)
        return Link(max(self.within.latency_s, self.between.latency_s), bytes_per_s)

    def __str__(self) -> str:
        return self.name


NVLINK, PCIE = Link(10e-6, 340e9), Link(20e-6, 12e9)
INFINIBAND, ETHERNET = Link(20e-6, 8 * 45e9), Link(60e-6, 11e9)
"""Eight adapters of 400 Gbit/s for the eight devices of a node; one of 100 Gbit/s shared by all of them."""

CLUSTERS = {
    cluster.name: cluster
    for cluster in (
        Cluster("8-nvlink", 1, 8, preset("h100-sxm"), NVLINK, NVLINK, 2 * 10**12),
        Cluster("8-pcie", 1, 8, preset("rtx4090"), PCIE, PCIE, 512 * 10**9),
        Cluster("4x8-infiniband", 4, 8, preset("h100-sxm"), NVLINK, INFINIBAND, 2 * 10**12),
        Cluster("4x8-ethernet", 4, 8, preset("a100"), Link(20e-6, 20e9), ETHERNET, 1 * 10**12),
    )
}

FIELDS = ("like", "nodes", "devices", "card", "within", "between", "host_memory")
EXPECTED = (
    f"the name of a cluster ({', '.join(CLUSTERS)}), the path of a TOML file, or a dict such as {{'like': "
    "'4x8-infiniband', 'nodes': 128, 'card': 'a100-sxm', 'between': {'latency_s': 2e-5, 'bytes_per_s': 2e11}}"
)

Given = str | PathLike[str] | Mapping[str, Any] | Cluster | None


def given_cluster(given: Given) -> Cluster | None:
    """The cluster that `cluster=` describes, or None if it is None. Raises ArgumentError for anything else."""
    if given is None or isinstance(given, Cluster):
        return given
    if isinstance(given, Mapping):
        return _described(given)
    check_path("cluster", given, EXPECTED)
    if str(given) in CLUSTERS:
        return CLUSTERS[str(given)]
    if Path(given).suffix != ".toml":
        raise wrong_argument("cluster", str(given), EXPECTED, did_you_mean(str(given), CLUSTERS))
    try:
        return _described(tomllib.loads(Path(given).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ArgumentError(f"cluster={str(given)!r} cannot be read: {error}") from error


def one_node(size: int, rates: Rates) -> Cluster:
    """The default to plan for: one node with `size` devices like this machine's."""
    link = Link(rates.network_latency_s, rates.network_bytes_per_s)
    return Cluster(f"one node of {size} of this device", 1, size, None, link, link)


def _described(given: Mapping[str, Any]) -> Cluster:
    """A cluster from its fields; missing ones are taken from the cluster that it is `like`."""
    unknown = next((name for name in given if name not in FIELDS), None)
    if unknown is not None:
        raise ArgumentError(f"cluster has {unknown!r}; {did_you_mean(unknown, FIELDS, EXPECTED)}")
    like, card = given.get("like"), given.get("card")
    if like is not None and like not in CLUSTERS:
        raise ArgumentError(f"cluster has like={like!r}, which does not exist; expected {', '.join(CLUSTERS)}")
    if card is not None and card not in CARDS:
        raise ArgumentError(f"cluster has the unknown card {card!r}; expected one of {', '.join(CARDS)}")
    changes: dict[str, Any] = {name: given[name] for name in ("nodes", "devices") if name in given}
    changes |= {name: _link(name, given[name]) for name in ("within", "between") if name in given}
    if card is not None:
        changes["rates"] = preset(card)
    if "host_memory" in given:
        changes["host_bytes"] = _host_bytes(given["host_memory"])
    base = CLUSTERS[like] if like is not None else _without_base(changes)
    found = replace(base, **changes)
    rates = f" of {found.rates.name}" if found.rates else " of this device"
    return replace(found, name=f"{found.nodes} x {found.devices}{rates}")


def _without_base(changes: Mapping[str, Any]) -> Cluster:
    """A cluster from its own fields alone. Raises ArgumentError if a field without a default is missing."""
    needed = ["devices", "within", *(["between"] if changes.get("nodes", 1) != 1 else [])]
    missing = [name for name in needed if name not in changes]
    if missing:
        raise ArgumentError(f"cluster has no {missing[0]!r} and no 'like' to take it from; expected {EXPECTED}")
    return Cluster("", 1, 1, None, changes["within"], changes.get("between", changes["within"]))


def _link(name: str, given: Any) -> Link:
    if isinstance(given, Link):
        return given
    numbers = isinstance(given, Mapping) and all(type(value) in (int, float) for value in given.values())
    if not isinstance(given, Mapping) or set(given) != {"latency_s", "bytes_per_s"} or not numbers:
        raise wrong_argument(f"cluster[{name!r}]", given, "{'latency_s': 2e-5, 'bytes_per_s': 5e10}")
    return Link(float(given["latency_s"]), float(given["bytes_per_s"]))


def _host_bytes(given: Any) -> int:
    try:
        return parse_bytes(given)
    except ValueError as error:
        raise ArgumentError(f"cluster['host_memory']: {error}") from error
