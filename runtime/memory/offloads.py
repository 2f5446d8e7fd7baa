"""Activations that wait for their backward on the host, and the memory there that they wait in."""

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
    """Memory on the host; in use as long as the tensor lives that a program has of it. `arrival` is its last copy's."""

    memory: Tensor
    user: weakref.ref[Tensor]
    arrival: Arrival = None


class Offloads:
    """The instructions that move activations, over buffers that are kept between steps: pinning takes long.

    A program that is given up half way drops its tensors, and with them the buffers are free: nobody has to say so.
    """

    def __init__(self, hardware: Hardware, copies: CopyEngine, stats: Stats) -> None:
        self.hardware = hardware
        self.copies = copies
        self.stats = stats
        self._free: dict[int, list[_Buffer]] = defaultdict(list)  # by their bytes
        self._taken: dict[int, _Buffer] = {}  # by their addresses

    @property
    def used_bytes(self) -> int:
        """Of the host's memory, what programs under way have activations in."""
        return sum(buffer.memory.nbytes for buffer in self._taken.values() if buffer.user() is not None)

    # -- instructions --------------------------------------------------------------------------------------

    def offload(self, value: Tensor) -> Tensor:
        """Start to copy a value to the host. Raises BudgetError where the host is full."""
        memory = self._take(value.nbytes)
        host = memory.view(value.dtype).as_strided(value.shape, value.stride())
        # A copy into the same memory before this one has been waited for by what was launched since, or comes before it
        # on the stream of such copies.
        arrival = self.copies.to_host(host, value)
        self._taken[host.data_ptr()] = _Buffer(memory, weakref.ref(host), arrival)
        self.stats.moved(to_host=value.nbytes)
        return host

    def depart(self, value: Tensor, host: Tensor) -> None:
        """The program lets go of the value behind this; what is launched from here on may use its memory."""
        self.copies.arrive(self._taken[host.data_ptr()].arrival)

    def reload(self, host: Tensor) -> Tensor:
        """Start to copy a value back."""
        value = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=self.hardware.device)
        self._taken[host.data_ptr()].arrival = self.copies.to_device(value, host)
        self.stats.moved(to_device=host.nbytes)
        return value

    def arrive(self, value: Tensor, host: Tensor) -> Tensor:
        """From here on the value is read; the program lets go of `host`."""
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
            self.drop()  # what is free is of other sizes
            self._book(memory)
        return memory

    def _book(self, memory: Tensor) -> None:
        self.hardware.host_tier.watch(memory.untyped_storage(), "an offloaded activation")

    def _collect(self) -> None:
        """Take back what programs have let go of."""
        for address in [address for address, buffer in self._taken.items() if buffer.user() is None]:
            buffer = self._taken.pop(address)
            self._free[buffer.memory.nbytes].append(buffer)

    def drop(self) -> None:
        """Give the memory that is not in use back to the host."""
        self._collect()
        for buffer in (buffer for free in self._free.values() for buffer in free):
            self.copies.finish(buffer.arrival)  # a step that was given up may have left it under way
        self._free.clear()
