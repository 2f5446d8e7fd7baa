"""Frozen dataclasses as versioned JSON, by cattrs: every field is checked against its annotation; none may be missing
or extra."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin

from cattrs import ClassValidationError, Converter, IterableValidationError, transform_error
from cattrs.v import format_exception

from ...runtime.isa.errors import ArgumentError

_T = TypeVar("_T")


@dataclass(frozen=True)
class Text:
    """A kind of JSON document.

    Fields:
        of: what it is, for error messages.
        version: raised when a field's meaning changes, so that documents of other versions are rejected.
        writer: name of the function that writes it, for error messages.
        remedy: how to make it again, for error messages.
    """

    of: str
    version: int
    writer: str
    remedy: str

    def write(self, value: object, converter: Converter) -> str:
        return json.dumps({"version": self.version, **converter.unstructure(value)}, indent=1)

    def read(self, text: str, kind: type[_T], converter: Converter) -> _T:
        """The inverse of `write`. Raises ArgumentError naming every wrong field, its value and the expected one."""
        try:
            data = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise ArgumentError(f"not a {self.of}: {error}; expected what {self.writer} writes") from error
        version = data.pop("version", None) if isinstance(data, dict) else None
        if version != self.version:
            found = "it has no version" if version is None else f"its version is {version!r}"
            raise ArgumentError(f"not a {self.of} of this version: {found}, expected {self.version}; {self.remedy}")
        try:
            return converter.structure(data, kind)
        except (ClassValidationError, IterableValidationError, ValueError) as error:
            faults = "; ".join(transform_error(error, self.of.split()[-1], format_exception=_tell))
            raise ArgumentError(f"not a {self.of}: {faults}; expected what {self.writer} writes") from error


def strict_converter() -> Converter:
    converter = Converter(forbid_extra_keys=True)
    converter.register_structure_hook_factory(is_dataclass, lambda kind: _whole(converter, kind))
    for scalar, what in ((int, "a whole number"), (bool, "true or false"), (str, "a text")):
        converter.register_structure_hook(scalar, _exactly(scalar, what))
    converter.register_structure_hook(float, _number)
    converter.register_structure_hook_func(lambda annotated: get_origin(annotated) is Literal, _one_of)
    return converter


def _whole(converter: Converter, kind: Any) -> Callable[[Any, Any], Any]:
    """A hook that requires every field: all of them are written, so an absent one is an error and not a default."""
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
    """A hook that accepts JSON's own type only; cattrs would convert 1.5 to the integer 1 and any string to True."""

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
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r}, expected a number")
    return float(value)


def _tell(error: BaseException, kind: type | None) -> str:
    if isinstance(error, ValueError | TypeError | AttributeError):
        return str(error)
    return format_exception(error, kind)
