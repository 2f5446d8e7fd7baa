"""Two ranks, of which one does something else or dies: both end, with what is right or with an error of ours.

Each case is a fault in a world: two processes, forked from one that sees no GPU (autograd has threads for those, which
no fork takes along), train by gloo, and rank 1 meets the fault. It fails where a process does not end (a hang), where
one ends with another error than ours (raw), or where both end well with other values than plain PyTorch has for the
mean of their losses (silently wrong).
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import geminifx
import pytest
import torch
from geminifx.runtime.distributed import ranks as ranks_module
from geminifx.runtime.distributed.point_to_point import Messages
from geminifx.runtime.isa.errors import GeminiError
from geminifx.runtime.machine import Machine
from geminifx.runtime.state_io.filesystem import Writer
from torch import Tensor, nn
from torch import distributed as dist

TIMEOUT_S = 10.0
"""What ranks wait for each other."""
PATIENCE_S = 90.0
"""Who has not ended by then hangs."""
STEPS, LR = 4, 0.1

WORLDS: dict[str, dict[str, Any]] = {
    "data": {"data": 2},
    "zero 2": {"data": 2, "zero": 2},
    "zero 3": {"data": 2, "zero": 3},
    "1d": {"tensor": "1d:2"},
    "pipeline": {"pipeline": 2},
}
ONE_BATCH = ("1d", "pipeline")
"""Worlds whose ranks have the same batch."""


class Network(nn.Module):
    """A prediction without labels, a loss with them."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, width), nn.Linear(width, 4)])

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        first, second = self.layers
        found = second(first(x).relu())
        return found if y is None else (found - y).square().mean()


def network(width: int = 8) -> Network:
    torch.manual_seed(0)
    return Network(width)


@dataclass
class Rank:
    """One rank of a case, at `step` of its training."""

    rank: int
    world: str
    folder: Path
    width: int = 8
    rows: int = 6
    steps: int = STEPS
    step: int = 0
    model: Any = None
    optimizer: Any = None
    hooks: dict[str, Callable[["Rank"], None]] = field(default_factory=dict)

    def batch(self) -> tuple[Tensor, Tensor]:
        return batch(self.step, self.rank if self.world not in ONE_BATCH else 0, self.rows)

    def hook(self, moment: str) -> None:
        if self.rank == 1 and moment in self.hooks:
            self.hooks[moment](self)

    def run(self) -> dict[str, list[float]]:
        """Train; returns the parameters."""
        self.hook("compile")
        options = {"microbatches": 2} if self.world == "pipeline" else {}
        self.model = geminifx.compile(network(self.width), parallel=WORLDS[self.world], timeout_s=TIMEOUT_S, **options)
        self.optimizer = self.model.optimizer(torch.optim.SGD, lr=LR)
        for step in range(self.steps):
            self.step = step
            self.hook("step")
            x, y = self.batch()
            loss = self.model(x, y)
            self.hook("forward")
            loss.backward()
            self.hook("backward")
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.hook("end")
        return {name: value.flatten().tolist() for name, value in self.model.state_dict().items()}


