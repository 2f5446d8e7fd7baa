"""One rank of the tests of pipelines: `torchrun --nproc-per-node 2 pipeline_worker.py OUT NAME...` finds them.

Rank 0 writes what all found to OUT; `test_pipeline.py` compares that with one process that has all stages.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

import geminifx
import torch
from geminifx.compiler.planner.pipeline.round_robin import EVEN, round_robin
from geminifx.runtime.isa.schedule import Schedule
from more_models import T5
from schedules import in_turns
from shared_captures import alone_for, shared_captures
from torch import Tensor
from torch import distributed as dist
from zoo import GPT2, LLAMA, OPT, Case, gpt2, llama, opt

STEPS, ROWS = 5, 8
DROPOUT = Case("opt, dropout, four blocks", lambda: opt(dropout=0.1, num_hidden_layers=4))
OPT_OF_EIGHT = Case("opt, eight blocks, not tied", lambda: opt(num_hidden_layers=8, tie_word_embeddings=False))
GPT2_OF_EIGHT = Case("gpt2, eight blocks", lambda: gpt2(layers=8))
LLAMA_OF_EIGHT = Case("llama, eight blocks", lambda: llama(layers=8))
TIED = Case("opt, four blocks", lambda: opt(num_hidden_layers=4))
SMALL = Case("opt, not tied", lambda: opt(tie_word_embeddings=False))
UNTIED = Case("opt, four blocks, not tied", lambda: opt(num_hidden_layers=4, tie_word_embeddings=False))


def half_frozen() -> Any:
    model = UNTIED.build()
    for block in model.model.decoder.layers[1:3]:
        block.requires_grad_(False)
    return model


FROZEN = Case("opt, four blocks, not tied, two of them frozen", half_frozen)


@dataclass(frozen=True)
class Training:
    """A model, how it is compiled, and its optimizer: torch's, or the model's own, in the backward or not.

    `micro`: how many backwards make a step, each with its share of the tangent. `data`: how many batches make one
    step's. `evaluates`: whether the model is evaluated behind each step.
    """

    case: Case
    options: dict[str, Any] = field(default_factory=dict)
    own: bool = True
    in_backward: bool = False
    micro: int = 1
    data: int = 1
    evaluates: bool = False
    max_grad_norm: float | None = None
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW

    def alone(self) -> "Training":
        """The same for one process, in the simplest way that gives the same numbers."""
        kept = {
            name: value
            for name, value in self.options.items()
            if name in ("precision", "microbatches", "fuse_loss", "frozen")
        }
        kept["microbatches"] = kept.get("microbatches", 4) * self.data
        return replace(self, options=kept, data=1, in_backward=False)

    def optimizer(self, model: geminifx.CompiledModule) -> torch.optim.Optimizer:
        if not self.own:
            return torch.optim.AdamW(model.parameters(), lr=1e-2)
        declared = {"in_backward": self.in_backward, "accumulate": self.micro, "max_grad_norm": self.max_grad_norm}
        return model.optimizer(self.kind, lr=1e-2, **declared)

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """A step's batch; some rows count few tokens, so that microbatches and ranks weigh differently."""
        whole = self.case.batch(batch=ROWS, seed=step)
        labels = whole["labels"].clone()
        labels[0, 3 + step % 3 :] = -100
        labels[1, 2:] = -100
        return {"input_ids": whole["input_ids"][rows], "labels": labels[rows]}


def pipeline(ranks: int, schedule: str, stages: int | None = None, **options: Any) -> dict[str, Any]:
    """The loss is whole, as one process computes it: in pieces its gradients would be rounded elsewhere."""
    degrees = {"pipeline": {"ranks": ranks, "stages": stages} if stages else ranks}
    return {"parallel": degrees, "schedule": schedule, "microbatches": 4, "fuse_loss": False, **options}


def taking_turns(schedule: Schedule, **options: Any) -> dict[str, Any]:
    """A round-robin as data. By name it suits the tiny stages, which take less time than a message, and leaves them
    together."""
    return {**pipeline(len(schedule.ranks), "", schedule.stages, **options), "schedule": schedule}


