"""The two sides of the machine, device and host: their memory accounts, and the engines that copy between them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..isa.errors import BudgetError, as_cause
from .streams import CopyEngine, copy_engine, host_buffer
from .tiers import Tier
from .traffic import Traffic


@dataclass(frozen=True)
class Hardware:
    """Where stores keep training states.

    `device` computes; with "cpu", a budgeted arena in RAM stands in for device memory. `traffic` records all copies.
    """

    device: torch.device
    device_tier: Tier = field(default_factory=lambda: Tier("device"))
    host_tier: Tier = field(default_factory=lambda: Tier("host"))
    traffic: Traffic = field(default_factory=Traffic)

    def new_copies(self) -> CopyEngine:
        """A copy engine with streams of its own."""
        engine = copy_engine(self.device)
        engine.traffic = self.traffic
        return engine

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def tiers(self) -> tuple[Tier, Tier]:
        """The device tier and the host tier."""
        return self.device_tier, self.host_tier

    def book(self, name: str, device_bytes: int, host_bytes: int, purpose: str) -> None:
        """Books bytes under a name on both tiers, replacing what was booked, or on neither. Raises BudgetError if
        one is full."""
        before = self.device_tier.booked(name)
        self.device_tier.book(name, device_bytes, purpose)
        try:
            self.host_tier.book(name, host_bytes, purpose)
        except BudgetError:
            self.device_tier.restore(name, before)
            raise

    def zeros(self, numel: int, dtype: torch.dtype, on_device: bool, pinned: bool = False) -> Tensor:
        """A flat tensor of zeros on either side, page-locked on the host if `pinned`, for fast copies. Raises
        BudgetError if there is no memory."""
        with self.placing():
            if on_device:
                return torch.zeros(numel, dtype=dtype, device=self.device)
            return host_buffer(numel, dtype, pinned and self.is_cuda)

    @contextmanager
    def placing(self) -> Iterator[None]:
        """A context for making and moving states. Turns out-of-memory errors into BudgetError: other users of the
        machine may have taken memory that the tiers account for."""
        try:
            yield
        except (torch.cuda.OutOfMemoryError, MemoryError) as error:
            tier = self.device_tier if isinstance(error, torch.cuda.OutOfMemoryError) else self.host_tier
            raise BudgetError(
                f"the {tier.name} ran out of memory for the model's values: {error}", tier=tier.name
            ) from as_cause(error)
