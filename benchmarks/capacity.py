"""The largest models that are trained within a budget: plans one, trains it, and tells whether that counts.

    python benchmarks/capacity.py --hidden 6144 --layers 40 --heads 48 --moments bf16 --device-budget 24GB
    python benchmarks/capacity.py --hidden 7168 --layers 39 --heads 56 --moments int8 --device-budget 32GB
    python benchmarks/capacity.py --hidden 7168 --layers 39 --heads 56 --moments int8 --device-budget 32GB --plan-only

The model has OPT's shape: four hidden sizes of feed-forward, a vocabulary of 50,272, a head tied to the embedding. All
layers are trained, by AdamW whose masters are exact, on one repeated batch of random tokens. It counts where it makes
the steps, the loss falls, and the device's memory, as the driver reports it, stays within the budget; what the host may
hold is a budget, too. Weights are made from one random block (`random_models.fill`), since drawing billions would take
minutes, and leave their own memory as chunks take them over: there is no second copy. With --plan-only nothing is
allocated and nothing runs. On a machine without a GPU the device is an arena in RAM, which shows that it works.
"""

import argparse
import json
import os
import sys
import time
from typing import Any, get_args

import geminifx
import psutil
import torch
from geminifx.runtime.isa.moments import Masters, Moments
from geminifx.runtime.isa.units import format_bytes, parse_bytes
from measuring import bytes_in_use
from random_models import empty_model, random_model
from systems.base import synchronize
from task import random_sequences
from transformers import OPTConfig

FEWEST_STEPS = 5
"""Optimizer's steps below which nothing counts."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--hidden", type=int, default=6144)
    made.add_argument("--layers", type=int, default=40)
    made.add_argument("--heads", type=int, default=48)
    made.add_argument("--vocab", type=int, default=50_272)
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--seq", type=int, default=1024, help="tokens per sequence")
    made.add_argument("--moments", choices=get_args(Moments), default="int8")
    made.add_argument("--masters", choices=get_args(Masters), default="exact")
    made.add_argument("--device-budget", default="24GB")
    made.add_argument("--host-budget", default="118GiB")
    made.add_argument("--steps", type=int, default=6)
    made.add_argument("--lr", type=float, default=1e-4)
    made.add_argument("--rates", default=None, help="plan for another machine, see geminifx.compile")
    made.add_argument("--plan-only", action="store_true", help="with weights on meta; nothing runs")
    return made


def config(args: argparse.Namespace) -> OPTConfig:
    return OPTConfig(
        hidden_size=args.hidden, word_embed_proj_dim=args.hidden, ffn_dim=4 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, vocab_size=args.vocab,
        max_position_embeddings=max(args.seq, 2048), dropout=0.0, layerdrop=0.0, use_cache=False,
    )  # fmt: skip


def planned(args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """The compiled model, its optimizer, and what was planned. Raises BudgetError where nothing fits."""
    began_s = time.perf_counter()
    is_cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if is_cuda else torch.float32
    source = empty_model(config(args)) if args.plan_only else random_model(config(args), torch.device("cpu"), dtype)
    made_s = time.perf_counter()
    model = geminifx.compile(
        source, device_budget=args.device_budget, host_budget=args.host_budget, precision="bf16", rates=args.rates
    )
    optimizer = model.optimizer(torch.optim.AdamW, lr=args.lr, in_backward=True, moments=args.moments,
                                masters=args.masters)  # fmt: skip
    model.prepare(**inputs(args))
    plan = model.plan
    print(plan, flush=True)
    told = {
        "parameters": sum(parameter.numel() for parameter in source.parameters()), "moments": args.moments,
        "masters": args.masters,
        "made_s": round(made_s - began_s, 1), "planned_s": round(time.perf_counter() - made_s, 1),
        "planned_device_bytes": plan.peak_bytes, "planned_host_bytes": plan.estimate.host_bytes,
        "planned_step_s": round(plan.estimate.step_s, 3),
    }  # fmt: skip
    return model, optimizer, told


def inputs(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    device = torch.device("cuda" if torch.cuda.is_available() and not args.plan_only else "cpu")
    batch = random_sequences(config(args), args.batch, args.seq, pad=False)
    return {name: values.to(device) for name, values in batch.items()}


def trained(args: argparse.Namespace, model: Any, optimizer: Any) -> dict[str, Any]:
    """Train on one batch, and return seconds, losses, the highest bytes, and whether it counts."""
    batch, losses, seconds, usage = inputs(args), [], [], dict[str, int]()
    free_bytes = psutil.virtual_memory().available
    for step in range(args.steps):
        began_s = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
        synchronize()
        seconds.append(round(time.perf_counter() - began_s, 3))
        used = {"device_peak_bytes": model.stats.device_peak_bytes, **bytes_in_use(free_bytes)}
        usage = {name: max(value, usage.get(name, 0)) for name, value in used.items()}
        print(f"step {step}: {seconds[-1]} s, loss {losses[-1]}", flush=True)
    fits = usage["device_peak_bytes"] <= parse_bytes(args.device_budget, of=0)
    counts = {"enough steps": args.steps >= FEWEST_STEPS, "the loss falls": losses[-1] < losses[0], "it fits": fits}
    return {"step_s": seconds, "losses": losses, **usage, "counts": all(counts.values()), **counts}


def main(words: list[str] | None = None) -> dict[str, Any]:
    args = parser().parse_args(words)
    model, optimizer, told = planned(args)
    if not args.plan_only:
        told |= trained(args, model, optimizer)
        print("device, planned and measured:", format_bytes(told["planned_device_bytes"]),
              format_bytes(told["device_peak_bytes"]))  # fmt: skip
    print(json.dumps(told), flush=True)
    return told


if __name__ == "__main__":
    main()
    sys.stderr.flush()
    os._exit(0)  # an orderly end unpins and frees all host memory, which takes longer than the steps
