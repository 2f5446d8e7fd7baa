"""Bad input: every wrong value of every argument, and every wrong file and option of the command line, is answered by
one error that names it; what was there before works on."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import geminifx
import pytest
import torch
from geminifx.compiler.cli.main import app
from geminifx.models.recipe.text import embedded_texts, train_tokenizer
from geminifx.runtime.isa.errors import GeminiError
from torch import nn
from torch.optim import SGD, AdamW, RMSprop
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

X = torch.ones(8, 4)
JUNK = bytes(range(256)) * 40
TINY = {
    "model_type": "opt", "vocab_size": 300, "hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "ffn_dim": 16, "max_position_embeddings": 32, "dropout": 0.0,
}  # fmt: skip


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(X).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with files of many kinds, which is the current one: nothing may be written outside."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "junk").write_bytes(JUNK)
    return tmp_path


# -- calls -------------------------------------------------------------------------------------------------

NO_PATHS: list[Any] = [3, True, [], {}, b"x", "", 1.5]
UNREADABLE = ["nope", "empty", "junk", "file", "file/below", Path("nope"), "nul\0"]
NO_BUDGETS = [
    True,
    [1],
    {},
    b"1GB",
    object(),
    float("nan"),
    float("inf"),
    -1,
    0,
    0.5,
    "",
    "x",
    "1 potato",
    "101%",
    "-1GB",
    1j,
]


def tensor_axes(**changes: Any) -> dict[str, Any]:
    return {"tensor": {"mode": "1d", "size": 2, **changes}}


COMPILE: dict[str, list[Any]] = {
    "device_budget": NO_BUDGETS,
    "host_budget": NO_BUDGETS,
    "world_size": ["2", 0, -1, 1.5, True, [2], {}],
    "example_inputs": [
        3, "x", X, {1: X}, {"nope": X}, (X, X, X), ("a",), (None,), [], (), {}, (torch.ones(8, 5),), (torch.ones(()),),
    ],
    "placement": ["gpu", "host", "", 3, True, [], {}, b"cpu"],
    "parallel": [
        "data=2", 3, [1], True, {1: 2}, {"dta": 2}, {"data": "2"}, {"data": 0}, {"data": 1.5}, {"data": True},
        {"zero": 4}, {"zero": "1"}, {"zero": -1}, {"zero": True}, {"zero": 1.0}, {"tensor": 3}, {"tensor": "1d"},
        {"tensor": "1d:x"}, {"tensor": "9d:2"}, {"tensor": {"size": 2}}, tensor_axes(mode="4d"), tensor_axes(mode=[]),
        tensor_axes(mode=2), tensor_axes(size="2"), tensor_axes(size=0), tensor_axes(mode="2d"), tensor_axes(depth=2),
        tensor_axes(sequence="no"), tensor_axes(sequence=1), tensor_axes(table=3), tensor_axes(table=[1]),
        tensor_axes(table={1: 2}), tensor_axes(table={"(": "tp=S0"}), tensor_axes(table={"x": "tp=S0"}),
        tensor_axes(table={"0.weight": "zz"}), tensor_axes(table={"0.weight": "tp=S7"}), tensor_axes(nope=1),
    ],
    "precision": ["int4", "float16", "", 3, True, torch.float32, [], {}],
    "reduce_dtype": ["x", "bf16", "", 3, True, torch.float32, [], {}],
    "recompute": ["some", "", 3, True, [3], (None,), ["nope"], {"a": 1}, object()],
    "fuse_loss": ["yes", "", 3, 1, 0, [], {}],
    "outputs": ["x", "", 3, True, [], {}],
    "plan": [*NO_PATHS, *UNREADABLE, object()],
    "passes": [3, "x", "", [3], (None,), {"a": 1}, True, net, [net], object()],
    "optimizer_state_bytes": ["8", -1, 1.5, True, [], {}],
    "device": ["tpu", "cuda", "cuda:7", "", 3, True, torch.device("cpu"), [], {}],
    "dump": [*NO_PATHS, "file", "file/below", "nul\0"],
    "config": [*NO_PATHS, *UNREADABLE],
    "nope": [3, "x"],
    "device_bugdet": ["1GB"],
}  # fmt: skip

OPTIMIZER: dict[str, list[Any]] = {
    "kind": [3, "AdamW", None, RMSprop, AdamW([nn.Parameter(X)]), [], nn.Linear, torch.optim.Optimizer],
    "params": [
        3, "x", True, [], {}, [3], [None], nn.Parameter(X), [nn.Parameter(X)], [{"lr": 1}], [{"params": [3]}],
    ],
    "max_grad_norm": ["1", -1, 0, float("nan"), float("inf"), [], True, X],
    "in_backward": ["yes", 3, 0, [], None],
    "accumulate": ["2", 0, -1, 1.5, True, None, []],
    "lr": ["x", -1, None, [], True, X, float("nan"), float("inf")],
    "betas": [3, "ab", None, (1, 2), ("a", "b"), (0.9,), (0.9, 0.99, 0.5), (-0.1, 0.9), {}],
    "eps": ["x", -1, None, [], float("nan")],
    "weight_decay": ["x", -1, None, [], float("nan")],
    "momentum": [0.9],
    "nope": [1],
    "amsgrad": [True],
    "maximize": [True],
    "capturable": [True],
    "differentiable": [True],
}  # fmt: skip

CHECKPOINT: dict[str, list[Any]] = {
    "model": [3, "x", None, [], net(), nn.Linear],
    "optimizer": [3, "x", [], AdamW, AdamW(net().parameters())],
    "directory": [3, None, True, [], {}, b"x", "", "file", "file/below", "nul\0"],
}
SAVE = {**CHECKPOINT, "extra": [object(), net, {1: object()}, nn.Linear]}
LOAD = {**CHECKPOINT, "directory": [*CHECKPOINT["directory"], "nope", "empty", "junk"]}

OTHERS: dict[str, list[Any]] = {
    "step": [3, None, "x", []],
    "steps": ["x", 0, -1, 1.5, True, None],
    "trace": [*NO_PATHS, "empty", "file/below", "nope/below"],
    "loader": [3, None, [1], "x"],
    "after": [3, None, ["chunk"]],
    "graph_pass": [3, None, "x"],
    "max_norm": ["x", None, [], -1, float("nan"), True],
    "state_dict": [3, None, [], {}, {"state": {}}, {"state": 3, "param_groups": 4}, {"state": {}, "param_groups": [3]}],
    "path": [3, None, [], b"x", ""],
    "save_pretrained": [*NO_PATHS, "nul\0"],
}


class Calls:
    """What is called with a wrong value for one argument, and what must work behind that."""

    def __init__(self) -> None:
        self.model = geminifx.compile(net(), example_inputs=(X,))
        self.optimizer = self.model.optimizer(AdamW, lr=1e-3)
        step(self.model, self.optimizer)

    def compile(self, name: str, value: Any) -> None:
        geminifx.compile(net(), **{"example_inputs": (X,), name: value})

    def compile_model(self, _: str, value: Any) -> None:
        geminifx.compile(value)

    def make_optimizer(self, name: str, value: Any) -> None:
        """A model is left as it was where its optimizer is refused."""
        model = geminifx.compile(net(), example_inputs=(X,))
        arguments = {"kind": AdamW, "params": None, "lr": 1e-3, name: value}
        try:
            model.optimizer(arguments.pop("kind"), arguments.pop("params"), **arguments)
        finally:
            step(model, model.optimizer(SGD, lr=1e-3))

    def save(self, name: str, value: Any) -> None:
        given = {"model": self.model, "optimizer": self.optimizer, "directory": "saved", name: value}
        geminifx.save_checkpoint(**given)

    def load(self, name: str, value: Any) -> None:
        given = {"model": self.model, "optimizer": self.optimizer, "directory": "saved", name: value}
        geminifx.load_checkpoint(**given)

    def other(self, name: str, value: Any) -> None:
        calls: Mapping[str, Callable[[Any], object]] = {
            "step": self.model.profile,
            "steps": lambda steps: self.model.profile(lambda: None, steps=steps),
            "trace": lambda trace: self.model.profile(lambda: None, trace=trace),
            "loader": lambda loader: geminifx.shard_dataloader(loader, self.model),
            "after": lambda after: geminifx.graph_pass(after=after)(net),
            "graph_pass": geminifx.graph_pass(after="chunk"),
            "max_norm": self.model.clip_grad_norm_,
            "state_dict": self.optimizer.load_state_dict,
            "path": self.model.plan.save,
            "save_pretrained": self.model.save_pretrained,
        }
        calls[name](value)

    def shard(self, _: str, value: Any) -> None:
        geminifx.shard_dataloader(DataLoader([1, 2]), value)

    def set_group(self, name: str, value: Any) -> None:
        """A group that is changed to what makes no sense is told of before anything is updated."""
        group = self.optimizer.param_groups[0]
        kept, before = group[name], [p.detach().clone() for p in self.model.parameters()]
        try:
            group[name] = value
            step(self.model, self.optimizer)
        finally:
            group[name] = kept
            self.optimizer.zero_grad()
            assert all(torch.equal(p, b) for p, b in zip(self.model.parameters(), before, strict=True))

    def read_plan(self, _: str, value: Any) -> None:
        geminifx.Plan.from_json(value)

    def edit_plan(self, field: str, value: Any) -> None:
        """A plan whose JSON has something else in one field."""
        plan = json.loads(self.model.plan.to_json())
        Path("plan.json").write_text(json.dumps({**plan, field: value}))
        geminifx.compile(net(), example_inputs=(X,), plan="plan.json")


def _named(table: Mapping[str, list[Any]]) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, values in table.items() for value in values)


PLAN_FIELDS = ("version", "request", "layout", "homes", "prefetch", "recompute", "format", "estimate", "mesh")
GROUPS = {name: [v for v in OPTIMIZER[name] if v is not True] for name in ("lr", "betas", "eps", "weight_decay")}
CASES: list[tuple[str, str, Any]] = [
    *(("compile", *case) for case in _named(COMPILE)),
    *(("compile_model", "model", value) for value in (3, None, "x", net, nn.Linear, [net()])),
    *(("make_optimizer", *case) for case in _named(OPTIMIZER)),
    *(("set_group", *case) for case in _named(GROUPS)),
    *(("save", *case) for case in _named(SAVE)),
    *(("load", *case) for case in _named(LOAD)),
    *(("other", *case) for case in _named(OTHERS)),
    *(("shard", "model", value) for value in (3, None, net())),
    *(
        ("read_plan", "plan", value)
        for value in ("x", "", "[]", "{}", '{"a": 1}', "null", "[" * 200_000, None, 3, [], {})
    ),
    *(("edit_plan", field, value) for field in PLAN_FIELDS for value in (None, "x", -1, [None], {"nope": 1})),
]

INSTEAD = {
    "save_pretrained": "directory",
    "directory": "directory|save to|checkpoint in",
    "nope": "no option|options",
    "graph_pass": "graph_pass",
}
"""What a message has where it is not the argument's name."""


