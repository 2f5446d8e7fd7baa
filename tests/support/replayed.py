"""What `tests/replay.py` compares: small models compiled by the public API alone, which other commits have, too.

python replayed.py FOLDER CASE ...    writes their programs and plans, a file each
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geminifx
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {"vocab_size": 64, "max_position_embeddings": 32}
ARENA = {"device": "cpu", "host_budget": "8GB"}


def opt(**changes: Any) -> nn.Module:
    return OPTForCausalLM(OPTConfig(**SIZES, **TEXT, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, **changes))


def gpt2() -> nn.Module:
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=32, **rates))


def llama(**changes: Any) -> nn.Module:
    heads = {"num_key_value_heads": 2, **changes}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **TEXT, intermediate_size=48, attention_dropout=0.0, **heads))


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(**SIZES, intermediate_size=64, image_size=16, patch_size=8))


def batch(model: nn.Module, rows: int = 8) -> dict[str, Any]:
    if model.config.model_type == "vit":
        return {"pixel_values": torch.zeros(rows, 3, 16, 16), "labels": torch.zeros(rows, dtype=torch.int64)}
    ids = torch.zeros(rows, 8, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}


# -- cases -------------------------------------------------------------------------------------------------


def compiled(build: Callable[[], nn.Module], optimizer: dict[str, Any] | None = None, share: float = 0.0,
             **options: Any) -> Any:  # fmt: skip
    """A compiled model; with `share`, within so many times the least device memory that it says it needs."""
    torch.manual_seed(0)
    model = build().train()
    options = {**ARENA, "example_inputs": batch(model), **options}
    if share:
        try:
            geminifx.compile(model, **options, device_budget=1)
        except geminifx.BudgetError as refused:
            options["device_budget"] = int(share * refused.smallest_bytes)
    found = geminifx.compile(model, **options)
    if optimizer is not None:
        found.optimizer(torch.optim.AdamW, lr=1e-3, **optimizer)
    return found


def with_evaluation(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.eval()(**batch(model))
    return model


def sharded(mode: str, size: int, build: Callable[[], nn.Module] = opt, **more: Any) -> Callable[[], nn.Module]:
    return lambda: compiled(
        build, world_size=8, parallel={"data": 8 // size, "tensor": {"mode": mode, "size": size, **more}}
    )


CASES: dict[str, Callable[[], nn.Module]] = {
    "opt, torch's optimizer": lambda: with_evaluation(compiled(opt, precision="fp32")),
    "opt, torch's optimizer, on the host": lambda: compiled(opt, precision="bf16", placement="cpu", recompute="all"),
    "opt": lambda: with_evaluation(compiled(opt, {}, precision="fp32")),
    "opt, bf16": lambda: compiled(opt, {"max_grad_norm": 1.0}, precision="bf16"),
    "opt, bf16, in the backward": lambda: compiled(opt, {"in_backward": True, "accumulate": 2}, precision="bf16"),
    "opt, within little": lambda: compiled(opt, {}, share=1.1, precision="bf16"),
    "opt, within more, in the backward": lambda: compiled(opt, {"in_backward": True}, share=1.6, precision="fp32"),
    "opt with dropout, recomputed": lambda: compiled(
        lambda: opt(attention_dropout=0.1), {}, placement="cpu", recompute="all"
    ),
    "gpt2, tied": lambda: compiled(gpt2, {}, precision="fp32"),
    "gpt2, fused loss": lambda: compiled(gpt2, {}, precision="bf16", fuse_loss=True),
    "llama": lambda: with_evaluation(compiled(llama, {}, precision="bf16")),
    "vit": lambda: compiled(vit, {}, precision="fp32"),
    "1d": sharded("1d", 2),
    "1d, sequence": sharded("1d", 4, sequence=True),
    "2d": sharded("2d", 4),
    "2.5d": sharded("2.5d", 8, depth=2),
    "3d": sharded("3d", 8),
    "3d, llama": sharded("3d", 8, lambda: llama(num_key_value_heads=4)),
    "zero 1": lambda: compiled(opt, {}, world_size=8, precision="bf16", parallel={"data": 8, "zero": 1}),
    "zero 3": lambda: compiled(opt, {}, world_size=8, precision="bf16", parallel={"data": 8, "zero": 3}),
    "zero 3, in the backward, 1d": lambda: compiled(
        opt, {"in_backward": True}, world_size=8, placement="cpu",
        parallel={"data": 4, "zero": 3, "tensor": {"mode": "1d", "size": 2}},
    ),
}  # fmt: skip


def main(folder: Path, *names: str) -> None:
    """What is refused is told in a file, too."""
    for name in names or CASES:
        try:
            model = CASES[name]()
            found = {**model.graph, "plan": f"{model.plan}\n"}
        except Exception as error:
            found = {"refused": f"{type(error).__name__}: {error}\n"}
        for what, text in found.items():
            (folder / f"{name}: {what}").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
