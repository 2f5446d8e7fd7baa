"""Puts chunks and buffers where a plan wants them; weights on `meta` get places there and wait for their values."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Protocol

import torch

from ...runtime.distributed.point_to_point import open_channels
from ...runtime.distributed.ranks import Ranks
from ...runtime.isa.homes import Homes
from ...runtime.memory.state_store import StateStore
from ..capture.materialize import give_buffers
from ..capture.weak_references import without_weak_references
from ..memory.device import Device
from ..programs.members import Census
from ..programs.programs import Compiled, channels, chunks_alike, state_alike
from ..setup import Declaration, Phase, Setup
from .half_loaded import HalfLoaded
from .values import move_buffers, share_values


class Incoming(Protocol):
    """A source of values for weights on `meta`, once these have places in chunks."""

    def check(self) -> None:
        """Raises, before anything is changed, if the values are no longer available."""

    def digest(self) -> str:
        """A digest that tells these values from others: all ranks must have been told to bring the same."""

    def bring(self, store: StateStore) -> None:
        """Writes all values; the same ones on every rank."""


class Places:
    """The places of one model's values. From the first `put` on, all ranks hold the same values.

    `incoming` is a source of values for weights on `meta`, until they are read; `homes` are those of the last `put`.
    """

    def __init__(self, census: Census, ranks: Ranks, device: Device) -> None:
        self.census, self.source, self.ranks, self.device = census, census.source, ranks, device
        self.incoming: Incoming | None = None
        self.homes: Homes = ()
        self._are_shared = self._are_placed = False  # on all ranks, for the optimizer that was declared
        self._declared: Declaration | None = None
        self._trained: frozenset[str] = frozenset()

    @property
    def are_empty(self) -> bool:
        """Whether any weights are on `meta`, without values."""
        return any(parameter.is_meta for parameter in self.census.now().parameters.values())

    def check_incoming(self) -> None:
        """Raises, on all ranks, if the values that are due are no longer available on one of them, or if ranks were
        told to bring different ones."""
        incoming = self.incoming
        if incoming is None:
            return
        with self.ranks.failing_alike():
            incoming.check()
            digest = incoming.digest()
        self.ranks.check_alike("what gives the weights values, a seed or files,", digest)

    def put(self, setup: Setup, homes: Homes, programs: Iterable[Compiled], phase: Phase,
            declared: Declaration | None) -> None:  # fmt: skip
        """Puts all values where `homes` say. Weights on `meta` get places for values, which must be the same on every
        rank. If one rank has no room for its values, all ranks raise."""
        are_empty, device, store = self.are_empty, self.device.torch_device, setup.machine.store
        # All ranks come here for the first places, for an optimizer's, and for those of parameters that are trained
        # from now on; for new homes some may come alone.
        are_together = not self._are_placed or declared is not self._declared or setup.trained != self._trained
        self._trained = setup.trained
        failing_alike = self.ranks.failing_alike if are_together else nullcontext
        with torch.inference_mode(False), torch.no_grad():
            with failing_alike(), store.hardware.placing():
                if are_empty:
                    give_buffers(self.source)
                if self.device.is_cuda:
                    move_buffers(self.source, device)
            if phase is Phase.PLANNED:
                self.ranks.join_axes((chunk.reduced_over for chunk in setup.plan.layout.chunks), device)
                open_channels(self.ranks, channels(setup.plan, programs))
            self._check_alike(setup, declared)
            if not self._are_shared:
                self.ranks.share_randomness()
                if not are_empty:
                    share_values(self.source, self.ranks, device, store.chunks)
            self._are_shared = True
            with failing_alike(), without_weak_references(self.source):
                store.chunks.lay_out(setup.plan.layout, self.census.now().parameters)
                store.place(homes)
        self.homes, self._are_placed = homes, True

    def bring(self, store: StateStore, half_loaded: HalfLoaded) -> None:
        """Reads the values that are due, if any are, into their places. If that fails, they are half loaded."""
        incoming, self.incoming = self.incoming, None
        if incoming is not None:
            with half_loaded.while_written("model"):
                with self.ranks.failing_alike():
                    incoming.bring(store)
                store.masters_written()

    def _check_alike(self, setup: Setup, declared: Declaration | None) -> None:
        """Raises StateError if ranks differ in what they place for the first time, or in the optimizer declared
        since."""
        if not self._are_shared:
            self.ranks.check_alike("the model", state_alike(setup.plan), chunks_alike(setup.plan))
        if not self._are_shared or declared is not self._declared:
            digest = "" if declared is None else declared.digest
            self.ranks.check_alike("model.optimizer(...), with its seed and options,", digest)
            self._are_placed = False
        self._declared = declared
