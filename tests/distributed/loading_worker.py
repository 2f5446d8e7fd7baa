"""One rank of the tests of loading: `torchrun --nproc-per-node 2 loading_worker.py OUT`.

Beside OUT are "model", files that transformers wrote, and "config.json". Rank 0 writes to OUT, by mode, what a model of
each has for its whole state, and what it has read of it; it saves each model beside.
"""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

import geminifx
import torch
from geminifx.compiler.weights.incoming import FromFiles
from geminifx.runtime.isa.errors import CheckpointError
from shared_captures import shared_captures
from torch import distributed as dist
from torch.optim import AdamW

MODES: dict[str, dict[str, Any]] = {
    "ZeRO 3": {"parallel": {"data": 2, "zero": 3}},
    "1d": {"parallel": {"tensor": "1d:2"}},
    "pipeline": {"parallel": {"pipeline": 2}, "microbatches": 2},
}
IDS = torch.arange(20).view(2, 10)
SEED = 7


def whole(model: geminifx.CompiledModule) -> dict[str, Any]:
    model.optimizer(AdamW, lr=1e-3)
    loss = model(input_ids=IDS, labels=IDS).loss
    return {"state": {name: value.clone() for name, value in model.state_dict().items()}, "loss": loss.detach()}


def fail(*arguments: Any) -> None:
    raise CheckpointError("the disk is gone")


def read_anew(directory: Path, options: dict[str, Any]) -> geminifx.CompiledModule:
    """By a model whose weights had places when another load of them failed."""
    model = geminifx.from_pretrained(directory, placement="cpu", recompute="none", **options)
    model.optimizer(AdamW, lr=1e-3)
    with mock.patch.object(FromFiles, "bring", fail), suppress(CheckpointError):
        model(input_ids=IDS, labels=IDS)
    assert model.session.half_loaded == {"model"}
    model.load_pretrained(directory)
    return model


def main(out: Path) -> None:
    found = {}
    for mode, options in MODES.items():
        read = geminifx.from_pretrained(out.parent / "model", placement="cpu", recompute="none", **options)
        found[f"{mode}, read"] = whole(read)
        read.save_pretrained(out.parent / mode, max_shard_size="20kB", dtype=torch.bfloat16)
        found[f"{mode}, read anew"] = {"state": read_anew(out.parent / "model", options).state_dict()}
        drawn = geminifx.from_pretrained(
            str(out.parent / "config.json"), seed=SEED, placement="cpu", recompute="none", **options
        )
        found[f"{mode}, drawn"] = whole(drawn)
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    with shared_captures():
        main(Path(sys.argv[1]))
