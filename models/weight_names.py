"""Matches the names of a model's weights with those in a file: Hugging Face's files may lack the prefix of the base
model, or have one that the model lacks, and know nothing of PEFT's names."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .lora import plain_name


@dataclass(frozen=True)
class Matched:
    """Which of a model's weights, under any of their names, a file has.

    Fields:
        found: maps a name in the model to the name in the file.
        missing: first names of parameters and buffers that the file has under none of their names.
        unexpected: other names in the file.
    """

    found: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def matched(model: nn.Module, own: Mapping[str, Any], names: Collection[str], aliases: Mapping[str, str]) -> Matched:
    """Match the model's `own` tensors, by all of their names, with the `names` in a file. `aliases` maps further names
    that the file gives to some of its tensors to their names."""
    found: dict[str, str] = {}
    for name in own:
        there = next((each for each in _spellings(model, name) if each in names or each in aliases), None)
        if there is not None:
            found[name] = aliases.get(there, there)
    groups: dict[int, list[str]] = {}
    for name, tensor in own.items():
        if isinstance(tensor, Tensor):
            groups.setdefault(id(tensor), []).append(name)
    missing = tuple(group[0] for group in groups.values() if not found.keys() & set(group))
    unexpected = set(names) - set(found.values()) - _left_out(model, names)
    return Matched(found, missing, tuple(sorted(unexpected)))


def _spellings(model: nn.Module, name: str) -> tuple[str, ...]:
    prefix, plain = getattr(model, "base_model_prefix", ""), plain_name(name)
    others = (plain.removeprefix(f"{prefix}."), f"{prefix}.{plain}") if prefix else ()
    return name, plain, *others


def _left_out(model: nn.Module, names: Collection[str]) -> set[str]:
    """Names that the model's class allows in files and does not read."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}
