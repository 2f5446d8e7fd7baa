"""Updates one range of a training state, on whichever side it lies, with the fastest kernel available."""

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from ..isa.layout import ChunkLayout
from ..kernels import whole_updates
from ..kernels.device_updates import DeviceKernel
from ..kernels.host_updates import HostKernel, Pieces
from ..kernels.moments import narrow, widened
from ..kernels.split_pairs import SplitPair, join, split
from ..kernels.update_rules import (
    AdafactorHyper,
    AdamHyper,
    AdamMoments,
    Gradient,
    LionHyper,
    MuonHyper,
    SgdHyper,
)
from . import lion
from .states import SQUARES, Hyper, Range, StateSlice

Kernel = HostKernel | DeviceKernel

PIECE = 2**20
"""Elements that are updated at a time where no kernel of ours reads them as they are stored; some 40 MB on a device."""

LAUNCHER_CORES = 2
"""Cores left to the thread that launches the device's work and to the driver's thread."""


def cores() -> set[int]:
    """The host's cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def host_threads(sharing: int) -> int:
    """The number of threads for updates on the host, where `sharing` processes share the machine."""
    return max(1, len(cores()) // sharing - LAUNCHER_CORES)


class UpdateKernels:
    """The kernels of both sides.

    Split pairs are updated by the host's and the device's kernels, which agree bit for bit; other masters by
    `torch.optim`'s fused functions. Moments stored in a narrower format than the kernel reads are widened for the
    update and narrowed again after it, `PIECE` elements at a time. `sharing` is the number of processes on this
    machine, which divide its cores.
    """

    def __init__(self, device: torch.device, sharing: int = 1) -> None:
        self.threads = host_threads(sharing)
        self._host = HostKernel()
        self._device = DeviceKernel() if device.type == "cuda" else None

    def update(self, layout: ChunkLayout, part: StateSlice, gradient: Gradient, elements: Range,
               into: StateSlice | None = None) -> None:  # fmt: skip
        """Updates `part`, the slice at `elements` of a chunk's state: in place, or `into` another place such as the
        spare. On CUDA it runs on the current stream and waits for nothing."""
        if elements.shape is not None:
            _update_whole(layout, part, gradient, elements)
            return
        takes = self._takes(layout, part)
        if into is not None and not (takes and layout.splits):
            for target, source in zip(into.tensors, part.tensors, strict=True):
                target.copy_(source)
            part, into = into, None
        if takes:
            self._update(layout, part, gradient, elements, into)
            return
        for piece in elements.pieces(PIECE):
            cut = slice(piece.start - elements.start, piece.end - elements.start)
            few, numel = part.cut(cut), piece.end - piece.start
            values = tuple(
                widened(moment, numel, layout.master_dtype, squares=number == SQUARES)
                for number, moment in enumerate(few.moments)
            )
            self._update(
                layout, replace(few, moments=values), replace(gradient, values=gradient.values[cut]), piece, None
            )
            for number, moment in enumerate(few.moments):
                narrow(values[number], moment, squares=number == SQUARES)

    def _takes(self, layout: ChunkLayout, part: StateSlice) -> bool:
        """Whether the kernel reads the moments as they are stored."""
        kernel = self._device if part.weights.is_cuda else self._host
        exact = all(moment.dtype == layout.master_dtype for moment in part.moments)
        return exact or (layout.splits and kernel is not None and kernel.widens)

    def add(self, total: Tensor, gradient: Gradient, *, fresh: bool) -> None:
        """Adds a gradient times its scale to `total`, on the side where that lies; if `fresh`, overwrites it."""
        if total.device.type == "cpu" and total.dtype == torch.float32:
            self._host.add(total, gradient, self.threads, fresh=fresh)
        elif fresh:
            total.copy_(gradient.values).mul_(gradient.scale)
        else:
            total.add_(gradient.values.to(total.device), alpha=gradient.scale)

    def _update(self, layout: ChunkLayout, part: StateSlice, gradient: Gradient, elements: Range,
                into: StateSlice | None) -> None:  # fmt: skip
        hyper = elements.hyper
        if not layout.splits:
            for cut in [slice(None)] if part.weights.is_cuda else _pieces_of_parameters(layout, elements):
                _update_master(part.cut(cut), replace(gradient, values=gradient.values[cut]), hyper)
            return
        pair, moments = SplitPair(part.weights, part.rest, elements.draws), part.moments
        if isinstance(hyper, SgdHyper) and not hyper.momentum:
            moments = ()
        kernel: Kernel = self._host
        options: tuple[Any, ...] = (hyper, self.threads, _pieces(into, len(moments), elements))
        if self._device is not None and part.weights.is_cuda:
            kernel, options = self._device, (hyper,)
        if isinstance(hyper, AdamHyper):
            kernel.adam(pair, gradient, AdamMoments(*moments), *options)
        elif isinstance(hyper, LionHyper):
            kernel.lion(pair, gradient, *moments, *options)
        elif isinstance(hyper, SgdHyper):
            kernel.sgd(pair, gradient, moments[0] if moments else None, *options)


def _update_whole(layout: ChunkLayout, part: StateSlice, gradient: Gradient, elements: Range) -> None:
    """Updates a whole parameter (Muon, Adafactor), on the device, in the bytes that `isa.whole_updates` counts."""
    if layout.splits:
        pair = SplitPair(part.weights, part.rest, elements.draws)
        master = join(pair)
        _update_whole_master(master, part, gradient, elements)
        split(master, pair)
        return
    master = part.weights if part.rest is None else part.rest
    _update_whole_master(master, part, gradient, elements)
    if part.rest is not None:
        part.weights.copy_(master)


def _update_whole_master(master: Tensor, part: StateSlice, gradient: Gradient, elements: Range) -> None:
    """Updates a master and its moments. No name here holds the gradient in the master's dtype, so that its memory is
    free once the rule has run."""
    shape, hyper = elements.shape, elements.hyper
    assert shape is not None
    numel = math.prod(shape)
    whole, values = master[:numel].view(shape), replace(gradient, values=gradient.values[:numel].view(shape))
    if isinstance(hyper, MuonHyper):
        momentum = widened(part.moments[0], numel, master.dtype, squares=False)
        whole_updates.muon(whole, _scaled(values, master.dtype), momentum.view(shape), hyper)
        narrow(momentum, part.moments[0], squares=False)
    else:
        assert isinstance(hyper, AdafactorHyper)
        whole_updates.adafactor(whole, _scaled(values, master.dtype), part.moments, hyper)


def _scaled(gradient: Gradient, dtype: torch.dtype) -> Tensor:
    """A gradient times its scale; a view of its values where that changes nothing."""
    values = gradient.values.to(dtype)
    return values * gradient.scale if isinstance(gradient.scale, Tensor) or gradient.scale != 1.0 else values


def _pieces(into: StateSlice | None, moments: int, elements: Range) -> Pieces | None:
    """The tensors for a host kernel that reads `moments` moments to write to; None to update in place."""
    return None if into is None else (SplitPair(into.weights, into.rest, elements.draws), into.moments[:moments])


def _pieces_of_parameters(layout: ChunkLayout, elements: Range) -> Iterator[slice]:
    """Slices of a range that belong to one parameter each, of at most `PIECE` elements, so that their gradients in
    float32 stay in the caches. torch's host kernels round the last few elements of a tensor differently, so bits match
    torch's only if no two parameters share a slice."""
    for slot in layout.slots:
        start = max(slot.offset, elements.start) - elements.start
        end = min(slot.offset + slot.numel, elements.end) - elements.start
        for first in range(start, end, PIECE):
            yield slice(first, min(first + PIECE, end))


