"""What measured steps tell of the machine: the modelled step is then the measured one."""

from dataclasses import replace

import pytest
from geminifx.compiler.planner.correction import MeasuredStep, corrected
from geminifx.compiler.planner.memory import Limits
from geminifx.compiler.planner.solution import estimated
from geminifx.compiler.planner.timeline import timeline
from geminifx.compiler.programs.programs import Compiled
from geminifx.compiler.rates.presets import preset
from geminifx.compiler.rates.rates import Rates, Slowdown
from optimizing import NET
from zoo import compiled

FAST = preset("h100-sxm")
SLOW_BUS = replace(FAST, up_bytes_per_s=1e5, down_bytes_per_s=1e5, both_bytes_per_s=1e5)
SLOW_DEVICE = replace(FAST, kernel_s=1e-3)


def planned(rates: Rates) -> tuple[Compiled, Limits]:
    """A program whose states are on the host, and the limits that it was planned for."""
    model = compiled(NET, precision="bf16", recompute="none", placement="cpu", rates=rates)
    return next(iter(model.session.programs().values())), model.session.planning.limits


def measured(program: Compiled, ratio: float, **others: float) -> MeasuredStep:
    """A step that takes so many times what is modelled."""
    expected = program.plan.estimate
    figures = {"up_s": 0.0, "down_s": 0.0, "host_s": 0.0, "peak_bytes": 0, **others}
    return MeasuredStep(step_s=ratio * expected.step_s, **figures)  # type: ignore[arg-type]


def modelled_s(program: Compiled, limits: Limits) -> float:
    return estimated(program.plan, program.flat, limits).plan.estimate.step_s


@pytest.mark.parametrize("rates", [FAST, SLOW_BUS, SLOW_DEVICE], ids=["fast", "slow bus", "slow device"])
@pytest.mark.parametrize("ratio", [0.4, 0.97, 1.0, 1.05, 3.0])
def test_the_modelled_step_is_then_the_measured_one(rates: Rates, ratio: float) -> None:
    program, limits = planned(rates)
    found = corrected(limits, program.plan, program.flat, measured(program, ratio))
    assert modelled_s(program, found) == pytest.approx(ratio * program.plan.estimate.step_s, rel=0.01)


def test_what_binds_explains_what_is_measured() -> None:
    program, limits = planned(SLOW_DEVICE)
    rates = corrected(limits, program.plan, program.flat, measured(program, 1.5)).rates
    assert rates.kernel_s == pytest.approx(1.5 * SLOW_DEVICE.kernel_s, rel=0.02)
    assert rates.up_bytes_per_s == pytest.approx(SLOW_DEVICE.up_bytes_per_s, rel=0.02)


def test_a_bus_that_binds_makes_no_slow_device() -> None:
    program, limits = planned(SLOW_BUS)
    rates = corrected(limits, program.plan, program.flat, measured(program, 1.02)).rates
    assert rates.kernel_s == pytest.approx(SLOW_BUS.kernel_s, rel=0.07)


def test_copies_are_corrected_by_what_was_measured_of_them() -> None:
    program, limits = planned(SLOW_BUS)
    busy_s = dict(program.plan.estimate.busy_s)
    told = measured(program, 1.6, up_s=2 * busy_s["bus up"], down_s=busy_s["bus down"])
    rates = corrected(limits, program.plan, program.flat, told).rates
    slower = SLOW_BUS.up_bytes_per_s / rates.up_bytes_per_s, SLOW_BUS.down_bytes_per_s / rates.down_bytes_per_s
    assert slower[0] == pytest.approx(2 * slower[1], rel=0.01)


def test_memory_that_was_not_planned_for_is_reserved() -> None:
    program, limits = planned(FAST)
    more = corrected(limits, program.plan, program.flat, measured(program, 1, peak_bytes=program.plan.peak_bytes + 9))
    less = corrected(limits, program.plan, program.flat, measured(program, 1, peak_bytes=1))
    assert (more.reserve_bytes, less.reserve_bytes) == (limits.reserve_bytes + 9, limits.reserve_bytes)


def test_a_slower_device_has_the_same_timeline_as_slower_rates() -> None:
    program, _ = planned(FAST)
    slow, fast = (timeline(program.flat, program.plan, rates) for rates in (FAST.slowed(Slowdown(compute=3)), FAST))
    found = fast.slowed(3)
    assert [about for _, *about in found.instructions] == [about for _, *about in slow.instructions]
    for one, other in zip(found.instructions, slow.instructions, strict=True):
        assert one[0] == pytest.approx(other[0])
    for name in ("compute_s", "busy_s", "launching_s"):
        assert getattr(found, name) == pytest.approx(getattr(slow, name))


def test_processes_wait_for_the_slowest() -> None:
    assert MeasuredStep.slowest([MeasuredStep(1, 2, 3, 4, 5), MeasuredStep(2, 1, 4, 3, 6)]) == MeasuredStep(
        2, 2, 4, 4, 6
    )
