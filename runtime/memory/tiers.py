"""Device and host memory as accounted tiers with hard limits.

On CUDA the device tier's limit is the caching allocator's own. Without an accelerator the device tier is a budgeted
arena in RAM: while a program runs, a meter sees every tensor that an operator makes and books it until its storage
dies. Thus the same code runs every policy and enforces every budget on a laptop.
"""

import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch

from ..isa.errors import BudgetError
from ..isa.torch_private import TorchDispatchMode, dispatch_modes, leave_mode


class _Watched(weakref.ref[torch.UntypedStorage]):
    """A weak reference to a storage that is booked as long as it lives."""

    __slots__ = ("num_bytes",)
    num_bytes: int


_num_bytes = attrgetter("num_bytes")


class Tier:
    """An account of bytes with a hard limit (None: unlimited).

    With several processes it waits up to `patience_s` seconds for room: gloo's threads hold what they have exchanged
    for a moment after the collective.

    Safe against Ctrl-C at any point: bookings are keyed by name, and booking a name again, as a repeated call does,
    replaces it. Watched storages are counted from those that are alive; the callback on a storage's death is a C
    function, because Python would swallow a Ctrl-C that fell into it.
    """

    def __init__(self, name: str, limit_bytes: int | None = None, patience_s: float = 0.0) -> None:
        self.name = name
        self.limit_bytes = limit_bytes
        self.patience_s = patience_s
        self.peak_bytes = 0
        self.step_peak_bytes = 0
        self._booked: dict[str, int] = {}
        self._watched: set[_Watched] = set()

    @property
    def used_bytes(self) -> int:
        return sum(self._booked.values()) + sum(map(_num_bytes, self._watched.copy()))

    @property
    def free_bytes(self) -> int | None:
        """The bytes that can still be used; None without a limit."""
        return None if self.limit_bytes is None else self.limit_bytes - self.used_bytes

    def begin_step(self) -> None:
        """Starts `step_peak_bytes` over."""
        self.step_peak_bytes = self.used_bytes

    def booked(self, name: str) -> int:
        """The bytes booked under a name."""
        return self._booked.get(name, 0)

    def book(self, name: str, num_bytes: int, purpose: str = "") -> None:
        """Books `num_bytes` under `name`, replacing what was booked there. Raises BudgetError, and changes nothing, if
        that exceeds the limit; its message tells the `purpose`, by default the name."""
        more = num_bytes - self.booked(name)
        if more > 0:
            self._make_sure(more, purpose or name)
        self._booked[name] = num_bytes

    def restore(self, name: str, num_bytes: int) -> None:
        """Books what was booked under `name` before, whatever the limit is now: those bytes were in use all along."""
        self._booked[name] = num_bytes

    def watch(self, storage: torch.UntypedStorage, purpose: str, is_booked: bool = False) -> None:
        """Books a storage, once, until it dies; for 0 bytes if it is booked already. Raises BudgetError as `book`
        does."""
        watched = _Watched(storage, self._watched.discard)
        watched.num_bytes = 0 if is_booked else storage.nbytes()
        if storage.nbytes() and watched not in self._watched:
            self._make_sure(watched.num_bytes, purpose)
            self._watched.add(watched)

    def _make_sure(self, num_bytes: int, purpose: str) -> None:
        """Waits for room for `num_bytes` more and updates the peaks; raises BudgetError if there is none."""
        used_bytes, deadline = self.used_bytes, time.monotonic() + self.patience_s
        while not self._fits(used_bytes + num_bytes) and time.monotonic() < deadline:
            time.sleep(0.001)
            used_bytes = self.used_bytes
        if not self._fits(used_bytes + num_bytes):
            raise BudgetError(
                f"the {self.name} tier is full: {purpose} needs {num_bytes:,} bytes, {used_bytes:,} of "
                f"{self.limit_bytes:,} are in use; raise the {self.name} budget or make the batch smaller",
                smallest_bytes=used_bytes + num_bytes,
                tier=self.name,
            )
        self.peak_bytes = max(self.peak_bytes, used_bytes + num_bytes)
        self.step_peak_bytes = max(self.step_peak_bytes, used_bytes + num_bytes)

    def _fits(self, used_bytes: int) -> bool:
        return self.limit_bytes is None or used_bytes <= self.limit_bytes


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of the CPU tensors that operators make inside it, while their storages live.

    With a tier, the tensors are booked on it, and an operator whose result exceeds the limit raises BudgetError.
    Without one they are only counted. Memory used inside an operator's kernel is not seen. Enter it through `metering`.
    """

    def __init__(self, tier: Tier | None = None) -> None:
        super().__init__()
        self.tier = tier or Tier("metered")

    @property
    def used_bytes(self) -> int:
        return self.tier.used_bytes

    @property
    def peak_bytes(self) -> int:
        return self.tier.peak_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = [tensor.untyped_storage() for tensor in _on_host((*args, *(kwargs or {}).values()))]
        result = func(*args, **(kwargs or {}))
        before = {storage._cdata for storage in known}
        for tensor in _on_host((result,)):
            storage = tensor.untyped_storage()
            if storage._cdata not in before:
                self.tier.watch(storage, str(func))
        return result

    def watch(self, tensor: torch.Tensor, is_booked: bool) -> None:
        """Books a tensor made outside of the meter; for 0 bytes if the tier has booked it already."""
        self.tier.watch(tensor.untyped_storage(), "a fetched chunk", is_booked)


@contextmanager
def metering(meter: MemoryMeter | None) -> Iterator[None]:
    """Context in which a meter, if there is one, counts; afterwards it does not, wherever Ctrl-C comes.

    A `with` statement alone does not promise that: Ctrl-C may come after its body and in front of its `__exit__`.
    """
    if meter is None:
        yield
        return
    before = len(dispatch_modes())

    def leave() -> None:
        while len(dispatch_modes()) > before:
            leave_mode()

    try:
        try:
            with meter:
                yield
        finally:
            leave()
    finally:
        leave()  # again, as an interrupt may have come before or within the first


def _on_host(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The CPU tensors among the arguments or results of an operator, which may be in lists: torch's own walk, through
    containers of any kind, takes longer than most operators."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.device.type == "cpu":
                yield value
        elif isinstance(value, list | tuple):
            yield from _on_host(value)
