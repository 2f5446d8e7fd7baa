"""Which machine this is, as far as its speed depends on it."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from ...runtime.isa.torch_private import cuda_driver
from ...runtime.optimizer.updates import cores

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Identity:
    """What rates are measured of; of another machine, or of this one with another driver or shared by another number
    of processes, they say nothing."""

    gpu: str
    driver: str
    cuda: str
    cpu: str
    cores: int
    processes: int
    torch_version: str

    @classmethod
    def of(cls, device: torch.device, processes: int) -> "Identity":
        """This machine's, with one of its GPUs for each of so many processes."""
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
