"""Estimate: what a plan is expected to take of memory, of time, and of the network."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CollectiveTraffic:
    """What a process receives in one step by one kind of collective along one axis of the mesh."""

    axis: str
    collective: str
    count: int
    received_bytes: int


@dataclass(frozen=True)
class Estimate:
    """Figures of the program that a plan was made for.

    Fields:
        step_s: modelled seconds of a step.
        busy_s: for how many of them each resource is busy, such as the device or a direction of the bus, the busiest
            first.
        rates: the machine at whose rates that is.
        static_bytes: on the device for good.
        peak_bytes: the device's highest point in a step.
        reserve_bytes: what of it the driver's context and libraries take.
        at_peak: what the peak consists of, by name, largest first.
        host_bytes: what the host holds: masters, gradients, optimizer state, and activations that are offloaded.
        offloaded_bytes: what of it are activations.
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
        """What a step takes at least, however its parts overlap: as long as its busiest resource is busy."""
        return self.busy_s[0][1] if self.busy_s else 0.0

    @property
    def binds(self) -> str:
        """The busiest resource."""
        return self.busy_s[0][0] if self.busy_s else ""


@dataclass(frozen=True)
class Alternative:
    """Another plan that would fit, by what it does otherwise: its modelled step and device peak."""

    what: str
    step_s: float
    peak_bytes: int
