"""What a compiled module has used: peak memory and bytes copied."""

from dataclasses import dataclass, field


@dataclass
class Usage:
    """Peaks of the two tiers, and bytes copied between them.

    `device_peak_bytes` is the device tier's peak: on CUDA the caching allocator's reserved maximum plus what the driver
    counts outside of it. `host_peak_bytes` is the host tier's: masters, gradients, compute copies, staging, and the
    optimizer state that is planned for.
    """

    device_peak_bytes: int = 0
    host_peak_bytes: int = 0
    to_device_bytes: int = 0
    to_host_bytes: int = 0


@dataclass(frozen=True)
class Figures:
    """Seconds and peak bytes of device memory of one training step, with all of its backwards."""

    step_s: float = 0.0
    peak_bytes: int = 0


@dataclass
class Stats(Usage):
    """Usage since the module was compiled; `step` is that of the last step alone.

    A step here is one call of the module, with its backward; peaks of earlier steps do not count in `step`. `planned`
    is what the current plan predicts for a training step. `measured` is what the last steps that were measured took,
    from the beginning of one to the beginning of the next, including what the training loop does in between.
    """

    steps: int = 0
    step: Usage = field(default_factory=Usage)
    planned: Figures = field(default_factory=Figures)
    measured: Figures = field(default_factory=Figures)

    def begin_step(self) -> None:
        self.step = Usage()
        self.steps += 1

    def moved(self, *, to_device: int = 0, to_host: int = 0) -> None:
        for usage in (self, self.step):
            usage.to_device_bytes += to_device
            usage.to_host_bytes += to_host

    def peaked(self, device_bytes: int, host_bytes: int) -> None:
        """Updates the peaks with what the last step has used at most so far."""
        for usage in (self, self.step):
            usage.device_peak_bytes = max(usage.device_peak_bytes, device_bytes)
            usage.host_peak_bytes = max(usage.host_peak_bytes, host_bytes)
