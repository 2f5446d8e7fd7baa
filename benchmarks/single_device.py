"""Time and memory of training one OPT on one device: ours within a budget, or plain PyTorch without one.

    python benchmarks/single_device.py --model opt-1.3b --batch 8 --seq 1024 --budget 24GB --recompute all
    python benchmarks/single_device.py --model opt-1.3b --batch 8 --seq 1024 --plain

Random weights, random tokens, AdamW over float32 masters, dropout 0. Prints one line of JSON: seconds per step
(median after three warm-up steps), peak device bytes as the driver reports them, compile time per stage.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace

import geminifx
import torch
from geminifx.models.presets import PRESETS
from transformers import OPTForCausalLM


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-1.3b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--budget", default=None)
    parser.add_argument("--placement", default="auto")
    parser.add_argument("--recompute", default="auto")
    parser.add_argument("--dump", default=None)
    parser.add_argument("--profile", default=None, help="write a Chrome trace of one step to this file")
    parser.add_argument("--plain", action="store_true", help="plain PyTorch: bf16 autocast, all on the device")
    return parser.parse_args()


def build(name: str) -> torch.nn.Module:
    config = replace(PRESETS[name], dropout=0.0).config()
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # initialised where it is fast
        return OPTForCausalLM(config).train()


def prepare(args: argparse.Namespace, batch: dict[str, torch.Tensor]) -> tuple[torch.nn.Module, dict]:
    model = build(args.model)
    if args.plain:
        return model, {}
    model = model.cpu()
    torch.cuda.empty_cache()
    start = time.perf_counter()
    compiled = geminifx.compile(model, device_budget=args.budget, placement=args.placement, recompute=args.recompute,
                                example_inputs=batch, dump=args.dump)  # fmt: skip
    print(compiled.plan)
    facts = {"compile_s": round(time.perf_counter() - start, 1), "planned_peak_bytes": compiled.plan.peak_bytes,
             "budget_bytes": compiled.plan.budget_bytes}  # fmt: skip
    return compiled, facts


def train(args: argparse.Namespace, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    seconds, losses, driver_peak_bytes = [], [], 0

    def step() -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=args.plain):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    for _ in range(args.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        losses.append(step())
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        free, total = torch.cuda.mem_get_info()
        driver_peak_bytes = max(driver_peak_bytes, total - free)
    if args.profile:
        with torch.profiler.profile() as profiler:
            step()
            torch.cuda.synchronize()
        profiler.export_chrome_trace(args.profile)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))
    median = statistics.median(seconds[3:])
    return {
        "step_s": round(median, 4), "tokens_per_s": round(args.batch * args.seq / median),
        "all_steps_s": [round(s, 3) for s in seconds], "driver_peak_bytes": driver_peak_bytes,
        "losses": [round(loss.item(), 4) for loss in losses[:: max(1, len(losses) // 4)]],
    }  # fmt: skip


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    tokens = torch.randint(0, 50000, (args.batch, args.seq), device="cuda")
    batch = {"input_ids": tokens, "labels": tokens}
    model, facts = prepare(args, batch)
    facts |= train(args, model, batch)
    if isinstance(model, geminifx.CompiledModule):
        stats = model.stats
        facts |= {"device_peak_bytes": stats.device_peak_bytes, "host_peak_bytes": stats.host_peak_bytes,
                  "to_device_bytes_per_step": stats.step.to_device_bytes,
                  "to_host_bytes_per_step": stats.step.to_host_bytes,
                  "passes": [str(record) for record in model.history["training"]]}  # fmt: skip
    print("RESULT " + json.dumps({"model": args.model, "batch": args.batch, "seq": args.seq,
                                  "device": torch.cuda.get_device_name(), "plain": args.plain, **facts}))  # fmt: skip


if __name__ == "__main__":
    main()
