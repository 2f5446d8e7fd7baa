"""What other programs read beside what they do not: files of others are kept, weights are saved once."""

import os
from pathlib import Path

import torch
from geminifx.runtime.state_io.pretrained import carry_over, save_weights
from safetensors.torch import load_file, load_model
from torch import nn


def test_carry_over_keeps_other_files_but_no_weights(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for directory, names in ((a, ("tokenizer.json", "config.json", "model-2.safetensors", "x.bin")), (b, ())):
        directory.mkdir()
        for name in names:
            (directory / name).write_text("old")
    (a / "sub").mkdir()
    (a / "sub" / "notes").write_text("old")
    (b / "config.json").write_text("new")
    carry_over(a, b)
    assert {str(f.relative_to(b)): f.read_text() for f in b.rglob("*") if f.is_file()} == {
        "config.json": "new",
        "tokenizer.json": "old",
        "sub/notes": "old",
    }
    carry_over(tmp_path / "nothing", b)


def test_carry_over_looks_at_nothing_outside(tmp_path: Path) -> None:
    """Whoever may write to a checkpoint may link from there to what only its owner can read."""
    a, b, secret = tmp_path / "a", tmp_path / "b", tmp_path / "secret"
    for directory in (a, b, secret):
        directory.mkdir()
    (secret / "key").write_text("of mine")
    (a / "file").symlink_to(secret / "key")
    (a / "folder").symlink_to(secret)
    (a / "gone").symlink_to("nowhere")
    os.mkfifo(a / "pipe")
    carry_over(a, b)
    assert {path.name: os.readlink(path) for path in b.iterdir()} == {
        "file": str(secret / "key"),
        "folder": str(secret),
        "gone": "nowhere",
    }


class Tied(nn.Module):
    """Two names for one weight; `packed` as in a chunk, where it lies in a larger storage."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        if packed:
            storage = torch.randn(64)
            self.a.weight.data = storage[:9].view(3, 3)
            self.b.bias.data = storage[32:35]


def test_tied_weights_are_saved_once_and_load_under_every_name(tmp_path: Path) -> None:
    model, other = Tied(packed=True), Tied(packed=False)
    save_weights(model.state_dict(), tmp_path)
    file = tmp_path / "model.safetensors"
    assert {name: t.numel() for name, t in load_file(file).items()} == {"a.weight": 9, "b.bias": 3}
    load_model(other, file)
    assert torch.equal(other.b.weight, model.a.weight) and torch.equal(other.b.bias, model.b.bias)
