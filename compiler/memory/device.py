"""The device that a model is compiled for, and the budgets of memory on the device and the host."""

import os
import warnings
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import torch

from ...runtime.distributed.ranks import Ranks
from ...runtime.isa.errors import ArgumentError, StateError
from ...runtime.isa.torch_private import use_expandable_segments
from ...runtime.isa.units import parse_bytes
from ...runtime.memory.hardware import Hardware
from ...runtime.memory.tiers import Tier
from ..options import DTYPES, Options
from ..planner.memory import Limits
from ..rates.choice import rates_of
from ..rates.rates import Rates
from .device_memory import CONTEXT_BYTES, HEADROOM_BYTES, DeviceMemory
from .host_memory import host_memory

WORKSPACE_BYTES = 96 * 2**20
"""The memory that matrix libraries take from torch's allocator: a workspace for each thread that multiplies."""

ALLOCATOR_SLACK = 0.02
"""The share of the budget left to rounding in torch's allocator."""

HOLE_SHARE = 0.5
"""The share of a step's largest storage that is left for holes in torch's allocator which are too small for it.

A storage needs one contiguous hole. Under a cap of 24.4 GB, OPT-2.7B at batch 16 was planned to 24.2 GB of tensors with
logits of 3.3 GB among them: once in every step the allocator found no hole, waited for all streams and gave its cached
blocks back to the driver, which took 0.35 s of a step of 1.0 s on an H100. With the loss in pieces, where no storage is
larger than 0.3 GB, it never had to.
"""

PATIENCE_S = 1.0

HOST_SHARE = 0.9
"""The share of free host memory that is used if no host_budget is given."""


def _own_device() -> int:
    """The index of this process's device. Raises StateError if there are fewer devices than processes."""
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if count == 1:  # some launchers show each process only its own device
        return 0
    if local >= count:
        raise StateError(
            f"LOCAL_RANK is {local}, but {count} devices are visible; launch as many processes on a machine as it has "
            "devices, or make one visible to each process with CUDA_VISIBLE_DEVICES"
        )
    return local


def gpu_limits(device_bytes: int | None, host_bytes: int, rates: Rates) -> Limits:
    """The limits for plans for a GPU that is not present: the most that CUDA may take of the budget stays free."""
    if device_bytes is None:
        return Limits(None, 0, host_bytes, rates, HOLE_SHARE)
    return with_allocator(device_bytes, CONTEXT_BYTES + HEADROOM_BYTES, host_bytes, rates)


def gpu_budget(tensors_bytes: int) -> int:
    """The least budget of such a GPU, in bytes, that has room for `tensors_bytes` of tensors."""
    return ceil((tensors_bytes + CONTEXT_BYTES + HEADROOM_BYTES + WORKSPACE_BYTES) / (1 - ALLOCATOR_SLACK))


def with_allocator(device_bytes: int, reserve_bytes: int, host_bytes: int, rates: Rates) -> Limits:
    """The limits for plans for a GPU, `reserve_bytes` of whose memory are outside torch's allocator."""
    reserve_bytes += WORKSPACE_BYTES + int(device_bytes * ALLOCATOR_SLACK)
    return Limits(device_bytes, reserve_bytes, host_bytes, rates, HOLE_SHARE)


def host_share(options: Options, ranks: Ranks) -> int:
    """The bytes that each rank may hold on its host: its share of the budget, or of what is free. If the ranks are only
    planned for, `cluster` may say how much memory a host has."""
    total, free = host_memory()
    if not ranks.launched and options.cluster is not None and options.cluster.host_bytes is not None:
        total = free = options.cluster.host_bytes
    wanted = options.host_budget if options.host_budget is not None else int(free * HOST_SHARE)
    return parse_bytes(wanted, of=total) // ranks.on_this_host


def plans_elsewhere(options: Options, ranks: Ranks) -> bool:
    """Whether plans are for the devices that `cluster` describes, which are not this machine's."""
    return options.cluster is not None and options.cluster.rates is not None and not ranks.launched


