"""What a model calls its modules, parameters and buffers never becomes code, and hinders nothing."""

import copy

import geminifx
import pytest
import torch
from geminifx.passes.program.text import parse_program, print_program
from torch import nn


class Named(nn.Module):
    """Blocks that are large enough to be functions of their own, a weight and a buffer, of any names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        block = lambda: nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))  # noqa: E731
        self.blocks = nn.ModuleDict({name: block() for name in names})
        self.scales = nn.ParameterDict({name: nn.Parameter(torch.rand(64)) for name in names})
        self.shifts = nn.Module()
        for name in names:
            self.shifts.register_buffer(name, torch.rand(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, block in self.blocks.items():
            x = x + block(x) * self.scales[name] + self.shifts._buffers[name]
        return x.sum()


NAMES = {
    "odd": ["en-de", "3x3", "class", "a\nimport os"],
    "quoted": ['say "hi"', "it's", "\\", "\\n", '"""', 'a"\n    raise SystemExit  #'],
    "commented": ["#", "a # b", "a | chunk=3", " | tied=b", "on x", " ", "coding: latin-1"],
    "unicode": ["größe", "重み", "\u2028", "\x0c", "\0", "\u202e", "fi"],
    "the same to Python": ["a-b", "a_b", "a b", "a+b"],
    "of the text": ["aten", "torch", "box", "DEVICE", "slice", "results", "geminifx"],
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_names_of_all_kinds_train_as_plain_pytorch_does(names):
    torch.manual_seed(0)
    model = Named(names)
    x = torch.randn(8, 64)
    compiled = geminifx.compile(copy.deepcopy(model), placement="cpu", recompute="none", example_inputs=(x,))
    expected, found = model(x), compiled(x)
    expected.backward()
    found.backward()
    assert torch.equal(found, expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(compiled.get_parameter(name).grad, parameter.grad), name
    program = compiled.session.last["training"].program
    text = print_program(program)
    assert print_program(parse_program(text, program.constants)) == text


def test_the_code_in_a_name_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"{quote}\n    open('mark', 'w')  #" for quote in ("a", 'a"', "a'", "a\r", 'a\\"')]
    x = torch.zeros(8, 64)
    model = geminifx.compile(Named(names), placement="cpu", recompute="none", example_inputs=(x,), dump="dump")
    model(torch.ones(8, 64)).backward()
    assert not (tmp_path / "mark").exists()
