"""One rank of the tests of state: `torchrun --nproc-per-node N state_worker.py OUT MODE...`.

The folder of OUT holds a checkpoint that one process wrote for each of MODELS. In these modes four ranks go on from
it, save checkpoints of their own, and to OUT what they found; eight ranks go on from it in one mode, and from that in
the next. `test_state.py` compares that with the one process, and reads the checkpoints.
"""

import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

import geminifx
import torch
from shared_captures import alone_for
from torch import Tensor
from torch import distributed as dist
from zoo import GPT2, OPT, Case, compiled, opt

ROWS, STEPS, CLIP = 8, 2, 0.3
MODELS = {"opt": OPT, "gpt2": GPT2}
CHAINED = Case("opt of four blocks", lambda: opt(num_hidden_layers=4))
FOUR_ROWS = {"example_inputs": OPT.batch(batch=ROWS // 2)}
"""What each of two batches has: a pipeline divides them into as many microbatches."""
MODES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "1d": ("opt", "own", {"parallel": {"data": 2, "tensor": "1d:2"}}),
    "1d, zero, bf16": ("opt", "own, bf16", {"parallel": {"data": 2, "tensor": "1d:2", "zero": 3}}),
    "2d": ("opt", "own", {"parallel": {"tensor": "2d:4"}}),
    "zero": ("opt", "own", {"parallel": {"data": 4, "zero": 2}}),
    "fused qkv": ("gpt2", "torch's", {"parallel": {"data": 2, "tensor": "1d:2"}}),
    "pipeline, zero": ("opt", "own", {"parallel": {"pipeline": 2, "data": 2, "zero": 1}, **FOUR_ROWS}),
    "pipeline": ("gpt2", "torch's", {"parallel": {"pipeline": 2, "data": 2}, **FOUR_ROWS}),
}
"""Name -> model, kind of optimizer, how it is compiled."""

CHAIN: dict[str, dict[str, Any]] = {
    "data 8": {"parallel": {"data": 8}},
    "pipeline 4, data 2": {"parallel": {"pipeline": 4, "data": 2}, "microbatches": 4, **FOUR_ROWS},
    "2.5d, data 2": {"parallel": {"data": 2, "tensor": {"mode": "2.5d", "size": 4}}},
    "pipeline 2, 1d, data 2": {"parallel": {"pipeline": 2, "data": 2, "tensor": "1d:2"}, **FOUR_ROWS},
    "pipeline 4, data 2, again": {"parallel": {"pipeline": 4, "data": 2}, "microbatches": 4, **FOUR_ROWS},
}
"""How eight ranks go on, one after the other, each from what the one before it saved."""


def make(case: Case, kind: str, **options: Any) -> tuple[geminifx.CompiledModule, torch.optim.Optimizer]:
    model = compiled(case, precision="bf16" if "bf16" in kind else "fp32", **options)
    if kind == "torch's":
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    return model, model.optimizer(torch.optim.AdamW, lr=1e-2, max_grad_norm=CLIP)


def train(model: geminifx.CompiledModule, optimizer: torch.optim.Optimizer, case: Case, first: int) -> dict[str, Any]:
    """Losses and norms of a few steps, on this rank's rows of each batch."""
    rows = ROWS // model.ranks.mesh.data_size
    part = slice(model.ranks.data_rank * rows, (model.ranks.data_rank + 1) * rows)
    losses, norms = [], []
    for step in range(first, first + STEPS):
        optimizer.zero_grad()
        loss = model(**{name: value[part] for name, value in case.batch(batch=ROWS, seed=step).items()}).loss
        loss.backward()
        if isinstance(optimizer, torch.optim.AdamW):
            norms.append(model.clip_grad_norm_(CLIP).item())
        optimizer.step()
        if not isinstance(optimizer, torch.optim.AdamW):
            norms.append(optimizer.grad_norm.item())
        losses.append(loss.item())
    return {"losses": losses, "norms": norms}


def values(model: geminifx.CompiledModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def go_on(name: str, folder: Path) -> dict[str, Any]:
    """Load what one process saved, train, and save."""
    of, kind, options = MODES[name]
    model, optimizer = make(MODELS[of], kind, **options)
    extra = geminifx.load_checkpoint(model, optimizer, folder / f"one, {of}, {kind}")
    found: dict[str, Any] = {"extra": extra, "loaded": values(model)}
    found |= train(model, optimizer, MODELS[of], STEPS)
    geminifx.save_checkpoint(model, optimizer, folder / name, extra=name)
    found["state"], found["optimizer"] = values(model), optimizer.state_dict()
    if kind != "torch's":  # whose state is each rank's own
        model.load_state_dict(found["loaded"])
        optimizer.load_state_dict(optimizer.state_dict())
        found["loaded again"] = values(model)
        first_only = optimizer.state_dict(first_only=True), model.state_dict(first_only=True)
        found["kept"] = [len(each) for each in first_only]
    return found


def fail(model: geminifx.CompiledModule, folder: Path) -> list[str]:
    """What saving over a file raises on each rank."""
    try:
        model.save_pretrained(folder / "file")
        told = ""
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    return model.ranks.gather(told)


def chain(folder: Path) -> dict[str, Any]:
    """What every one of eight ranks finds, by mode."""
    found, saved = {}, folder / "one"
    for number, (name, options) in enumerate(CHAIN.items(), start=1):
        model, optimizer = make(CHAINED, "own", **options)
        geminifx.load_checkpoint(model, optimizer, saved)
        mine: dict[str, Any] = {"loaded": values(model), "loaded optimizer": deepcopy(optimizer.state_dict())}
        mine |= train(model, optimizer, CHAINED, number * STEPS)
        saved = folder / name
        geminifx.save_checkpoint(model, optimizer, saved)
        mine |= {"state": values(model), "optimizer": deepcopy(optimizer.state_dict())}
        found[name] = everyones(mine)
    return found


def prepare(ranks: int, arguments: Sequence[str]) -> None:
    """Captures and plans what each rank would, in the process that all of them are forked from."""
    modes = [(MODELS[of], kind, options) for of, kind, options in map(MODES.__getitem__, arguments[1:])]
    with alone_for(ranks):
        for case, kind, options in modes or [(CHAINED, "own", options) for options in CHAIN.values()]:
            model, _ = make(case, kind, **options)
            model.prepare(**case.batch(batch=ROWS // model.ranks.mesh.data_size))


def everyones(mine: dict[str, Any]) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def by_four(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {name: everyones(go_on(name, folder)) for name in names}
    if "1d" not in names:
        return found
    # Written in one mode, read in another.
    model, optimizer = make(OPT, "own", parallel={"tensor": "2d:4"})
    geminifx.load_checkpoint(model, optimizer, folder / "1d")
    found["1d read in 2d"] = {"state": values(model), "optimizer": optimizer.state_dict()}
    model.save_pretrained(folder / "pretrained")
    found["failures"] = fail(model, folder)
    return found


def main(out: Path, *names: str) -> None:
    """Checkpoints are read from the folder of OUT, and written there."""
    found = by_four(out.parent, names) if names else chain(out.parent)
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
