"""Rates of known cards, from published peaks and the shares of them that are sustained.

A card is planned with these until it is measured, and plans for other cards can be made with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ...runtime.isa.moments import Moments, update_bytes
from .rates import Products, Rates, Updates

SHARE_BY_SIZE = ((0.5e-6, 0.12), (4e-6, 0.45), (30e-6, 0.85), (200e-6, 1.0))
"""Pairs: a matmul that would take this many seconds at the rate of large ones reaches this share of that rate."""

MEMORY_SHARE = 0.85
"""Share of the published device memory bandwidth that is sustained."""

PCIE_BYTES_PER_S = {3: 15.75e9, 4: 31.5e9, 5: 63e9}
"""Published bandwidth of 16 lanes, in each direction, by PCIe generation."""

ALONE_SHARE, BOTH_SHARE = 0.8, 0.5
"""Shares of that bandwidth that are sustained: by copies in one direction alone, and in each direction while both and
the host's updates run. 28 GB/s were measured with H100 and 40 GB/s with H200, both on PCIe 5."""

PASSING = 1.4
"""Bytes that copies take through the host's memory for each byte that its updates lack: 264e9 per second were measured
at 190 GB/s."""

CORE_PARAMS_PER_S: Mapping[Moments, float] = {"exact": 0.31e9, "bf16": 0.39e9, "int8": 0.44e9}
"""Parameters per second that one core updates, by how moments are stored: 16 cores reach 5e9, 6.2e9 and 7e9."""

TORCH_SHARE = 0.6
"""Speed of a torch optimizer on the host, relative to our kernel."""


@dataclass(frozen=True)
class Host:
    """A host's cores and memory bandwidth."""

    cores: int
    bytes_per_s: float


DESKTOP, SERVER = Host(8, 40e9), Host(16, 190e9)
"""Two channels of DDR4; a server's share for one of its GPUs."""


@dataclass(frozen=True)
class Card:
    """A card's published peaks in FLOP/s, without sparsity and accumulating in float32, by dtype.

    `product_share` of the bf16 and fp16 peaks is reached by large matmuls in training steps. For H200 it is measured
    (800e12 FLOP/s; many in a row, which power limits, reach 660e12), for H100 SXM taken over from it, for others
    estimated.
    `network_bytes_per_s` is what a card receives from another one of its kind.
    """

    names: tuple[str, ...]
    bf16: float
    fp16: float
    fp32: float
    memory_bytes_per_s: float
    pcie: int
    product_share: float
    network_bytes_per_s: float
    host: Host = SERVER


CARDS = {
    "rtx2060": Card(("RTX 2060",), 6.5e12, 26e12, 6.5e12, 336e9, 3, 0.85, 6e9, DESKTOP),
    "rtx3090": Card(("RTX 3090",), 71e12, 71e12, 35.6e12, 936e9, 4, 0.85, 12e9, DESKTOP),
    "rtx4090": Card(("RTX 4090",), 165e12, 165e12, 82.6e12, 1008e9, 4, 0.9, 12e9, DESKTOP),
    "v100": Card(("V100-PCIE-16GB", "V100-PCIE-32GB"), 14e12, 112e12, 14e12, 900e9, 3, 0.75, 10e9),
    "v100-sxm": Card(("V100-SXM2-16GB", "V100-SXM2-32GB"), 15.7e12, 125e12, 15.7e12, 900e9, 3, 0.75, 110e9),
    "a100": Card(("A100 80GB PCIe",), 312e12, 312e12, 19.5e12, 1935e9, 4, 0.7, 20e9),
    "a100-sxm": Card(("A100-SXM4-80GB",), 312e12, 312e12, 19.5e12, 2039e9, 4, 0.8, 230e9),
    "h100": Card(("H100 PCIe",), 756e12, 756e12, 51e12, 2000e9, 5, 0.6, 40e9),
    "h100-sxm": Card(("H100 80GB HBM3",), 989e12, 989e12, 67e12, 3350e9, 5, 0.8, 340e9),
    "h200": Card(("H200",), 989e12, 989e12, 67e12, 4800e9, 5, 0.8, 340e9),
}
"""Known cards by the name that plans ask for; `names` are the driver's, without a prefix of `MAKERS`."""

MAKERS = ("NVIDIA ", "Tesla ", "GeForce ")

FP32_SHARE = 0.8
KERNEL_S, LAUNCH_S = 1.5e-6, 30e-6
"""The least that an operator takes on the device, and what launching one takes a server's processor: a step of
OPT-1.3B x 1 that waits for nothing else took 35 us for each on an H200's machine (0.060 s, docs/measured.md)."""
NETWORK_LATENCY_S = 20e-6


def preset(name: str) -> Rates:
    """The rates of a known card. Raises KeyError for others."""
    card, host = CARDS[name], CARDS[name].host
    pcie = PCIE_BYTES_PER_S[card.pcie]
    memory = card.memory_bytes_per_s * MEMORY_SHARE

    def updates(moments: Moments) -> Updates:
        each_bytes, most = update_bytes(moments), host.cores * CORE_PARAMS_PER_S[moments]
        return Updates(min(host.bytes_per_s / each_bytes, most), memory / each_bytes)

    exact = updates("exact")
    return Rates(
        name=f"the preset {name}",
        bf16=_products(card.bf16 * card.product_share),
        fp16=_products(card.fp16 * card.product_share),
        fp32=_products(card.fp32 * FP32_SHARE),
        memory_bytes_per_s=memory,
        kernel_s=KERNEL_S,
        launch_s=LAUNCH_S,
        up_bytes_per_s=ALONE_SHARE * pcie,
        down_bytes_per_s=ALONE_SHARE * pcie,
        both_bytes_per_s=BOTH_SHARE * pcie,
        host_params_per_s=exact.host_params_per_s,
        passing_bytes_per_s=PASSING * host.bytes_per_s,
        torch_params_per_s=TORCH_SHARE * exact.host_params_per_s,
        device_params_per_s=exact.device_params_per_s,
        network_bytes_per_s=card.network_bytes_per_s,
        network_latency_s=NETWORK_LATENCY_S,
        overlaps=True,
        bf16_moments=updates("bf16"),
        int8_moments=updates("int8"),
    )


def card_named(gpu: str) -> str | None:
    """The preset of the card that the driver calls `gpu`, or None, as for laptop or smaller-memory variants."""
    for maker in MAKERS:
        gpu = gpu.removeprefix(maker)
    return next((name for name, card in CARDS.items() if gpu in card.names), None)


def _products(flops_per_s: float) -> Products:
    return Products(
        tuple(seconds * flops_per_s for seconds, _ in SHARE_BY_SIZE),
        tuple(share * flops_per_s for _, share in SHARE_BY_SIZE),
    )
