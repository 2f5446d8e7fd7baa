"""One rank of the data-parallel tests: `torchrun --nproc-per-node 2 worker.py OUT NAME...` finds what these are of.

Rank 0 writes what it found to OUT; `test_data_parallel.py` compares that with one process on the whole batches.
"""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

import geminifx
import torch
from geminifx.runtime.isa.errors import StateError
from optimizing import homes_of
from shared_captures import alone_for
from torch import Tensor, nn
from torch import distributed as dist
from zoo import GPT2, LLAMA, OPT, Case, compiled, opt, smallest_budget

STEPS, ROWS = 5, 4


@dataclass(frozen=True)
class Torchs:
    """torch's optimizer."""

    def __call__(self, model: geminifx.CompiledModule) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


@dataclass(frozen=True)
class Own:
    """The model's own optimizer. `scale` is the loss scale of float16 to start from."""

    kind: type[torch.optim.Optimizer] = torch.optim.AdamW
    max_grad_norm: float | None = None
    in_backward: bool = False
    accumulate: int = 1
    moments: str = "exact"
    masters: str = "exact"
    scale: float = 0.0

    def __call__(self, model: geminifx.CompiledModule) -> torch.optim.Optimizer:
        declared = {name: value for name, value in vars(self).items() if name != "scale"}
        optimizer = model.optimizer(lr=1e-2, **declared)
        if self.scale:
            model.session.machine.store.held.loss_scale = self.scale
        return optimizer


@dataclass(frozen=True)
class Training:
    """A model, how it is compiled, and its optimizer.

    `tight`: within the least budget that it says it needs. `where`: with its training state placed by hand, a key of
    `PLACES`. `zero`: the stage. `micro`: how many backwards make a step. `also`: what else happens: gradients
    are halved, "halve", or clipped, "clip", in front of a step, or the model is evaluated behind it, "evaluate"; or the
    worker of rank 1 is always "late".
    """

    case: Case
    optimizer: Torchs | Own
    options: dict[str, Any] = field(default_factory=dict)
    tight: bool = False
    where: str = ""
    zero: int = 0
    micro: int = 1
    also: str = ""

    def compile(self) -> geminifx.CompiledModule:
        options = {**self.options, **({"parallel": {"zero": self.zero}} if self.zero else {})}
        if self.tight:
            options["device_budget"] = smallest_budget.__wrapped__(self.case, **options)
        if self.where:
            plan = compiled(self.case, **options).plan
            options["plan"] = replace(plan, homes=homes_of(self.where, plan))
        return compiled(self.case, **options)

    def alone(self) -> "Training":
        """The same for one process, in the simplest way that gives the same numbers."""
        plain = replace(self.optimizer, in_backward=False) if isinstance(self.optimizer, Own) else self.optimizer
        options = {name: value for name, value in self.options.items() if name in ("fuse_loss", "frozen")}
        also = "" if self.also == "late" else self.also
        return replace(self, optimizer=plain, options=options, tight=False, where="", zero=0, also=also)

    def batch(self, step: int, rows: slice) -> dict[str, Tensor]:
        """Rows of a step's batch; the first row counts few tokens, so that the ranks' parts weigh differently."""
        whole = self.case.batch(batch=ROWS, seed=step)
        labels = whole["labels"].clone()
        labels[0, 3 + step % 3 :] = -100
        labels[1, 2:] = -100
        return {"input_ids": whole["input_ids"][rows], "labels": labels[rows]}


def half_frozen() -> nn.Module:
    model = opt()
    model.model.decoder.layers[0].requires_grad_(False)
    return model


FROZEN = Case("opt, its first block frozen", half_frozen)

