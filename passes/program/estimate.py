"""Estimate: the memory, time and network traffic that a plan is expected to need."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CollectiveTraffic:
    """What one process receives in a step through one kind of collective along one axis of the mesh."""

    axis: str
    collective: str
    count: int
    received_bytes: int


@dataclass(frozen=True)
class Estimate:
    """Figures for the program that a plan was made for.

    Fields:
        step_s: modelled seconds per step.
        busy_s: seconds per step that each resource (the device, a direction of the bus, ...) is busy, busiest first.
        rates: name of the machine whose rates the model uses.
        static_bytes: device memory that is always occupied.
        peak_bytes: peak device memory in a step.
        reserve_bytes: the part of the peak that the driver's context and libraries take.
        at_peak: breakdown of the peak as pairs of name and bytes, largest first.
        host_bytes: host memory for masters, gradients, optimizer state and offloaded activations.
        offloaded_bytes: the part of `host_bytes` that is activations.
        collectives: what each process receives from the others in a step.
    """

    step_s: float = 0.0
    busy_s: tuple[tuple[str, float], ...] = ()
    rates: str = ""
    static_bytes: int = 0
    peak_bytes: int = 0
    reserve_bytes: int = 0
    at_peak: tuple[tuple[str, int], ...] = ()
    host_bytes: int = 0
    offloaded_bytes: int = 0
    collectives: tuple[CollectiveTraffic, ...] = ()

    @property
    def bound_s(self) -> float:
        """A lower bound on the step, however well its parts overlap: the time its busiest resource is busy."""
        return self.busy_s[0][1] if self.busy_s else 0.0

    @property
    def binds(self) -> str:
        """The busiest resource, or ""."""
        return self.busy_s[0][0] if self.busy_s else ""


@dataclass(frozen=True)
class Alternative:
    """Another plan that would fit: how it differs, its modelled step and its peak device memory."""

    what: str
    step_s: float
    peak_bytes: int
