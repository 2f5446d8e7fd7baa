"""compare: every mode that a world has a mesh for, planned on one process."""

from pathlib import Path

import geminifx
import pytest
import torch
from geminifx.compiler.cli.compare import compare_ways, ways
from geminifx.compiler.cli.main import app
from geminifx.models.presets import load_model
from typer.testing import CliRunner
from zoo import OPT, compiled, opt, tokens


@pytest.mark.parametrize(
    "world, modes",
    [
        (2, ["data", "data, ZeRO 3", "1d", "1d, sequence"]),
        (4, ["data", "data, ZeRO 3", "1d", "1d, sequence", "2d"]),
        (8, ["data", "data, ZeRO 3", "1d", "1d, sequence", "2.5d, depth 2", "3d"]),
        (64, ["data", "data, ZeRO 3", "1d", "1d, sequence", "2d", "2.5d, depth 4", "2.5d, depth 16", "3d"]),
    ],
)
def test_ways_to_divide_the_work(world: int, modes: list[str]) -> None:
    assert list(ways(world)) == modes


@pytest.mark.slow
def test_every_way_is_planned_or_says_why_not() -> None:
    found = {way.name: way for way in compare_ways(opt(), 8, tokens(batch=8), recompute="none")}
    planned = {name: way.plan for name, way in found.items() if way.plan is not None}
    assert set(found) - set(planned) == {"1d", "1d, sequence"}, "four heads do not divide by eight"
    assert "number of heads is not divisible by 8" in found["1d"].refusal
    assert planned["data"].peak_bytes > planned["data, ZeRO 3"].peak_bytes
    assert {collective.axis for collective in planned["2.5d, depth 2"].estimate.collectives} == {"depth", "row", "col"}


def test_what_data_parallelism_exchanges_is_every_gradient_twice() -> None:
    plan = compiled(OPT, world_size=4).plan
    gradients = sum(chunk.compute_bytes for chunk in plan.layout.chunks)
    reduced = max(plan.estimate.collectives, key=lambda collective: collective.received_bytes)
    assert reduced.axis == "data" and reduced.collective == "all-reduce"
    assert 0 <= reduced.received_bytes - 2 * gradients * 3 // 4 <= 64, "the loss and the number of tokens besides"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "collective", "often"), [(0, "all-reduce", 2), (1, "reduce-scatter", 1), (2, "reduce-scatter", 1)]
)
def test_gradients_of_16_bits_are_exchanged_as_float32_unless_that_is_not_wanted(
    zero: int, collective: str, often: int
) -> None:
    received, options = [], {"world_size": 4, "parallel": {"zero": zero}, "precision": "bf16"}
    for asked in ({}, {"reduce_dtype": "compute"}):
        model = compiled(OPT, **options, **asked)
        model.optimizer(torch.optim.AdamW, lr=1e-3)
        plan = model.plan
        gradients = sum(chunk.compute_bytes for chunk in plan.layout.chunks) * (1 if asked else 2)
        found = max(
            (e for e in plan.estimate.collectives if e.collective == collective), key=lambda e: e.received_bytes
        )
        assert 0 <= found.received_bytes - often * gradients * 3 // 4 <= 64
        assert ("added up in the dtype they are computed in" if asked else "added up in float32") in str(plan)
        assert geminifx.Plan.from_json(plan.to_json()) == plan
        received.append(found.received_bytes)
    assert received[0] == pytest.approx(2 * received[1], abs=64)


def test_over_the_depth_every_gradient_is_exchanged_twice_too() -> None:
    parallel = {"tensor": {"mode": "2.5d", "size": 8, "depth": 2}}
    plan = geminifx.compile(opt(), parallel=parallel, world_size=8, example_inputs=tokens(batch=4)).plan
    gradients = sum(chunk.compute_bytes for chunk in plan.layout.chunks)
    reduced = max(
        (e for e in plan.estimate.collectives if e.axis == "depth"), key=lambda collective: collective.received_bytes
    )
    assert reduced.collective == "all-reduce"
    assert 0 <= reduced.received_bytes - 2 * gradients * 1 // 2 <= 64, "the loss and the number of tokens besides"


def test_depth_and_data_are_one_where_weights_are_shared_out() -> None:
    parallel = {"data": 2, "zero": 3, "tensor": {"mode": "2.5d", "size": 8, "depth": 2}}
    model = geminifx.compile(opt(), parallel=parallel, world_size=16, example_inputs=tokens(batch=4))
    model.optimizer(torch.optim.AdamW, lr=1e-3)
    plan = model.plan
    assert {chunk.shards for chunk in plan.layout.chunks} == {4} and "ZeRO" in str(plan)
    assert "stage 3, over data x depth" in str(plan)
    found = {e.collective for e in plan.estimate.collectives if e.axis == "data x depth"}
    assert found == {"all-gather", "reduce-scatter"}


@pytest.mark.slow
def test_the_command_shows_a_table() -> None:
    arguments = ["compare", "opt-mini", "--world-size", "4", "--batch-size", "4", "--seq-len", "16"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "4 processes" in result.output and "row " in result.output and "2d" in result.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["empty"], "the directory empty has no config.json"),
        (["opt-mini", "--seq-len", "100000"], "--seq-len 100000 is longer than the 256 positions of the model"),
        (["opt-mini", "--recompute", "some"], "recompute='some'; expected one of 'auto', 'none', 'all'"),
        (["opt-mini", "--device-budget", "x"], "device_budget: cannot read 'x'"),
    ],
)
def test_errors_are_one_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    result = CliRunner().invoke(app, ["compare", *words], env={"COLUMNS": "200"})
    assert result.exit_code == 2 and says in result.output and "Traceback" not in result.output


@pytest.mark.slow
def test_a_directory_is_compared_without_its_weights_and_for_any_batch(tmp_path: Path) -> None:
    load_model("opt-mini").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    words = ["compare", str(tmp_path), "--world-size", "2", "--seq-len", "16", "--recompute", "none"]
    small, large = (CliRunner().invoke(app, [*words, "--batch-size", size]) for size in ("2", "2000000"))
    assert small.exit_code == large.exit_code == 0, large.output
    assert "MB" in small.output and "GB" in large.output