def check_call(calls: Calls, number: int) -> None:
    call, name, value = CASES[number]
    told = f"case {number}: {call}({name}={value!r:.80})"
    try:
        getattr(calls, call)(name, value)
    except GeminiError as error:
        named = "plan" if call == "edit_plan" else name
        assert re.search(INSTEAD.get(named, re.escape(named)), str(error)), f"{told} is not named by: {error}"
    except BaseException as error:
        error.add_note(told)
        raise
    else:
        pytest.fail(f"{told} was taken")


@pytest.mark.campaign
def test_a_wrong_argument_is_named(there: Path, cases: Iterator[int]) -> None:
    calls = Calls()
    geminifx.save_checkpoint(calls.model, calls.optimizer, "saved")
    before = sorted(os.listdir())
    for number in (number for number in cases if number < len(CASES)):
        check_call(calls, number)
        step(calls.model, calls.optimizer)
    (there / "plan.json").unlink(missing_ok=True)
    assert sorted(os.listdir()) == before, "nothing half-made stays"
    geminifx.load_checkpoint(calls.model, calls.optimizer, "saved")


@pytest.mark.campaign
def test_what_the_model_does_not_take_raises_as_the_model_does(there: Path) -> None:
    calls, plain = Calls(), net()
    for arguments in ((), (1,), ("x",), (None,), (X, X), (torch.ones(8, 5),), (torch.ones(8, 4, dtype=torch.int64),)):
        with pytest.raises(Exception) as expected:
            plain(*arguments)
        with pytest.raises((expected.type, GeminiError)):
            calls.model(*arguments)
        step(calls.model, calls.optimizer)


