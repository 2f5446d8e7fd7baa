"""Optimizer updates to try kernels on: rules, values of every kind, and what counts as equal bits."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from geminifx.runtime.isa.moments import BLOCK, stored_numel
from geminifx.runtime.kernels.device_updates import DeviceKernel
from geminifx.runtime.kernels.host_updates import HostKernel
from geminifx.runtime.kernels.moments import narrow
from geminifx.runtime.kernels.rounding import Draws, key_of
from geminifx.runtime.kernels.split_pairs import SplitPair, split
from geminifx.runtime.kernels.update_rules import AdamHyper, AdamMoments, Gradient, LionHyper, SgdHyper
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ADAMW = AdamHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, step=3)
ADAMS = (
    ADAMW,
    replace(ADAMW, decoupled=False),
    replace(ADAMW, weight_decay=0.0, step=1),
    replace(ADAMW, beta1=0.3, beta2=0.95, step=100_000),
    replace(ADAMW, beta1=0.0, beta2=0.0, eps=0.0),
    replace(ADAMW, beta2=2.0**-23, step=1),  # root is the largest float32 below 1, the hard divisor
)
SGDS = (
    SgdHyper(lr=0.1),
    SgdHyper(lr=0.1, momentum=0.9, first=True),
    SgdHyper(lr=0.1, momentum=0.9, weight_decay=0.01, dampening=0.2),
    SgdHyper(lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
)
LIONS = (
    LionHyper(lr=1e-3, beta1=0.9, beta2=0.99),
    LionHyper(lr=1e-2, beta1=0.95, beta2=0.98, weight_decay=0.3),
    LionHyper(lr=1e-2, beta1=0.0, beta2=0.0),
)
Hyper = AdamHyper | SgdHyper | LionHyper
RULES = ADAMS + SGDS + LIONS
SPECIAL = (
    0x00000000, 0x80000000,  # zeros
    0x00000001, 0x80000001, 0x007FFFFF, 0x00008000, 0x80008000,  # denormals, the last two ties
    0x3F808000, 0x3F818000, 0xBF808000, 0x3F807FFF, 0x3F808001,  # ties at odd and even, and beside one
    0x7F7F8000, 0x7F7FFFFF, 0xFF7FFFFF,  # rounded to infinity in bfloat16
    0x7F800000, 0xFF800000,  # infinities
    0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FFF8000,  # NaNs, some that carry over
)  # fmt: skip


def floats(bits: list[int]) -> Tensor:
    return torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32))


def any_bits(numel: int, seed: int) -> Tensor:
    """Float32 of any kind: special values and uniform bit patterns, half of them near 1."""
    source = np.random.default_rng(seed)
    bits = source.integers(0, 2**32, numel, dtype=np.uint32)
    usual = (bits & 0x80FFFFFF) | 0x3D000000
    picked = source.choice(np.array(SPECIAL, dtype=np.uint32), numel)
    bits = np.where(source.random(numel) < 0.5, usual, np.where(source.random(numel) < 0.3, picked, bits))
    return floats(bits)


def usual(numel: int, seed: int) -> Tensor:
    """Finite float32 of many sizes, as training has them."""
    source = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-9, 3, (numel,), generator=source)
    return torch.randn(numel, generator=source) * sizes


DRAWS = Draws(key_of(0, 3, "weight"), 2**32 - 500)
"""Of elements whose number passes the largest of 32 bits."""
STORED = {"exact": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}
"""How moments may be stored."""


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, except that the payload of a NaN is free."""
    a, b = a.float().detach(), b.float().detach()
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


def stored(values: Tensor, dtype: torch.dtype, *, squares: bool) -> Tensor:
    """A moment as it is stored."""
    made = torch.empty(stored_numel(dtype, values.numel()), dtype=dtype, device=values.device)
    narrow(values, made, squares=squares)
    return made


def same_stored(a: Tensor, b: Tensor) -> bool:
    """Equal codes and scales; which NaN a scale is is free."""
    if a.dtype != torch.uint8:
        return same(a, b)
    blocks = [moment.view(-1, stored_numel(torch.uint8, BLOCK)) for moment in (a, b)]
    codes, scales = zip(*((each[:, :BLOCK], each[:, BLOCK:].contiguous().view(torch.float32)) for each in blocks),
                        strict=True)  # fmt: skip
    return torch.equal(*codes) and same(*scales)


def same_pair(a: SplitPair, b: SplitPair) -> bool:
    halves = zip(a.tensors, b.tensors, strict=True)
    return all(torch.equal(one.view(torch.int16), other.view(torch.int16)) for one, other in halves)


class Problem:
    """Weights, a gradient and moments, stored as `moments` says, with zeros before and after them in their buffers.
    Where there are `draws`, masters are rounded by them."""

    def __init__(
        self,
        numel: int,
        seed: int,
        dtype: torch.dtype,
        offset: int = 0,
        values: Callable[[int, int], Tensor] = any_bits,
        moments: torch.dtype = torch.float32,
        draws: Draws | None = None,
    ) -> None:
        def place(values: Tensor) -> Tensor:
            beside = values.new_zeros(offset * (4 if values.dtype == torch.uint8 else 1))  # where a scale may begin
            return torch.cat([beside, values, beside])[beside.numel() : beside.numel() + values.numel()]

        pair = split(values(numel, seed))
        self.pair = SplitPair(place(pair.hi), place(pair.lo) if draws is None else None, draws)
        self.gradient = Gradient(place(values(numel, seed + 1).to(dtype)), 1.0 if seed % 2 else -0.37)
        mean = stored(values(numel, seed + 2), moments, squares=False)
        square = stored(values(numel, seed + 3).abs(), moments, squares=True)
        self.moments = AdamMoments(place(mean), place(square))

    def update(self, kernel: HostKernel | DeviceKernel, hyper: Hyper, threads: int = 1) -> None:
        rest = (threads,) if isinstance(kernel, HostKernel) else ()
        if isinstance(hyper, AdamHyper):
            kernel.adam(self.pair, self.gradient, self.moments, hyper, *rest)
        elif isinstance(hyper, LionHyper):
            kernel.lion(self.pair, self.gradient, self.moments.mean, hyper, *rest)
        else:
            buffer = self.moments.mean if hyper.momentum else None
            kernel.sgd(self.pair, self.gradient, buffer, hyper, *rest)

    def equals(self, other: "Problem") -> bool:
        return (
            same_pair(self.pair, other.pair)
            and same_stored(self.moments.mean, other.moments.mean)
            and same_stored(self.moments.square, other.moments.square)
        )
