"""State of sharded models on four and eight processes: whole state_dicts, and checkpoints that any number reads."""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import geminifx
import pytest
import torch
from launching import launched
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from state_worker import CHAIN, CHAINED, CLIP, MODELS, MODES, STEPS, make, train, values  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("state")]  # they share what the processes found

# Sums are taken in another order than in one process; in bfloat16 that moves weights by a rounding now and then.
CLOSE = {"own": 2e-5, "torch's": 2e-5, "own, bf16": 1e-2}

EVERY_MODE = pytest.mark.parametrize("name", MODES)
Finder = Callable[[str], Any]


@cache
def alone(of: str, kind: str, folder: Path) -> dict[str, Any]:
    """What one process saved, and found on going on."""
    model, optimizer = make(MODELS[of], kind)
    train(model, optimizer, MODELS[of], 0)
    geminifx.save_checkpoint(model, optimizer, folder / f"one, {of}, {kind}", extra={"step": STEPS})
    saved = values(model)
    return {"saved": saved, **train(model, optimizer, MODELS[of], STEPS), "state": values(model)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("state")
    (folder / "file").write_text("not a directory")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Finder:
    """What four ranks made in a mode of what one process saved, or found besides."""

    def of(name: str) -> Any:
        for of, kind, _ in MODES.values():
            alone(of, kind, folder)
        return launched(HERE / "state_worker.py", folder / "found.pt", *MODES, ranks=4)[name]

    return of


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def same_optimizer(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    pairs = ((ours["state"][i], theirs["state"][i]) for i in ours["state"])
    return ours["state"].keys() == theirs["state"].keys() and all(same(a, b) for a, b in pairs)


@EVERY_MODE
def test_four_ranks_go_on_from_one_process(folder: Path, found: Finder, name: str) -> None:
    of, kind, _ = MODES[name]
    ranks, expected = found(name), alone(of, kind, folder)
    for rank in ranks:
        assert rank["extra"] == {"step": STEPS}
        assert same(rank["loaded"], expected["saved"]), "masters are exact, whole, and in the model's names"
        assert rank["losses"] == ranks[0]["losses"] and rank["norms"] == ranks[0]["norms"]
        assert rank["losses"] == pytest.approx(expected["losses"], rel=CLOSE[kind])
        assert rank["norms"] == pytest.approx(expected["norms"], rel=max(CLOSE[kind], 1e-4))
        assert min(rank["norms"]) > CLIP, "so that clipping matters"
        assert same(rank["state"], ranks[0]["state"])


@EVERY_MODE
def test_one_process_goes_on_from_four_ranks(folder: Path, found: Finder, name: str) -> None:
    (of, kind, _), (first, *_, last) = MODES[name], found(name)
    model, optimizer = make(MODELS[of], kind)
    assert geminifx.load_checkpoint(model, optimizer, folder / name) == name
    assert same(values(model), first["state"])
    if kind != "torch's":
        assert same_optimizer(optimizer.state_dict(), first["optimizer"])
        assert same_optimizer(last["optimizer"], first["optimizer"])


@pytest.mark.parametrize("name", ["1d, zero, bf16", "2d", "1d", "zero", "pipeline, zero"])
def test_whole_values_are_taken_in_parts(found: Finder, name: str) -> None:
    for number, rank in enumerate(found(name)):
        assert same(rank["loaded again"], rank["loaded"])
        assert all(rank["kept"]) if number == 0 else rank["kept"] == [0, 0]


def test_a_checkpoint_is_read_in_another_mode(found: Finder) -> None:
    assert same(found("1d read in 2d")["state"], found("1d")[0]["state"])
    assert same_optimizer(found("1d read in 2d")["optimizer"], found("1d")[0]["optimizer"])


def test_rank_0_writes_what_transformers_reads(folder: Path, found: Finder) -> None:
    read = AutoModelForCausalLM.from_pretrained(folder / "pretrained", dtype=torch.float32).state_dict()
    assert same(read, found("1d")[0]["state"])


def test_what_fails_on_rank_0_raises_on_all(found: Finder) -> None:
    first, *others = found("failures")
    assert first.startswith("NotADirectoryError:")
    assert all(told.startswith("StateError: rank 0 failed with NotADirectoryError") for told in others)


# -- eight ranks, from mode to mode ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process has saved, from which eight ranks go on in each mode of CHAIN."""
    folder = tmp_path_factory.mktemp("chain")
    model, optimizer = make(CHAINED, "own")
    train(model, optimizer, CHAINED, 0)
    geminifx.save_checkpoint(model, optimizer, folder / "one")
    return folder


@pytest.fixture(scope="module")
def by_eight(chained: Path) -> dict[str, Any]:
    """What eight ranks found in each mode of CHAIN, on going on from the one before."""
    return launched(HERE / "state_worker.py", chained / "found.pt", ranks=8)


@pytest.fixture(scope="module")
def uninterrupted() -> list[dict[str, Any]]:
    """Of one process that does all the steps: losses and norms, from one checkpoint to the next."""
    model, optimizer = make(CHAINED, "own")
    return [train(model, optimizer, CHAINED, STEPS * number) for number in range(len(CHAIN) + 2)]


def close(found: Finder, expected: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=CLOSE["own"])
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)


@pytest.mark.parametrize("number", range(len(CHAIN)), ids=list(CHAIN))
def test_eight_ranks_go_on_from_another_mode(
    chained: Path, by_eight: dict[str, Any], uninterrupted: list[dict[str, Any]], number: int
) -> None:
    if number:
        before = by_eight[list(CHAIN)[number - 1]][0]
    else:
        model, optimizer = make(CHAINED, "own")
        geminifx.load_checkpoint(model, optimizer, chained / "one")
        before = {"state": values(model), "optimizer": optimizer.state_dict()}
    ranks = by_eight[list(CHAIN)[number]]
    for rank in ranks:
        assert same(rank["loaded"], before["state"]) and same_optimizer(rank["loaded optimizer"], before["optimizer"])
        assert same(rank["state"], ranks[0]["state"]) and same_optimizer(rank["optimizer"], ranks[0]["optimizer"])
        close(rank, uninterrupted[number + 1])


@pytest.mark.parametrize("name", CHAIN)
def test_one_process_goes_on_from_eight_ranks(
    chained: Path, by_eight: dict[str, Any], uninterrupted: list[dict[str, Any]], name: str
) -> None:
    model, optimizer = make(CHAINED, "own")
    geminifx.load_checkpoint(model, optimizer, chained / name)
    assert same(values(model), by_eight[name][0]["state"])
    assert same_optimizer(optimizer.state_dict(), by_eight[name][0]["optimizer"])
    number = list(CHAIN).index(name) + 2
    close(train(model, optimizer, CHAINED, STEPS * number), uninterrupted[number])
