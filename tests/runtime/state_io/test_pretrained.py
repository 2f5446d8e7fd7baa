"""Files of others in a directory that is replaced: they are kept, and nothing outside is looked at."""

import os
from pathlib import Path

from geminifx.runtime.state_io.pretrained import carry_over


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
