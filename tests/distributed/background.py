"""One rank of the test of saves in the background: `background.py FOLDER`; it prints a line of JSON."""

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

import geminifx
import torch
from geminifx.runtime.isa.errors import GeminiError
from geminifx.runtime.state_io.filesystem import Writer
from saving import network, same, values
from shared_captures import shared_captures

RANK, FOLDER = int(os.environ["RANK"]), Path(sys.argv[1])
WORLDS: dict[str, dict[str, Any]] = {"zero 2": {"data": 2, "zero": 2}, "data": {"data": 2}, "1d": {"tensor": "1d:2"}}


def made(seed: int, **parallel: Any) -> tuple[geminifx.CompiledModule, torch.optim.Optimizer]:
    model = geminifx.compile(network(seed), example_inputs=(torch.ones(8, 6),), parallel=parallel)
    return model, model.optimizer(torch.optim.AdamW, lr=1e-2)


def train(model: geminifx.CompiledModule, optimizer: torch.optim.Optimizer, first: int) -> list[float]:
    losses = []
    for step in range(first, first + 3):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step + 100 * model.ranks.data_rank))
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def saved_while_training(name: str) -> bool:
    """Whether what is saved in the background, and written after more steps, is what another save had written."""
    model, optimizer = made(0, **WORLDS[name])
    train(model, optimizer, 0)
    geminifx.save_checkpoint(model, optimizer, FOLDER / f"{name}, before", extra=name)
    opened, write_data = threading.Event(), Writer.write_data
    Writer.write_data = lambda *arguments: opened.wait(60) and write_data(*arguments)
    saving = geminifx.save_checkpoint(model, optimizer, FOLDER / name, extra=name, background=True)
    train(model, optimizer, 3)
    opened.set()
    Writer.write_data = write_data
    train(model, optimizer, 6)  # beside the exchanges of the thread
    saving.result()
    found = []
    for folder in (FOLDER / f"{name}, before", FOLDER / name):
        assert geminifx.load_checkpoint(model, optimizer, folder) == name
        found.append((values(model), train(model, optimizer, 3)))
    return same(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def told(action: Callable[[], object]) -> list[str]:
    try:
        action()
    except GeminiError as error:
        return [type(error).__name__, str(error)]
    return ["", ""]


def fails_on_one() -> list[list[str]]:
    """What each rank is told where rank 1 cannot write, and where it has no room for a copy."""
    model, optimizer = made(0, data=2, zero=2)
    train(model, optimizer, 0)
    write_data, found = Writer.write_data, []
    if RANK == 1:
        Writer.write_data = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    geminifx.save_checkpoint(model, optimizer, FOLDER / "fails", background=True)
    found.append(told(lambda: geminifx.save_checkpoint(model, optimizer, FOLDER / "fails")))
    Writer.write_data = write_data
    tier = model.session.hardware.host_tier
    if RANK == 1:
        tier.limit_bytes = tier.used_bytes
    found.append(told(lambda: geminifx.save_checkpoint(model, optimizer, FOLDER / "fails", background=True)))
    tier.limit_bytes = None
    found.append(told(geminifx.save_checkpoint(model, optimizer, FOLDER / "fails", background=True).result))
    train(model, optimizer, 3)
    return found


with shared_captures():
    found = {**{name: saved_while_training(name) for name in WORLDS}, "failures": fails_on_one()}
print(json.dumps(found), flush=True)
