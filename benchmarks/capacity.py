"""The largest models that are trained within a budget: plans one, trains it, and tells whether that counts.

    python benchmarks/capacity.py --hidden 6144 --layers 40 --heads 48 --moments bf16 --device-budget 24GB
    python benchmarks/capacity.py --hidden 7168 --layers 39 --heads 56 --moments int8 --device-budget 32GB
    python benchmarks/capacity.py --hidden 7168 --layers 39 --heads 56 --moments int8 --device-budget 32GB --plan-only
    python benchmarks/capacity.py --row 70b-qlora        # what ROWS say of it; other options overrule that

The model has OPT's shape, four hidden sizes of feed-forward, a vocabulary of 50,272, a head tied to the embedding, or
is one of `random_models`. All layers are trained, by AdamW, or, with --lora, adapters beside frozen ones, which are
bfloat16 or codes, on one repeated batch of random tokens. It counts where it makes
the steps, the loss falls, and the device's memory, as the driver reports it, stays within the budget; what the host may
hold is a budget, too. Weights are made from one random block (`random_models.fill`), since drawing billions would take
minutes, and leave their own memory as chunks take them over: there is no second copy. Codes are those of one random
weight of each shape; what is frozen as bfloat16 may be more than the host holds, and is read from views of that block
(`random_models.overlapping`). float16 has a loss scale, for which updates wait for `step()`. With --plan-only nothing
is allocated and nothing runs. On a machine without a GPU the device is an arena in RAM, which shows that it works.
"""

import argparse
import json
import os
import sys
import time
from functools import cache
from typing import Any, get_args

import geminifx
import psutil
import torch
from geminifx.compiler.weights.quantized_weights import keep_packed
from geminifx.models.adapters import blocks
from geminifx.models.low_rank import adapted
from geminifx.runtime.isa.moments import Masters, Moments
from geminifx.runtime.isa.quantized import Quantized
from geminifx.runtime.isa.units import format_bytes, parse_bytes
from geminifx.runtime.kernels.packed import Packed
from geminifx.runtime.kernels.quantized import quantize
from measuring import bytes_in_use
from random_models import config_of, empty_model, fill, norm_weight, overlapping, random_model
from systems.base import synchronize
from task import random_sequences
from torch import nn
from transformers import OPTConfig, PreTrainedConfig

FEWEST_STEPS = 5
"""Optimizer's steps below which nothing counts."""


