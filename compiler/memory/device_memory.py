"""How much of a GPU's memory this process holds, and how much it may have: others may use the GPU, too.

CUDA tells what is in use on the whole GPU, and of this process alone what torch's allocator has. What else it holds,
the driver's context and libraries, looks like memory of others.
"""

from dataclasses import dataclass

import torch

HEADROOM_BYTES = 192 * 2**20
"""What CUDA's context may still grow by while training, as kernels and library handles are loaded."""

CONTEXT_BYTES = 2**30
"""The most that context and libraries are taken to hold: what is in use beyond that is other processes'."""


@dataclass(frozen=True)
class DeviceMemory:
    """A GPU's memory as it was when it was measured.

    Fields:
        total_bytes: the GPU's.
        own_bytes: what this process held outside of torch's allocator; on a GPU that it had for itself all that was in
            use there, on another at most `CONTEXT_BYTES`.
        available_bytes: what the whole process may hold: what was free, and what it held already.
    """

    device: torch.device
    total_bytes: int
    own_bytes: int
    available_bytes: int

    @classmethod
    def measured(cls, device: torch.device) -> "DeviceMemory":
        _load_libraries(device)
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        own = min(max(0, total - free - reserved), CONTEXT_BYTES)
        return cls(device, total, own, free + reserved + own)

    @property
    def others_bytes(self) -> int:
        return self.total_bytes - self.available_bytes

    @property
    def reserve_bytes(self) -> int:
        """What the process may come to hold outside of torch's allocator."""
        return self.own_bytes + HEADROOM_BYTES

    def room_bytes(self) -> int:
        """What the whole process may hold now, beside what others have come to hold."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) + self._outside_bytes(free)

    def peak_bytes(self) -> int:
        """The process's highest device memory since torch's peak statistics were reset. Of what is in use outside of
        its allocator no more is counted than the process may come to hold: others may have come."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return torch.cuda.max_memory_reserved(self.device) + self._outside_bytes(free)

    def _outside_bytes(self, free: int) -> int:
        """What the process holds outside of torch's allocator, as far as the driver tells."""
        outside = max(0, self.total_bytes - free - torch.cuda.memory_reserved(self.device))
        return min(outside, self.reserve_bytes)


def _load_libraries(device: torch.device) -> None:
    """Make the libraries that every model uses take their device memory now, where it is measured."""
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.ones(256, 256, dtype=dtype, device=device)
        (a @ a).sum().item()
    del a
    torch.cuda.empty_cache()
