"""Options: every mistake is answered before anything is captured, with what would have been right."""

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import geminifx
import pytest
import torch
from geminifx.compiler.options import Options
from geminifx.runtime.isa.errors import ArgumentError
from torch import nn
from zoo import MLP, OPT, compiled, opt, tokens

pytestmark = pytest.mark.usefixtures("shared")

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"device_budget": "24 potatoes"}, "unknown unit 'potatoes'"),
    ({"device_budget": "plenty"}, "cannot read 'plenty'"),
    ({"device_budget": 0}, "at least one byte"),
    ({"device_budget": "0GB"}, "at least one byte"),
    ({"device_budget": -1}, "at least one byte"),
    ({"device_budget": "-24GB"}, "at least one byte"),
    ({"device_budget": "101%"}, "more than the memory that exists"),
    ({"device_budget": float("inf")}, "cannot be inf"),
    ({"device_budget": True}, "is not an amount of memory"),
    ({"host_budget": "3 bananas"}, "unknown unit 'bananas'"),
    ({"placement": "gpu"}, "placement='gpu'; expected one of 'cuda', 'cpu', 'auto'"),
    ({"placement": "atuo"}, "did you mean 'auto'"),
    ({"precision": "bf-16"}, "did you mean 'bf16'"),
    ({"precision": "int4"}, "expected one of"),
    ({"outputs": "losses"}, "did you mean 'loss'"),
    ({"recompute": "al"}, "did you mean 'all'"),
    ({"device": "tpu"}, "device='tpu'; expected one of"),
    ({"placment": "cpu"}, "no option 'placment'; did you mean 'placement'"),
    ({"zzz": 1}, "no option 'zzz'; the options are device_budget"),
    ({"world_size": 0}, "expected a number of processes, 1 or more"),
    ({"parallel": {"date": 2}}, "parallel has 'date'; did you mean 'data'"),
    ({"timeout_s": 0}, "timeout_s=0; expected a positive number of seconds"),
    ({"reduce_dtype": "bf16"}, "reduce_dtype='bf16'; expected one of 'fp32', 'compute'"),
    ({"reduce_dtype": "float32"}, "did you mean 'fp32'"),
    ({"parallel": {"data": 0}}, "data is 0; expected a whole number of processes"),
    ({"parallel": {"data": 2, "zero": 4}}, "zero is 4; expected 0, 1, 2 or 3"),
    ({"parallel": {"tensor": {"size": 4}}}, "tensor has no mode"),
    ({"parallel": {"tensor": {"mode": "2.5"}}}, "the mode '2.5' is unknown; did you mean '2.5d'"),
    ({"parallel": {"tensor": "2d:6"}}, "a square of processes; size=6 is not"),
    ({"parallel": {"tensor": {"mode": "2.5d", "size": 6, "depth": 2}}}, "2 square(s)"),
    ({"parallel": {"tensor": "3d:4"}}, "a cube of processes"),
    ({"parallel": {"tensor": {"mode": "2d", "size": 4, "depth": 2}}}, "only the mode '2.5d' has a depth"),
    ({"parallel": {"tensor": {"mode": "2d", "size": 4, "sequence": True}}}, "only the mode '1d'"),
    ({"world_size": 8, "parallel": {"data": 3, "tensor": "1d:2"}}, "is 6 processes, but the world has 8"),
    (
        {"passes": (print,)},
        "passes=(<built-in function print>,); expected functions decorated with @geminifx.graph_pass",
    ),
    ({"config": "no/such/file.toml"}, "there is no such file"),
]


