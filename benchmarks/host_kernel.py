"""Speed of the host's optimizer updates: ours per variant and number of threads, and torch's fused AdamW.

    python benchmarks/host_kernel.py --threads 1 7 14 --params 256M --json host_kernel.json

AdamW over bfloat16 gradients: split pairs and float32 moments, 26 bytes of memory traffic per parameter, against
`torch._fused_adamw_` on float32 weights, gradients and moments, 28 bytes. Prints G params/s, the best of several
runs, as a table; `--json` writes it. Takes less than 30 s and 16 bytes per parameter.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from geminifx.runtime.kernels.host_updates import TORCH, HostKernel, available_variants
from geminifx.runtime.kernels.split_pairs import SplitPair
from geminifx.runtime.kernels.update_rules import AdamHyper, AdamMoments, Gradient
from torch import Tensor

SECONDS_EACH = 1.0
HYPER = AdamHyper(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=10)
BYTES = {"fused torch, float32": 28}
PAIR_BYTES = 26


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", default="64M", help="how many, such as 64M (10^6) or 1G (10^9)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


def count(text: str) -> int:
    unit = {"k": 10**3, "M": 10**6, "G": 10**9}.get(text[-1])
    return int(text) if unit is None else int(float(text[:-1]) * unit)


def rate(update: Callable[[], None], params: int) -> float:
    """Return G params/s of the fastest run within about a second, after a run that touches the memory."""
    update()
    best, deadline = float("inf"), time.perf_counter() + SECONDS_EACH
    while True:
        start = time.perf_counter()
        update()
        end = time.perf_counter()
        best = min(best, end - start)
        if end > deadline:
            return params / best / 1e9


def ours(variant: str, threads: int, params: int) -> float:
    pair = SplitPair(torch.full((params,), 0.02).bfloat16(), torch.zeros(params, dtype=torch.int16))
    moments = AdamMoments(torch.zeros(params), torch.zeros(params))
    gradient = Gradient(torch.full((params,), 1e-3, dtype=torch.bfloat16))
    kernel = HostKernel(variant)
    return rate(lambda: kernel.adam(pair, gradient, moments, HYPER, threads), params)


def fused(threads: int, params: int) -> float:
    weight, grad, mean, square = (torch.full((params,), value) for value in (0.02, 1e-3, 0.0, 0.0))
    step = [torch.tensor(float(HYPER.step))]

    def update(*tensors: Tensor) -> None:
        torch._fused_adamw_(
            *([tensor] for tensor in tensors), [], step, amsgrad=False, lr=HYPER.lr, beta1=HYPER.beta1,
            beta2=HYPER.beta2, weight_decay=HYPER.weight_decay, eps=HYPER.eps, maximize=False,
        )  # fmt: skip

    torch.set_num_threads(threads)
    return rate(lambda: update(weight, grad, mean, square), params)


def main() -> None:
    args = parse_args()
    params, rows = count(args.params), []
    print(f"{params / 1e6:.0f} M parameters, torch {torch.__version__}, {platform.processor() or platform.machine()}")
    print(f"{'':24}{'threads':>8}{'G params/s':>12}{'GB/s':>8}")
    for threads in dict.fromkeys(args.threads):
        torch.set_num_threads(threads)
        rates = {"fused torch, float32": fused(threads, params)}
        for variant in available_variants():
            few = min(params, 1_000_000) if variant in (TORCH, "plain") else params  # slow: a sample will do
            rates[variant] = ours(variant, threads, few)
        for name, speed in rates.items():
            traffic = speed * BYTES.get(name, PAIR_BYTES)
            print(f"{name:24}{threads:>8}{speed:>12.3f}{traffic:>8.1f}")
            rows.append({"kernel": name, "threads": threads, "gparams_per_s": speed, "gbytes_per_s": traffic})
    if args.json:
        args.json.write_text(json.dumps({"params": params, "torch": torch.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
