"""Two real processes, each with half of the batch, train as one process with all of it."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import torchrun

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from nearness import check  # noqa: E402
from worker import CASES, EXACT, IN_FOURS, ROWS, STEPS, Trained, train  # noqa: E402

pytestmark = pytest.mark.xdist_group("data parallel")  # they share what the processes found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("ranks") / "found.pt"
    done = torchrun(HERE / "worker.py", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.fixture(scope="module")
def found_by_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("ranks") / "found.pt"
    done = torchrun(HERE / "worker.py", str(out), *IN_FOURS, ranks=4)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


_alone: dict[str, Trained] = {}


def one_process(name: str) -> Trained:
    """What one process finds; cases that are alike there share it."""
    training = CASES[name].alone()
    if repr(training) not in _alone:
        _alone[repr(training)] = train(training, slice(0, ROWS))
    return _alone[repr(training)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process(found: dict[str, Any], name: str) -> None:
    check(found[name], one_process(name), CASES[name])


@pytest.mark.parametrize("name", IN_FOURS)
def test_four_ranks_train_as_one_process(found_by_four: dict[str, Any], name: str) -> None:
    check(found_by_four[name], one_process(name), CASES[name])


@pytest.mark.parametrize("name", EXACT)
def test_with_zero_every_bit_is_that_without(found: dict[str, Any], name: str) -> None:
    assert found[name]


def test_an_overflow_on_one_rank_skips_the_step_on_all(found: dict[str, Any]) -> None:
    plain, divided = found["overflow"]
    assert 0 < plain["skipped"] == divided["skipped"] < STEPS
    for ours, loss in zip(divided["losses"], plain["losses"], strict=True):
        assert abs(ours - loss) <= 2**-9 * loss


@pytest.mark.xfail(strict=True, reason="sums of bfloat16 gradients are rounded after every term")
def test_a_mean_of_bfloat16_gradients_is_rounded_once(found_by_four: dict[str, Any]) -> None:
    """Plain PyTorch adds float32 gradients under autocast; here the ranks' own are of bfloat16, and their mean need
    not lose more than the rounding to it, half of a bit in the last of eight places."""
    gradients, means = zip(*found_by_four["averaged"], strict=True)
    exact = torch.stack(gradients).double().mean(0)
    for mean in means:
        assert ((mean.double() - exact).abs() <= 2**-9 * exact.abs()).all()


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


@pytest.mark.parametrize(("name", "times"), BYTES)
def test_a_rank_keeps_its_share_of_the_training_state(
    found: dict[str, Any], found_by_four: dict[str, Any], name: str, times: int
) -> None:
    parameters = sum(p.numel() for p in CASES[name].case.seeded().parameters())
    for _, _, num_bytes in (found if times == 1 else found_by_four)[name]["ranks"]:
        assert num_bytes == pytest.approx(BYTES[name, times] * parameters, rel=0.1), "but for padding"
