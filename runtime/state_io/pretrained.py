"""Directories that other programs read, too: weights beside files that are not ours."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
"""How files end that hold weights: old ones beside new ones would be another model's."""


def carry_over(old: Path, new: Path) -> None:
    """Give `new` the files of `old` that it lacks, such as a tokenizer, but not the weights that it replaces. Folders
    are kept whole. Links stay links: what they point to is not looked at."""
    for name in _files(old):
        copy = new / name
        is_replaced = len(name.parts) == 1 and name.name.endswith(WEIGHTS)
        if not os.path.lexists(copy) and not is_replaced:
            copy.parent.mkdir(parents=True, exist_ok=True)
            _keep(old / name, copy)


def _keep(file: Path, copy: Path) -> None:
    """The very file under another name, which costs nothing, or a copy where the file system has no such links."""
    try:
        os.link(file, copy, follow_symlinks=False)
    except OSError:
        shutil.copy2(file, copy, follow_symlinks=False)


def _files(directory: Path) -> Iterator[Path]:
    """The names of all files and links below, none of them by way of a link."""
    for folder, below, names in os.walk(directory):
        links = [name for name in below if Path(folder, name).is_symlink()]
        for path in (Path(folder, name) for name in (*names, *links)):
            if path.is_symlink() or path.is_file():  # a socket or a pipe is of a process
                yield path.relative_to(directory)
