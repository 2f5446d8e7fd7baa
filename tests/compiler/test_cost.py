"""The modelled time of a step: more on the device is never slower, and our updates hide where torch's do not."""

from dataclasses import replace

import pytest
from geminifx.compiler.cost import ARENA, CUDA, Rates, StepTime
from geminifx.passes.plan import Plan, Residency
from geminifx.runtime.layout import Updates
from hypothesis import given
from hypothesis import strategies as st
from optimizing import NET
from zoo import compiled

# Slow enough for the small model's updates and copies to show.
SLOW = Rates(1e9, 1e9, 1e6, 1e7, 1e5, overlaps=True)
MODEL = compiled(NET, precision="bf16")
PLAN, PROGRAM = MODEL.plan, MODEL.session.last["training"].flat
CHUNKS = range(len(PLAN.layout.chunks))
RATES = pytest.mark.parametrize("rates", [CUDA, ARENA, SLOW], ids=["cuda", "arena", "slow"])
DECLARED = [None, Updates(), Updates(in_backward=True)]


def seconds(plan: Plan, residency: Residency, rates: Rates) -> float:
    return StepTime(PROGRAM, rates).seconds(plan, residency)


@RATES
@pytest.mark.parametrize("updates", DECLARED, ids=["torch's", "ours", "in the backward"])
def test_with_everything_on_the_device_a_step_is_its_compute(rates: Rates, updates: Updates | None) -> None:
    time = StepTime(PROGRAM, rates)
    everything = Residency(masters=frozenset(CHUNKS))
    assert time.seconds(replace(PLAN, updates=updates), everything) == time.forward_s + time.backward_s > 0


@RATES
@given(masters=st.sets(st.sampled_from(CHUNKS)), weights=st.sets(st.sampled_from(CHUNKS)), one=st.sampled_from(CHUNKS))
@pytest.mark.parametrize("updates", DECLARED, ids=["torch's", "ours", "in the backward"])
def test_one_chunk_more_on_the_device_is_never_slower(
    rates: Rates, updates: Updates | None, masters: set[int], weights: set[int], one: int
) -> None:
    plan = replace(PLAN, updates=updates)
    before = Residency(frozenset(masters), frozenset(weights))
    stays = replace(before, weights=before.weights | {one})
    whole = replace(stays, masters=before.masters | {one})
    if updates is not None and updates.in_backward and one == min(set(CHUNKS) - masters, default=-1):
        return  # the first chunk on the host decides how long updates have: another may then be the first
    assert seconds(plan, whole, rates) <= seconds(plan, stays, rates) <= seconds(plan, before, rates)


def test_updates_hide_behind_the_compute_that_they_run_beside() -> None:
    on_host = Residency(weights=frozenset(CHUNKS))
    torchs, ours, at_once = (seconds(replace(PLAN, updates=updates), on_host, SLOW) for updates in DECLARED)
    assert at_once < ours < torchs
