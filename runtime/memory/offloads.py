"""Activations that wait on the host for their backward, and the pinned buffers that hold them."""

import weakref
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from ..isa.errors import BudgetError
from ..isa.torch_private import unmetered
from .hardware import Hardware
from .stats import Stats
from .streams import Arrival, CopyEngine


@dataclass(eq=False)
class _Buffer:
    """Host memory, in use while the tensor that a program has of it lives. `arrival` is that of its last copy."""

    memory: Tensor
    user: weakref.ref[Tensor]
    arrival: Arrival = None


class Offloads:
    """The instructions that offload and reload activations. Buffers are kept between steps, because pinning is slow.

    A program that is abandoned half way drops its tensors, which frees the buffers without further action.
    """

    def __init__(self, hardware: Hardware, copies: CopyEngine, stats: Stats) -> None:
        self.hardware = hardware
        self.copies = copies
        self.stats = stats
        self._free: dict[int, list[_Buffer]] = defaultdict(list)  # by size in bytes
        self._taken: dict[int, _Buffer] = {}  # by address

    @property
    def used_bytes(self) -> int:
        """The bytes of host memory that hold activations of programs under way."""
        return sum(buffer.memory.nbytes for buffer in self._taken.values() if buffer.user() is not None)

    # -- instructions --------------------------------------------------------------------------------------

    def offload(self, value: Tensor) -> Tensor:
        """Starts to copy a value to the host. Raises BudgetError if the host is full."""
        memory = self._take(value.nbytes)
        host = memory.view(value.dtype).as_strided(value.shape, value.stride())
        # Safe to reuse the memory: work launched since has waited for an earlier reload from it, and an earlier offload
        # into it comes first on the stream of such copies.
        arrival = self.copies.to_host(host, value)
        self._taken[host.data_ptr()] = _Buffer(memory, weakref.ref(host), arrival)
        self.stats.moved(to_host=value.nbytes)
        return host

    def depart(self, value: Tensor, host: Tensor) -> None:
        """Ends an offload: the program then drops `value`, whose memory may be reused by what is launched later."""
        self.copies.arrive(self._taken[host.data_ptr()].arrival)

    def reload(self, host: Tensor) -> Tensor:
        """Starts to copy a value back to the device."""
        value = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=self.hardware.device)
        self._taken[host.data_ptr()].arrival = self.copies.to_device(value, host)
        self.stats.moved(to_device=host.nbytes)
        return value

    def arrive(self, value: Tensor, host: Tensor) -> Tensor:
        """Ends a reload: `value` is read from now on, and the program drops `host`."""
        self.copies.arrive(self._taken[host.data_ptr()].arrival)
        return value

    # -- memory --------------------------------------------------------------------------------------------

    def _take(self, num_bytes: int) -> Tensor:
        if not self._free[num_bytes]:
            self._collect()
        if self._free[num_bytes]:
            return self._free[num_bytes].pop().memory
        with unmetered():
            memory = self.hardware.zeros(num_bytes, torch.uint8, on_device=False, pinned=True)
        try:
            self._book(memory)
        except BudgetError:
            self.drop()  # the free buffers are of other sizes
            self._book(memory)
        return memory

    def _book(self, memory: Tensor) -> None:
        self.hardware.host_tier.watch(memory.untyped_storage(), "an offloaded activation")

    def _collect(self) -> None:
        """Takes back the buffers that programs have dropped."""
        for address in [address for address, buffer in self._taken.items() if buffer.user() is None]:
            buffer = self._taken.pop(address)
            self._free[buffer.memory.nbytes].append(buffer)

    def drop(self) -> None:
        """Returns the buffers that are not in use to the host."""
        self._collect()
        for buffer in (buffer for free in self._free.values() for buffer in free):
            self.copies.finish(buffer.arrival)  # an abandoned step may have left a copy under way
        self._free.clear()
