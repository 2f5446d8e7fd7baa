"""One rank of the data-parallel tests: `torchrun --nproc-per-node 2 worker.py OUT` trains every case of `CASES`.

Rank 0 writes what it found to OUT; `test_data_parallel.py` compares that with one process on the whole batches.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

import geminifx
import torch
from torch import Tensor
from torch import distributed as dist
from zoo import GPT2, LLAMA, OPT, Case, compiled, smallest_budget

STEPS, RANKS, ROWS = 4, 2, 4
Optimizers = Callable[[geminifx.CompiledModule], torch.optim.Optimizer]


@dataclass(frozen=True)
class Training:
    """A model, how it is compiled, and its optimizer."""

    case: Case
    optimizer: Optimizers
    options: dict[str, Any] = field(default_factory=dict)
    tight: bool = False

    def compile(self) -> geminifx.CompiledModule:
        least = {"device_budget": smallest_budget(self.case, **self.options)} if self.tight else {}
        return compiled(self.case, **self.options, **least)

    def batch(self, step: int, rows: slice) -> dict[str, Tensor]:
        """Rows of a step's batch; the first row counts few tokens, so that the ranks' parts weigh differently."""
        whole = self.case.batch(batch=ROWS, seed=step)
        labels = whole["labels"].clone()
        labels[0, 3 + step % 3 :] = -100
        labels[1, 2:] = -100
        return {"input_ids": whole["input_ids"][rows], "labels": labels[rows]}


def torchs(model: geminifx.CompiledModule) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def own(**declared: Any) -> Optimizers:
    return lambda model: model.optimizer(torch.optim.AdamW, lr=1e-2, **declared)


CASES = {
    "torch's optimizer": Training(OPT, torchs),
    "torch's optimizer, on the host, within the least": Training(LLAMA, torchs, {"recompute": "all"}, tight=True),
    "our optimizer": Training(GPT2, own()),
    "our optimizer, clipped": Training(OPT, own(max_grad_norm=0.5), {"placement": "cpu"}),
    "in the backward, fused loss": Training(OPT, own(in_backward=True), {"fuse_loss": True, "placement": "cpu"}),
}


def train(training: Training, rows: slice) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of a few steps on these rows of each batch, and the parameters after them."""
    model = training.compile()
    optimizer = training.optimizer(model)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(**training.batch(step, rows)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: value.clone() for name, value in model.state_dict().items()}


def replicas_agree(state: dict[str, Tensor]) -> bool:
    """Whether all ranks hold the same bits."""
    flat = torch.cat([value.float().flatten() for value in state.values()])
    first = flat.clone()
    dist.broadcast(first, src=0)
    return torch.equal(flat, first)


def main(out: Path) -> None:
    found: dict[str, Any] = {}
    for name, training in CASES.items():
        part, rank = ROWS // RANKS, int(os.environ["RANK"])
        losses, state = train(training, slice(rank * part, (rank + 1) * part))
        agree: list[Any] = [None] * RANKS
        dist.all_gather_object(agree, (replicas_agree(state), losses))
        found[name] = {"ranks": agree, "state": state}
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
