"""model.profile: what is counted, and that it counts the user's own step."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from geminifx.compiler.inspect.profile import Profile, _covered_s
from hypothesis import given
from hypothesis import strategies as st
from optimizing import ADAMW, NET, placed


@pytest.mark.parametrize("own", [True, False])
def test_a_step_is_run_as_often_as_asked_and_told_of(own: bool, tmp_path: Path) -> None:
    model = placed(NET, "host")
    kind, hyper = ADAMW
    optimizer = model.optimizer(kind, **hyper) if own else kind(model.parameters(), **hyper)
    steps = []

    def step() -> None:
        steps.append(NET.loss(model, NET.batch()))
        steps[-1].backward()
        optimizer.step()
        optimizer.zero_grad()

    found = model.profile(step, steps=3, trace=tmp_path / "trace.json")
    assert len(steps) == 3
    assert (found.host_update_s > 0) is own, "a torch optimizer's updates do not run beside the program"
    assert found.compute_s > 0 and 0 <= found.waiting < 1 and not found.copies_up_s
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any("addmm" in event["name"] for event in events)
    with pytest.raises(ValueError, match="steps=0"):
        model.profile(step, steps=0)
    assert len(steps) == 3


def test_the_table() -> None:
    text = str(Profile(step_s=0.2, compute_s=0.15, copies_up_s=0.1, copies_down_s=0.0, host_update_s=0.05))
    assert "device computes            150.0 ms      75%" in text and text.endswith("25%")


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20))))
def test_time_under_several_events_counts_once(spans: list[tuple[int, int]]) -> None:
    events = [SimpleNamespace(time_range=SimpleNamespace(start=a, end=a + length)) for a, length in spans]
    covered = {t for a, length in spans for t in range(a, a + length)}
    assert _covered_s(events) == pytest.approx(len(covered) * 1e-6)
