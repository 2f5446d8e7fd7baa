"""Which of a model's weights are which of a file's: Hugging Face's files may name a model's parts without its head, or
with one that it lacks, and know nothing of PEFT's names."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .lora import plain_name


@dataclass(frozen=True)
class Matched:
    """Of a model's weights, by all of their names, what a file has.

    Fields:
        found: a name of the model's -> the file's.
        missing: parameters and buffers under none of whose names the file has anything, by their first names.
        unexpected: what the file has besides.
    """

    found: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def matched(model: nn.Module, own: Mapping[str, Any], names: Collection[str], aliases: Mapping[str, str]) -> Matched:
    """Match a model's `own` tensors, by all of their names, with the names in a file, and further names that it gives
    some of them."""
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
    """What the model's class says that files may have and it does not read."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}
