"""Calibration: what most measurements agree on makes rates, a busy machine is refused; and all of it runs."""

import threading
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from geminifx.compiler.rates import calibrate as calibration
from geminifx.compiler.rates import others
from geminifx.compiler.rates.calibrate import AUTOMATIC, BusyError, calibrate, differences, measured, rates_from
from geminifx.compiler.rates.measure import Effort, Measurements
from geminifx.compiler.rates.others import HostWatch, used_by_others
from geminifx.compiler.rates.presets import preset
from geminifx.compiler.rates.rates import Updates
from geminifx.runtime.distributed.ranks import Ranks
from geminifx.runtime.kernels.host_updates import HostKernel

CPU = torch.device("cpu")
TINY = Effort(
    needed_bytes=0, sizes=(8, 16), sustained_s=0.0, each_s=0.0, copied_bytes=1024, operator_bytes=1024,
    host_params=1000, device_params=1000, updates_on_device=True,
)  # fmt: skip
FOUND = Measurements(
    products_s=((3e-6, 12e-6), (3e-6, 12e-6), (6e-6, 82e-6)), memory_bytes_per_s=4e12, kernel_s=2e-6, launch_s=5e-6,
    up_bytes_per_s=52e9, down_bytes_per_s=51e9, both_bytes_per_s=40e9, host_params_per_s=6e9,
    host_beside_params_per_s=5e9, torch_params_per_s=3e9, device_params_per_s=130e9,
)  # fmt: skip


def test_what_was_measured_is_what_the_clock_goes_by() -> None:
    rates = rates_from(FOUND, replace(AUTOMATIC, sizes=(512, 1024)), "NVIDIA H200")
    assert rates.bf16.flop == (2 * 512**3, 2 * 1024**3)
    assert rates.bf16.flops_per_s[1] == 2 * 1024**3 / 10e-6, "what begins and ends an operator is counted apart"
    assert rates.bf16.flops_per_s[0] == 2 * 512**3 / 1.5e-6, "as far as it is not most of it"
    assert rates.fp32.flops_per_s[1] == 2 * 1024**3 / 80e-6
    for field in fields(Measurements):
        if field.name in ("memory_bytes_per_s", "kernel_s", "launch_s", "both_bytes_per_s", "host_params_per_s"):
            assert getattr(rates, field.name) == getattr(FOUND, field.name)
    assert rates.device_params_per_s == 130e9 and rates.name == "NVIDIA H200, measured" and rates.overlaps
    # Copies of 80 GB/s take a sixth of the worker's time.
    assert rates.passing_bytes_per_s == pytest.approx(80e9 * 6)


def test_what_was_not_measured_is_the_card_s_or_follows() -> None:
    automatic = rates_from(replace(FOUND, device_params_per_s=None), TINY, "NVIDIA H200")
    assert automatic.device_params_per_s == 4e12 / 26
    assert automatic.network_bytes_per_s == preset("h200").network_bytes_per_s
    assert rates_from(FOUND, TINY, "NVIDIA A10").network_bytes_per_s == 20e9, "through the host"
    together = replace(FOUND, network_bytes_per_s=200e9, network_latency_s=3e-5)
    assert rates_from(together, TINY, "NVIDIA H200").network_bytes_per_s == 200e9
    assert rates_from(together, TINY, "NVIDIA H200").network_latency_s == 3e-5


def test_narrow_moments_have_rates_of_their_own() -> None:
    on_host = replace(FOUND, host_bf16_params_per_s=7e9, host_int8_params_per_s=8e9)
    rates = rates_from(on_host, TINY, "NVIDIA H200")
    assert rates.updates("bf16") == Updates(7e9, 4e12 / 18) and rates.updates("int8") == Updates(8e9, 4e12 / 14.0625)
    on_both = replace(on_host, device_bf16_params_per_s=2e11, device_int8_params_per_s=3e11)
    rates = rates_from(on_both, TINY, "NVIDIA H200")
    assert rates.updates("bf16") == Updates(7e9, 2e11) and rates.updates("int8") == Updates(8e9, 3e11)
    assert rates.updates("exact") == Updates(6e9, 130e9)
    without = rates_from(FOUND, TINY, "NVIDIA H200")
    assert without.int8_moments is None and without.updates("int8").host_params_per_s == pytest.approx(
        6e9 * 26 / 14.0625
    )


def test_copies_that_do_not_slow_updates_still_cost_a_little() -> None:
    faster_beside = replace(FOUND, host_beside_params_per_s=6.1e9)
    assert 0 < rates_from(faster_beside, TINY, "NVIDIA H200").passing_bytes_per_s < float("inf")


@pytest.mark.parametrize(
    "changes, named",
    [({}, []), ({"up_bytes_per_s": 52e9 * 1.14}, []), ({"up_bytes_per_s": 52e9 * 1.16}, ["up_bytes_per_s"]),
     ({"up_bytes_per_s": 52e9 / 1.16}, ["up_bytes_per_s"]),
     ({"launch_s": 7e-6}, []), ({"launch_s": 8e-6}, ["launch_s"]),
     ({"products_s": ((3e-6, 12e-6), (3e-6, 12e-6), (6e-6, 182e-6))}, ["products_s"])],
)  # fmt: skip
def test_two_measurements_that_are_too_far_apart_are_named(changes: dict[str, object], named: list[str]) -> None:
    assert differences([FOUND, replace(FOUND, **changes)]) == named


UNSTEADY = [replace(FOUND, launch_s=launch_s) for launch_s in (5e-6, 9e-6, 17e-6, 33e-6, 65e-6)]


