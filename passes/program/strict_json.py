"""Frozen dataclasses as JSON with a version, by cattrs: every field by its annotation, none missing and none more."""

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
    """A kind of text: what it is `of`, its version, which grows when a field's meaning changes, so that a text of
    another version is not misread, and, for messages, who writes it and how it is made anew."""

    of: str
    version: int
    writer: str
    remedy: str

    def write(self, value: object, converter: Converter) -> str:
        return json.dumps({"version": self.version, **converter.unstructure(value)}, indent=1)

    def read(self, text: str, kind: type[_T], converter: Converter) -> _T:
        """The inverse. Raises ArgumentError, naming every field that is wrong, what was found and what is expected."""
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
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r}, expected a number")
    return float(value)


def _tell(error: BaseException, kind: type | None) -> str:
    if isinstance(error, ValueError | TypeError | AttributeError):
        return str(error)
    return format_exception(error, kind)