@dataclass(frozen=True)
class Device:
    """The device that computes; "cpu" stands for a budgeted arena in RAM."""

    torch_device: torch.device

    @classmethod
    def choose(cls, options: Options) -> "Device":
        name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if name == "cuda" and "LOCAL_RANK" in os.environ and torch.cuda.current_device() == 0:
            torch.cuda.set_device(_own_device())  # one for each of torchrun's processes
        index = torch.cuda.current_device() if name == "cuda" else None
        return cls(torch.device(name, index))

    @property
    def is_cuda(self) -> bool:
        return self.torch_device.type == "cuda"

    @cached_property
    def memory(self) -> DeviceMemory:
        """The GPU's memory, measured on first use."""
        return DeviceMemory.measured(self.torch_device)

    def total_bytes(self) -> int:
        if self.is_cuda:
            return torch.cuda.get_device_properties(self.torch_device).total_memory
        return host_memory()[0]

    def hardware(self, limits: Limits, ranks: Ranks) -> Hardware:
        """The accounts of device and host. A GPU needs no limit, since its allocator keeps to the budget. The arena,
        with several processes, waits up to `PATIENCE_S` for memory that gloo's threads still hold."""
        device_bytes = None if self.is_cuda else limits.device_bytes
        device = Tier("device", device_bytes, PATIENCE_S * ranks.together)
        return Hardware(self.torch_device, device, Tier("host", limits.host_bytes))

    def dtype(self, options: Options) -> torch.dtype | None:
        """The dtype that parameters compute in; None: their own dtypes."""
        return DTYPES.get(options.precision or ("bf16" if self.is_cuda else ""))

    def budget_bytes(self, options: Options, ranks: Ranks) -> int | None:
        """The device budget in bytes, at most the device's memory; None if none is given. Raises ValueError for one
        that makes no sense, such as a share of the memory of a device that is only described."""
        budget = options.device_budget
        if plans_elsewhere(options, ranks):
            is_share = isinstance(budget, str) and "%" in budget
            if is_share or (budget is None and self.is_cuda):
                raise ArgumentError(
                    f"device_budget={budget!r}, but how much memory the devices of the cluster {options.cluster} have "
                    "is not known here; expected the bytes that may be used of each, such as device_budget='80GB'"
                )
            return None if budget is None else parse_bytes(budget)
        return None if budget is None else min(parse_bytes(budget, of=self.total_bytes()), self.total_bytes())

    def limits(self, options: Options, ranks: Ranks) -> Limits:
        """The budgets of each rank in bytes, and the rates of the machine that they share. On CUDA this also caps the
        allocator, so that the whole process keeps to the budget.

        Raises ValueError for a budget that makes no sense.
        """
        host_bytes, processes = host_share(options, ranks), ranks.on_this_host
        given = self.budget_bytes(options, ranks)
        if not self.is_cuda or plans_elsewhere(options, ranks):
            rates = rates_of(self.torch_device, options.rates, processes, 0)
            return gpu_limits(given, host_bytes, rates) if self.is_cuda else Limits(given, 0, host_bytes, rates)
        room_bytes = min(given or self.total_bytes(), torch.cuda.mem_get_info(self.torch_device)[0]) - HEADROOM_BYTES
        # Before the memory is measured, as this loads libraries that stay.
        rates = rates_of(self.torch_device, options.rates, processes, room_bytes)
        device_bytes = self._device_bytes(given)
        share = max(0.0, min(1.0, (device_bytes - self.memory.reserve_bytes) / self.total_bytes()))
        use_expandable_segments()
        torch.cuda.set_per_process_memory_fraction(share, self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        return with_allocator(device_bytes, self.memory.reserve_bytes, host_bytes, rates)

    def _device_bytes(self, given: int | None) -> int:
        """The budget as given, or all that other processes leave."""
        if given is None:
            return self.memory.available_bytes
        if given > self.memory.available_bytes:
            warnings.warn(
                f"device_budget is {given:,} bytes, but other processes hold {self.memory.others_bytes:,} of the "
                f"{self.memory.total_bytes:,} of {self.torch_device}: unless they give some back, a step that needs "
                f"more than {self.memory.available_bytes:,} runs out of memory",
                stacklevel=2,
            )
        return given

    def begin_step(self) -> None:
        """Starts a new count of `step_peak_bytes`, by resetting torch's own peak statistics."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.torch_device)

    def step_peak_bytes(self) -> int:
        """The process's peak device memory in this step, as the driver would report it. For CUDA only."""
        return self.memory.peak_bytes()
