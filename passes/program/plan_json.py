"""Plans as JSON, by cattrs: every field by its annotation, dtypes by name, formats of training state by kind."""

import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin

import torch
from cattrs import ClassValidationError, Converter, IterableValidationError, transform_error
from cattrs.v import format_exception

from ...runtime.isa.errors import ArgumentError
from ...runtime.isa.formats import StateFormat, kinds_of_format

VERSION = 4
"""Of the text: it grows when a field's meaning changes, so that a plan of another version is not misread."""

_T = TypeVar("_T")


def write_json(plan: object) -> str:
    return json.dumps({"version": VERSION, **_converter().unstructure(plan)}, indent=1)


def read_json(text: str, kind: type[_T]) -> _T:
    """The inverse. Raises ArgumentError, naming every field that is wrong, what was found and what is expected."""
    try:
        data = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"not a geminifx plan: {error}; expected what Plan.to_json writes") from error
    version = data.pop("version", None) if isinstance(data, dict) else None
    if version != VERSION:
        found = "it has no version" if version is None else f"its version is {version!r}"
        raise ArgumentError(
            f"not a geminifx plan of this version: {found}, expected {VERSION}; make it anew with "
            "geminifx.compile(...).plan.save(path)"
        )
    try:
        return _converter().structure(data, kind)
    except (ClassValidationError, IterableValidationError, ValueError) as error:
        faults = "; ".join(transform_error(error, "plan", format_exception=_tell))
        raise ArgumentError(f"not a geminifx plan: {faults}; expected what Plan.to_json writes") from error


def _converter() -> Converter:
    converter = Converter(forbid_extra_keys=True)
    converter.register_structure_hook_factory(is_dataclass, lambda kind: _whole(converter, kind))
    for scalar, what in ((int, "a whole number"), (bool, "true or false"), (str, "a text")):
        converter.register_structure_hook(scalar, _exactly(scalar, what))
    converter.register_structure_hook(float, _number)
    converter.register_structure_hook_func(lambda annotated: get_origin(annotated) is Literal, _one_of)
    converter.register_structure_hook(torch.dtype, _dtype)
    converter.register_unstructure_hook(torch.dtype, lambda dtype: str(dtype).removeprefix("torch."))
    converter.register_structure_hook_func(
        lambda annotated: annotated is StateFormat, lambda data, _: _format(converter, data)
    )
    converter.register_unstructure_hook_func(
        lambda annotated: isinstance(annotated, type) and issubclass(annotated, StateFormat),
        lambda found: {"kind": found.kind, **converter.unstructure_attrs_asdict(found)},
    )
    return converter


def _whole(converter: Converter, kind: Any) -> Callable[[Any, Any], Any]:
    """Every field is written, so one that is absent is a mistake, and not to be replaced by a default in silence."""
    structure = converter.gen_structure_attrs_fromdict(kind)
    names = [field.name for field in fields(kind)]

    def structure_whole(data: Any, _: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError(f"{data!r}, expected {kind.__name__} with {', '.join(names)}")
        missing = [name for name in names if name not in data]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        return structure(data, kind)

    return structure_whole


def _exactly(scalar: type, what: str) -> Callable[[Any, Any], Any]:
    """JSON's own types only: cattrs would take 1.5 for the integer 1, and any text for true."""

    def structure(value: Any, _: Any) -> Any:
        if type(value) is not scalar:
            raise ValueError(f"{value!r}, expected {what}")
        return value

    return structure


def _one_of(value: Any, annotated: Any) -> Any:
    if value not in get_args(annotated):
        raise ValueError(f"{value!r}, expected one of {', '.join(map(str, get_args(annotated)))}")
    return value


def _number(value: Any, _: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{value!r}, expected a number")
    return float(value)


def _dtype(name: Any, _: Any) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r}, expected a dtype of torch's, such as 'bfloat16'")
    return dtype


def _format(converter: Converter, data: Any) -> StateFormat:
    kinds = kinds_of_format()
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind not in kinds:
        raise ValueError(f"{kind!r}, expected a kind of training state: {', '.join(kinds)}")
    return converter.structure({key: value for key, value in data.items() if key != "kind"}, kinds[kind])


def _tell(error: BaseException, kind: type | None) -> str:
    if isinstance(error, ValueError | TypeError | AttributeError):
        return str(error)
    return format_exception(error, kind)