IN_TWOS = {
    "1f1b": Training(SMALL, pipeline(2, "1f1b")),
    "gpipe, tied, torch's optimizer": Training(GPT2, pipeline(2, "gpipe"), own=False),
    "1f1b, tied, in the backward": Training(OPT, pipeline(2, "1f1b", placement="cpu"), in_backward=True),
    "1f1b, recompute, dropout, evaluation": Training(DROPOUT, pipeline(2, "1f1b", recompute="all"), evaluates=True),
    "zb1p, clipped": Training(LLAMA, pipeline(2, "zb1p"), max_grad_norm=0.5),
    "interleaved, two backwards a step": Training(UNTIED, pipeline(2, "interleaved", 4), micro=2),
    "1f1b, Adafactor": Training(UNTIED, pipeline(2, "1f1b"), kind=torch.optim.Adafactor),
    "1f1b, frozen blocks of 4 bits": Training(FROZEN, pipeline(2, "1f1b", frozen="nf4")),
    "zb1p, frozen blocks of 8 bits, streamed": Training(
        FROZEN, pipeline(2, "zb1p", frozen="int8", placement="cpu"), in_backward=True
    ),
    "zbv, in the second backward": Training(DROPOUT, pipeline(2, "zbv", 4), in_backward=True, micro=2),
    "roundrobin, recompute, on the host, evaluation": Training(
        UNTIED, pipeline(2, "roundrobin", 4, recompute="all", placement="cpu"), evaluates=True
    ),
    "roundrobin of tied stages, clipped": Training(
        OPT, pipeline(2, "roundrobin", recompute="all", fuse_loss="auto"), max_grad_norm=0.5
    ),
    "roundrobin, in turns, in the backward": Training(
        UNTIED, taking_turns(in_turns(4, 2, 4), recompute="all", placement="cpu"), in_backward=True
    ),
    "roundrobin, tied, dropout, clipped": Training(DROPOUT, taking_turns(in_turns(4, 2, 4)), max_grad_norm=0.5),
    "roundrobin, torch's optimizer, two backwards a step": Training(
        GPT2, taking_turns(in_turns(2, 2, 4), recompute="all"), own=False, micro=2
    ),
}
IN_FOURS = {
    "pipeline 4": Training(UNTIED, pipeline(4, "1f1b")),
    "pipeline 2 x data 2, tied": Training(OPT, pipeline(2, "1f1b", microbatches=2), data=2),
    "pipeline 2 x data 2, zero 1": Training(
        UNTIED, {**pipeline(2, "zb1p", microbatches=2), "parallel": {"pipeline": 2, "data": 2, "zero": 1}}, data=2
    ),
    "roundrobin 4, on the host, in the backward": Training(
        OPT_OF_EIGHT, taking_turns(round_robin([EVEN] * 8, 4, 4), recompute="all", placement="cpu"), in_backward=True
    ),
    "roundrobin 2 x data 2, tied, zero 3": Training(
        TIED,
        {**taking_turns(in_turns(4, 2, 4)), "parallel": {"pipeline": {"ranks": 2, "stages": 4}, "data": 2, "zero": 3}},
        data=2,
    ),
}
IN_EIGHTS = {
    "pipeline 8, 1f1b": Training(OPT_OF_EIGHT, pipeline(8, "1f1b", microbatches=8)),
    "pipeline 8, zb1p, tied, on the host, in the backward": Training(
        GPT2_OF_EIGHT, pipeline(8, "zb1p", microbatches=8, placement="cpu", offload="all"), in_backward=True
    ),
    "pipeline 4 x data 2, interleaved": Training(OPT_OF_EIGHT, pipeline(4, "interleaved", 8), data=2),
    "pipeline 4 x data 2, zbv, recompute, clipped": Training(
        LLAMA_OF_EIGHT, pipeline(4, "zbv", 8, recompute="all"), data=2, max_grad_norm=0.5
    ),
    "pipeline 4 x data 2, gpipe, encoder and decoder, zero 1": Training(
        T5, {**pipeline(4, "gpipe"), "parallel": {"pipeline": 4, "data": 2, "zero": 1}}, data=2
    ),
}
TRAININGS = {**IN_TWOS, **IN_FOURS, **IN_EIGHTS}


@dataclass
class Trained:
    """Losses of every backward, and the parameters behind the last step."""

    losses: list[float]
    state: dict[str, Tensor]


def train(training: Training, rows: slice = slice(None)) -> Trained:
    torch.manual_seed(7)
    with shared_captures():
        model = geminifx.compile(training.case.seeded(), example_inputs=training.batch(0, rows), **training.options)
    torch.manual_seed(1)
    optimizer, losses = training.optimizer(model), []
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(training.micro):
            loss = model(**training.batch(10 * step + part, rows)).loss
            (loss / training.micro).backward()
            losses.append(loss.item())
        optimizer.step()
        if training.evaluates:
            model.eval()
            with torch.no_grad():
                losses.append(model(**training.batch(step, rows)).loss.item())
            model.train()
    assert model.stats.device_peak_bytes <= model.plan.peak_bytes
    return Trained(losses, {name: value.clone() for name, value in model.state_dict().items()})


def prepare(ranks: int, arguments: Sequence[str]) -> None:
    """Captures and plans what the first rank would, in the process that all of them are forked from."""
    with alone_for(ranks):
        for training in (TRAININGS[name] for name in arguments[1:]):
            rows = slice(0, ROWS // training.data)
            with shared_captures():
                geminifx.compile(training.case.seeded(), example_inputs=training.batch(0, rows), **training.options)


def find(name: str) -> Any:
    """What all ranks find of a training."""
    training, each = TRAININGS[name], ROWS // TRAININGS[name].data
    place = int(os.environ["RANK"]) % training.data  # of the mesh's axes the pipeline is the outer one
    trained = train(training, slice(place * each, (place + 1) * each))
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, vars(trained))
    return everyones


def main(out: Path, *names: str) -> None:
    found = {name: find(name) for name in names}
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
