"""One rank of the tensor-parallel tests: `torchrun --nproc-per-node N tensor_worker.py OUT NAME...`.

Rank 0 writes what it found to OUT; `test_tensor_parallel.py` compares that with one process on the whole batches.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

import geminifx
import torch
from geminifx.compiler.parallel import Parallel
from more_models import BERT, DETACHED, QWEN3
from shared_captures import alone_for
from torch import Tensor
from torch import distributed as dist
from worker import Own, Training, of_all, plan, replicas_agree, train, write_found
from zoo import GPT2, LLAMA, OPT, Case, compiled, opt, smallest_budget

ROWS = 8
OPT_OF_EIGHT = Case("opt of eight heads", lambda: opt(num_attention_heads=8))
DEEP = Case("opt of four blocks", lambda: opt(num_hidden_layers=4))
HOST = {"placement": "cpu"}


@dataclass(frozen=True)
class Sharded(Training):
    """A training on the mesh that `parallel` declares; alone, by one process. `tight`: within the least budget."""

    parallel: dict[str, Any] = field(default_factory=dict)

    def compile(self) -> geminifx.CompiledModule:
        options = {**self.options, "example_inputs": self.batch(0, self.rows(0))}
        options |= {"parallel": self.parallel} if self.parallel else {}
        if self.tight:
            options["device_budget"] = smallest_budget.__wrapped__(self.case, **options)
        return compiled(self.case, **options)

    def alone(self) -> "Sharded":
        return replace(super().alone(), parallel={})  # type: ignore[return-value]

    def rows(self, rank: int) -> slice:
        """The rows of each batch that a rank is given: all that share tensors are given the same."""
        if not self.parallel:
            return slice(0, ROWS)
        mesh = Parallel.of(self.parallel).mesh(None, 1)
        each = ROWS // mesh.data_size
        return slice(mesh.data_rank(rank) * each, (mesh.data_rank(rank) + 1) * each)

    def batch(self, step: int, rows: slice) -> dict[str, Tensor]:
        """Some rows count few tokens, so that the ranks' parts weigh differently."""
        whole = self.case.batch(batch=ROWS, seed=step)
        labels = whole["labels"].clone()
        labels[0, 3 + step % 3 :] = labels[5, 2:] = -100
        return {"input_ids": whole["input_ids"][rows], "labels": labels[rows]}


def tensor(mode: str, size: int, data: int = 1, zero: int = 0, **more: Any) -> dict[str, Any]:
    return {"data": data, "zero": zero, "tensor": {"mode": mode, "size": size, **more}}


def staged(mode: str, size: int, stages: int = 2, **more: Any) -> dict[str, Any]:
    """Tensors that are sharded within each of a pipeline's two ranks."""
    return {"pipeline": {"ranks": 2, "stages": stages}, **tensor(mode, size, **more)}


