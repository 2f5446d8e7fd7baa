"""What the ranks say when one of them goes wrong: each ends with an error that names the rank."""

import json
import re
from pathlib import Path

import geminifx
import pytest
import torch
from geminifx.runtime.isa.errors import StateError
from launching import ranks_of
from torch import nn

SCRIPT = Path(__file__).parent / "faults.py"


FAULTLESS = (
    "none",
    "all judge",
    "staged",
    "drawn",
    "read",
    "saved where rank 0 sees room",
    "declared",
    "declared by all",
)
TOGETHER = pytest.mark.xdist_group("faults")  # they share what the processes said
Said = dict[str, tuple[str, str]]


def said_by(*arguments: str, codes: tuple[int, int]) -> list[Said]:
    """Per rank, fault -> (error, message)."""
    ended = ranks_of(SCRIPT, *arguments)
    assert tuple(code for code, _ in ended) == codes
    lines = [[json.loads(line) for line in output.splitlines() if line.startswith("[")] for _, output in ended]
    return [{fault: (error, message) for fault, error, message in rank} for rank in lines]


@pytest.fixture(scope="module")
def said() -> list[Said]:
    return said_by(codes=(0, 7))


@pytest.mark.slow
@TOGETHER
def test_without_a_fault_nothing_is_raised(said) -> None:
    assert [rank[name] for rank in said for name in FAULTLESS] == [("", "")] * 2 * len(FAULTLESS)


@pytest.mark.slow
@TOGETHER
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("world", "ValueError", "world_size=3, but 2 processes were launched"),
        ("models", "StateError", "rank(s) 1 differs from that of rank 0"),
        ("shared", "StateError", "rank(s) 1 called the model with a different batch from the ranks that they shard"),
        (
            "shared later",
            "StateError",
            "rank(s) 1 called the model with a different batch from the ranks that they shard",
        ),
        ("staged, shared later", "StateError", "rank(s) 1 called the model with a different batch from the ranks that"),
        ("staged, of another shape", "StateError", "a training step of the model ([0] float32[4, 4]; "),
        ("sharded", "StateError", "a training step of the model ([0] float32[3, 4]; "),
        ("evaluates alone", "StateError", "an evaluation of the model ([0] float32[2, 4]; "),
        (
            "judges alone",
            "StateError",
            "rank 0: the forward of a training step after 0 update(s); rank 1: an evaluation.",
        ),
        (
            "drawn from other seeds",
            "StateError",
            "what gives the weights values, a seed or files, of rank(s) 1 differs",
        ),
        ("other files", "StateError", "what gives the weights values, a seed or files, of rank(s) 1 differs from that"),
        ("other chances", "StateError", "model.optimizer(...), with its seed and options, of rank(s) 1 differs from"),
        ("other chances later", "StateError", "model.optimizer(...), with its seed and options, of rank(s) 1 differs"),
        ("other rates", "StateError", "model.optimizer(...), with its seed and options, of rank(s) 1 differs from"),
        ("declared by none", "StateError", "zero=2 divides only the training state of model.optimizer(...)"),
        ("declared by one", "StateError", "zero=2 divides only the training state of model.optimizer(...)"),
        ("an update less", "StateError", "rank 1: the forward of a training step after 0 update(s). All ranks must"),
    ],
)
def test_every_rank_is_told(said, fault: str, error: str, message: str) -> None:
    for rank in said:
        found, text = rank[fault]
        assert found == error and message in text


@pytest.mark.slow
@TOGETHER
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("cannot be drawn", "OSError", "there is no room"),
        ("damaged files", "CheckpointError", "model.safetensors, "),
        ("files damaged later", "CheckpointError", "model.safetensors, "),
    ],
)
def test_what_fails_on_one_rank_is_told_on_the_others(said, fault: str, error: str, message: str) -> None:
    (others, told), (own, text) = (rank[fault] for rank in said)
    assert own == error and message in text
    assert others == "StateError" and told == f"rank 1 failed with {error}: {text}"


