"""Plans as JSON: dtypes by name, training-state formats by kind, schedules as lines of their text."""

from typing import Any, TypeVar

import torch
from cattrs import Converter

from ...runtime.isa.formats import StateFormat, kinds_of_format
from ...runtime.isa.schedule import Schedule
from .strict_json import Text, strict_converter

PLAN_TEXT = Text(
    of="geminifx plan", version=6, writer="Plan.to_json",
    remedy="save a new one with geminifx.compile(...).plan.save(path)",
)  # fmt: skip

_T = TypeVar("_T")


def write_json(plan: object) -> str:
    return PLAN_TEXT.write(plan, _converter())


def read_json(text: str, kind: type[_T]) -> _T:
    """The inverse of `write_json`. Raises ArgumentError naming every wrong field, its value and the expected one."""
    return PLAN_TEXT.read(text, kind, _converter())


def _converter() -> Converter:
    converter = strict_converter()
    converter.register_structure_hook(torch.dtype, _dtype)
    converter.register_unstructure_hook(torch.dtype, lambda dtype: str(dtype).removeprefix("torch."))
    converter.register_structure_hook(Schedule, lambda lines, _: _schedule(lines))
    converter.register_unstructure_hook(Schedule, lambda schedule: str(schedule).splitlines())
    converter.register_structure_hook_func(
        lambda annotated: annotated is StateFormat, lambda data, _: _format(converter, data)
    )
    converter.register_unstructure_hook_func(
        lambda annotated: isinstance(annotated, type) and issubclass(annotated, StateFormat),
        lambda found: {"kind": found.kind, **converter.unstructure_attrs_asdict(found)},
    )
    return converter


def _dtype(name: Any, _: Any) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r}, expected a torch dtype, such as 'bfloat16'")
    return dtype


def _schedule(lines: Any) -> Schedule:
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"{lines!r}, expected the lines of a schedule as text")
    return Schedule.parse("\n".join(lines))


def _format(converter: Converter, data: Any) -> StateFormat:
    kinds = kinds_of_format()
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind not in kinds:
        raise ValueError(f"{kind!r}, expected a kind of training state: {', '.join(kinds)}")
    return converter.structure({key: value for key, value in data.items() if key != "kind"}, kinds[kind])
