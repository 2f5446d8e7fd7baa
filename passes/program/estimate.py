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
        step_s: modelled seconds of a step, at the rates of the machine it is planned on. Operators without a formula
            for their FLOP, and what processes exchange, take none, so it tells plans for one mesh apart.
        static_bytes: on the device for good.
        peak_bytes: the device's highest point in a step.
        reserve_bytes: what of it the driver's context and libraries take.
        at_peak: what the peak consists of, by name, largest first.
        host_bytes: what the host holds: masters, gradients, optimizer state, and activations that are offloaded.
        offloaded_bytes: what of it are activations.
        collectives: what each process receives from the others in a step.
    """

    step_s: float = 0.0
    static_bytes: int = 0
    peak_bytes: int = 0
    reserve_bytes: int = 0
    at_peak: tuple[tuple[str, int], ...] = ()
    host_bytes: int = 0
    offloaded_bytes: int = 0
    collectives: tuple[CollectiveTraffic, ...] = ()