CASES = {
    "torch's optimizer": Training(OPT, Torchs()),
    "torch's optimizer, on the host, within the least": Training(LLAMA, Torchs(), {"recompute": "all"}, tight=True),
    "our optimizer": Training(GPT2, Own()),
    "our optimizer, clipped": Training(OPT, Own(max_grad_norm=0.5), {"placement": "cpu"}),
    "in the backward, fused loss": Training(OPT, Own(in_backward=True), {"fuse_loss": True, "placement": "cpu"}),
    "microbatches, clipped": Training(OPT, Own(max_grad_norm=0.5), {"microbatches": 2, "recompute": "all"}),
    "microbatches, zero 2, tied weights, in the backward": Training(
        GPT2, Own(in_backward=True), {"microbatches": 2, "placement": "cpu"}, zero=2
    ),
    "a frozen block of 4 bits": Training(FROZEN, Own(), {"frozen": "nf4"}),
    "zero 1": Training(OPT, Own(), {"placement": "cuda"}, zero=1),
    "zero 2, tied weights": Training(GPT2, Own(), zero=2),
    "zero 3": Training(LLAMA, Own(), {"placement": "cuda"}, zero=3),
    "zero 2, on the host, clipped": Training(OPT, Own(max_grad_norm=0.5), {"placement": "cpu"}, zero=2, also="late"),
    "zero 3, on the host, in the backward, fused loss": Training(
        OPT, Own(in_backward=True), {"fuse_loss": True, "placement": "cpu"}, zero=3
    ),
    "zero 3, within the least, clipped by the model": Training(
        LLAMA, Own(), {"recompute": "all"}, tight=True, zero=3, also="clip"
    ),
    "zero 2, within the least, in the backward": Training(OPT, Own(in_backward=True), tight=True, zero=2),
    "zero 3, two backwards a step, clipped": Training(OPT, Own(accumulate=2, max_grad_norm=0.5), zero=3, micro=2),
    "zero 1, in the second backward, everywhere": Training(
        OPT, Own(accumulate=2, in_backward=True), where="mixed", zero=1, micro=2
    ),
    "zero 3, streamed, in the backward": Training(OPT, Own(in_backward=True), where="streamed", zero=3),
    "zero 3, a frozen block, everywhere": Training(FROZEN, Own(), where="mixed", zero=3),
}
IN_FOURS = ("zero 3", "zero 1, in the second backward, everywhere", "zero 2, on the host, clipped")
BFLOAT16 = {"precision": "bf16"}
EXACT = {
    "1, streamed, resident": Training(OPT, Own(), BFLOAT16, where="streamed, resident", zero=1, also="evaluate"),
    "2, two backwards a step": Training(OPT, Own(accumulate=2), BFLOAT16, where="mixed", zero=2, micro=2),
    "3, streamed, in the backward": Training(OPT, Own(in_backward=True), BFLOAT16, where="streamed", zero=3),
    "3, gradients halved": Training(GPT2, Own(), BFLOAT16, zero=3, also="halve"),
    "3, masters rounded by chance": Training(
        OPT, Own(masters="bf16-stochastic"), BFLOAT16, where="mixed", zero=3, also="evaluate"
    ),
    "3, masters rounded by chance, moments of 8 bits": Training(
        OPT, Own(masters="bf16-stochastic", moments="int8", in_backward=True), BFLOAT16, zero=3, also="evaluate"
    ),
    "2, Lion's moment of 8 bits": Training(
        OPT, Own(kind=geminifx.Lion, moments="int8"), {**BFLOAT16, "placement": "cpu"}, zero=2, also="evaluate"
    ),
    "3, a frozen block of 4 bits": Training(FROZEN, Own(), {**BFLOAT16, "frozen": "nf4"}, zero=3, also="evaluate"),
    "1, a frozen block of 8 bits, streamed": Training(
        FROZEN, Own(in_backward=True), {**BFLOAT16, "frozen": "int8"}, where="streamed", zero=1, also="evaluate"
    ),
    "1, within the least": Training(OPT, Own(), {**BFLOAT16, "recompute": "all"}, tight=True, zero=1),
    "2, within the least": Training(LLAMA, Own(), {**BFLOAT16, "recompute": "all"}, tight=True, zero=2),
}
"""Where two processes add two numbers and masters are updated by our own kernels, every bit is that without ZeRO, also
where all is saved and loaded on the way."""

AVERAGED, OVERFLOW = "averaged", "overflow"
OVERFLOWING = Training(OPT, Own(scale=2.0**17), {"precision": "fp16"}, zero=3)


@dataclass
class Trained:
    """Losses of every backward, and what is there after the last step: the parameters, the optimizer's state, how many
    steps were skipped, and how many bytes of training state."""

    losses: list[float]
    state: dict[str, Tensor]
    optimizer: dict[str, Any]
    skipped: int
    num_bytes: int


