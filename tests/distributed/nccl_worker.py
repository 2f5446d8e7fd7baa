"""One rank of the tests on several GPUs: `torchrun --nproc-per-node N nccl_worker.py OUT NAME...`.

Rank 0 writes what it found to OUT; `test_nccl.py` compares that with one process on the whole batches.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import geminifx
import torch
from tensor_worker import Sharded, tensor
from torch import distributed as dist
from worker import Own, of_all, train, write_found
from zoo import LLAMA, OPT, Case, llama

MODES: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        **{f"data, zero {zero}": {"data": 2, "zero": zero} for zero in range(4)},
        "1d": tensor("1d", 2),
        "1d along the sequence": tensor("1d", 2, sequence=True),
        "2.5d of two layers, zero 3": tensor("2.5d", 2, depth=2, zero=3),
        "pipeline": {"pipeline": 2},
        "pipeline, zb1p": {"pipeline": 2},
        "pipeline, roundrobin": {"pipeline": 2},
    },
    4: {
        **{f"data, zero {zero}": {"data": 4, "zero": zero} for zero in range(4)},
        "1d": tensor("1d", 4),
        "1d along the sequence, data, zero 2": tensor("1d", 2, data=2, zero=2, sequence=True),
        "pipeline, 1d": {"pipeline": 2, **tensor("1d", 2)},
        "pipeline, data, zero 1": {"pipeline": 2, "data": 2, "zero": 1},
        "2d": tensor("2d", 4),
        "2.5d of one layer": tensor("2.5d", 4),
        "2.5d of two layers, data": tensor("2.5d", 2, data=2, depth=2),
        "2.5d of two layers, data, zero 1": tensor("2.5d", 2, data=2, depth=2, zero=1),
        "2.5d of two layers, data, zero 3": tensor("2.5d", 2, data=2, depth=2, zero=3),
    },
    8: {
        "data, zero 3": {"data": 8, "zero": 3},
        "2d, data, zero 1": tensor("2d", 4, data=2, zero=1),
        "2.5d": tensor("2.5d", 8, depth=2),
        "2.5d, zero 3": tensor("2.5d", 8, depth=2, zero=3),
        "3d": tensor("3d", 8),
    },
}
"""By how many GPUs there are."""

SCHEDULES = {
    "pipeline, zb1p": {"schedule": "zb1p"},
    "pipeline, roundrobin": {"schedule": "roundrobin", "recompute": "all"},
}

LLAMA_OF_FOUR = Case("llama of four key heads", lambda: llama(key_heads=4), exact=False)
"""So many as can be divided over four."""

OPTIMIZERS = {"auto": Own(max_grad_norm=0.5), "cpu": Own(in_backward=True)}
EXACT: dict[str, Any] = {"precision": "fp32", "device": "cuda"}
SAVED = "saved and loaded"


def cases(ranks: int) -> dict[str, Sharded]:
    """Every way to be parallel, of two models and both placements."""
    return {
        f"{case.name}, {mode}, placement {placement}":
            Sharded(case, optimizer, {**EXACT, "placement": placement, **SCHEDULES.get(mode, {})}, parallel=parallel)
        for case in (OPT, LLAMA_OF_FOUR) for mode, parallel in MODES[ranks].items()
        for placement, optimizer in OPTIMIZERS.items()
    }  # fmt: skip


def save_and_load(ranks: int, rank: int) -> bool:
    """Whether a checkpoint that all GPUs write is, loaded into a new model, what was saved, and trains on alike."""
    training = Sharded(LLAMA, Own(), EXACT, parallel={"data": ranks, "zero": 3})
    rows = training.rows(rank)
    made = [(model, training.optimizer(model)) for model in (training.compile() for _ in range(2))]
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder, src=0)
    path = Path(folder[0]) / "checkpoint"
    for step in range(4):
        if step == 2:
            geminifx.save_checkpoint(*made[0], path)
            geminifx.load_checkpoint(*made[1], path)
        for model, optimizer in made[: 1 + (step >= 2)]:
            model(**training.batch(step, rows)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    went_on, loaded = (model.state_dict() for model, _ in made)
    return all(torch.equal(loaded[name], value) for name, value in went_on.items())


def find(name: str, ranks: int, rank: int) -> Any:
    """What all ranks find of one of the cases, or whether what was SAVED comes back."""
    if name == SAVED:
        return save_and_load(ranks, rank)
    training = cases(ranks)[name]
    trained = train(training, training.rows(rank))
    on_device = replace(trained, state={key: value.cuda() for key, value in trained.state.items()})
    return of_all(on_device) | {"state": trained.state}


if __name__ == "__main__":
    write_found(find, Path(sys.argv[1]), sys.argv[2:])