CASES: dict[int, dict[str, Sharded]] = {
    4: {
        "1d x 2, data 2, clipped, within the least": Sharded(
            LLAMA, Own(max_grad_norm=0.5), tight=True, parallel=tensor("1d", 2, data=2)
        ),
        "1d x 4, sequence, on the host": Sharded(GPT2, Own(), HOST, parallel=tensor("1d", 4, sequence=True)),
        "2d, clipped, on the host, within the least": Sharded(
            GPT2, Own(max_grad_norm=0.5), {**HOST, "recompute": "all"}, tight=True, parallel=tensor("2d", 4)
        ),
        "2.5d of two layers, data 2, in the backward": Sharded(
            OPT, Own(in_backward=True), HOST, parallel=tensor("2.5d", 2, data=2, depth=2)
        ),
        "2.5d of two layers, data 2, zero 3 over both, clipped, on the host": Sharded(
            LLAMA, Own(max_grad_norm=0.5), HOST, parallel=tensor("2.5d", 2, data=2, zero=3, depth=2)
        ),
        "2.5d of one layer": Sharded(BERT, Own(), parallel=tensor("2.5d", 4)),
        "pipeline 2, 1d x 2, 1f1b, tied, clipped": Sharded(
            GPT2, Own(max_grad_norm=0.5), {"microbatches": 4}, parallel=staged("1d", 2)
        ),
        "pipeline 2, 1d x 2, sequence, zb1p, on the host, in the backward": Sharded(
            LLAMA,
            Own(in_backward=True),
            {**HOST, "microbatches": 4, "schedule": "zb1p", "recompute": "all"},
            parallel=staged("1d", 2, sequence=True),
        ),
        "pipeline 2, 2.5d of two layers, interleaved, zero 1": Sharded(
            DEEP,
            Own(),
            {"microbatches": 4, "schedule": "interleaved", "recompute": ("model.decoder.layers.1",)},
            parallel=staged("2.5d", 2, 4, depth=2) | {"zero": 1},
        ),
    },
    8: {
        "data 8": Sharded(OPT, Own(), parallel={"data": 8}),
        "data 8, on the host, within the least": Sharded(LLAMA, Own(), HOST, tight=True, parallel={"data": 8}),
        "data 8, zero 1": Sharded(LLAMA, Own(), parallel={"data": 8, "zero": 1}),
        "data 8, zero 1, on the host, within the least": Sharded(
            OPT, Own(in_backward=True), HOST, tight=True, parallel={"data": 8, "zero": 1}
        ),
        "data 8, zero 2": Sharded(OPT, Own(max_grad_norm=0.5), parallel={"data": 8, "zero": 2}),
        "data 8, zero 2, on the host, within the least": Sharded(
            LLAMA, Own(), {**HOST, "recompute": "all"}, tight=True, parallel={"data": 8, "zero": 2}
        ),
        "data 8, zero 3": Sharded(LLAMA, Own(in_backward=True), parallel={"data": 8, "zero": 3}),
        "data 8, zero 3, on the host, within the least": Sharded(
            OPT, Own(max_grad_norm=0.5), HOST, tight=True, parallel={"data": 8, "zero": 3}
        ),
        "1d x 8": Sharded(OPT_OF_EIGHT, Own(), parallel=tensor("1d", 8)),
        "1d x 8, sequence, on the host, within the least": Sharded(
            OPT_OF_EIGHT, Own(max_grad_norm=0.5), HOST, tight=True, parallel=tensor("1d", 8, sequence=True)
        ),
        "1d x 4, data 2": Sharded(GPT2, Own(in_backward=True), parallel=tensor("1d", 4, data=2)),
        "1d x 4, data 2, on the host, within the least": Sharded(
            OPT, Own(), {**HOST, "recompute": "all"}, tight=True, parallel=tensor("1d", 4, data=2)
        ),
        "2d, data 2": Sharded(LLAMA, Own(max_grad_norm=0.5), parallel=tensor("2d", 4, data=2)),
        "2d, data 2, on the host, within the least": Sharded(
            OPT, Own(in_backward=True), HOST, tight=True, parallel=tensor("2d", 4, data=2)
        ),
        "2.5d": Sharded(OPT, Own(), parallel=tensor("2.5d", 8, depth=2)),
        "2.5d, on the host, within the least": Sharded(
            QWEN3, Own(max_grad_norm=0.5), HOST, tight=True, parallel=tensor("2.5d", 8, depth=2)
        ),
        "2.5d, zero 1, in the backward": Sharded(
            GPT2, Own(in_backward=True), parallel=tensor("2.5d", 8, zero=1, depth=2)
        ),
        "3d, zero 2, clipped, on the host, within the least": Sharded(
            OPT, Own(max_grad_norm=0.5), HOST, tight=True, parallel=tensor("3d", 8, zero=2)
        ),
        "pipeline 2, 1d x 2, data 2, zbv, zero 1": Sharded(
            DEEP,
            Own(max_grad_norm=0.5),
            {"microbatches": 4, "schedule": "zbv"},
            parallel=staged("1d", 2, 4, data=2, zero=1),
        ),
        "pipeline 2, 2.5d of one layer, offload, in the backward": Sharded(
            GPT2, Own(in_backward=True), {**HOST, "microbatches": 4, "offload": "all"}, parallel=staged("2.5d", 4)
        ),
        "3d": Sharded(GPT2, Own(max_grad_norm=0.5), parallel=tensor("3d", 8)),
        "3d, on the host, within the least": Sharded(
            LLAMA, Own(in_backward=True), {**HOST, "recompute": "all"}, tight=True, parallel=tensor("3d", 8)
        ),
    },
}
"""By how many ranks there are: every mode and, by eight, every stage of ZeRO, with and without a budget, state on the
device and on the host."""


_DROPPING = {
    "": {"parallel": tensor("1d", 2, data=2, sequence=True)},
    " in stages": {"parallel": staged("1d", 2), "microbatches": 2},
}
DROPPED: dict[str, dict[str, Any]] = {
    f"dropout{where}, recompute {recompute}": {**options, "recompute": recompute}
    for where, options in _DROPPING.items()
    for recompute in ("none", "all")
}
LOGITS = "logits"
DROPPING = Case("opt with dropout", lambda: opt(dropout=0.2, attention_dropout=0.2))


def drop(**options: Any) -> dict[str, Any]:
    """Two steps with dropout: losses, weights, whether replicas agree, and where the generator is behind them."""
    model = compiled(DROPPING, **options)
    optimizer, losses = model.optimizer(torch.optim.AdamW, lr=1e-2), []
    torch.manual_seed(model.ranks.data_rank)
    for step in range(2):
        loss = model(**DROPPING.batch(seed=step)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = {"losses": losses, "state": state, "agree": replicas_agree(state), "generator": torch.get_rng_state()}
    found["forked"] = model.session.machine.fork_rng(torch.empty(()), ["tp"])
    return found | {"place": [model.ranks.mesh.coordinate(model.ranks.rank, axis) for axis in ("data", "tp")]}


def logits(**options: Any) -> Tensor:
    """Those of a training step in which the loss alone has a gradient."""
    model = compiled(DETACHED, outputs="all", **options)
    loss, found = model(**DETACHED.batch())
    loss.backward()
    return found


def find(name: str, ranks: int, rank: int) -> Any:
    """What all ranks find of one of CASES, of DROPPED, or LOGITS."""
    everyones: list[Any] = [None] * ranks
    if name == LOGITS:
        return logits(parallel=tensor("2d", 4))
    if name in DROPPED:
        dist.all_gather_object(everyones, drop(**DROPPED[name]))
        return everyones
    training = CASES[ranks][name]
    return of_all(train(training, training.rows(rank)))


def prepare(ranks: int, arguments: Sequence[str]) -> None:
    """Captures and plans what each rank would, in the process that all of them are forked from."""
    with alone_for(ranks):
        for name in arguments[1:]:
            if name in CASES[ranks]:
                plan(CASES[ranks][name], CASES[ranks][name].rows(0))
            elif name in DROPPED:
                compiled(DROPPING, **DROPPED[name]).optimizer(torch.optim.AdamW)


if __name__ == "__main__":
    write_found(find, Path(sys.argv[1]), sys.argv[2:])
