"""How training goes by the way in which moments and masters are stored: a loss curve each, of one model on one text.

    python benchmarks/state_formats.py --steps 300 --csv docs/state_formats.csv

A small OPT learns the text in the package, byte by byte, by `model.optimizer(AdamW, moments=..., masters=...)`. The
file has a line for each step, with a column for each way.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import geminifx
import torch
from geminifx.models.recipe.text import embedded_texts
from geminifx.runtime.isa.moments import Masters, Moments
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

WAYS: dict[str, tuple[Moments, Masters]] = {
    **{moments: (moments, "exact") for moments in get_args(Moments)},
    "exact, rounded": ("exact", "bf16-stochastic"),
    "int8, rounded": ("int8", "bf16-stochastic"),
}
"""Ways to store moments and masters, by what a column of the file is called."""
LAST = 20
"""Steps at the end whose mean loss is told."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--steps", type=int, default=300)
    made.add_argument("--hidden", type=int, default=64)
    made.add_argument("--layers", type=int, default=2)
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--seq", type=int, default=64)
    made.add_argument("--lr", type=float, default=3e-3)
    made.add_argument("--csv", type=Path, required=True)
    return made


def batches(args: argparse.Namespace) -> Iterator[Tensor]:
    """Bytes of the text from random places on, the same ones in every run: int64 [batch, seq]."""
    text = torch.frombuffer(bytearray("\n".join(embedded_texts()).encode()), dtype=torch.uint8).long()
    source = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(0, len(text) - args.seq, (args.batch, 1), generator=source)
        yield text[starts + torch.arange(args.seq)]


def losses(args: argparse.Namespace, way: str) -> list[float]:
    moments, masters = WAYS[way]
    torch.manual_seed(0)
    source = OPTForCausalLM(
        OPTConfig(
            vocab_size=256, hidden_size=args.hidden, word_embed_proj_dim=args.hidden, ffn_dim=4 * args.hidden,
            num_hidden_layers=args.layers, num_attention_heads=4, max_position_embeddings=args.seq, dropout=0.0,
        )
    )  # fmt: skip
    model = geminifx.compile(source.train(), precision="bf16")
    optimizer = model.optimizer(torch.optim.AdamW, lr=args.lr, in_backward=True, moments=moments,
                                masters=masters)  # fmt: skip
    found = []
    for _, tokens in zip(range(args.steps), batches(args), strict=False):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    last = found[-LAST:]
    print(f"{way}: the last {len(last)} steps' mean loss is {sum(last) / len(last):.4f}", flush=True)
    return found


def main(words: list[str] | None = None) -> None:
    args = parser().parse_args(words)
    curves = [losses(args, way) for way in WAYS]
    with args.csv.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(["step", *WAYS])
        writer.writerows([step, *(f"{loss:.4f}" for loss in row)] for step, row in enumerate(zip(*curves, strict=True)))


if __name__ == "__main__":
    main()
