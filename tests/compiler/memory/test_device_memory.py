"""A GPU that other processes use, too: their memory is not ours, and not promised either."""

import warnings
from dataclasses import dataclass

import geminifx
import pytest
import torch
from geminifx.compiler.memory import device, device_memory
from geminifx.compiler.memory.device import Device
from geminifx.compiler.memory.device_memory import CONTEXT_BYTES, HEADROOM_BYTES, DeviceMemory
from geminifx.compiler.options import Options
from geminifx.compiler.rates.rates import ARENA
from geminifx.runtime.distributed.ranks import ALONE
from torch import nn

TOTAL, CONTEXT = 80 * 10**9, 5 * 10**8
GPU = torch.device("cuda", 0)


@dataclass
class Gpu:
    """What CUDA would tell of a GPU: `context` and `reserved` are this process's, `others` are not."""

    context: int = CONTEXT
    reserved: int = 0
    others: int = 0
    peak: int = 0
    share: float = 1.0

    def mem_get_info(self, _: object) -> tuple[int, int]:
        return TOTAL - self.context - self.reserved - self.others, TOTAL


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu()
    monkeypatch.setattr(device_memory, "_load_libraries", lambda _: None)
    monkeypatch.setattr(device, "use_expandable_segments", lambda: None)
    monkeypatch.setattr(Device, "total_bytes", lambda _: TOTAL)
    for name, fake in {
        "mem_get_info": found.mem_get_info,
        "memory_stats_as_nested_dict": lambda _: {
            "reserved_bytes": {"all": {"current": found.reserved, "peak": max(found.peak, found.reserved)}}
        },
        "set_per_process_memory_fraction": lambda share, _: setattr(found, "share", share),
        "reset_peak_memory_stats": lambda _: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return found


def budget(gpu: Gpu, given: int | str | None = None) -> tuple[int, int]:
    """The budget in bytes, and what torch's allocator may take of it."""
    limits = Device(GPU).limits(Options(device_budget=given, rates=ARENA), ALONE)
    assert limits.device_bytes is not None
    return limits.device_bytes, round(gpu.share * TOTAL)


def test_alone_the_whole_gpu_is_the_budget(gpu: Gpu) -> None:
    assert budget(gpu) == (TOTAL, TOTAL - CONTEXT - HEADROOM_BYTES)
    gpu.reserved = 10**10  # of another model in this process
    assert budget(gpu) == (TOTAL, TOTAL - CONTEXT - HEADROOM_BYTES)
    assert budget(gpu, "50%") == (TOTAL // 2, TOTAL // 2 - CONTEXT - HEADROOM_BYTES)


@pytest.mark.parametrize("reserved", [0, 10**10])
def test_beside_others_what_they_leave_is_the_budget(gpu: Gpu, reserved: int) -> None:
    gpu.others, gpu.reserved = 3 * 10**10, reserved
    device_bytes, allocator_bytes = budget(gpu)
    free, _ = gpu.mem_get_info(GPU)
    assert allocator_bytes == free + reserved - HEADROOM_BYTES, "all that is free, whatever the context takes"
    assert TOTAL - gpu.others <= device_bytes <= TOTAL - gpu.others + CONTEXT_BYTES - CONTEXT


def test_a_budget_beside_others_is_this_processs(gpu: Gpu) -> None:
    gpu.others = 3 * 10**10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert budget(gpu, 4 * 10**10) == (4 * 10**10, 4 * 10**10 - CONTEXT_BYTES - HEADROOM_BYTES)
    with pytest.warns(UserWarning, match=r"other processes hold 29,4.* of the 80,000,000,000 of cuda:0: unless they"):
        assert budget(gpu, "80%")[0] == 64 * 10**9


@pytest.mark.parametrize("before", [0, 2 * 10**10])
@pytest.mark.parametrize("later", [0, 10**8, 2 * 10**10])
def test_peaks_are_this_processs_whoever_comes_and_goes(gpu: Gpu, before: int, later: int) -> None:
    gpu.others = before
    memory = DeviceMemory.measured(GPU)
    gpu.peak, gpu.others = 10**10, later
    own = memory.peak_bytes() - gpu.peak
    assert CONTEXT <= own <= (CONTEXT_BYTES if before else CONTEXT) + HEADROOM_BYTES
    if not before and not later:
        gpu.context += 10**7
        assert memory.peak_bytes() - gpu.peak == CONTEXT + 10**7, "alone, to the byte"


@pytest.mark.cuda
def test_on_a_gpu_the_default_budget_is_what_is_free_and_what_this_process_holds() -> None:
    x = torch.randn(4, 64)
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    free, total = torch.cuda.mem_get_info()  # before libraries are loaded, which the budget leaves room for
    model = geminifx.compile(nn.Linear(64, 64), example_inputs=(x,))
    found = model.session.limits.device_bytes
    assert held.nbytes < found <= total
    assert found - model.session.device.memory.own_bytes <= free + torch.cuda.memory_reserved()
    model(x).sum().backward()
    assert held.nbytes < model.stats.device_peak_bytes <= found
