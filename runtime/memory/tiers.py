"""Device and host memory as accounted tiers with hard limits.

On CUDA the device tier's limit is the caching allocator's own. On a machine without an accelerator the
device tier is a budgeted arena in RAM: while a program runs, a meter sees every tensor that any operator
makes and charges it to the tier until its storage dies, so that every policy runs, and every budget is
enforced, by the same code on a laptop.
"""

import time
import weakref
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..isa.errors import BudgetError
from ..isa.torch_private import TorchDispatchMode


class Tier:
    """An account of bytes with a hard limit (None: unlimited).

    Among several processes it waits up to `patience_s` for room: gloo's threads hold what they have exchanged a moment
    longer than the collective takes.
    """

    def __init__(self, name: str, limit_bytes: int | None = None, patience_s: float = 0.0) -> None:
        self.name = name
        self.limit_bytes = limit_bytes
        self.patience_s = patience_s
        self.used_bytes = 0
        self.peak_bytes = 0
        self.step_peak_bytes = 0

    def begin_step(self) -> None:
        """From here on `step_peak_bytes` counts anew."""
        self.step_peak_bytes = self.used_bytes

    def charge(self, num_bytes: int, purpose: str) -> None:
        """Book `num_bytes`. Raises BudgetError, and books nothing, where the limit would be exceeded."""
        deadline = time.monotonic() + self.patience_s
        while not self._fits(num_bytes) and time.monotonic() < deadline:
            time.sleep(0.001)
        used = self.used_bytes + num_bytes
        if not self._fits(num_bytes):
            raise BudgetError(
                f"the {self.name} tier is full: {purpose} needs {num_bytes:,} bytes, {self.used_bytes:,} of "
                f"{self.limit_bytes:,} are in use; raise the {self.name} budget or make the batch smaller",
                smallest_bytes=used,
            )
        self.used_bytes = used
        self.peak_bytes = max(self.peak_bytes, used)
        self.step_peak_bytes = max(self.step_peak_bytes, used)

    def _fits(self, num_bytes: int) -> bool:
        return self.limit_bytes is None or self.used_bytes + num_bytes <= self.limit_bytes

    def refund(self, num_bytes: int) -> None:
        self.used_bytes -= num_bytes


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of CPU tensors that operators make inside it, while their storages live.

    With a tier, bytes are charged to it and a charge that exceeds the limit raises BudgetError out of the
    operator; without one they are only counted. Memory inside an operator's kernel is not seen.
    """

    def __init__(self, tier: Tier | None = None) -> None:
        super().__init__()
        self.tier = tier or Tier("metered")
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @property
    def used_bytes(self) -> int:
        return self.tier.used_bytes

    @property
    def peak_bytes(self) -> int:
        return self.tier.peak_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = [t.untyped_storage() for t in pytree.tree_leaves((args, kwargs)) if _counts(t)]
        result = func(*args, **(kwargs or {}))
        before = {storage._cdata for storage in known}
        for tensor in pytree.tree_leaves(result):
            if _counts(tensor) and tensor.untyped_storage()._cdata not in before:
                self._charge(tensor.untyped_storage(), str(func))
        return result

    def count(self, tensor: torch.Tensor, is_charged: bool) -> None:
        """Take note of a tensor that was made unseen; nothing is booked for one that is charged to the tier already."""
        self._charge(tensor.untyped_storage(), "a fetched chunk", 0 if is_charged else None)

    def _charge(self, storage: torch.UntypedStorage, purpose: str, num_bytes: int | None = None) -> None:
        key, num_bytes = storage._cdata, storage.nbytes() if num_bytes is None else num_bytes
        if key in self._live or storage.nbytes() == 0:
            return
        self.tier.charge(num_bytes, purpose)

        def died(_: object) -> None:
            del self._live[key]
            self.tier.refund(num_bytes)

        self._live[key] = weakref.ref(storage, died)


def _counts(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"
