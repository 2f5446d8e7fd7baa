"""What the tests of the passes share: golden programs, captured models, comparison of programs."""

import ast
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from geminifx.compiler.capture.trace import CaptureRequest, capture
from geminifx.compiler.planner.packing import pack, uses
from geminifx.models.adapters import blocks, example_inputs
from geminifx.passes.program.manager import Pass
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.program import Program, note, type_of
from geminifx.passes.program.text import parse_program, print_program
from geminifx.passes.program.verify import verify
from geminifx.runtime.isa.layout import ChunkLayout, Layout, Slot
from geminifx.runtime.isa.precision import parameter_dtypes
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

GOLDEN = Path(__file__).parent.parent / "golden"


# -- golden programs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def golden() -> Callable[[str, Pass, Plan], None]:
    """`golden(case, pass, plan)`: one pass makes `after` of `before` in tests/golden/<pass>_<case>.py.

    With ACCEPT=1 in the environment the file is rewritten with what the pass makes instead.
    """
    return _check_golden


def _check_golden(case: str, current: Pass, plan: Plan) -> None:
    path = GOLDEN / f"{current.name}_{case}.py"
    intro, texts = _read_golden(path)
    program = parse_program(texts["before"])
    before = print_program(program)
    # What the pass requires must hold of the example, or it shows a program that never comes about.
    verify(program, plan, current.requires, "before")
    current.rewrite(program, plan)
    kept = tuple(fact for fact in (*current.requires, *current.gives) if fact not in current.breaks)
    verify(program, plan, kept, current.name)
    program.name = "after"
    after = print_program(program)
    assert_same(parse_program(after), program)
    if os.environ.get("ACCEPT") == "1":
        path.write_text(f'"""{intro}"""\n\n\n{before}\n\n{after}', encoding="utf-8")
    else:
        assert texts["before"] == before, f"{path.name}: 'before' is not as programs print; run `make golden`"
        assert texts["after"] == after, f"{path.name}: run `make golden` if the change is intended"


def _read_golden(path: Path) -> tuple[str, dict[str, str]]:
    """The introduction of a golden file, and its programs: what follows `before` belongs to `after`."""
    source = path.read_text(encoding="utf-8")
    module, lines = ast.parse(source), source.splitlines(keepends=True)
    before = next(node for node in module.body if isinstance(node, ast.FunctionDef))
    assert before.name == "before", f"{path.name} must begin with the program before the pass"
    texts = {"before": "".join(lines[before.lineno - 1 : before.end_lineno])}
    texts["after"] = "".join(lines[before.end_lineno :]).lstrip("\n")
    return ast.get_docstring(module, clean=False) or "", texts


@pytest.fixture(scope="session")
def layout() -> Callable[..., Layout]:
    """`layout(["a", "b"], ["c"])`: two chunks of 4 x 4 float32 parameters, in this order."""
    return _square_layout


def _square_layout(*chunks: list[str]) -> Layout:
    # 64 elements are the 256 bytes that slots are aligned to.
    return Layout(
        tuple(
            ChunkLayout(index, 64 * len(names), torch.float32, torch.float32, True,
                        tuple(Slot(name, 64 * i, (4, 4)) for i, name in enumerate(names)))
            for index, names in enumerate(chunks)
        )
    )  # fmt: skip


# -- comparison --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def same() -> Callable[[Program, Program], None]:
    return assert_same


def assert_same(a: Program, b: Program) -> None:
    """Equal names, operators, arguments, results and notes, node by node, in shared functions too."""
    assert a.name == b.name
    assert list(a.functions) == list(b.functions)
    for left, right in zip(a.nodes, b.nodes, strict=True):
        assert _described(left) == _described(right)
    for name, function in a.functions.items():
        assert_same(function, b.functions[name])