def test_a_machine_on_which_something_else_runs_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration.HostWatch, "others", lambda *_: "others keep 60 % of the host's 16 cores busy")
    found = iter(UNSTEADY)
    with pytest.raises(
        BusyError,
        match=r"5 times, launch_s came out differently every time, and others keep 60 % .* busy; stop the",
    ):
        calibrate(CPU, TINY, measure=lambda *_: next(found))
    assert next(found, None) is None


def test_where_nobody_else_is_seen_the_rates_say_what_is_unsteady(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration.HostWatch, "others", lambda *_: None)
    found = iter(UNSTEADY)
    rates = calibrate(CPU, TINY, measure=lambda *_: next(found))
    assert (rates.name, rates.launch_s) == ("the CPU, measured (launch_s unsteady)", 9e-6), "of 5, 9 and 17"


def test_most_measurements_are_heard_and_of_each_rate_other_ones_may_be() -> None:
    cold, hit = replace(FOUND, launch_s=9e-6), replace(FOUND, host_params_per_s=2e9)
    found = iter([cold, hit, FOUND])
    rates = calibrate(CPU, TINY, measure=lambda *_: next(found))
    assert (rates.launch_s, rates.host_params_per_s, rates.name) == (5e-6, 6e9, "the CPU, measured")


def test_two_that_agree_are_enough() -> None:
    found = iter([FOUND, replace(FOUND, launch_s=5.2e-6)])
    assert calibrate(CPU, TINY, measure=lambda *_: next(found)).launch_s == pytest.approx(5.1e-6)


def test_others_are_seen_by_the_processors_time_that_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"_all_busy_s": 100.0, "_own_busy_s": 10.0}
    for name in clock:
        monkeypatch.setattr(others, name, lambda name=name: clock[name])
    monkeypatch.setattr(others, "cores", lambda: set(range(4)))
    monkeypatch.setattr(others.time, "perf_counter", lambda: clock["_all_busy_s"] - 100)
    watch = HostWatch()
    clock.update(_all_busy_s=110.0, _own_busy_s=19.0)
    assert watch.others() is None, "a second of 40"
    clock.update(_own_busy_s=11.0)
    assert watch.others() == "other processes keep 22 % of the host's 4 cores busy" and watch.others(9) is None


def test_nor_is_one_that_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "used_by_others", lambda *_: "other processes hold 12.0 GB of the GPU's memory")
    with pytest.raises(BusyError, match="other processes hold"):
        calibrate(CPU, TINY, measure=lambda *_: pytest.fail("nothing is to run"))


@pytest.mark.parametrize(
    "free, reserved, busy, says",
    [(70, 8, 0, None), (60, 8, 0, "other processes hold 12.9 GB of the GPU's memory"),
     (70, 8, 93, "the GPU is 93 % busy already"), (70, 8, None, None),
     (2, 78, 0, "2.15 GB of the GPU's memory are free, but 3.22 GB are needed")],
    ids=["nobody", "memory", "time", "nobody tells", "ours, and full"],
)  # fmt: skip
def test_who_uses_a_gpu(monkeypatch: pytest.MonkeyPatch, free: int, reserved: int, busy: int | None,
                        says: str | None) -> None:  # fmt: skip
    def utilization(device: torch.device) -> int:
        if busy is None:
            raise ModuleNotFoundError("pynvml")
        return busy

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved * 2**30)
    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    assert used_by_others(torch.device("cuda"), calibration.THOROUGH.needed_bytes) == says


def test_no_room_is_no_error_of_the_model_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Measurements:
        raise MemoryError("CUDA cannot pin 268,435,456 bytes of host memory")

    monkeypatch.setattr(calibration.Bench, "measure", full)
    with pytest.raises(BusyError, match="there is not enough free memory to measure: CUDA cannot pin"):
        measured(CPU, TINY, Ranks())


def test_everything_can_be_measured_and_random_numbers_are_nobody_else_s() -> None:
    """On the CPU, whose copies are done when they return: what is timed is another matter."""
    before = torch.get_rng_state()
    found = measured(CPU, TINY, Ranks())
    assert torch.equal(torch.get_rng_state(), before)
    for field in fields(Measurements):
        if not field.name.startswith(("network", "device_bf16", "device_int8")):  # whose kernels are the GPU's
            assert min(calibration._numbers(getattr(found, field.name))) > 0, field.name
    assert found.network_bytes_per_s is None, "one process exchanges nothing"
    assert [len(seconds) for seconds in found.products_s] == [2, 2, 2]
    rates_from(found, TINY, "the CPU")


def test_copies_in_both_directions_are_timed_beside_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which another thread makes; what it raises is raised."""
    update, beside = HostKernel.adam, list[str]()

    def watched(*args: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            beside.append("update")
            if len(beside) > 1:
                raise ValueError("an update beside copies")
        update(*args)

    monkeypatch.setattr(HostKernel, "adam", watched)
    with pytest.raises(ValueError, match="an update beside copies"):
        for _ in range(100):  # one may be over before its second update
            measured(CPU, TINY, Ranks())
    assert beside


@pytest.mark.cuda
def test_a_gpu_is_measured_and_left_as_it_was() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    before, reserved = torch.cuda.get_rng_state(device), torch.cuda.memory_reserved(device)
    rates = rates_from(measured(device, AUTOMATIC, Ranks()), AUTOMATIC, torch.cuda.get_device_name(device))
    assert torch.equal(torch.cuda.get_rng_state(device), before)
    assert torch.cuda.memory_reserved(device) - reserved <= 64 * 2**20, "a workspace of the library for products"
    assert rates.bf16.flops_per_s[-1] > rates.fp32.flops_per_s[-1] / 2 and rates.both_bytes_per_s > 1e9
    assert 0 < rates.kernel_s < rates.launch_s < 1e-3
