"""Checks whether saved states, of a state_dict or a checkpoint, are of this optimizer. A state_dict does not name its
class, so the options of its groups and the values it has for each parameter must tell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..isa.layout import Layout
from .hyper_checks import number

Group = Mapping[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class SavedState:
    """What was saved of one parameter: the shapes of its tensors by name, None for values that are no tensors, and the
    number of its steps."""

    shapes: Mapping[str, Shape | None]
    step: Any = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "SavedState":
        """From a parameter's entry in a state_dict."""
        there = {name: value for name, value in values.items() if name != "step" and value is not None}
        shapes = {name: tuple(value.shape) if isinstance(value, Tensor) else None for name, value in there.items()}
        return cls(shapes, values.get("step"))

    @property
    def is_empty(self) -> bool:
        return not self.shapes and self.step is None

    @property
    def steps(self) -> int:
        """The number of steps taken; for optimizers that do not count them, 1 if anything was saved."""
        return int(not self.is_empty) if self.step is None else int(self.step)

    def check_room(self, parameter: str, layout: Layout) -> None:
        """Raises ValueError if there are tensors, but the parameter's chunk here has no memory for its training."""
        found = layout.places.get(parameter)
        if self.shapes and found is not None and not found[0].trainable:
            raise ValueError(
                f"the optimizer state of {parameter} has {', '.join(self.shapes)}, for which there is no memory: the "
                "parameter was frozen when the model was planned. Make it trainable and call the model once, for a "
                "training step, before loading; it may be frozen again afterwards"
            )

    def check(self, parameter: str, expected: Mapping[str, Shape], *, counts: bool) -> None:
        """Raises ValueError for anything but an empty state or a complete one: tensors of the `expected` shapes and,
        where the optimizer `counts`, the number of steps."""
        if self.is_empty:
            return
        found = [*self.shapes, *(() if self.step is None else ("step",))]
        names = [*expected, *(("step",) if counts else ())]
        if not set(names) <= set(found):
            raise ValueError(
                f"the optimizer state of {parameter} has {', '.join(found)}, expected {', '.join(names)}; it belongs "
                "to another optimizer, or is incomplete"
            )
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise ValueError(
                    f"the optimizer state of {parameter} has {name} of shape {self.shapes[name]}, expected {shape}; "
                    "it belongs to another model"
                )
        if self.step is not None and not (number(self.step) >= 0 and number(self.step).is_integer()):
            raise ValueError(
                f"the optimizer state of {parameter} has step={self.step!r}, expected the number of steps taken"
            )


def check_kind(kind: str, saved: Group) -> None:
    """Raises ValueError if a saved group, which need not name its kind, names another than its own group's `kind`."""
    if saved.get("kind", kind) != kind:
        raise ValueError(
            f"a group of the optimizer is of kind {kind}, but the saved group is of kind {saved['kind']!r}"
        )


def check_rule(kind: str, defaults: Group, own: Sequence[Group], saved: Sequence[Group]) -> None:
    """Raises ValueError if `saved` groups are of another optimizer than `own`, groups of the class named `kind`."""
    for group in saved:
        lacking = [key for key, default in defaults.items() if _tells(key, default) and key not in group]
        if lacking:
            raise ValueError(
                f"the optimizer is {kind}, but the saved groups have no {', '.join(lacking)}; they seem to belong to "
                "another optimizer: if they do not, add the missing options to them"
            )
        if "eps" in group and "eps" not in defaults:
            raise ValueError(
                f"the optimizer is {kind}, which has no eps, but the saved groups have one; they belong to another "
                "optimizer"
            )
    for mine, group in zip(own, saved, strict=False):
        key = "decoupled_weight_decay"
        if key in mine and group.get(key, mine[key]) != mine[key]:
            theirs = "AdamW" if group[key] else "Adam"
            raise ValueError(f"the optimizer is {kind}, but the saved groups have the weight decay of {theirs}")


def _tells(key: str, default: object) -> bool:
    """Whether the option distinguishes a class in every version of torch: most flags come and go. `amsgrad` is one that
    stays, and that other optimizers with betas lack."""
    return key == "amsgrad" or not isinstance(default, bool | None)
