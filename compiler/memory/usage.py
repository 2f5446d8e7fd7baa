"""What steps use of both tiers, next to what was planned."""

from ...passes.program.plan import Plan
from ...runtime.memory.hardware import Hardware
from ...runtime.memory.stats import Figures, Stats
from .device import Device


class StepUsage:
    """Counts the usage of one model. Stores add their copies to `stats`; `beside` brings it up to date."""

    def __init__(self, device: Device, hardware: Hardware) -> None:
        self.device, self.hardware, self.stats = device, hardware, Stats()

    def begin_step(self) -> None:
        """Starts a new count of `stats.step`."""
        self._note_peaks()
        for tier in self.hardware.tiers:
            tier.begin_step()
        self.device.begin_step()
        self.stats.begin_step()

    def beside(self, plan: Plan | None) -> Stats:
        """What has been used so far, with this plan's estimate of a step."""
        self._note_peaks()
        if plan is not None:
            self.stats.planned = Figures(plan.estimate.step_s, plan.peak_bytes)
        return self.stats

    def _note_peaks(self) -> None:
        device, host = self.hardware.tiers
        device_bytes = self.device.step_peak_bytes() if self.device.is_cuda else device.step_peak_bytes
        self.stats.peaked(device_bytes, host.step_peak_bytes)