def _described(node: fx.Node) -> tuple[object, ...]:
    """A node without identity. Where an input or an instruction without result is not named in the text, its
    name is not compared; nor is the module of an input, which no line of the text states."""
    origin = note(node)
    if node.op == "placeholder":
        return node.op, node.name, origin.type, origin.role, origin.tied
    name = node.name if origin.type is not None else ""
    return node.op, name, str(node.target), _frozen(node.args), _frozen(node.kwargs), origin


def _frozen(value: object) -> object:
    if isinstance(value, fx.Node):
        return ("node", value.name)
    if isinstance(value, dict):
        return [(key, _frozen(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return (isinstance(value, list), [_frozen(item) for item in value])
    return (type(value), repr(value))  # 1, 1.0, True differ, as do 0.0 and -0.0; nan equals nan


# -- captured models ---------------------------------------------------------------------------------------

_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "max_position_embeddings": 32}  # fmt: skip


def _opt() -> nn.Module:
    config = transformers.OPTConfig(**_SIZES, ffn_dim=64, word_embed_proj_dim=32)
    return transformers.OPTForCausalLM(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(**_SIZES, intermediate_size=64, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def _bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**_SIZES, intermediate_size=64))


def _cnn() -> nn.Module:
    convolutions = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, 3))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 2))


def _stack() -> nn.Module:
    """Equal blocks, each large enough for a chunk of its own: what `cluster` makes one function of."""
    layers = [nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 64)) for _ in range(5)]
    return nn.Sequential(*layers)


_MODELS = {"opt": _opt, "gpt2": _gpt2, "llama": _llama, "bert": _bert, "cnn": _cnn, "mlp": _mlp, "stack": _stack}
_INPUTS = {"cnn": (2, 3, 8, 8), "mlp": (2, 4), "stack": (2, 64)}


@dataclass(frozen=True)
class Example:
    """A captured model, a plan for it, a value for each of the program's inputs, and the names of its blocks."""

    program: Program
    plan: Plan
    values: dict[str, Tensor]
    blocks: tuple[str, ...]

    def arguments(self, program: Program) -> list[Tensor]:
        """Fresh arguments for `program`, which may be a rewritten one with fewer inputs."""
        return [self.values[note(node).role].clone() for node in program.placeholders]


@cache
def _captured(name: str, training: bool) -> Example:
    torch.manual_seed(0)
    model = _MODELS[name]().train(training)
    args = (torch.randn(_INPUTS[name]),) if name in _INPUTS else ()
    kwargs = example_inputs(model, 2, 8) or {}
    program = capture(model, args, kwargs, CaptureRequest(backward=training)).program
    names = blocks(model)
    packed = pack(uses(program), dict(model.named_parameters()), names, parameter_dtypes(model, None))
    values = {f"parameter:{name}": p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    values |= {f"buffer:{name}": buffer for name, buffer in model.named_buffers()}
    values |= {f"constant:{name}": value for name, value in program.constants.items()}
    values |= {f"input:{i}": value for i, value in enumerate(tree_leaves((args, kwargs)))}
    for position, node in program.inputs("tangent").items():
        values[f"tangent:{position}"] = torch.randn(type_of(node).shape)
    return Example(program, Plan(layout=packed, recompute=names[:1]), values, names)


@pytest.fixture(params=list(_MODELS))
def example(request: pytest.FixtureRequest) -> Example:
    """A small model's training step with values; shared, so `program` must be copied before it is changed."""
    return _captured(request.param, True)


@pytest.fixture(scope="session")
def stack() -> Example:
    """The training step of equal blocks."""
    return _captured("stack", True)


@pytest.fixture
def captured(example: Example) -> tuple[Program, Plan]:
    """A small model's training step, to be changed at will, and a plan for it."""
    return example.program.copy(), example.plan


@pytest.fixture(params=["opt", "cnn"])
def evaluation(request: pytest.FixtureRequest) -> tuple[Program, Plan]:
    """A small model's forward without gradients."""
    example = _captured(request.param, False)
    return example.program.copy(), example.plan
