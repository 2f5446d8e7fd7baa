"""Saving: a process that is killed at any of its file events leaves the old state or the new one, bit for bit.

Each case is a process, forked from this one, that saves and is killed when it is about to open, rename, flush, remove
or write to a file for the n-th time. All numbers n are tried, for every kind of checkpoint, where directories change
places in one step and where they do so in two.
"""

import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import geminifx
import pytest
import torch
from geminifx.compiler.cli.run_directory import RunDirectory
from geminifx.models.presets import load_model
from geminifx.models.recipe.text import train_tokenizer
from geminifx.runtime.isa.errors import CheckpointError
from geminifx.runtime.state_io import exchange
from geminifx.runtime.state_io.checksums import Checksum
from geminifx.runtime.state_io.leftovers import put_back
from safetensors.torch import load_file
from saving import OPTIMIZERS, compiled, train, values
from trainable import SMALL_OPT
from transformers import AutoConfig, AutoModelForCausalLM

SIZE = 1500
EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.chown", "shutil.copyfile"}
"""Python tells of them before they happen."""
WRITES = 16
"""Of so many writes to a file one counts: there are hundreds, and all end in a file that is not whole."""

pytestmark = [pytest.mark.campaign, pytest.mark.xdist_group("kills")]  # they share what was saved
State = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """How something is saved to a directory, and what is found there; `old` is whether there is something before."""

    save: Callable[[Path, bool], None]
    find: Callable[[Path], State]
    old: bool = True


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- what is saved -----------------------------------------------------------------------------------------


@cache
def trained(new: bool) -> tuple[geminifx.CompiledModule, torch.optim.Optimizer]:
    """One state of a model, or another."""
    model = compiled(seed=int(new))
    optimizer = OPTIMIZERS["own"](model)
    train(model, optimizer)
    return model, optimizer


@cache
def reader() -> tuple[geminifx.CompiledModule, torch.optim.Optimizer]:
    model = compiled(seed=2)
    return model, OPTIMIZERS["own"](model)


def save_checkpoint(folder: Path, new: bool) -> None:
    geminifx.save_checkpoint(*trained(new), folder, extra=float(new))


def save_in_background(folder: Path, new: bool) -> None:
    geminifx.save_checkpoint(*trained(new), folder, extra=float(new), background=True).result()


def find_checkpoint(folder: Path) -> State:
    model, optimizer = reader()
    extra = geminifx.load_checkpoint(model, optimizer, folder)
    states = optimizer.state_dict()["state"]
    return {
        **values(model),
        "extra": torch.tensor(extra),
        **{f"{i} {key}": v.clone() for i, state in states.items() for key, v in state.items()},
    }


@cache
def language_model(new: bool) -> tuple[RunDirectory, torch.optim.Optimizer]:
    torch.manual_seed(int(new))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL_OPT))
    ids = torch.zeros(2, 8, dtype=torch.int64)
    made = geminifx.compile(model, example_inputs={"input_ids": ids, "labels": ids})
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog. " * 40], 300)
    return RunDirectory(made, tokenizer), made.optimizer(torch.optim.AdamW, lr=1e-3)


def save_run(folder: Path, new: bool) -> None:
    run, optimizer = language_model(new)
    run.save(folder, optimizer, {"new": float(new)})


def find_run(folder: Path) -> State:
    """Both parts of it, which are of one moment."""
    run, optimizer = language_model(False)
    opened = run.open(folder)
    kept = values(run.model)
    opened.load(optimizer)
    found = {**values(run.model), "extra": torch.tensor(opened.extra["new"])}
    run.model.load_state_dict(kept)
    published = load_model(str(put_back(folder))).state_dict()
    assert same(published, {name: found[name] for name in published})
    assert (folder / "tokenizer.json").is_file()
    return found


def save_weights(folder: Path, new: bool) -> None:
    model, _ = trained(new)
    model.save_pretrained(folder)
    if not new:
        (folder / "notes").write_text("of the user")