@pytest.mark.parametrize("options, answer", MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_answered(options: dict[str, Any], answer: str) -> None:
    model = MLP.seeded()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(ValueError) as refused:
        geminifx.compile(model, **options)
    assert answer in str(refused.value)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


NUMBERS = (
    "device_budget", "host_budget", "world_size", "microbatches", "rounds", "optimizer_state_bytes", "timeout_s",
)  # fmt: skip


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", NUMBERS)
def test_true_and_false_are_no_numbers(name: str, given: bool) -> None:
    with pytest.raises(ArgumentError, match=rf"^{name}.*{given}.*; expected "):
        Options.of({name: given})


@pytest.mark.parametrize(
    "parallel",
    [{"data": True}, {"zero": True}, {"pipeline": True}, {"pipeline": {"ranks": 2, "stages": True}},
     {"tensor": {"mode": "1d", "size": True}}, {"tensor": {"mode": "2.5d", "size": 8, "depth": True}}],
    ids=str,
)  # fmt: skip
def test_true_is_no_degree(parallel: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="True"):
        Options.of({"parallel": parallel})


def test_every_option_that_defaults_to_a_number_is_among_these() -> None:
    numeric = {f.name for f in fields(Options) if type(f.default) in (int, float)}
    assert numeric <= set(NUMBERS)


def test_cuda_without_cuda_is_refused() -> None:
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        geminifx.compile(MLP.seeded(), device="cuda")


def test_blocks_to_recompute_must_exist() -> None:
    with pytest.raises(ValueError, match=r"'layers\.9', which is not a block; the blocks are model\.decoder\.layers"):
        compiled(OPT, recompute=("layers.9",))


def test_degrees_of_one_are_accepted() -> None:
    assert Options.of({"world_size": 1, "parallel": {"data": 1, "tensor": "1d:1"}}).world_size == 1


def config(folder: Path, text: str) -> Path:
    path = folder / "geminifx.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_config_file_gives_options_and_arguments_take_precedence(tmp_path: Path) -> None:
    path = config(
        tmp_path,
        'device_budget = "1MB"\nplacement = "cpu"\nprecision = "bf16"\nrecompute = ["0", "1"]\n[parallel]\ndata = 1\n',
    )
    options = Options.of({"config": path, "placement": "auto", "device_budget": None})
    assert (options.device_budget, options.placement, options.precision) == ("1MB", "auto", "bf16")
    assert options.recompute == ("0", "1") and options.parallel == {"data": 1}
    model = compiled(MLP, config=path)
    assert (model.plan.request.policy, model.plan.request.budget_bytes) == ("cpu", 10**6)
    assert model.plan.recompute == ("0", "1")


@pytest.mark.parametrize(
    "text, answer",
    [
        ("placement = ", "is not TOML"),
        ('placment = "cpu"', "did you mean 'placement'"),
        ('placement = "gpu"', "expected one of"),
        ('device_budget = "24 potatoes"', "potatoes"),
    ],
)
def test_mistakes_in_a_config_file(tmp_path: Path, text: str, answer: str) -> None:
    with pytest.raises(ValueError, match=answer):
        geminifx.compile(MLP.seeded(), config=config(tmp_path, text))


def test_a_config_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "geminifx.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not TOML"):
        geminifx.compile(MLP.seeded(), config=path)


@pytest.mark.parametrize(
    ("examples", "says"),
    [
        ((), "example_inputs: missing a required argument: 'input'; expected the arguments of Linear.forward"),
        ({"nope": torch.ones(2, 4)}, "example_inputs: missing a required argument: 'input'"),
        ((torch.ones(2, 5),), "example_inputs: Linear.forward raised RuntimeError with them: "),
        (("x",), "example_inputs: Linear.forward raised TypeError with them: "),
        (torch.ones(2, 4), "example_inputs=tensor(.*; expected the model's arguments"),
    ],
)
def test_example_inputs_that_the_model_does_not_take(examples: Any, says: str) -> None:
    model = nn.Linear(4, 2)
    with pytest.raises(ArgumentError, match=re.escape(says).replace(re.escape(".*"), ".*")) as told:
        geminifx.compile(model, example_inputs=examples)
    assert (told.value.__cause__ is not None) == ("raised" in says)
    assert any("load it with attn_implementation=" in note for note in getattr(told.value, "__notes__", ())) == (
        "TypeError" in says
    )
    geminifx.compile(model, example_inputs=(torch.ones(2, 4),))(torch.ones(2, 4)).sum().backward()


def test_only_who_gave_no_batch_is_told_to_give_one() -> None:
    for options in ({}, {"example_inputs": tokens()}):
        with pytest.raises(geminifx.BudgetError, match=r"too small.*A smaller batch or sequence needs less") as told:
            geminifx.compile(opt(), device_budget=1000, **options).plan  # noqa: B018
        assert told.value.smallest_bytes is not None
        assert ("these inputs are a guess: pass the batch you train on" in str(told.value)) == (not options)


@pytest.mark.parametrize("function", [geminifx.compile, geminifx.from_pretrained])
def test_help_shows_every_option(function: Any) -> None:
    shown = inspect.signature(function).parameters
    assert {field.name for field in fields(Options)} <= set(shown)
    assert shown["placement"].default == "auto" and shown["plan"].kind is inspect.Parameter.KEYWORD_ONLY
    assert all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in shown.values())