@pytest.mark.slow
@TOGETHER
@pytest.mark.parametrize("fault", ["no room for buffers", "no room for weights"])
def test_memory_that_one_rank_lacks_for_its_values_is_an_error_of_all(said, fault: str) -> None:
    (others, told), (own, text) = (rank[fault] for rank in said)
    assert own == others == "BudgetError" and told == f"rank 1 failed with {own}: {text}"


@pytest.mark.slow
@TOGETHER
def test_rank_0_alone_looks_at_what_a_save_replaces(said) -> None:
    (own, text), (others, told) = (rank["saved where rank 0 sees none"] for rank in said)
    assert own == "CheckpointError" and "contains files that are not a checkpoint" in text
    assert others == "StateError" and told == f"rank 0 failed with CheckpointError: {text}"


@pytest.mark.slow
@TOGETHER
@pytest.mark.parametrize(
    ("when", "gradient"),
    [("at once", 1.5), ("later", 2 + 1.5), ("than examples", 1.5), (", zero 2", 2 + 1.5)],
)
def test_ranks_with_data_of_their_own_may_have_batches_of_any_shape(said, when: str, gradient: float) -> None:
    """A shorter last batch, as loaders without drop_last make it: gradients are the mean of the ranks'."""
    for rank in said:
        assert rank[f"shorter{when}" if when[0] == "," else f"shorter {when}"] == ("", str(gradient))


@pytest.mark.slow
@TOGETHER
def test_the_death_of_a_rank_ends_the_others(said) -> None:
    assert "death" not in said[1]
    found, text = said[0]["death"]
    assert (
        found == "StateError"
        and "rank 0 of 2 lost rank(s) 1 in all_gather (the backward of a training step after 1 update(s)), in step 2"
        in text
        and "last checkpoint" in text
    )


@pytest.mark.slow
def test_a_death_between_forward_and_backward_ends_a_pipeline() -> None:
    first, second = said_by("staged", codes=(0, 7))
    assert not second and first["death"][0] == "StateError"
    assert "rank 0 of 2 lost rank(s) 1 in " in first["death"][1]
    # What the dead one sent last may not have left it.
    half = r"\(the (forward|backward) of a training step after 1 update\(s\)\), in step 2: which ended"
    assert re.search(half, first["death"][1])


@pytest.mark.slow
def test_all_of_a_pipeline_tell_who_has_died_wherever_they_stand() -> None:
    """The ranks next to it lose it first, and the others lose these."""
    ended = ranks_of(SCRIPT.parent / "chain.py", ranks=5)
    assert [code for code, _ in ended] == [0, 0, 7, 0, 0]
    for rank, (code, output) in enumerate(ended):
        other_schedule, other_call, *death = map(json.loads, output.splitlines())
        assert "run different programs, which would exchange different data in the forward" in other_schedule
        assert "rank 0: an evaluation; rank 1: a forward" in other_call
        assert len(death) == (code == 0)
        for told in death:
            assert f"rank {rank} of 5 lost rank(s) 2 in " in told and "in step 3: which ended" in told


def test_alone_a_model_for_several_ranks_is_compiled_and_refuses_to_step() -> None:
    x = torch.ones(2, 4)
    model = geminifx.compile(nn.Linear(4, 4), parallel={"data": 8}, example_inputs=(x,))
    assert model.plan.batches == 8 and "data 8" in str(model.plan) and "training" in model.graph
    with pytest.raises(StateError, match="torchrun --nproc-per-node 8"):
        model(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel": {"tensor": 2}}, "expected a mode and a size"),
        ({"parallel": {"data": 0}}, "whole number"),
        ({"world_size": 0}, "1 or more"),
        ({"world_size": 4, "parallel": {"data": 8}}, "must be the size of the world"),
    ],
)
def test_degrees_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        geminifx.compile(nn.Linear(2, 2), **options)
