"""Damage: whatever happens to any file of a checkpoint or a run, it is told, by an error for users that names the file,
and the model is as before; or what is loaded is what was saved."""

import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import geminifx
import pytest
import torch
from geminifx.compiler.cli.job import TrainOptions, prepare
from geminifx.compiler.cli.run_directory import RunDirectory
from geminifx.models.presets import load_model
from geminifx.models.recipe.text import train_tokenizer
from geminifx.runtime.isa.errors import CheckpointError, GeminiError
from geminifx.runtime.state_io.checksums import CHECKSUMS
from saving import OPTIMIZERS, compiled, same, train, values
from trainable import SMALL_OPT

SIZE = 8000
TEXT = "the quick brown fox jumps over the lazy dog. " * 40

pytestmark = [pytest.mark.campaign, pytest.mark.xdist_group("damage")]  # they share what was saved


# -- what happens to a file --------------------------------------------------------------------------------


def flip(data: bytes, chance: random.Random) -> bytes:
    at, changed = chance.randrange(len(data)), bytearray(data)
    changed[at] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def cut_the_beginning(data: bytes, chance: random.Random) -> bytes:
    return data[chance.randrange(1, len(data) + 1) :]


def zero(data: bytes, chance: random.Random) -> bytes:
    """A block that was never written."""
    first = chance.randrange(len(data))
    return (data[:first] + bytes(512) + data[first + 512 :])[: len(data)]


def add(data: bytes, chance: random.Random) -> bytes:
    return data + chance.randbytes(chance.randint(1, 100))


def scramble(data: bytes, chance: random.Random) -> bytes:
    return chance.randbytes(len(data))


def empty(data: bytes, chance: random.Random) -> bytes:
    return b""


def lose(data: bytes, chance: random.Random) -> None:
    return None


DAMAGE: list[Callable[[bytes, random.Random], bytes | None]] = [
    *[flip] * 6, *[cut] * 3, cut_the_beginning, zero, add, scramble, empty, lose,
]  # fmt: skip


# -- what is saved, and how it is loaded -------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A directory. `load` loads from a copy of it, and tells whether that is what was saved; `is_same` tells whether
    the model that it would be loaded into is as before."""

    folder: Path
    load: Callable[[Path], bool]
    is_same: Callable[[], bool]
    sealed: bool = True

    @property
    def files(self) -> list[str]:
        return sorted(str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file())


def checkpoint(folder: Path) -> Place:
    source, model = compiled(), compiled(seed=1)
    optimizer, other = (OPTIMIZERS["own"](each) for each in (source, model))
    train(source, optimizer)
    train(model, other)
    geminifx.save_checkpoint(source, optimizer, folder, extra={"step": 3})
    geminifx.save_checkpoint(model, other, folder.parent / "as before", extra=None)
    expected, before = values(source), values(model)

    def load(damaged: Path) -> bool:
        extra = geminifx.load_checkpoint(model, other, damaged)
        found = values(model)
        geminifx.load_checkpoint(model, other, folder.parent / "as before")
        return extra == {"step": 3} and same(found, expected)

    def is_same() -> bool:
        """Also where it says that it has half of each, and computes with neither."""
        if model.session.half_loaded:
            geminifx.load_checkpoint(model, other, folder.parent / "as before")
        return same(values(model), before)

    return Place(folder, load, is_same)


def run(folder: Path) -> Place:
    (folder.parent / "data.txt").write_text(TEXT)
    (folder.parent / "small.json").write_text(json.dumps(SMALL_OPT))
    model = load_model(str(folder.parent / "small.json"))
    ids = torch.zeros(2, 16, dtype=torch.int64)
    made = geminifx.compile(model, example_inputs={"input_ids": ids, "labels": ids})
    directory = RunDirectory(made, train_tokenizer([TEXT], 300))
    directory.save(folder, made.optimizer(torch.optim.AdamW, lr=1e-3), {"step": 0})
    expected = values(made)

    def load(damaged: Path) -> bool:
        """What --resume reads before it has a compiled model, and what it reads then."""
        job = prepare(TrainOptions(data=folder.parent / "data.txt", seq_len=16, output=damaged, resume=True))
        found = job.model.state_dict()
        same_text = job.tokenizer(TEXT)["input_ids"] == directory.tokenizer(TEXT)["input_ids"]
        return directory.open(damaged).extra == {"step": 0} and same(found, expected) and same_text

    return Place(folder, load, lambda: same(values(made), expected))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Place]:
    folder = tmp_path_factory.mktemp("saved")
    (folder / "checkpoint").mkdir()
    (folder / "run").mkdir()
    found = {"checkpoint": checkpoint(folder / "checkpoint" / "saved"), "run": run(folder / "run" / "saved")}
    return found | {f"{name} of before": replace(place, sealed=False) for name, place in found.items()}


# -- the property ------------------------------------------------------------------------------------------


def check(number: int, folder: Path, places: dict[str, Place]) -> str:
    """What came of it: "told", "loaded" or "nothing", where the damage changed nothing."""
    chance = random.Random(number)
    name = chance.choice(["checkpoint"] * 5 + ["run"] * 3 + ["checkpoint of before", "run of before"])
    place = places[name]
    file, damage = chance.choice(place.files), chance.choice(DAMAGE)
    told = f"case {number}: {damage.__name__}, of {file} of a {name}"
    whole = (place.folder / file).read_bytes()
    damaged = damage(whole, chance)
    if damaged == whole:
        return "nothing"
    copied = shutil.copytree(place.folder, folder)
    (folder / file).unlink() if damaged is None else (folder / file).write_bytes(damaged)
    if not place.sealed:
        for each in folder.rglob(CHECKSUMS):
            each.unlink()
    try:
        is_right = place.load(copied)
    except CheckpointError as error:
        assert not place.sealed or file in str(error) or Path(file).name in str(error), f"{told}: {error}"
        return "told"
    except (GeminiError, ValueError) as error:
        assert not place.sealed, f"{told}: {type(error).__name__}: {error}"
        return "told"
    else:
        # Without checksums a file may be damaged and read like any other; with them, what is lost may be the list.
        assert is_right or not place.sealed, f"{told}: loaded silently wrong"
        return "loaded"
    finally:
        assert place.is_same(), f"{told}: the model is not as before"
        shutil.rmtree(folder)


def test_damage_is_told_or_does_not_matter(cases: Iterator[int], tmp_path: Path, places: dict[str, Place]) -> None:
    found = []
    for number in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found.append(check(number, tmp_path / "damaged", places))
            except Exception as error:
                error.add_note(f"in case {number}")
                raise
    assert found.count("told") > 0.8 * len(found)


def test_what_is_whole_loads(places: dict[str, Place]) -> None:
    for place in places.values():
        assert place.load(place.folder) and place.is_same()
