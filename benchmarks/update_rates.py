"""Speed of optimizer updates on the host and on the device, by how states are stored, beside what memory copies reach.

    python benchmarks/update_rates.py --threads 1 7 14 --params 256M --json update_rates.json

AdamW over bfloat16 gradients and weights, by each variant of the kernels that this machine has, against
`torch._fused_adamw_` on float32 weights, gradients and moments. Prints 10**9 parameters a second, the best of
several runs, and the bytes of memory that this reads and writes, as a table; `--json` writes it. Takes a second for
each row and 16 bytes per parameter.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import get_args

import torch
from geminifx.runtime.isa.moments import Masters, Moments, stored_dtype, stored_numel, update_bytes
from geminifx.runtime.kernels import device_updates, host_updates
from geminifx.runtime.kernels.device_updates import DeviceKernel
from geminifx.runtime.kernels.host_updates import TORCH, HostKernel
from geminifx.runtime.kernels.rounding import Draws
from geminifx.runtime.kernels.split_pairs import SplitPair
from geminifx.runtime.kernels.update_rules import AdamHyper, AdamMoments, Gradient
from torch import Tensor

SECONDS_EACH = 1.0
HYPER = AdamHyper(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=10)
FEW = 1_000_000
"""Parameters that slow variants are measured with: a sample will do."""
SLOW = (TORCH, "plain")
WAYS: tuple[tuple[Moments, Masters], ...] = tuple(product(get_args(Moments), get_args(Masters)))
COPY_BYTES, FUSED_BYTES = 4, 28
"""Bytes that are read and written by a copy of two bytes, and for each parameter by torch's fused update."""


@dataclass(frozen=True)
class Row:
    """One measurement; a copy is of two bytes per parameter."""

    where: str
    kernel: str
    moments: str
    masters: str
    gparams_per_s: float
    gbytes_per_s: float


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", default="64M", help="how many, such as 64M (10^6) or 1G (10^9)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


def count(text: str) -> int:
    unit = {"k": 10**3, "M": 10**6, "G": 10**9}.get(text[-1])
    return int(text) if unit is None else int(float(text[:-1]) * unit)


def rate(update: Callable[[], None], params: int, device: torch.device) -> float:
    """10**9 parameters a second of the fastest run within about a second, after one that touches the memory."""
    update()
    best, deadline = float("inf"), time.perf_counter() + SECONDS_EACH
    while True:
        wait(device)
        start = time.perf_counter()
        update()
        wait(device)
        end = time.perf_counter()
        best = min(best, end - start)
        if end > deadline:
            return params / best / 1e9


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def problem(
    params: int, moments: Moments, masters: Masters, device: torch.device
) -> tuple[SplitPair, Gradient, AdamMoments]:
    def full(value: float, dtype: torch.dtype, numel: int = params) -> Tensor:
        return torch.full((numel,), value, dtype=dtype, device=device)

    dtype = stored_dtype(moments, torch.float32)
    weights = full(0.02, torch.bfloat16)
    pair = SplitPair(weights, full(0, torch.int16)) if masters == "exact" else SplitPair(weights, None, Draws(1))
    mean, square = (full(0, dtype, stored_numel(dtype, params)) for _ in range(2))
    return pair, Gradient(full(1e-3, torch.bfloat16)), AdamMoments(mean, square)


def bytes_each(moments: Moments, masters: Masters) -> float:
    """What one parameter's update reads and writes."""
    return update_bytes(moments) - (0 if masters == "exact" else 4)  # a remainder is read and written


def on_host(params: int, threads: int) -> Iterator[Row]:
    here, where = torch.device("cpu"), f"host, {threads} threads"
    torch.set_num_threads(threads)
    yield from by_torch(params, here, where)
    for variant in host_updates.available_variants():
        kernel, numel = HostKernel(variant), min(params, FEW) if variant in SLOW else params
        for moments, masters in (way for way in WAYS if kernel.widens or way[0] == "exact"):
            state = problem(numel, moments, masters, here)
            speed = rate(lambda: kernel.adam(*state, HYPER, threads), numel, here)  # noqa: B023 - called at once
            yield Row(where, variant, moments, masters, speed, speed * bytes_each(moments, masters))


def on_device(params: int, device: torch.device) -> Iterator[Row]:
    where = torch.cuda.get_device_name(device)
    yield from by_torch(params, device, where)
    for variant in device_updates.available_variants():
        kernel = DeviceKernel(variant)
        for moments, masters in (way for way in WAYS if kernel.widens or way[0] == "exact"):
            state = problem(params, moments, masters, device)
            speed = rate(lambda: kernel.adam(*state, HYPER), params, device)  # noqa: B023 - called at once
            yield Row(where, variant, moments, masters, speed, speed * bytes_each(moments, masters))


def by_torch(params: int, device: torch.device, where: str) -> Iterator[Row]:
    """A copy, and torch's own fused update."""
    source, target = (torch.zeros(params, dtype=torch.bfloat16, device=device) for _ in range(2))
    speed = rate(lambda: target.copy_(source), params, device)
    yield Row(where, "copy", "", "", speed, speed * COPY_BYTES)
    tensors = [[torch.full((params,), value, device=device)] for value in (0.02, 1e-3, 0.0, 0.0)]
    step = [torch.tensor(float(HYPER.step), device=device)]

    def update() -> None:
        torch._fused_adamw_(
            *tensors, [], step, amsgrad=False, lr=HYPER.lr, beta1=HYPER.beta1, beta2=HYPER.beta2,
            weight_decay=HYPER.weight_decay, eps=HYPER.eps, maximize=False,
        )  # fmt: skip

    speed = rate(update, params, device)
    yield Row(where, "fused torch, float32", "exact", "exact", speed, speed * FUSED_BYTES)


def main() -> None:
    args = parse_args()
    params, rows = count(args.params), list[Row]()
    print(f"{params / 1e6:.0f} M parameters, torch {torch.__version__}, {platform.processor() or platform.machine()}")
    print(f"{'':24}{'kernel':24}{'moments':10}{'masters':18}{'G params/s':>12}{'GB/s':>10}")
    places = [on_device(params, torch.device("cuda"))] if torch.cuda.is_available() else []
    for place in [*places, *(on_host(params, threads) for threads in dict.fromkeys(args.threads))]:
        for row in place:
            told = f"{row.where:24}{row.kernel:24}{row.moments:10}{row.masters:18}"
            print(f"{told}{row.gparams_per_s:>12.3f}{row.gbytes_per_s:>10.1f}")
            rows.append(row)
    if args.json:
        told = {"params": params, "torch": torch.__version__, "rows": [vars(row) for row in rows]}
        args.json.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
