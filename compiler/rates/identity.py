"""Identifies this machine, as far as its speed depends on it."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from ...runtime.isa.torch_private import cuda_driver
from ...runtime.optimizer.updates import cores

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Identity:
    """The machine that rates are valid for. They do not apply to another one, nor to this one with another driver or
    with another number of processes sharing it."""

    gpu: str
    driver: str
    cuda: str
    cpu: str
    cores: int
    processes: int
    torch_version: str

    @classmethod
    def of(cls, device: torch.device, processes: int) -> "Identity":
        """This machine's identity, when each of `processes` processes uses one of its GPUs."""
        return cls(
            gpu=torch.cuda.get_device_name(device),
            driver=cuda_driver(),
            cuda=torch.version.cuda or torch.version.hip or "",
            cpu=_cpu_model(),
            cores=len(cores()),
            processes=processes,
            torch_version=torch.__version__,
        )


def _cpu_model(cpuinfo: Path = CPUINFO) -> str:
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
