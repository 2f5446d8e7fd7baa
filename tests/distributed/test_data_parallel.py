"""Two real processes, each with half of the batch, train as one process with all of it."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import finder

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from nearness import check  # noqa: E402
from worker import AVERAGED, CASES, EXACT, IN_FOURS, OVERFLOW, ROWS, STEPS, Trained, train  # noqa: E402

pytestmark = pytest.mark.xdist_group("data parallel")  # they share what the processes find
QUICK = ("torch's optimizer", "zero 2, on the host, clipped", "zero 3, two backwards a step, clipped")
"""Of these both optimizers, both tiers, accumulation and clipping; `make test` runs no others."""
LAUNCHES = {2: (QUICK, tuple(name for name in (*CASES, *EXACT, OVERFLOW) if name not in QUICK)),
            4: ((*IN_FOURS, AVERAGED),)}  # fmt: skip
Finder = Callable[[str, int], Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Finder:
    return finder(HERE / "worker.py", tmp_path_factory.mktemp("ranks"), LAUNCHES)


def slow_but(names: Iterable[Any]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in names]


_alone: dict[str, Trained] = {}


def one_process(name: str) -> Trained:
    """What one process finds; cases that are alike there share it."""
    training = CASES[name].alone()
    if repr(training) not in _alone:
        _alone[repr(training)] = train(training, slice(0, ROWS))
    return _alone[repr(training)]


@pytest.mark.parametrize("name", slow_but(CASES))
def test_two_ranks_train_as_one_process(found: Finder, name: str) -> None:
    check(found(name, 2), one_process(name), CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_FOURS)
def test_four_ranks_train_as_one_process(found: Finder, name: str) -> None:
    check(found(name, 4), one_process(name), CASES[name])


@pytest.mark.parametrize("name", slow_but(EXACT))
def test_with_zero_every_bit_is_that_without(found: Finder, name: str) -> None:
    assert found(name, 2)


@pytest.mark.slow
def test_an_overflow_on_one_rank_skips_the_step_on_all(found: Finder) -> None:
    plain, divided = found(OVERFLOW, 2)
    assert 0 < plain["skipped"] == divided["skipped"] < STEPS
    for ours, loss in zip(divided["losses"], plain["losses"], strict=True):
        assert abs(ours - loss) <= 2**-9 * loss


@pytest.mark.slow
def test_a_mean_of_bfloat16_gradients_is_rounded_once(found: Finder) -> None:
    """Plain PyTorch adds float32 gradients under autocast; here the ranks' own are of bfloat16, and their mean need
    not lose more than the rounding to it, half of the last of its eight places."""
    gradients, means = zip(*found(AVERAGED, 4), strict=True)
    exact = torch.stack(gradients).double().mean(0)
    for mean in means:
        assert ((mean.double() - exact).abs() <= 2**-8 * exact.abs()).all()


# Bytes per float32 parameter: the weights that compute, AdamW's moments, and on the host what gradients land in.
WEIGHTS, MOMENTS, LANDED = 4, 8, 4
BYTES = {
    ("our optimizer", 1): WEIGHTS + MOMENTS,
    ("our optimizer, clipped", 1): WEIGHTS + MOMENTS + LANDED,
    ("zero 1", 1): WEIGHTS + MOMENTS / 2,
    ("zero 2, tied weights", 1): WEIGHTS + MOMENTS / 2,
    ("zero 3", 1): (WEIGHTS + MOMENTS) / 2,
    ("zero 2, on the host, clipped", 1): (WEIGHTS + MOMENTS + LANDED) / 2,
    ("zero 3", 2): (WEIGHTS + MOMENTS) / 4,
    ("zero 2, on the host, clipped", 2): (WEIGHTS + MOMENTS + LANDED) / 4,
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "times"), BYTES)
def test_a_rank_keeps_its_share_of_the_training_state(found: Finder, name: str, times: int) -> None:
    parameters = sum(p.numel() for p in CASES[name].case.seeded().parameters())
    for _, _, num_bytes in found(name, 2 * times)["ranks"]:
        assert num_bytes == pytest.approx(BYTES[name, times] * parameters, rel=0.1), "but for padding"
