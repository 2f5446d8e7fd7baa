"""Real processes, each with some of the layers, train as one process with all of them."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import finder

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from pipeline_worker import (  # noqa: E402
    FROZEN,
    IN_EIGHTS,
    IN_FOURS,
    IN_TWOS,
    OPT_OF_EIGHT,
    SMALL,
    STEPS,
    TRAININGS,
    UNTIED,
    Trained,
    Training,
    train,
)

pytestmark = pytest.mark.xdist_group("pipelines")  # they share what the processes find
DIVIDED = ("roundrobin 4, on the host, in the backward",)
"""Several ranks run the last stage, each for some of the microbatches."""
QUICK = ("1f1b", "1f1b, tied, in the backward")
"""`make test` runs no others."""
LAUNCHES = {
    2: (QUICK, tuple(name for name in IN_TWOS if name not in QUICK)),
    4: (tuple(IN_FOURS),),
    8: (tuple(IN_EIGHTS),),
}
Finder = Callable[[str, int], Any]

LOSS, PARAMETER, LR = 2**-18, 2**-6, 1e-2
"""Sums in another order, of tied weights' gradients and of ranks' batches, differ by their last bits. AdamW divides
a gradient by its size: where that is nearly nothing a weight goes on by some share of what it goes in all steps."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Finder:
    return finder(HERE / "pipeline_worker.py", tmp_path_factory.mktemp("pipelines"), LAUNCHES)


def slow_but(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in names]


_alone: dict[str, Trained] = {}


def one_process(training: Training) -> Trained:
    """What one process finds; trainings that are alike there share it."""
    if repr(training) not in _alone:
        _alone[repr(training)] = train(training)
    return _alone[repr(training)]


def check(found: list[dict[str, Any]], name: str) -> None:
    """All ranks see one process's losses, and have its parameters."""
    everyones, training = [Trained(**each) for each in found], TRAININGS[name]
    expected = one_process(training.alone())
    exact = training.case in (SMALL, UNTIED, FROZEN, OPT_OF_EIGHT) and training.data == 1 and name not in DIVIDED
    for trained in everyones:
        assert trained.losses == everyones[0].losses
        assert all(torch.equal(value, everyones[0].state[key]) for key, value in trained.state.items())
    assert len(expected.losses) == STEPS * (training.micro + training.evaluates)
    for loss, whole in zip(everyones[0].losses, expected.losses, strict=True):
        assert loss == whole if exact and not training.evaluates else abs(loss - whole) <= LOSS * abs(whole)
    for key, whole in expected.state.items():
        value = everyones[0].state[key]
        if exact:
            assert torch.equal(value, whole), key
        else:
            assert (value - whole).abs().max() <= PARAMETER * LR * STEPS, key


@pytest.mark.parametrize("name", slow_but(IN_TWOS))
def test_two_ranks_train_as_one_process(found: Finder, name: str) -> None:
    check(found(name, 2), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_FOURS)
def test_four_ranks_train_as_one_process(found: Finder, name: str) -> None:
    check(found(name, 4), name)


@pytest.mark.campaign(whole=True)
@pytest.mark.parametrize("name", IN_EIGHTS)
def test_eight_ranks_train_as_one_process(found: Finder, name: str) -> None:
    check(found(name, 8), name)
