"""Which of a machine's devices a process takes."""

import pytest
import torch
from geminifx.compiler.memory.device import Device
from geminifx.compiler.options import Options
from geminifx.runtime.isa.errors import StateError


@pytest.mark.parametrize(("visible", "local", "taken"), [(8, 3, 3), (1, 3, 0), (1, 0, 0)])
def test_a_process_takes_its_own_of_the_visible_devices(
    monkeypatch: pytest.MonkeyPatch, visible: int, local: int, taken: int
) -> None:
    current = [0]
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: current.__setitem__(0, index))
    assert Device.choose(Options(device="cuda")).torch_device == torch.device("cuda", taken)


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(StateError, match="LOCAL_RANK is 2, but 2 devices are visible"):
        Device.choose(Options(device="cuda"))
