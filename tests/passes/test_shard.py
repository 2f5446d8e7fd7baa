"""shard: one rank's program of its parts, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.program import note, type_of
from geminifx.passes.program.text import parse_program
from geminifx.passes.shard import shard
from geminifx.passes.sharding.parameters import whole_parameters
from geminifx.runtime.isa.errors import ShardingError
from sharding import Whole, check, declared, plan_for, sharded, sharded_step, whole_step
from zoo import GPT2, LLAMA, OPT, Case, opt, tokens

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize(
    ("case", "parallel"),
    [
        ("two_linears", declared("1d", 2)),
        ("one_linear", declared("2d", 4)),
        ("vocabulary", declared("1d", 2)),
        ("dropout", declared("1d", 2)),
    ],
)
def test_before_and_after(golden, case, parallel):
    golden(case, shard, plan_for(parallel))


def test_alone_nothing_changes(captured, same):
    program, _ = captured
    before = program.copy()
    shard.rewrite(program, Plan())
    same(program, before)


@pytest.mark.parametrize(
    ("case", "parallel"),
    [
        ("two_linears", declared("1d", 4)),
        ("two_linears", declared("2d", 4)),
        ("two_linears", declared("3d", 8)),
        ("one_linear", declared("2d", 4)),
        ("one_linear", declared("2.5d", 8, depth=2)),
        ("vocabulary", declared("1d", 2)),
        ("vocabulary", declared("2d", 4)),
    ],
)
def test_all_ranks_compute_what_the_whole_does(case: str, parallel: dict[str, Any]) -> None:
    text = (GOLDEN / f"shard_{case}.py").read_text(encoding="utf-8")
    whole = parse_program("def before" + text.split("def before")[1].split("\n\ndef after")[0])
    generator, values = torch.Generator().manual_seed(0), {}
    for node in whole.placeholders:
        shape, is_index = type_of(node).shape, type_of(node).dtype == torch.int64
        made = torch.randint(0, 8, shape, generator=generator) if is_index else torch.randn(shape, generator=generator)
        values[note(node).role] = made
    if case == "vocabulary":
        values["input:1"][2] = -100
    check(sharded(Whole(whole, values), parallel))


# -- parameters --------------------------------------------------------------------------------------------


def placements(case: Case, parallel: dict[str, Any]) -> dict[str, str]:
    program = whole_step(case).shard(plan_for(parallel))
    return {name: note(node).placement for name, node in program.inputs("parameter").items()}


def test_parameters_lie_as_what_they_do() -> None:
    found = placements(OPT, declared("2.5d", 8, depth=2))
    layer = "model.decoder.layers.0."
    assert found["model.decoder.embed_tokens.weight"] == "row=S1 col=S0"
    assert found["model.decoder.embed_positions.weight"] == "col=S1"
    assert found[layer + "self_attn.q_proj.weight"] == found[layer + "fc2.weight"] == "row=S1 col=S0"
    assert found[layer + "self_attn.q_proj.bias"] == found[layer + "self_attn_layer_norm.weight"] == "col=S0"
    found = placements(OPT, declared("1d", 2))
    assert found[layer + "self_attn.q_proj.weight"] == found[layer + "fc1.weight"] == "tp=S0"
    assert found[layer + "self_attn.out_proj.weight"] == found[layer + "fc2.weight"] == "tp=S1"
    assert found[layer + "fc1.bias"] == "tp=S0" and found[layer + "fc2.bias"] == "R"
    found = placements(OPT, declared("3d", 8))
    assert found[layer + "fc1.weight"] == "b=S0 c=S1" and found[layer + "fc2.weight"] == "b=S1 c=S0"
    found = placements(GPT2, declared("1d", 2))
    layer = "transformer.h.0."
    assert found[layer + "attn.c_attn.weight"] == "tp=S1/3" and found[layer + "attn.c_attn.bias"] == "tp=S0/3"
    assert found[layer + "mlp.c_proj.weight"] == "tp=S0"


def test_the_users_table_is_honoured() -> None:
    table = {r".*layers\.1\.fc.\.weight": "R", r".*layers\.0\.fc1\.weight": "tp=S1"}
    parallel = declared("1d", 2, table=table)
    found = placements(OPT, parallel)
    assert found["model.decoder.layers.1.fc1.weight"] == found["model.decoder.layers.1.fc2.weight"] == "R"
    assert found["model.decoder.layers.0.fc1.weight"] == "tp=S1"
    check(sharded_step(OPT, parallel))


def test_what_does_not_divide_stays_whole_and_is_told() -> None:
    case = Case("odd", lambda: opt(ffn_dim=65, vocab_size=63), lambda **_: tokens(batch=8, length=8))
    step = whole_step(case)
    notes = whole_parameters(step.program, plan_for(declared("1d", 2)))
    assert "model.decoder.embed_tokens.weight [63, 32] stays replicated on tp: 63 is not divisible by 2" in notes
    assert "model.decoder.layers.0.fc1.weight [65, 32] stays replicated on tp: 65 is not divisible by 2" in notes
    assert whole_parameters(whole_step(OPT).program, plan_for(declared("1d", 2))) == ()


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "parallel", "message"),
    [
        (
            LLAMA,
            declared("1d", 4),
            r"self_attn: a hidden dimension of 16, .* over the 4 ranks of axis tp, .* \[8, 8, 2, 8\]",
        ),
        (
            OPT,
            declared("1d", 8),
            r"a hidden dimension of 32, .* \[8, 8, 4, 8\], whose number of heads is not divisible by 8",
        ),
        (
            OPT,
            declared("2.5d", 32, depth=8),
            r"a batch of 8 example\(s\) does not divide evenly over depth 8 x row 2 ranks; .* multiple of 16",
        ),
    ],
)
def test_what_does_not_divide_is_refused_with_its_numbers(case: Case, parallel: dict, message: str) -> None:
    with pytest.raises(ShardingError, match=message):
        whole_step(case).shard(plan_for(parallel))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"lm_haed.*": "R"}, "the table's pattern 'lm_haed.*' matches no parameter, such as model.decoder"),
        ({".*fc1.weight": "row=S0"}, "names the axis 'row'; the axes are tp"),
        ({".*fc1.bias": "tp=S1"}, r"the table has S1 for .*fc1.bias \[64\], which has no dimension 1"),
        ({".*fc1.bias": "tp=B"}, "'B' is not a placement; expected R, P, or S and a dimension"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(table: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whole_step(OPT).shard(plan_for(declared("1d", 2, table=table)))


def test_a_table_that_shards_weights_along_replicas_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"S0 for .*fc1.bias on depth, an axis along which all .* the same weights; leave that"
    ):
        whole_step(OPT).shard(plan_for(declared("2.5d", 8, depth=2, table={".*fc1.bias": "depth=S0"})))


def test_a_table_that_does_not_divide_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"shards dimension 0 of .*fc1.bias \[64\] over 3 ranks, and its size is not divisible"
    ):
        whole_step(OPT).shard(plan_for(declared("1d", 3, table={".*fc1.bias": "tp=S0"})))