def find_weights(folder: Path) -> State:
    place = put_back(folder)
    if not place.exists():
        raise CheckpointError("nothing there")
    assert (place / "notes").read_text() == "of the user"
    return load_file(place / "model.safetensors")


KINDS = {
    "a checkpoint": Kind(save_checkpoint, find_checkpoint),
    "in the background": Kind(save_in_background, find_checkpoint),
    "the first checkpoint": Kind(save_checkpoint, find_checkpoint, old=False),
    "a run": Kind(save_run, find_run),
    "weights": Kind(save_weights, find_weights),
}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Path, list[State]]]]:
    """Where the old state of a kind lies, and both states."""

    @cache
    def made(name: str) -> tuple[Path, list[State]]:
        kind, folder = KINDS[name], tmp_path_factory.mktemp("before")
        kind.save(folder / "old", False)
        shutil.copytree(folder / "old", folder / "new")
        kind.save(folder / "new", True)
        return folder / "old", [kind.find(folder / "old"), kind.find(folder / "new")]

    yield made


# -- and killed --------------------------------------------------------------------------------------------


def count_down(folder: Path, event: int) -> None:
    """From here on this process is killed at the file event of this number."""
    numbers, writes = count(), count()

    def tick() -> None:
        if next(numbers) == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def heard(name: str, arguments: tuple[Any, ...]) -> None:
        if name in EVENTS and (name != "open" or str(arguments[0]).startswith(str(folder))):
            tick()

    def tick_by_writes(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            if next(writes) % WRITES == 0:
                tick()
            return function(*arguments)

        return called

    def ticking(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            tick()
            found = function(*arguments)
            tick()
            return found

        return called

    sys.addaudithook(heard)
    os.fsync = ticking(os.fsync)
    exchange.exchange = ticking(exchange.exchange)
    Checksum.then = tick_by_writes(Checksum.then)  # type: ignore[method-assign]


def killed(kind: Kind, folder: Path, two_steps: bool, event: int) -> bool:
    """Save the new state in a process that is killed at this event. Whether it was."""
    child = os.fork()
    if child == 0:
        try:
            if two_steps:
                exchange.exchange = lambda one, other: False
            count_down(folder, event)
            kind.save(folder / "saved", True)
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def check(number: int, folder: Path, before: Callable[[str], tuple[Path, list[State]]]) -> bool:
    """Whether the case came about: there are only so many events."""
    ways = [(name, two_steps) for name in KINDS for two_steps in (False, True)]
    (name, two_steps), event = ways[number % len(ways)], number // len(ways)
    kind, (old, states) = KINDS[name], before(name)
    folder.mkdir()
    if kind.old:
        shutil.copytree(old, folder / "saved")
    was_killed = killed(kind, folder, two_steps, event)
    told = f"case {number}: {name}, {'two steps' if two_steps else 'one step'}, event {event}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = kind.find(folder / "saved")
        except CheckpointError as error:
            assert was_killed and not kind.old and not (folder / "saved").exists(), f"{told}: {error}"
        else:
            expected = states if was_killed else states[1:]
            assert any(same(found, state) for state in expected), f"{told}: neither the old state nor the new one"
        kind.save(folder / "saved", True)
    assert os.listdir(folder) == ["saved"], f"{told}: the next save sweeps"
    shutil.rmtree(folder)
    return was_killed


def test_a_killed_save_leaves_the_old_state_or_the_new_one(
    cases: Iterator[int], tmp_path: Path, before: Callable[[str], tuple[Path, list[State]]]
) -> None:
    done = [check(number, tmp_path / str(number), before) for number in cases]
    assert sum(done) > 0.2 * len(done)


def test_every_event_is_tried(tmp_path: Path, before: Callable[[str], tuple[Path, list[State]]]) -> None:
    for name, kind in KINDS.items():
        shutil.copytree(before(name)[0], tmp_path / name / "saved")
        was_killed = killed(kind, tmp_path / name, True, SIZE // (2 * len(KINDS)))
        assert not was_killed, f"{name} has more events: enlarge SIZE"
