"""One rank that meets faults: other models, other batches, and in the end the death of rank 1.

With the argument "staged" it meets the last alone, in a pipeline. It prints a line of JSON for each fault: what was
raised, and what it said. What is none, a batch of another shape on one rank, tells the gradient that comes of it.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

import geminifx
import torch
from geminifx.compiler.memory.device import Device
from geminifx.compiler.weights import places
from safetensors.torch import save_file
from torch import nn

RANK = int(os.environ["RANK"])


def train(width: int = 8, rows: int = 2, steps: int = 1, dies_at: int = -1) -> None:
    torch.manual_seed(RANK)  # weights differ until rank 0's are taken
    model = geminifx.compile(nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        if step == dies_at and RANK == 1:
            os._exit(7)
        model(torch.ones(rows, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def shorter(examples: bool = False, before: int = 0, **options: Any) -> float:
    """A batch of rank 1 is a row shorter, at once or after some others; among them an evaluation of its own."""
    inputs = {"example_inputs": (torch.ones(2, 4),)} if examples else {}
    model = geminifx.compile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), **inputs, **options)
    optimizer = model.optimizer(torch.optim.SGD, lr=0.0) if examples else torch.optim.SGD(model.parameters(), lr=0.0)
    for rows in [2] * before + [2 - RANK]:
        model(torch.ones(rows, 4)).sum().backward()
        if RANK and not options:  # what is divided is brought together by all
            with torch.no_grad():
                model(torch.ones(7, 4))
    gradient = model.get_parameter("1.bias").grad.item()
    optimizer.step()
    return gradient


def share(before: int = 0) -> None:
    """Two ranks that shard tensors, each with a batch of its own, at once or behind some that are the same."""
    model = geminifx.compile(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), parallel={"tensor": "1d:2"})
    for _ in range(before):
        model(torch.ones(2, 4))
    model(torch.full((2, 4), float(RANK)))


class Layers(nn.Module):
    """Two blocks, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def staged(rows: int = 2, filled: float = 1.0, dies: bool = False) -> None:
    """A step of two ranks that have layers of their own, and one in which rank 1 has so many rows of this number."""
    model = geminifx.compile(Layers(), parallel={"pipeline": 2}, microbatches=2, example_inputs=(torch.ones(2, 4),))
    optimizer = model.optimizer(torch.optim.SGD, lr=0.1, max_grad_norm=1.0)
    for step in range(2):
        is_other = step and RANK
        loss = model(torch.full((rows if is_other else 2, 4), filled if is_other else 1.0))
        if dies and is_other:
            os._exit(7)
        loss.backward()
        optimizer.step()


def sharded(rows: int = 2, evaluates: bool = False) -> None:
    """A step of two ranks that shard tensors, and one in which rank 1 has so many rows, or evaluates."""
    model = geminifx.compile(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), parallel={"tensor": "1d:2"})
    model(torch.ones(2, 4)).sum().backward()
    with torch.set_grad_enabled(not (evaluates and RANK)):
        model(torch.ones(rows if RANK else 2, 4))


class WithLoss(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).square().mean()


def judged(by: int | None) -> None:
    """A step of two ranks with batches of their own, and one before which rank `by` evaluates a loss, or all do."""
    model = geminifx.compile(WithLoss(4, 4))
    model(torch.ones(2, 4)).backward()
    if by in (RANK, None):
        with torch.no_grad():
            assert model(torch.full((2, 4), float(RANK))).item() > 0
    model(torch.ones(2, 4)).backward()