_OPT_18B = {"hidden": 6144, "layers": 40, "heads": 48}
_OPT_24B = {"hidden": 7168, "layers": 39, "heads": 56, "device_budget": "32GB"}
_OPT_13B = {"hidden": 5120, "layers": 40, "heads": 40}
_GPT2_XL = {"hidden": 1600, "layers": 48, "heads": 25, "device_budget": "6GB", "moments": "exact"}
_LLAMA_70B = {"model": "llama-70b", "lora": 16}
ROWS: dict[str, dict[str, Any]] = {
    "12b": {"hidden": 5120, "layers": 37, "heads": 40, "moments": "exact"},
    "18b": {**_OPT_18B, "moments": "bf16", "host_budget": "122GiB"},
    "18b-8k": {**_OPT_18B, "batch": 8},
    "24b": _OPT_24B,
    "30b-8k": {"hidden": 7168, "layers": 48, "heads": 56, "masters": "bf16-stochastic", "batch": 8},
    "6.7b-8": {"hidden": 4096, "layers": 32, "heads": 32, "batch": 8},
    "70b-lora": {**_LLAMA_70B, "host_budget": "124GB"},
    "70b-qlora": {**_LLAMA_70B, "frozen": "nf4", "batch": 8, "host_budget": "50GB"},
    "13b-lora": {**_OPT_13B, "lora": 16, "batch": 4, "host_budget": "28GB"},
    "1.5b": _GPT2_XL,
    "1.5b-fp16": {**_GPT2_XL, "precision": "fp16"},
    "24b-fp16": {**_OPT_24B, "precision": "fp16"},
}
"""Models and formats that are to run, by name: options in place of the defaults. Where none is told, the device has
24 GB and the host 118 GiB; float16 keeps a whole master beside each weight, so that its 24b is refused there."""


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The options, those of a row where one is asked for."""
    made = parser()
    row = made.parse_args(words).row
    made.set_defaults(**ROWS.get(row, {}))
    return made.parse_args(words)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--row", choices=ROWS, help="options of this name in place of the defaults")
    made.add_argument("--model", default=None, help="one of random_models, or a config file, instead of OPT's shape")
    made.add_argument("--hidden", type=int, default=6144)
    made.add_argument("--layers", type=int, default=40)
    made.add_argument("--heads", type=int, default=48)
    made.add_argument("--vocab", type=int, default=50_272)
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--seq", type=int, default=1024, help="tokens per sequence")
    made.add_argument("--moments", choices=get_args(Moments), default="int8")
    made.add_argument("--masters", choices=get_args(Masters), default="exact")
    made.add_argument("--precision", choices=("bf16", "fp16"), default="bf16")
    made.add_argument("--lora", type=int, default=0, metavar="RANK", help="train adapters beside frozen layers")
    made.add_argument("--frozen", choices=("bf16", *get_args(Quantized)), default="bf16", help="how these are kept")
    made.add_argument("--device-budget", default="24GB")
    made.add_argument("--host-budget", default="118GiB")
    made.add_argument("--steps", type=int, default=6)
    made.add_argument("--lr", type=float, default=1e-4)
    made.add_argument("--rates", default=None, help="plan for another machine, see geminifx.compile")
    made.add_argument("--plan-only", action="store_true", help="with weights on meta; nothing runs")
    return made


def config(args: argparse.Namespace) -> PreTrainedConfig:
    if args.model is not None:
        return config_of(args.model, seq=args.seq)
    return OPTConfig(
        hidden_size=args.hidden, word_embed_proj_dim=args.hidden, ffn_dim=4 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, vocab_size=args.vocab,
        max_position_embeddings=max(args.seq, 2048), dropout=0.0, layerdrop=0.0, use_cache=False,
    )  # fmt: skip


def planned(args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """The compiled model, its optimizer, and what was planned. Raises BudgetError where nothing fits."""
    began_s = time.perf_counter()
    source = adapted_model(args) if args.lora else whole_model(args)
    parameters = sum(parameter.numel() for parameter in source.parameters())
    made_s = time.perf_counter()
    frozen = args.frozen if args.lora and args.plan_only and args.frozen != "bf16" else None
    model = geminifx.compile(
        source, device_budget=args.device_budget, host_budget=args.host_budget, precision=args.precision,
        rates=args.rates, frozen=frozen,
    )  # fmt: skip
    optimizer = model.optimizer(torch.optim.AdamW, lr=args.lr, in_backward=args.precision != "fp16",
                                moments=args.moments, masters=args.masters)  # fmt: skip
    model.prepare(**inputs(args))
    if args.lora and args.frozen == "bf16" and not args.plan_only:
        norm = norm_weight(source.config)
        model.load_state_dict(
            {name: overlapping(name, p.shape, norm) for name, p in source.named_parameters(remove_duplicate=False)}
        )
    plan = model.plan
    print(plan, flush=True)
    told = {
        "row": args.row, "precision": args.precision, "lora": args.lora, "frozen": args.frozen if args.lora else None,
        "parameters": parameters, "moments": args.moments,
        "masters": args.masters,
        "made_s": round(made_s - began_s, 1), "planned_s": round(time.perf_counter() - made_s, 1),
        "planned_device_bytes": plan.peak_bytes, "planned_host_bytes": plan.estimate.host_bytes,
        "planned_step_s": round(plan.estimate.step_s, 3),
    }  # fmt: skip
    return model, optimizer, told


def whole_model(args: argparse.Namespace) -> Any:
    """All of whose layers are trained."""
    if args.plan_only:
        return empty_model(config(args))
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return random_model(config(args), torch.device("cpu"), dtype)


def adapted_model(args: argparse.Namespace) -> Any:
    """Frozen, with adapters: on `meta`, or, where it is kept as codes, with values."""
    model = empty_model(config(args))
    frozen = [layer for path in blocks(model) for layer in model.get_submodule(path).modules()
              if isinstance(layer, nn.Linear)]  # fmt: skip
    model = adapted(model, blocks(model), args.lora)
    if args.plan_only or args.frozen == "bf16":
        return model
    codes = cache(random_codes)
    for layer in frozen:
        keep_packed(layer, codes(tuple(layer.weight.shape), args.frozen))
    for name, parameter in [*model.named_parameters()]:
        if parameter.is_meta:
            values = torch.empty_like(parameter, device="cpu")
            fill(name, values, norm_weight(model.config))
            torch.utils.swap_tensors(parameter, nn.Parameter(values, parameter.requires_grad))
    return model


def random_codes(shape: tuple[int, int], format: Quantized) -> Packed:
    """A quantised weight of a shape, which layers that are alike share until chunks take them over."""
    weight = torch.empty(shape, dtype=torch.bfloat16)
    fill("weight", weight)
    return Packed(format, shape, torch.bfloat16, *quantize(weight, format))


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
    args = arguments(words)
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
