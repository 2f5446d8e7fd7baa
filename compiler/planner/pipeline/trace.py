"""Exports a simulated step for chrome://tracing and ui.perfetto.dev: a track per rank, an arrow per message."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from .simulate import Simulated

_KINDS = {"F": "forward", "B": "backward", "I": "gradients of inputs", "W": "gradients of weights"}
_US_PER_S = 1e6


def chrome_trace(simulated: Simulated, tail_s: Sequence[float] = ()) -> str:
    """The step in Chrome's trace event format (JSON). `tail_s` are each rank's seconds after its last backward."""
    events = [*_names(simulated), *_slices(simulated), *_tails(simulated, tail_s), *_arrows(simulated)]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events})


def _names(simulated: Simulated) -> Iterator[dict[str, Any]]:
    schedule = simulated.schedule
    yield {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": schedule.name}}
    for rank in range(len(schedule.ranks)):
        stages = ", ".join(map(str, schedule.stages_of(rank)))
        yield {
            "ph": "M",
            "name": "thread_name",
            "pid": 0,
            "tid": rank,
            "args": {"name": f"rank {rank}: stage {stages}"},
        }
        yield {"ph": "M", "name": "thread_sort_index", "pid": 0, "tid": rank, "args": {"sort_index": rank}}


def _slices(simulated: Simulated) -> Iterator[dict[str, Any]]:
    for rank, action, begin_s, end_s in simulated.events:
        yield {
            "ph": "X", "name": str(action), "cat": _KINDS[action.kind], "pid": 0, "tid": rank,
            "ts": begin_s * _US_PER_S, "dur": (end_s - begin_s) * _US_PER_S,
            "args": {"stage": action.stage, "microbatch": action.microbatch},
        }  # fmt: skip


def _tails(simulated: Simulated, tail_s: Sequence[float]) -> Iterator[dict[str, Any]]:
    ends_s = {event.rank: event.end_s for event in sorted(simulated.events, key=lambda event: event.end_s)}
    for rank, seconds in enumerate(tail_s):
        yield {
            "ph": "X", "name": "sums and updates", "cat": "sums and updates", "pid": 0, "tid": rank,
            "ts": ends_s[rank] * _US_PER_S, "dur": seconds * _US_PER_S,
        }  # fmt: skip


def _arrows(simulated: Simulated) -> Iterator[dict[str, Any]]:
    """Arrows between slices: the viewer ties each end of an arrow to the slice that encloses it."""
    events = {event.action: event for event in simulated.events}
    for number, message in enumerate(simulated.messages):
        sent_s = (message.end_s - message.begin_s) * _US_PER_S
        for phase, end in ("s", events[message.action]), ("f", events[message.reader]):
            yield {
                "ph": phase, "bp": "e", "id": number, "name": "message", "cat": "message", "pid": 0, "tid": end.rank,
                "ts": end.begin_s * _US_PER_S, "args": {"us": sent_s},
            }  # fmt: skip