def batch(step: int, number: int, rows: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(10 * step + number)
    return torch.randn(rows, 4, generator=draw), torch.randn(rows, 4, generator=draw)


def expected(world: str, rows: tuple[int, int], steps: int, always: bool) -> dict[str, Any]:
    """The parameters that plain PyTorch has after so many steps; the ranks' batches have these rows in the last, or
    always."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    numbers = (0,) if world in ONE_BATCH else (0, 1)
    for step in range(steps):
        parts = [batch(step, number, rows[number] if always or step == STEPS - 1 else 6) for number in numbers]
        sum(model(*part) for part in parts).div(len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.flatten().tolist() for name, value in model.state_dict().items()}


# -- faults ------------------------------------------------------------------------------------------------


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(step: int, action: Callable[[Rank], object]) -> Callable[[Rank], None]:
    def acts(rank: Rank) -> None:
        if rank.step == step:
            action(rank)

    return acts


def patched(owner: Any, name: str) -> Callable[[Rank], None]:
    """From here on the process dies in this function."""
    return lambda rank: setattr(owner, name, die)


def instructed(owner: Any, name: str, calls: int = 0) -> Callable[[Rank], None]:
    """The process dies in an instruction, from step 2 on, behind so many calls of it. To be set before programs are
    made, which keep the instructions that they find."""

    def sets(rank: Rank) -> None:
        run, left, kind = getattr(owner, name), iter(range(calls)), type(vars(owner)[name])

        def call(*args: Any) -> Any:
            if rank.step >= 2 and next(left, None) is None:
                die()
            return run(*args)

        setattr(owner, name, staticmethod(call) if kind is staticmethod else call)

    return sets


def killed(number: int) -> Callable[[Rank], None]:
    """The process dies by chance at some of what a pipeline's ranks do."""
    chance = Random(number)
    moments = ((Messages, "send"), (Messages, "receive"), (Machine, "wait"), (Machine, "release"), (Machine, "put"))
    return instructed(*chance.choice(moments), calls=chance.randrange(4))


def own_error(rank: Rank) -> None:
    raise ZeroDivisionError("of the user")


def change_parameter(rank: Rank) -> None:
    """Between a forward and its backward: a check refuses that."""
    with rank.model._facade_calls.lending(), torch.no_grad():
        rank.model.load_state_dict(rank.model.state_dict())


def skip_step(rank: Rank) -> None:
    """A backward more before the update than the others make."""
    rank.optimizer.step = lambda: delattr(rank.optimizer, "step")
    rank.optimizer.zero_grad = lambda: delattr(rank.optimizer, "zero_grad")


def drop_step(rank: Rank) -> None:
    """Take a forward whose backward never comes, and go on with the next."""
    rank.model(*rank.batch())


def evaluate(rank: Rank, with_loss: bool = True) -> None:
    x, y = rank.batch()
    with torch.no_grad():
        rank.model(x, y if with_loss else None)


def save(rank: Rank, **how: bool) -> None:
    geminifx.save_checkpoint(rank.model, rank.optimizer, rank.folder / "saved", **how).result()


Setup = Callable[[Rank], None]


def hooked(**hooks: Callable[[Rank], object]) -> Setup:
    return lambda rank: rank.hooks.update(hooks)


def only_second(**values: int) -> Setup:
    return lambda rank: vars(rank).update(values if rank.rank == 1 else {})


def both_save(moment: str, action: Callable[[Rank], None], **how: bool) -> Setup:
    """All save in step 2; rank 1 meets `action` before."""

    def sets(rank: Rank) -> None:
        def saves() -> None:
            if rank.rank == 1:
                action(rank)
            save(rank, **how)

        run = Rank.hook
        rank.hook = lambda m: saves() if m == moment and rank.step == 2 else run(rank, m)  # type: ignore[method-assign]

    return sets


def other_order(rank: Rank) -> None:
    """One evaluates before the step, the other behind it."""
    run, moment = Rank.hook, ("step", "backward")[rank.rank]
    rank.hook = lambda m: evaluate(rank) if m == moment and rank.step == 2 else run(rank, m)  # type: ignore[method-assign]


FAULTS: dict[str, Setup] = {
    "none": hooked(),
    "another width": only_second(width=12),
    "another shape from the beginning": only_second(rows=4),
    "another shape in the last step": hooked(step=at(STEPS - 1, lambda rank: vars(rank).update(rows=4))),
    "fewer steps": only_second(steps=2),
    "more steps": only_second(steps=STEPS + 1),
    "fewer steps, and a save": hooked(step=at(2, save)),
    "dies before compile": hooked(compile=die),
    "dies before a forward": hooked(step=at(2, die)),
    "dies in a forward": hooked(compile=instructed(Machine, "wait")),
    "dies before a backward": hooked(forward=at(2, die)),
    "dies in a backward": hooked(compile=instructed(Machine, "gradients")),
    "dies when it agrees": hooked(step=at(2, patched(ranks_module.Ranks, "_agree"))),
    "dies in an exchange": hooked(forward=at(2, patched(ranks_module.Ranks, "_run"))),
    "dies before an update": hooked(backward=at(2, die)),
    "dies at the end": hooked(end=die),
    "dies in a save": both_save("step", patched(Writer, "write_data")),
    "dies in a background save": both_save("step", patched(Writer, "write_data"), background=True),
    "raises in a save": both_save("step", lambda rank: setattr(Writer, "write_data", own_error)),
    "both save": both_save("step", lambda rank: None),
    "both save in the background": both_save("step", lambda rank: None, background=True),
    "saves alone": hooked(step=at(2, save)),
    "saves alone in the background": hooked(step=at(2, lambda rank: save(rank, background=True))),
    "raises an error of its own": hooked(step=at(2, own_error)),
    "raises in a check": hooked(forward=at(2, change_parameter)),
    "is slow": hooked(step=lambda rank: time.sleep(0.5), forward=lambda rank: time.sleep(0.5)),
    "is slower than the others wait": hooked(step=at(2, lambda rank: time.sleep(TIMEOUT_S + 5))),
    "evaluates alone": hooked(step=at(2, evaluate)),
    "evaluates alone between forward and backward": hooked(forward=at(2, evaluate)),
    "evaluates alone without labels": hooked(step=at(2, lambda rank: evaluate(rank, with_loss=False))),
    "evaluates alone at last": hooked(end=evaluate),
    "another order": other_order,
    "a forward more": hooked(step=at(2, drop_step)),
    "an update less": hooked(backward=at(1, skip_step)),
    "reads the state alone": hooked(step=at(2, lambda rank: rank.model.state_dict())),
}
KILLS: dict[str, Setup] = {f"is killed, {number}": hooked(compile=killed(number)) for number in range(20)}
"""In the middle of a pipeline's schedule."""
CASES = [*((fault, world) for fault in FAULTS for world in WORLDS), *((fault, "pipeline") for fault in KILLS)]
SIZE = len(CASES)
RIGHT = ("none", "is slow", "both save", "both save in the background")
"""What is no fault."""

pytestmark = [pytest.mark.campaign, pytest.mark.xdist_group("ranks")]


# -- two processes -----------------------------------------------------------------------------------------


def started(fault: str, rank: Rank, port: int) -> int:
    """The process of one rank, which writes how it ended."""
    child = os.fork()
    if child:
        return child
    with open(rank.folder / f"{rank.rank}.txt", "w") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    os.environ |= {"RANK": str(rank.rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # fmt: skip
    try:
        (FAULTS | KILLS)[fault](rank)
        ended: Any = rank.run()
    except BaseException as error:
        of_ours = isinstance(error, (GeminiError, ZeroDivisionError))
        ended = [type(error).__name__ if of_ours else "raw", str(error)]
    (rank.folder / f"{rank.rank}.json").write_text(json.dumps(ended))
    sys.stdout.flush()
    os._exit(0)


def wait(children: list[int]) -> list[int]:
    """Those that hang, which are ended."""
    deadline, left = time.monotonic() + PATIENCE_S, set(children)
    while left and time.monotonic() < deadline:
        left -= {child for child in left if os.waitpid(child, os.WNOHANG)[0]}
        time.sleep(0.02)
    for child in left:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return sorted(left)


def check(number: int, folder: Path) -> None:
    fault, world = CASES[number]
    told = f"case {number}: {fault}, {world}"
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = [started(fault, Rank(rank, world, folder), store.port) for rank in range(2)]
    hang = wait(children)
    assert not hang, f"{told}: rank(s) {[children.index(child) for child in hang]} hang"
    files = [folder / f"{rank}.json" for rank in range(2)]
    ended = [json.loads(file.read_text()) if file.exists() else ["killed", ""] for file in files]
    assert not any(each[0] == "raw" for each in ended if isinstance(each, list)), f"{told}: {ended}"
    if fault in KILLS:
        assert ended[1] == ["killed", ""] and "rank 0 of 2 lost rank(s) 1" in ended[0][1], f"{told}: {ended}"
    values = {rank: each for rank, each in enumerate(ended) if isinstance(each, dict)}
    if fault in RIGHT:
        assert len(values) == 2, f"{told}: {ended}"
    rows = (6, 4) if fault.startswith("another shape") else (6, 6)
    always = fault == "another shape from the beginning"
    for rank, found in values.items():
        steps = 2 if rank and fault == "fewer steps" else STEPS
        assert found == near(expected(world, rows, steps, always)), f"{told}: rank {rank} is silently wrong"


def near(values: dict[str, list[float]]) -> dict[str, Any]:
    return {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in values.items()}


def test_ranks_end_with_what_is_right_or_with_a_reason(cases: Iterator[int], tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path), *map(str, cases)]
    alone = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | alone, stderr=subprocess.PIPE, text=True)
    assert not done.returncode, done.stderr


if __name__ == "__main__":
    for number in sys.argv[2:]:
        (of_case := Path(sys.argv[1]) / number).mkdir()
        check(int(number), of_case)