def one_update_less() -> None:
    """Rank 1 takes two backwards together where rank 0 updates after each."""
    model = geminifx.compile(WithLoss(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        model(torch.ones(2, 4)).backward()
        if step or not RANK:
            optimizer.step()


class Holds(WithLoss):
    """Has a buffer."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("held", torch.ones(4))


def has_no_room(for_buffers: bool) -> None:
    """Two ranks of which rank 1 has no memory for its values."""
    model = geminifx.compile(Holds())
    session, replaced = model.session, mock.patch.object(places, "move_buffers", side_effect=out_of_memory)
    if not RANK:
        replaced = nullcontext()
    elif not for_buffers:
        session.hardware.host_tier.limit_bytes = 1
        session.hardware.device_tier.limit_bytes = 1
    with mock.patch.object(Device, "is_cuda", property(lambda self: for_buffers)), replaced:
        model.prepare(torch.ones(2, 4))
        session.placed()


def out_of_memory(*_: Any) -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory")


class Fails(nn.Linear):
    """Its values cannot be drawn on rank 1."""

    def reset_parameters(self) -> None:
        if RANK and not self.weight.is_meta:
            raise OSError("there is no room")
        super().reset_parameters()


def empty(kind: type[nn.Linear] = nn.Linear) -> geminifx.CompiledModule:
    with geminifx.init_empty():
        source = nn.Sequential(kind(4, 4), nn.ReLU(), nn.Linear(4, 1))
    return geminifx.compile(source)


def drawn(seed: int = 0, kind: type[nn.Linear] = nn.Linear) -> None:
    model = empty(kind)
    model.initialize(seed)
    model(torch.ones(2, 4))


def read(added: float = 0.0, damage: str = "") -> None:
    """Two ranks that read files of their own; those of rank 1 differ by so much in one weight, or are damaged there
    "before" they are found or "later"."""
    values = {
        "0.weight": torch.ones(4, 4),
        "0.bias": torch.ones(4),
        "2.weight": torch.ones(1, 4),
        "2.bias": torch.ones(1),
    }
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file(values | {"2.bias": torch.full((1,), 1.0 + added * RANK)}, file)
        whole, model = file.read_bytes(), empty()
        for when in ("before", "later"):
            if when == damage and RANK:
                file.write_bytes(whole[:-4])
            if when == "before":
                model.load_pretrained(folder)
        model(torch.ones(2, 4))


def saved(sees_others: int) -> None:
    """A checkpoint in a place where one rank sees files that are not its own."""
    model = geminifx.compile(WithLoss(4, 4))
    model(torch.ones(2, 4)).backward()
    with TemporaryDirectory() as folder:
        if sees_others == RANK:
            (Path(folder) / "mine").touch()
        geminifx.save_checkpoint(model, None, folder)


def declared_by(*ranks: int) -> None:
    """A step of two ranks that share out weights, which is refused before model.optimizer(...) is called."""
    model = geminifx.compile(WithLoss(4, 4), parallel={"data": 2, "zero": 2}, example_inputs=(torch.ones(2, 4),))
    if RANK in ranks:
        model.optimizer(torch.optim.SGD, lr=0.1)
    model(torch.ones(2, 4))


def declared(examples: bool = False, **options: Any) -> None:
    inputs = {"example_inputs": (torch.ones(2, 4),)} if examples else {}
    model = geminifx.compile(WithLoss(4, 4), precision="bf16", **inputs)
    model.optimizer(**{"kind": torch.optim.SGD, "lr": 0.1, "masters": "bf16-stochastic"} | options)
    model(torch.ones(2, 4)).backward()


def meet(fault: str, action: Callable[[], float | None]) -> None:
    try:
        told = action()
        found = ["", "" if told is None else str(told)]
    except Exception as error:
        found = [type(error).__name__, str(error)]
    print(json.dumps([fault, *found]), flush=True)


def main() -> None:
    meet("none", train)
    meet("world", lambda: geminifx.compile(nn.Linear(2, 2), world_size=3))
    meet("models", lambda: train(width=8 + RANK))
    meet("shorter at once", shorter)
    meet("shorter later", lambda: shorter(before=1))
    meet("shorter than examples", lambda: shorter(examples=True))
    meet("shorter, zero 2", lambda: shorter(examples=True, before=1, parallel={"data": 2, "zero": 2}))
    meet("shared", share)
    meet("shared later", lambda: share(before=2))
    meet("staged", staged)
    meet("staged, shared later", lambda: staged(filled=2.0))
    meet("staged, of another shape", lambda: staged(rows=4))
    meet("sharded", lambda: sharded(rows=3))
    meet("evaluates alone", lambda: sharded(evaluates=True))
    meet("all judge", lambda: judged(by=None))
    meet("judges alone", lambda: judged(by=1))
    meet("an update less", one_update_less)
    meet("drawn", drawn)
    meet("drawn from other seeds", lambda: drawn(seed=RANK))
    meet("cannot be drawn", lambda: drawn(kind=Fails))
    meet("no room for buffers", lambda: has_no_room(for_buffers=True))
    meet("no room for weights", lambda: has_no_room(for_buffers=False))
    meet("read", read)
    meet("other files", lambda: read(added=1.0))
    meet("damaged files", lambda: read(damage="before"))
    meet("files damaged later", lambda: read(damage="later"))
    meet("saved where rank 0 sees room", lambda: saved(sees_others=1))
    meet("saved where rank 0 sees none", lambda: saved(sees_others=0))
    meet("declared by all", lambda: declared_by(0, 1))
    meet("declared by none", declared_by)
    meet("declared by one", lambda: declared_by(0))
    meet("declared", declared)
    meet("other chances", lambda: declared(seed=RANK))
    meet("other chances later", lambda: declared(examples=True, seed=RANK))
    meet("other rates", lambda: declared(lr=0.1 + RANK))
    meet("death", lambda: train(steps=3, dies_at=1))


if sys.argv[1:] == ["staged"]:
    meet("death", lambda: staged(dies=True))
else:
    main()
os._exit(0)  # gloo's threads may abort a process that ends in order after it has lost a peer
