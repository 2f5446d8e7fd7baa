"""shard: whole models. All ranks together find the loss, the gradients and the logits of the unsharded program."""

from math import prod

import pytest
from all_ranks import assemble, placements_of
from geminifx.passes.program.program import type_of
from geminifx.runtime.isa.instructions import ALL_GATHER, ALL_REDUCE
from geminifx.runtime.isa.linear_cross_entropy import ABSENT
from more_models import LLAMA_OF_FOUR, MORE
from sharding import check, declared, sharded, sharded_step, whole_step
from zoo import GPT2, LLAMA, OPT, Case, gpt2

MODES = {
    "1d x 2": declared("1d", 2),
    "1d x 4, sequence": declared("1d", 4, sequence=True),
    "2d x 4": declared("2d", 4),
    "2.5d x 8, depth 2": declared("2.5d", 8, depth=2),
    "2.5d x 4, depth 1": declared("2.5d", 4),
    "3d x 8": declared("3d", 8),
}
CASES = {"opt": OPT, "llama": LLAMA_OF_FOUR, "gpt2": GPT2}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_the_whole(name: str, mode: str) -> None:
    found = sharded_step(CASES[name], MODES[mode])
    check(found)
    assert [r for r in found.program.results if r.startswith("output")] == ["output:0", "output:1"]


@pytest.mark.parametrize("mode", ["1d x 2", "2d x 4", "2.5d x 8, depth 2", "3d x 8"])
def test_grouped_heads_are_shared_by_as_many_ranks_as_there_are(mode: str) -> None:
    check(sharded_step(LLAMA, MODES[mode]))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["1d x 2", pytest.param("2.5d x 4, depth 1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", MORE, ids=[case.name for case in MORE])
def test_other_families_too(case: Case, mode: str) -> None:
    check(sharded_step(case, MODES[mode]))


@pytest.mark.parametrize("mode", ["1d x 4, sequence", "2.5d x 8, depth 2", "3d x 8"])
@pytest.mark.parametrize("name", CASES)
def test_evaluation_gives_whole_logits(name: str, mode: str) -> None:
    found = sharded_step(CASES[name], MODES[mode], training=False)
    check(found)
    assert found.found["output:1"][0].shape == (8, 8, 64)
    assert not found.program.calls(ABSENT)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_as_large_as_the_logits_is_put_together_in_training(mode: str) -> None:
    found = sharded_step(OPT, MODES[mode])
    assert found.program.results["output:1"].target is ABSENT
    for collective in (*found.program.calls(ALL_GATHER), *found.program.calls(ALL_REDUCE)):
        assert prod(type_of(collective).shape) < found.expected["output:1"].numel()


@pytest.mark.parametrize("mode", ["1d x 2", "2d x 4", "3d x 8"])
def test_outputs_that_are_asked_for_come_back_whole_from_training_too(mode: str) -> None:
    found = sharded(whole_step(OPT), MODES[mode], outputs="all")
    check(found)
    assert list(found.program.inputs("tangent")) == ["0"] and not found.program.calls(ABSENT)
    assert {part.shape for part in found.found["output:1"]} == {found.expected["output:1"].shape}


DROPPING = Case("gpt2 with dropout", lambda: gpt2(dropout=0.3))


@pytest.mark.parametrize("mode", ["1d x 2", "1d x 4"])
def test_of_whole_activations_ranks_drop_what_one_process_drops(mode: str) -> None:
    check(sharded_step(DROPPING, declared("1d", int(mode[-1]))))


@pytest.mark.parametrize("mode", MODES)
def test_with_dropout_replicas_stay_the_same(mode: str) -> None:
    """Parts of an activation are dropped by numbers of each rank's own: not what one process drops, but each at the
    same rate, and every replica of a gradient is of the same bits."""
    found = sharded_step(DROPPING, MODES[mode])
    axes, parameters = found.mesh.tensor_axes, found.program.inputs("parameter")
    for name, node in parameters.items():
        whole = assemble(found.found[f"gradient:{name}"], placements_of(node, found.mesh), axes)
        assert whole.shape == found.expected[f"gradient:{name}"].shape and whole.isfinite().all()
    assert len({loss.item() for loss in found.found["output:0"]}) == 1
    assert abs(found.found["output:0"][0] - found.expected["output:0"]) < 0.1
