"""How much of a GPU's memory this process holds, and how much it may hold beside other processes.

CUDA reports what is in use on the whole GPU, and torch's allocator what it holds for this process. The rest of what the
process holds, the driver's context and libraries, cannot be told from memory of other processes.
"""

from dataclasses import dataclass

import torch

HEADROOM_BYTES = 320 * 2**20
"""How much CUDA's context may still grow during training, as kernels and library handles are loaded: by 250 MB in steps
of 18 billion parameters with moments of 8 bits and 121 GB of page-locked host memory (H200, torch 2.11)."""

CONTEXT_BYTES = 2**30
"""The most that context and libraries are assumed to hold; anything in use beyond that belongs to other processes."""


@dataclass(frozen=True)
class DeviceMemory:
    """A GPU's memory at the time of measuring.

    Fields:
        total_bytes: the GPU's memory.
        own_bytes: memory this process held outside torch's allocator: everything else in use on the GPU, but at most
            `CONTEXT_BYTES`, as the rest is other processes'.
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
        reserved, _ = _reserved_bytes(device)
        own = min(max(0, total - free - reserved), CONTEXT_BYTES)
        return cls(device, total, own, free + reserved + own)

    @property
    def others_bytes(self) -> int:
        return self.total_bytes - self.available_bytes

    @property
    def reserve_bytes(self) -> int:
        """The most that the process is expected to hold outside torch's allocator."""
        return self.own_bytes + HEADROOM_BYTES

    def room_bytes(self) -> int:
        """What the whole process may hold now, given what others have taken since."""
        free, _ = torch.cuda.mem_get_info(self.device)
        reserved, _ = _reserved_bytes(self.device)
        return free + reserved + self._outside_bytes(free, reserved)

    def peak_bytes(self) -> int:
        """The process's peak device memory since torch's peak statistics were reset. Outside the allocator it counts at
        most `reserve_bytes`, as anything beyond that is other processes'."""
        free, _ = torch.cuda.mem_get_info(self.device)
        reserved, most = _reserved_bytes(self.device)
        return most + self._outside_bytes(free, reserved)

    def _outside_bytes(self, free: int, reserved: int) -> int:
        """What the process holds outside torch's allocator, as far as the driver tells."""
        return min(max(0, self.total_bytes - free - reserved), self.reserve_bytes)


def _reserved_bytes(device: torch.device) -> tuple[int, int]:
    """What torch's allocator holds now, and the most since its peak statistics were reset. `torch.cuda.memory_reserved`
    rewrites all statistics to find one, which takes as long as launching a hundred kernels, and every step asks."""
    found = torch.cuda.memory_stats_as_nested_dict(device)["reserved_bytes"]["all"]
    return found["current"], found["peak"]


def _load_libraries(device: torch.device) -> None:
    """Loads the libraries that every model uses, so that the device memory they take is measured."""
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.ones(256, 256, dtype=dtype, device=device)
        (a @ a).sum().item()
    del a
    torch.cuda.empty_cache()