def train(training: Training, rows: slice, resume_at: int = -1) -> Trained:
    """A few steps on these rows of each batch; before step `resume_at` all is saved and loaded into a new model."""
    model = training.compile()
    optimizer, losses = training.optimizer(model), []
    if training.also == "late" and os.environ.get("RANK") == "1":
        delay(model.session.machine.store.updater)
    for step in range(STEPS):
        if step == resume_at:
            saved = deepcopy((model.state_dict(), optimizer.state_dict()))
            model = training.compile()
            optimizer = training.optimizer(model)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        optimizer.zero_grad()
        for part in range(training.micro):
            loss = model(**training.batch(10 * step + part, rows)).loss
            loss.backward()
            losses.append(loss.item())
        for parameter in model.parameters() if training.also == "halve" else ():
            parameter.grad = parameter.grad * 0.5
        if training.also == "clip":
            losses.append(model.clip_grad_norm_(0.25).item())
        optimizer.step()
        if training.also == "evaluate":
            with torch.no_grad():
                losses.append(model(**training.batch(step, rows)).loss.item())
    if model.session.ranks.mesh.weight_axes and not getattr(training.optimizer, "in_backward", False):
        check_torchs_clipping(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    skipped = getattr(optimizer, "skipped_steps", 0)
    return Trained(losses, state, deepcopy(optimizer.state_dict()), skipped, state_bytes(model))


def check_torchs_clipping(model: nn.Module) -> None:
    """Every rank would find another norm, that of its own parts."""
    try:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    except StateError as error:
        assert "is sharded: other ranks hold other parts of it" in str(error)
    else:
        raise AssertionError("torch has clipped by the norm of one rank's parts")


def delay(updater: Any) -> None:
    """Let the worker update only while somebody waits for it."""
    update, wait, waited_for = updater._update_on_host, updater.tickets.worker.wait, threading.Event()

    def waiting(*args: Any) -> Any:
        waited_for.set()
        try:
            return wait(*args)
        finally:
            waited_for.clear()

    def late(*args: Any) -> Any:
        if not waited_for.wait(60):
            raise TimeoutError("nobody has waited for the update")
        return update(*args)

    updater.tickets.worker.wait, updater._update_on_host = waiting, late


def state_bytes(model: geminifx.CompiledModule) -> int:
    """Bytes of the training state of our own optimizer on both tiers, weights that stay on the device included."""
    chunks, states = model.session.machine.chunks, getattr(model.session.machine.store, "states", [])
    tensors = [chunk.resident for chunk in chunks]
    for state in states:
        tensors += [state.weights, state.rest, *state.moments, state.held, state.total]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def replicas_agree(state: dict[str, Tensor]) -> bool:
    """Whether all ranks hold the same bits."""
    flat = torch.cat([value.float().flatten() for value in state.values()])
    first = flat.clone()
    dist.broadcast(first, src=0)
    return torch.equal(flat, first)


def same(one: Trained, other: Trained) -> bool:
    """Whether two trainings went alike, bit for bit."""
    moments = zip(one.optimizer["state"].values(), other.optimizer["state"].values(), strict=True)
    equal_moments = all(torch.equal(a[key], b[key]) for a, b in moments for key in b)
    equal_weights = all(torch.equal(one.state[name], value) for name, value in other.state.items())
    return one.losses == other.losses and equal_weights and equal_moments


def averaged(rank: int) -> tuple[Tensor, Tensor]:
    """A bfloat16 gradient as this rank has it, and the mean over the ranks that arrives in `.grad`."""
    x = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(rank)).bfloat16()
    model = geminifx.compile(nn.Linear(x.numel(), 1, bias=False), precision="bf16", example_inputs=(x.float(),))
    model(x.float()).sum().backward()
    return x[0], next(model.parameters()).grad[0].clone()


def of_all(trained: Trained) -> dict[str, Any]:
    """What this rank has trained, and of every rank whether it agrees with the others, its losses and bytes."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (replicas_agree(trained.state), trained.losses, trained.num_bytes))
    return {"ranks": ranks, "state": trained.state, "optimizer": trained.optimizer}


def find(name: str, ranks: int, rank: int) -> Any:
    """What all ranks find of one of CASES, of EXACT, AVERAGED or OVERFLOW."""
    rows = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    everyones: list[Any] = [None] * ranks
    if name in CASES:
        trained = train(CASES[name], rows)
        return of_all(trained)
    if name in EXACT:
        plain = train(replace(EXACT[name], zero=0), rows)
        return same(train(EXACT[name], rows, resume_at=2 if EXACT[name].also else -1), plain)
    if name == AVERAGED:
        dist.all_gather_object(everyones, averaged(rank))
        return everyones
    return [vars(train(replace(OVERFLOWING, zero=zero), rows)) for zero in (0, 3)]


def plan(training: Training, rows: slice) -> None:
    """Captures and plans what `train` runs."""
    model = training.compile()
    training.optimizer(model)
    model.prepare(**training.batch(0, rows))


def prepare(ranks: int, arguments: Sequence[str]) -> None:
    """Captures and plans what each rank would, in the process that all of them are forked from."""
    with alone_for(ranks):
        for training in (CASES[name] for name in arguments[1:] if name in CASES):
            plan(training, slice(0, ROWS // ranks))


def write_found(find: Callable[[str, int, int], Any], out: Path, names: Sequence[str]) -> None:
    """Rank 0 writes what all ranks find of each name, and says which comes next: one that never ends is the last."""
    found: dict[str, Any] = {}
    for name in names:
        if os.environ["RANK"] == "0":
            sys.stderr.write(f"{name}\n")
        found[name] = find(name, int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    write_found(find, Path(sys.argv[1]), sys.argv[2:])
