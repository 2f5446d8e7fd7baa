"""The modelled time of a step: what nobody can be faster than, who waits for whom, and what hides behind what."""

from dataclasses import replace

import pytest
from geminifx.compiler.cost import ARENA, CUDA, LAUNCH_S, Rates
from geminifx.compiler.step_time import StepTime
from geminifx.passes.plan import Residency
from geminifx.runtime.layout import Updates
from hypothesis import given
from hypothesis import strategies as st
from optimizing import NET
from zoo import compiled

INFINITE = float("inf")
SLOW = Rates(1e9, 1e9, 1e6, 1e7, 1e5, 1e8, overlaps=True)
"""Slow enough for the small model's updates and copies to show."""
MODEL = compiled(NET, precision="bf16")
PLAN, PROGRAM = MODEL.plan, MODEL.session.last["training"].flat
CHUNKS = PLAN.layout.chunks
EVERYTHING = frozenset(range(len(CHUNKS)))
RATES = pytest.mark.parametrize("rates", [CUDA, ARENA, SLOW], ids=["cuda", "arena", "slow"])
DECLARED = [None, Updates(), Updates(in_backward=True)]
UPDATES = pytest.mark.parametrize("updates", DECLARED, ids=["torch's", "ours", "in the backward"])
SOME = st.sets(st.sampled_from(sorted(EVERYTHING))).map(frozenset)


def seconds(updates: Updates | None, residency: Residency, rates: Rates) -> float:
    return StepTime(PROGRAM, rates).seconds(replace(PLAN, updates=updates), residency)


@RATES
@UPDATES
def test_with_everything_on_the_device_a_step_is_its_compute_and_updates(rates: Rates, updates: Updates | None) -> None:
    found = seconds(updates, Residency(masters=EVERYTHING), rates)
    updates_s = sum(chunk.numel for chunk in CHUNKS) / rates.device_params_per_s
    assert found == pytest.approx(StepTime(PROGRAM, rates).compute_s + updates_s) and found > 0


@RATES
@UPDATES
@given(masters=SOME, weights=SOME, streamed=SOME)
def test_no_step_is_faster_than_the_busiest_or_slower_than_all_in_turn(
    rates: Rates, updates: Updates | None, masters: frozenset[int], weights: frozenset[int], streamed: frozenset[int]
) -> None:
    streamed = streamed - masters if updates else frozenset()
    found = seconds(updates, Residency(masters, weights, streamed), rates)
    on_host = [chunk for chunk in CHUNKS if chunk.index not in masters | streamed]
    host_s = sum(chunk.numel for chunk in on_host) / (rates.host_params_per_s if updates else rates.torch_params_per_s)
    compute_s = StepTime(PROGRAM, rates).compute_s
    # Twice fetched, refreshed, a gradient, and a streamed state up; each at most once for every chunk.
    moved = sum(4 * chunk.compute_bytes + 12 * chunk.numel for chunk in CHUNKS)
    other_s = sum(chunk.numel for chunk in CHUNKS) * (1 / rates.device_params_per_s + 1 / rates.passing_params_per_s)
    all_s = compute_s + host_s + moved / rates.bus_bytes_per_s + other_s + LAUNCH_S * len(streamed)
    assert max(compute_s, host_s) * (1 - 1e-9) <= found <= all_s * (1 + 1e-9)


def test_updates_hide_behind_the_compute_that_they_run_beside() -> None:
    on_host = Residency(weights=EVERYTHING)
    torchs, ours, at_once = (seconds(updates, on_host, SLOW) for updates in DECLARED)
    assert at_once < ours < torchs


def test_what_hides_all_updates_still_waits_for_the_first_chunk_s() -> None:
    """Its gradient is complete last, and the next forward begins with it."""
    rates = replace(SLOW, bus_bytes_per_s=INFINITE, host_params_per_s=1e9, device_params_per_s=INFINITE)
    exposed = seconds(Updates(in_backward=True), Residency(weights=EVERYTHING), rates)
    compute_s, first_s = StepTime(PROGRAM, rates).compute_s, CHUNKS[0].numel / rates.host_params_per_s
    assert exposed == pytest.approx(compute_s + first_s, rel=1e-6)
    hidden = seconds(Updates(in_backward=True), Residency(frozenset({0}), EVERYTHING), rates)
    assert compute_s <= hidden < exposed


def test_a_slow_bus_decides_how_long_a_step_takes_whose_states_travel() -> None:
    rates = replace(SLOW, host_params_per_s=INFINITE, passing_params_per_s=INFINITE, bus_bytes_per_s=1e6)
    found = seconds(Updates(in_backward=True), Residency(weights=EVERYTHING, streamed=EVERYTHING), rates)
    moments_and_rest = sum(10 * chunk.numel for chunk in CHUNKS)
    assert found == pytest.approx(moments_and_rest / rates.bus_bytes_per_s, rel=1e-3)