# -- commands ----------------------------------------------------------------------------------------------


def _messages(*turns: Any) -> str:
    return json.dumps({"messages": list(turns)})


DATA: dict[str, bytes | str] = {
    "junk.txt": JUNK,
    "junk.jsonl": JUNK,
    "junk.json": JUNK,
    "junk.csv": JUNK,
    "junk.bin": JUNK,
    "empty.txt": "",
    "empty.jsonl": "\n\n",
    "empty.json": "[]",
    "empty.csv": "text\n",
    "space.txt": " \n\t ",
    "utf16.txt": "words".encode("utf-16"),
    "latin.csv": "text\nGr\xfc\xdfe".encode("latin-1"),
    "nul.txt": "a\0b",
    "object.json": '{"text": "x"}',
    "lines.json": '{"text": "x"}\n{"text": "y"}',
    "numbers.json": "[1, 2]",
    "comma.json": '[{"text": "x"},]',
    "open.json": '[{"text": "x"}',
    "deep.json": "[" * 100_000,
    "deep.jsonl": "[" * 100_000,
    "digits.jsonl": '{"text": ' + "1" * 10_000 + "}",
    "list.jsonl": "[1]",
    "number.jsonl": "1",
    "null.jsonl": "null",
    "broken.jsonl": '{"text": "x"}\n{"text": ',
    "other.jsonl": '{"body": "x"}',
    "both.jsonl": '{"text": "x", "prompt": "p", "completion": "c"}',
    "kind.jsonl": '{"text": 3}',
    "half.jsonl": '{"text": "\\ud800"}',
    "changes.jsonl": '{"text": "x"}\n{"prompt": "p", "completion": "c"}',
    "prompt.jsonl": '{"prompt": "p"}',
    "silent.jsonl": '{"prompt": "p", "completion": ""}',
    "long.jsonl": json.dumps({"prompt": "p", "completion": "word " * 400}),
    "few.txt": "few words",
    "chat.jsonl": _messages({"role": "assistant", "content": "hi"}),
    "role.jsonl": _messages({"content": "hi"}),
    "content.jsonl": _messages({"role": "user", "content": None}),
    "text.jsonl": _messages("hi"),
    "nobody.jsonl": _messages(),
    "said.jsonl": '{"messages": "hi"}',
    "ragged.csv": "text,n\nx",
    "twice.csv": "text,text\nx,y",
    "unnamed.csv": "text,\nx,y",
    "quote.csv": 'text\n"x',
    "semicolon.csv": "text;n\nx;1",
}
MODELS: dict[str, str] = {
    "list.json": "[]",
    "open.json": "{",
    "untyped.json": "{}",
    "kind.json": '{"model_type": 3}',
    "unknown.json": '{"model_type": "nope"}',
    "vision.json": '{"model_type": "vit"}',
    "hidden.json": json.dumps({**TINY, "hidden_size": "wide"}),
    "negative.json": json.dumps({**TINY, "hidden_size": -4}),
    "heads.json": json.dumps({**TINY, "num_attention_heads": 3}),
    "vocabulary.json": json.dumps({**TINY, "vocab_size": 4}),
    "number.json": "3",
}
OPTIONS: dict[str, list[str]] = {
    "--device-budget": ["", "x", "0", "-1", "1 potato", "101%", "nan", "1000"],
    "--host-budget": ["", "x", "0", "-1GB", "1e"],
    "--device": ["tpu", "cuda", "", "cuda:9"],
    "--placement": ["gpu", "", "CPU"],
    "--precision": ["int4", "", "float32"],
    "--recompute": ["some", "", "1"],
    "--steps": ["0", "-1", "x", "1.5", ""],
    "--epochs": ["0", "-1", "x", "1.5", "2"],
    "--batch-size": ["0", "-1", "x", "1000000000", "99999999999999999999999"],
    "--seq-len": ["1", "0", "-3", "x", "33", "1000000000"],
    "--lr": ["nan", "inf", "-1", "0", "x"],
    "--seed": ["-1", "x", "99999999999999999999999"],
    "--save-every": ["-1", "x"],
    "--output": ["file", "file/below", "other"],
    "--dump": ["file", "file/below"],
    "--data": [*DATA, "nope", "nope.txt", "empty", "file", "/dev/null"],
    "--fields": ["", "x", "text", "text=", "=text", "label=x", "prompt=x", "text=x,text=y", "text=x"],
    "--parallel": [
        "x",
        "data",
        "data=",
        "data=x",
        "data=0",
        "tensor=9d:2",
        "tensor=1d",
        "zero=9",
        "data=1000000",
        "==",
    ],
    "--nprocs": ["0", "-1", "x", "1000000"],
    "--nope": ["x"],
}
COMPARE: dict[str, list[str]] = {
    "--world-size": ["1", "0", "-1", "x", "1000000000"],
    "--batch-size": ["0", "-1", "x", "99999999999999999999999"],
    "--seq-len": ["1", "x", "33"],
    "--device-budget": ["", "x", "0", "101%"],
    "--recompute": ["some", ""],
}
NO_MODELS = [*(f"models/{name}" for name in MODELS), "nope.json", "./nope", "empty", "file", "junk", "bare", "weights"]
COMMANDS: list[list[str]] = [
    *(["train", "tiny.json", option, value] for option, values in OPTIONS.items() for value in values),
    *(["train", model] for model in NO_MODELS),
    *(["compare", "tiny.json", option, value] for option, values in COMPARE.items() for value in values),
    *(["compare", model] for model in NO_MODELS if model not in ("bare", "weights", "models/vocabulary.json")),
    ["train", "tiny.json", "--resume"],
    ["train", "tiny.json", "--output", "empty", "--resume"],
    ["train", "tiny.json", "--output", "bare", "--resume"],
    ["train", "tuned", "--data", "chat.jsonl"],
    ["train", "--fields", "text=x"],
    ["train", "tiny.json", "too", "many"],
    ["nope"],
    ["compare", "--nope"],
]


