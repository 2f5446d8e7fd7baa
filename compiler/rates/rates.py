"""Rates: how fast a machine is; the planner's clock goes by them."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from math import log

import numpy as np
import torch

from ...runtime.isa.moments import Moments, update_bytes

STREAM_LAUNCH_S = 1.5e-3
"""Seconds the launching thread needs to stream one chunk's state through the device, in pieces."""

CORRECTED = ", corrected by measured steps"

SUM_BYTES = 10
"""Bytes read and written to add one bfloat16 gradient to a float32 sum."""


@dataclass(frozen=True)
class Products:
    """Sustained matmul rates in one dtype: `flops_per_s[i]` for matmuls of `flop[i]` FLOP; sizes ascend."""

    flop: tuple[float, ...]
    flops_per_s: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.flop, self.flop[1:], strict=False))
        if not self.flop or len(self.flop) != len(self.flops_per_s) or not rising:
            raise ValueError(
                f"products of {self.flop} FLOP at {self.flops_per_s} FLOP/s; expected increasing sizes and one rate "
                "for each"
            )
        _check_positive(self, self.flop + self.flops_per_s)

    @classmethod
    def of_any_size(cls, flops_per_s: float) -> "Products":
        return cls((1.0,), (flops_per_s,))

    def seconds(self, flop: float) -> float:
        """Seconds of one matmul. Rates are interpolated over the logarithm of the size."""
        if flop <= 0:
            return 0.0
        return flop / float(np.interp(log(flop), [log(size) for size in self.flop], self.flops_per_s))

    def slowed(self, factor: float) -> "Products":
        return Products(self.flop, tuple(rate / factor for rate in self.flops_per_s))


@dataclass(frozen=True)
class Slowdown:
    """Factors by which measured times exceed modelled ones: compute, copies up and down, and updates on the host."""

    compute: float = 1.0
    up: float = 1.0
    down: float = 1.0
    host: float = 1.0


@dataclass(frozen=True)
class Updates:
    """Parameters per second that our kernels update with AdamW: on the host, with no copies, and on the device."""

    host_params_per_s: float
    device_params_per_s: float

    def __post_init__(self) -> None:
        _check_positive(self, (self.host_params_per_s, self.device_params_per_s))

    def slowed(self, by: Slowdown) -> "Updates":
        return Updates(self.host_params_per_s / by.host, self.device_params_per_s / by.compute)


