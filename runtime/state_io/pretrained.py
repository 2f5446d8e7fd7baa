"""Model directories that other programs read, too: weights beside files that are not ours."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
"""Suffixes of weight files. Old ones must not stay beside new ones: they would be another model's."""


def carry_over(old: Path, new: Path) -> None:
    """Gives `new` the files of `old` that it lacks, such as a tokenizer, except weights, which are replaced. Folders
    are kept whole. Links stay links, and are not followed."""
    for name in _files(old):
        copy = new / name
        is_replaced = len(name.parts) == 1 and name.name.endswith(WEIGHTS)
        if not os.path.lexists(copy) and not is_replaced:
            copy.parent.mkdir(parents=True, exist_ok=True)
            _keep(old / name, copy)


def _keep(file: Path, copy: Path) -> None:
    """A hard link to the file, which costs nothing, or a copy if the file system has none."""
    try:
        os.link(file, copy, follow_symlinks=False)
    except OSError:
        shutil.copy2(file, copy, follow_symlinks=False)


def _files(directory: Path) -> Iterator[Path]:
    """The paths of all files and links below `directory`, relative to it; links are not followed."""
    for folder, below, names in os.walk(directory):
        links = [name for name in below if Path(folder, name).is_symlink()]
        for path in (Path(folder, name) for name in (*names, *links)):
            if path.is_symlink() or path.is_file():  # a socket or a pipe belongs to a process
                yield path.relative_to(directory)
