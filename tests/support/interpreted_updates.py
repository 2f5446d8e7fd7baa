"""The device's Triton kernels against the host's, bit for bit, by Triton's interpreter: run with TRITON_INTERPRET=1."""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product

import torch
from geminifx.runtime.kernels import device_updates
from geminifx.runtime.kernels.device_updates import TRITON, DeviceKernel
from geminifx.runtime.kernels.host_updates import HostKernel
from updates import DRAWS, DTYPES, RULES, STORED, Problem, any_bits, usual

NUMELS = (1024 + 43, 2 * 1024 + 256 + 43)


def differing() -> Iterator[str]:
    """What does not come out alike."""
    for moments, hyper, dtype, values in product(STORED, RULES, DTYPES, (usual, any_bits)):
        for numel, draws in zip(NUMELS, (None, DRAWS), strict=True):
            expected, found = (Problem(numel, 3, dtype, 4, values, STORED[moments], draws) for _ in range(2))
            for problem in (expected, found):
                _flush(problem.gradient.values)
            expected.update(HostKernel(), hyper)
            found.update(DeviceKernel(TRITON), hyper)
            if not found.equals(expected):
                yield f"{numel}, draws {draws}, with {moments} moments and {dtype} {values.__name__} gradients: {hyper}"


def _flush(gradient: torch.Tensor) -> None:
    """Triton 3.9's interpreter reads bfloat16's denormal numbers as others."""
    if gradient.dtype == torch.bfloat16:
        gradient.masked_fill_(gradient.float().abs() < torch.finfo(torch.bfloat16).tiny, 0.0)


def main() -> None:
    torch.cuda.device = lambda device: nullcontext()
    device_updates._compiles = lambda: True
    DeviceKernel._launches = lambda self, pair: True
    raise SystemExit("\n".join(differing()) or 0)


if __name__ == "__main__":
    main()