@dataclass(frozen=True)
class Rates:
    """How fast a machine is; `name` says which one, and where the numbers come from.

    Fields:
        bf16, fp16, fp32: sustained matmul rates in that dtype. Other dtypes use float32's.
        memory_bytes_per_s: what operators read and write of device memory.
        kernel_s: the least time that any operator takes on the device.
        launch_s: what the launching thread needs for each operator.
        up_bytes_per_s, down_bytes_per_s: copies to the device and to the host, alone.
        both_bytes_per_s: copies in each direction while both and the host's updates run.
        host_params_per_s: parameters that our kernel updates on the host, with no copies.
        passing_bytes_per_s: copied bytes, in either direction, that keep the host's updates waiting for a second: both
            share the bandwidth of its memory.
        torch_params_per_s: parameters that a torch optimizer updates on the host, gradients and casts included.
        device_params_per_s: parameters that are updated on the device.
        network_bytes_per_s, network_latency_s: bytes a process receives from the others, and the fixed cost of each
            exchange.
        overlaps: whether copies, our updates and exchanges overlap with compute.
        bf16_moments, int8_moments: update rates with moments in that format; by default scaled from those of exact
            moments, by bytes.
    """

    name: str
    bf16: Products
    fp16: Products
    fp32: Products
    memory_bytes_per_s: float
    kernel_s: float
    launch_s: float
    up_bytes_per_s: float
    down_bytes_per_s: float
    both_bytes_per_s: float
    host_params_per_s: float
    passing_bytes_per_s: float
    torch_params_per_s: float
    device_params_per_s: float
    network_bytes_per_s: float
    network_latency_s: float
    overlaps: bool
    bf16_moments: Updates | None = None
    int8_moments: Updates | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name.endswith("_per_s"):
                _check_positive(field.name, (getattr(self, field.name),))
            elif field.name.endswith("_s") and not getattr(self, field.name) >= 0:
                raise ValueError(f"{field.name} is {getattr(self, field.name)!r}; expected seconds, 0 or more")

    def products(self, dtype: torch.dtype) -> Products:
        return {torch.bfloat16: self.bf16, torch.float16: self.fp16}.get(dtype, self.fp32)

    def updates(self, moments: Moments) -> Updates:
        """Rates of AdamW updates of bfloat16 weights with moments in this format."""
        measured = {"bf16": self.bf16_moments, "int8": self.int8_moments}.get(moments)
        faster = update_bytes("exact") / update_bytes(moments)
        return measured or Updates(self.host_params_per_s * faster, self.device_params_per_s * faster)

    def with_slower_products(self, factor: float) -> "Rates":
        """The same machine, on which matrix products take `factor` times as long."""
        products = {name: getattr(self, name).slowed(factor) for name in ("bf16", "fp16", "fp32")}
        return replace(self, **products)

    def slowed(self, by: Slowdown) -> "Rates":
        """The same machine, corrected by measured slowdowns."""
        return replace(
            self.with_slower_products(by.compute),
            name=f"{self.name.removesuffix(CORRECTED)}{CORRECTED}",
            memory_bytes_per_s=self.memory_bytes_per_s / by.compute,
            kernel_s=self.kernel_s * by.compute,
            launch_s=self.launch_s * by.compute,
            device_params_per_s=self.device_params_per_s / by.compute,
            up_bytes_per_s=self.up_bytes_per_s / by.up,
            down_bytes_per_s=self.down_bytes_per_s / by.down,
            both_bytes_per_s=self.both_bytes_per_s / max(by.up, by.down),
            host_params_per_s=self.host_params_per_s / by.host,
            passing_bytes_per_s=self.passing_bytes_per_s / by.host,
            torch_params_per_s=self.torch_params_per_s / by.host,
            bf16_moments=self.bf16_moments and self.bf16_moments.slowed(by),
            int8_moments=self.int8_moments and self.int8_moments.slowed(by),
        )

    @property
    def host_sums_per_s(self) -> float:
        """Gradient elements per second that the host accumulates: bound by its memory, as updates are."""
        return self.host_params_per_s * update_bytes("exact") / SUM_BYTES

    @property
    def device_sums_per_s(self) -> float:
        """Gradient elements per second that the device accumulates."""
        return self.memory_bytes_per_s / SUM_BYTES

    def exchange_s(self, count: int, received_bytes: int) -> float:
        """Seconds of `count` exchanges in which a process receives `received_bytes` in total."""
        return count * self.network_latency_s + received_bytes / self.network_bytes_per_s


def _check_positive(what: object, rates: tuple[float, ...]) -> None:
    for rate in rates:
        if not rate > 0:
            raise ValueError(f"{what}: {rate!r}; expected a number above 0")


def slowest(found: Iterable[Rates]) -> Rates:
    """The rates of the machine that the others wait for."""
    return min(found, key=lambda rates: (rates.bf16.flops_per_s[-1], rates.both_bytes_per_s, rates.host_params_per_s))


_ANY, _CORE = float("inf"), Products.of_any_size(50e9)
ARENA = Rates(
    "the arena in RAM", bf16=_CORE, fp16=_CORE, fp32=_CORE, memory_bytes_per_s=8e9, kernel_s=0.0, launch_s=5e-6,
    up_bytes_per_s=8e9, down_bytes_per_s=8e9, both_bytes_per_s=8e9, host_params_per_s=_ANY, passing_bytes_per_s=_ANY,
    torch_params_per_s=_ANY, device_params_per_s=_ANY, network_bytes_per_s=1e9, network_latency_s=1e-4, overlaps=False,
)  # fmt: skip
"""One CPU: both tiers are the same memory, and the same cores update either."""