SIZE = len(CASES) + len(COMMANDS)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data, models and checkpoints that nobody can train, beside some that one can."""
    directory = tmp_path_factory.mktemp("commands")
    for name, content in DATA.items():
        (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)
    for name in ("models", "empty", "other"):
        (directory / name).mkdir()
    for name, text in MODELS.items():
        (directory / "models" / name).write_text(text)
    (directory / "file").write_text("text")
    (directory / "junk").write_bytes(JUNK)
    (directory / "other" / "thesis.tex").write_text("precious")
    (directory / "good.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    (directory / "tiny.json").write_text(json.dumps(TINY))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY))
    for name in ("bare", "weights", "tuned"):
        model.save_pretrained(directory / name)
    tokenizer = train_tokenizer(embedded_texts()[:3], 300)
    for name in ("weights", "tuned"):
        tokenizer.save_pretrained(directory / name)
    (directory / "weights" / "model.safetensors").write_bytes(JUNK)
    return directory


def check_command(words: list[str]) -> None:
    given = [] if "--data" in words or words[0] != "train" else ["--data", "good.txt"]
    given += [] if {"--steps", "--nope", "--fields"} & set(words) or words[0] != "train" else ["--steps", "1"]
    given += [] if {"--seq-len"} & set(words) or words[0] != "train" else ["--seq-len", "16"]
    result = CliRunner().invoke(app, [*words, *given], env={"COLUMNS": "300"})
    told = f"geminifx {' '.join([*words, *given])!r:.200}: {result.output[-600:]}"
    assert result.exit_code not in (0, None), f"{told} was taken"
    assert isinstance(result.exception, SystemExit), f"{told} ended by {result.exception!r}"
    shown = result.output.strip()
    assert shown and "Traceback" not in shown and shown.count("\u256d") == 1, f"{told} is not one message"


@pytest.mark.campaign
def test_a_wrong_command_is_one_message(bench: Path, cases: Iterator[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench)
    before = sorted(os.listdir())
    for number in (number for number in cases if number >= len(CASES)):
        check_command(COMMANDS[number - len(CASES)])
    assert sorted(os.listdir()) == before, "nothing half-made stays"
    assert (bench / "other" / "thesis.tex").read_text() == "precious"


def test_there_are_many() -> None:
    assert len(CASES) >= 300 and len(COMMANDS) >= 150
