"""Copies between the tiers, and host memory that they run at full speed from.

On CUDA copies run on streams of their own, ordered against the compute stream by events; the launching
thread never waits for one except in `finish`. Elsewhere a copy is done when its call returns.
"""

import weakref
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

Arrival: TypeAlias = torch.cuda.Event | None
"""What tells that a copy is done; None where it is done already."""


class CopyEngine(Protocol):
    """Copies equal dtypes between the tiers."""

    def to_device(self, target: Tensor, source: Tensor) -> Arrival:
        """Start a copy that may overwrite `target` once everything launched so far is done."""

    def to_host(self, target: Tensor, source: Tensor) -> Arrival:
        """Start a copy of what everything launched so far makes of `source`."""

    def arrive(self, arrival: Arrival) -> None:
        """Let everything launched from now on see the copy's result."""

    def finish(self, arrival: Arrival) -> None:
        """Block the calling thread until the copy is done."""


class ImmediateCopies:
    """The engine of a machine without an accelerator."""

    def to_device(self, target: Tensor, source: Tensor) -> Arrival:
        target.copy_(source)
        return None

    def to_host(self, target: Tensor, source: Tensor) -> Arrival:
        target.copy_(source)
        return None

    def arrive(self, arrival: Arrival) -> None:
        return None

    def finish(self, arrival: Arrival) -> None:
        return None


class CudaCopies:
    """One stream per direction, so that both directions of the bus are busy at once."""

    def __init__(self, device: torch.device) -> None:
        self.up = torch.cuda.Stream(device)
        self.down = torch.cuda.Stream(device)

    def to_device(self, target: Tensor, source: Tensor) -> Arrival:
        return self._copy(self.up, target, source)

    def to_host(self, target: Tensor, source: Tensor) -> Arrival:
        return self._copy(self.down, target, source)

    def _copy(self, stream: torch.cuda.Stream, target: Tensor, source: Tensor) -> Arrival:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            arrival = torch.cuda.Event()
            arrival.record(stream)
        return arrival

    def arrive(self, arrival: Arrival) -> None:
        if arrival is not None:
            torch.cuda.current_stream().wait_event(arrival)

    def finish(self, arrival: Arrival) -> None:
        if arrival is not None:
            arrival.synchronize()


def host_buffer(numel: int, dtype: torch.dtype, pinned: bool) -> Tensor:
    """Zeroed host memory of exactly this size, registered with CUDA where `pinned`.

    torch's own pinned memory rounds sizes up to powers of two and pins page by page; touching the pages
    first, in parallel, and registering them afterwards is exact and several times faster.
    """
    buffer = torch.empty(numel, dtype=dtype).zero_()
    if pinned and numel:
        runtime, address = torch.cuda.cudart(), buffer.data_ptr()
        status = int(runtime.cudaHostRegister(address, buffer.nbytes, 0))
        if status != 0:
            raise MemoryError(
                f"CUDA cannot pin {buffer.nbytes:,} bytes of host memory (error {status}); raise the limit of "
                "locked memory (ulimit -l) or lower host_budget"
            )
        weakref.finalize(buffer.untyped_storage(), runtime.cudaHostUnregister, address)
    return buffer