def _update_master(part: StateSlice, gradient: Gradient, hyper: Hyper) -> None:
    """Updates a master that is kept as a whole, and the weights that are rounded from it."""
    master = part.weights if part.rest is None else part.rest
    grad, moments = _scaled(gradient, master.dtype), part.moments
    if isinstance(hyper, AdamHyper):
        # The count before this step: torch adds one before it updates.
        done = torch.full((), hyper.step - 1, dtype=torch.float32, device=master.device)
        adam(
            [master], [grad], *([moment] for moment in moments), [], [done], fused=True, amsgrad=False, maximize=False,
            lr=hyper.lr, beta1=hyper.beta1, beta2=hyper.beta2, eps=hyper.eps, weight_decay=hyper.weight_decay,
            decoupled_weight_decay=hyper.decoupled,
        )  # fmt: skip
    elif isinstance(hyper, LionHyper):
        group = {"lr": hyper.lr, "betas": (hyper.beta1, hyper.beta2), "weight_decay": hyper.weight_decay}
        lion.update(master, grad, moments[0], group)
    elif isinstance(hyper, SgdHyper):
        # Without momentum there is no buffer; with it, the first update does not read one.
        buffers = [moments[0] if hyper.momentum and not hyper.first else None]
        sgd(
            [master], [grad], buffers, fused=True, maximize=False, lr=hyper.lr, weight_decay=hyper.weight_decay,
            momentum=hyper.momentum, dampening=hyper.dampening, nesterov=hyper.nesterov,
        )  # fmt: skip
        if hyper.momentum and hyper.first:
            moments[0].copy_(buffers[0])
    if part.rest is not None:
        part.weights.copy_(master)
