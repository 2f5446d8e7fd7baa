"""Memory pressure: the device has less memory than planned, as other processes took some, or a step needs more.

Training goes on with fewer weights and states on the device, and the same bits. Chunks move before a step that is seen
to lack room, or after a forward that ran out of memory, which has changed nothing and runs again. When there is room
again, everything returns. Several processes exchange how much room they have every few steps, and move together.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...passes.program.plan import Plan
from ...runtime.isa.errors import BudgetError
from ..planner.memory import Limits
from ..programs.programs import Key
from ..session import Session
from .rehoming import Plans, Rehoming

LESS = 0.9
"""After a step has run out of memory, each limit that is tried is this share of the one before."""

AGREED_STEPS = 16
"""The interval, in training steps, at which several processes exchange how much room they have."""

PATIENT_STEPS = 16
"""How many training steps without a failure pass before a plan may grow again. Doubles after each further failure, up
to `MOST_PATIENT_STEPS`."""

MOST_PATIENT_STEPS = 1024

WORTH = 0.02
"""The least relative gain in room that a new plan is worth: what other processes hold fluctuates."""

T = TypeVar("T")


class Pressure:
    """The memory pressure on one model. `is_on` tells whether its homes may change; `is_shrunk`, whether it runs on
    less memory than asked for."""

    def __init__(self, session: Session, rehoming: Rehoming) -> None:
        self.session, self.rehoming = session, rehoming
        self.is_on = session.planning.adapts
        self.is_shrunk = False
        self._steps = 0
        self._patience = PATIENT_STEPS
        self._grows_at = self._shrinks_at = 0  # the earliest steps at which to try

    # -- before a step -------------------------------------------------------------------------------------

    def call(self, key: Key) -> bool:
        """Called when an optimizer's step begins with a call of this program. Returns whether homes have changed.
        Raises BudgetError if the step would run out of memory and, as it updates in its backward, could not be
        repeated."""
        self._steps += 1
        if not self.is_on or (self.session.ranks.together and self._steps % AGREED_STEPS):
            return False
        room_bytes, needed_bytes = self._room_bytes(), self._plan(key).peak_bytes
        told = self.session.ranks.gather((room_bytes, needed_bytes))
        least_bytes = min((room for room, _ in told if room is not None), default=None)
        if any(room is not None and room < needed for room, needed in told):
            assert least_bytes is not None
            return self._shrink_before(key, least_bytes)
        return self.is_shrunk and self._steps >= self._grows_at and self._grow(key, least_bytes)

    def _room_bytes(self) -> int | None:
        """The device memory that the process may hold now, in bytes; None if nothing limits it."""
        session = self.session
        if not session.device.is_cuda:
            return session.hardware.device_tier.limit_bytes
        room, asked = session.device.memory.room_bytes(), session.planning.asked_bytes
        return room if asked is None else min(room, asked)

    def _plan(self, key: Key) -> Plan:
        return self.session.programs()[key].plan

    def _limits(self, device_bytes: int | None) -> Limits:
        return replace(self.session.planning.limits, device_bytes=device_bytes)

    def _shrink(self, key: Key, limits: Limits) -> bool:
        """Moves to plans within `limits`, if the program fits them on every process. Returns whether it did."""
        plans = self._agreed(key, limits)
        if plans is None or not self.rehoming.move(key, plans):
            return False
        self.session.planning.limits = limits
        self.is_shrunk = True
        self._grows_at, self._patience = self._steps + self._patience, min(2 * self._patience, MOST_PATIENT_STEPS)
        if self.session.device.is_cuda:
            torch.cuda.empty_cache()  # for the processes that need it
        return True

    def _shrink_before(self, key: Key, room_bytes: int) -> bool:
        """Moves to plans within the room there is. If that fails, the step may still run out of memory, and is
        repeated; raises BudgetError if it could not be, since it updates in its backward."""
        in_backward = self._plan(key).format.in_backward
        if self._steps < self._shrinks_at and not in_backward:
            return False
        if self._shrink(key, self._limits(room_bytes)):
            return True
        self._shrinks_at = self._steps + PATIENT_STEPS
        if not in_backward:
            return False
        least_bytes = self._least_bytes(key)
        why = f"but the step needs {least_bytes:,}, even with everything that can be on the host moved there"
        if least_bytes <= room_bytes:
            why = f"and training state that would have to leave it could not: {self.rehoming.failure}"
        raise BudgetError(
            f"only {room_bytes:,} bytes of the device's memory are available now, {why}; nothing was updated. Free "
            "memory, for example that of other processes, or make the batch smaller, and call the model again",
            smallest_bytes=least_bytes,
        )

    def _grow(self, key: Key, room_bytes: int | None) -> bool:
        now_bytes, asked_bytes = self.session.planning.limits.device_bytes, self.session.planning.asked_bytes
        self._grows_at = self._steps + PATIENT_STEPS
        if room_bytes is not None and now_bytes is not None and room_bytes < now_bytes * (1 + WORTH):
            return False
        limits = self._limits(room_bytes)
        plans = self._agreed(key, limits)
        if plans is None or not self.rehoming.move(key, plans):
            return False
        self.session.planning.limits = limits
        self.is_shrunk = room_bytes is not None and (asked_bytes is None or room_bytes < asked_bytes * (1 - WORTH))
        return True

    def _agreed(self, key: Key, limits: Limits) -> Plans | None:
        """Plans with the homes that rank 0 chooses; None if the program does not fit on every rank."""
        ranks = self.session.ranks
        homes = ranks.gather(self.rehoming.chosen(key, limits).homes if ranks.rank == 0 else None)[0]
        plans = self.rehoming.plans(key, homes, limits)
        return plans if all(ranks.gather(limits.allow(plans[key]))) else None

    # -- in a forward --------------------------------------------------------------------------------------

    def withstood(self, key: Key, arguments: Any, forward: Callable[[], T]) -> T:
        """Runs a training step's forward and returns its result. If it runs out of device memory it runs again with
        less on the device, from the same random state, unless something that it reads has changed meanwhile."""
        if not self.is_on or self.session.ranks.together:
            return forward()
        machine = self.session.demanded().machine
        random_state, versions = machine.random_state, self._versions(arguments)
        while True:
            try:
                return forward()
            except (BudgetError, torch.cuda.OutOfMemoryError) as error:
                is_devices = not isinstance(error, BudgetError) or error.tier == "device"
                limits = self._less(key) if is_devices and versions == self._versions(arguments) else None
                if limits is None:
                    raise
            # Not in the handler: the error keeps alive what the program held.
            machine.random_state = random_state
            if not self._shrink(key, limits):
                raise BudgetError(
                    "the device ran out of memory, and the host does not have enough memory to take over part of the "
                    "training state; nothing was updated. Raise host_budget, or make the batch smaller",
                    tier="host",
                )

    def _versions(self, arguments: Any) -> list[int]:
        """Versions of all tensors that a forward reads and may have written: arguments and buffers, not parameters."""
        tensors: list[Any] = [*pytree.tree_leaves(arguments), *self.session.census.last.buffers.values()]
        return [tensor._version for tensor in tensors if isinstance(tensor, Tensor) and not tensor.is_inference()]

    def _less(self, key: Key) -> Limits | None:
        """Limits that leave fewer of the program's chunks on the device; None if nothing can be spared."""
        now, room_bytes = self._plan(key), self._room_bytes()
        least_bytes = self._least_bytes(key)
        device_bytes = now.peak_bytes if room_bytes is None else min(now.peak_bytes, room_bytes)
        while device_bytes >= least_bytes:
            limits = self._limits(device_bytes)
            chosen = self.rehoming.chosen(key, limits)
            if chosen.homes != now.homes and chosen.peak_bytes < now.peak_bytes:
                return limits
            less_bytes = int(min(device_bytes, chosen.peak_bytes) * LESS)
            device_bytes = max(less_bytes, least_bytes) if device_bytes > least_bytes else 0
        return None

    def _least_bytes(self, key: Key) -> int:
        """The peak in bytes with everything on the host that can be there."""
        return self.rehoming.chosen(key, self._limits(0)).peak_bytes
