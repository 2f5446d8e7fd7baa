"""The bus between device and host on the planner's clock: two directions, each slower while the other is busy."""

from dataclasses import dataclass

from ..rates.rates import Rates


@dataclass
class Lane:
    """One direction: its rate while the other is idle, its total busy time, and its latest busy stretch."""

    bytes_per_s: float
    busy_s: float = 0.0
    begun_s: float = 0.0
    done_s: float = 0.0

    def use(self, begin_s: float, end_s: float, busy_s: float) -> None:
        """Records a busy stretch, merged with the latest one unless it begins after the end of that."""
        self.begun_s = min(self.begun_s, begin_s) if begin_s <= self.done_s else begin_s
        self.done_s = max(self.done_s, end_s) if begin_s <= self.done_s else end_s
        self.busy_s += busy_s


class Bus:
    """Times copies by when they begin. A later call does not slow the copies of earlier calls."""

    def __init__(self, rates: Rates) -> None:
        self.both_bytes_per_s = rates.both_bytes_per_s
        self.up, self.down = Lane(rates.up_bytes_per_s), Lane(rates.down_bytes_per_s)

    def to_device(self, num_bytes: int, begin_s: float) -> float:
        """The time at which a copy is done."""
        return self._copied(self.up, self.down, num_bytes, begin_s)

    def to_host(self, num_bytes: int, begin_s: float) -> float:
        return self._copied(self.down, self.up, num_bytes, begin_s)

    def through(self, up_bytes: int, down_bytes: int, begin_s: float) -> float:
        """The time at which bytes streamed through the device, piece by piece, have passed both ways."""
        up_s, down_s = up_bytes / self.both_bytes_per_s, down_bytes / self.both_bytes_per_s
        end_s = begin_s + max(up_s, down_s)
        self.up.use(begin_s, end_s, up_s)
        self.down.use(begin_s, end_s, down_s)
        return end_s

    def _copied(self, lane: Lane, other: Lane, num_bytes: int, begin_s: float) -> float:
        """At the full rate, except at the shared rate while the other direction is busy."""
        now_s, left = begin_s, float(num_bytes)
        stretches = ((other.begun_s, lane.bytes_per_s), (other.done_s, self.both_bytes_per_s))
        for until_s, bytes_per_s in stretches:
            if now_s < until_s and left:
                moved = min(left, (until_s - now_s) * bytes_per_s)
                now_s, left = now_s + moved / bytes_per_s, left - moved
        end_s = now_s + left / lane.bytes_per_s
        lane.use(begin_s, end_s, end_s - begin_s)
        return end_s
