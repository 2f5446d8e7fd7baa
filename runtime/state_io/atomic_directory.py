"""Checkpoints that are either the old one or the new one, never half of each."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..distributed.ranks import Ranks


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success it takes the place of `path`, files in `path`
    that it lacks included, on failure it is removed and `path` is as before. A link to a directory stays one.

    Raises whatever the body raises, and OSError where the disk is full, the place cannot be written, or `path`
    is a file.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{path} is a file, which a checkpoint would replace; expected a directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _flush(file)
        _exchange(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def shared_directory(path: str | Path, ranks: Ranks) -> Iterator[Path]:
    """As `atomic_directory`, for all ranks together: they yield the same directory, on a file system that all share,
    and leave when `path` is the new one on all of them.

    Raises what the body raises, and on ranks on which it raised nothing StateError, naming the others' errors.
    """
    with ExitStack() as stack:
        made, error = None, None
        try:
            made = stack.enter_context(atomic_directory(path)) if ranks.rank == 0 else None
        except Exception as caught:
            error = caught
        ranks.raise_alike(error)
        directory = ranks.gather(made)[0]
        try:
            yield directory
        except Exception as caught:
            error = caught
        ranks.raise_alike(error)
        try:
            stack.close()
        except Exception as caught:
            error = caught
        ranks.raise_alike(error)


def _flush(file: Path) -> None:
    """Errors of the disk must arise before the old checkpoint is touched."""
    if file.is_file():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange(temporary: Path, target: Path) -> None:
    """Renames only, so that nothing can fail for lack of space; the old one goes last."""
    os.chmod(temporary, 0o755)
    if not target.exists():
        os.rename(temporary, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    try:
        os.rename(target, old / target.name)
        os.rename(temporary, target)
    except BaseException:  # an interruption between the two, too
        if not target.exists():
            os.rename(old / target.name, target)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
"""How files end that hold weights: old ones beside new ones would be another model's."""


def carry_over(old: Path, new: Path) -> None:
    """Give `new` the files of `old` that it lacks, such as a tokenizer, but no weights."""
    for file in old.rglob("*") if old.is_dir() else ():
        copy = new / file.relative_to(old)
        if file.is_file() and not copy.exists() and not file.name.endswith(WEIGHTS):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)


def save_weights(named: dict[str, Tensor], directory: Path) -> None:
    """The state_dict of a model that is not Hugging Face's, as model.safetensors.

    A tensor with several names is stored under the first: `safetensors.torch.load_model` finds the others.
    """
    kept: dict[tuple[int, torch.Size], str] = {}
    # Names of one tensor share address and shape; parameters of one chunk share no more than its storage.
    weights = {name: t for name, t in named.items() if kept.setdefault((t.data_ptr(), t.shape), name) == name}
    aliases = {name: kept[t.data_ptr(), t.shape] for name, t in named.items() if name not in weights}
    tensors = {name: t.cpu().clone(memory_format=torch.contiguous_format) for name, t in weights.items()}
    save_file(tensors, str(directory / "model.safetensors"), metadata={**aliases, "format": "pt"})
