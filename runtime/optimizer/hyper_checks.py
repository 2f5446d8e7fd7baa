"""Checks of parameter groups' options, made before any update runs."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from ..isa.errors import ArgumentError, wrong_argument

UNSUPPORTED = ("amsgrad", "maximize", "capturable", "differentiable")
NOT_NEGATIVE = ("lr", "eps", "weight_decay", "momentum")


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_norm(name: str, norm: Any) -> None:
    """Raises ArgumentError unless `norm` is a number, 0 or more, to clip to; an infinite one only measures."""
    if not (is_number(norm) and norm >= 0):
        raise wrong_argument(name, norm, "a number, 0 or more")


def check_group(group: Mapping[str, Any]) -> None:
    """Raises ArgumentError for options that are not numbers, are out of range, or that no update here supports."""
    asked = next((name for name in UNSUPPORTED if group.get(name)), None)
    if asked is not None:
        raise ArgumentError(f"model.optimizer({asked}=True) is not supported; leave {asked} out")
    numbers = (name for name in NOT_NEGATIVE if name in group)
    if "beta2_decay" in group:  # Adafactor's eps is a pair, which Adafactor checks itself
        numbers = (name for name in numbers if name != "eps")
    for name in numbers:
        if not 0 <= number(group[name]) < math.inf:
            raise wrong_argument(name, group[name], "a number, 0 or more")
    if "dampening" in group and not math.isfinite(number(group["dampening"])):
        raise wrong_argument("dampening", group["dampening"], "a number")
    if "betas" in group:
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(0 <= number(beta) < 1 for beta in betas):
            raise wrong_argument("betas", betas, "two numbers, 0 or more and below 1, such as (0.9, 0.999)")


def check_state_dict(given: Any) -> None:
    """Raises ArgumentError unless `given` has the form of an optimizer's state_dict, with valid group options."""
    if not isinstance(given, Mapping) or not isinstance(given.get("state"), Mapping):
        raise wrong_argument("state_dict", given, "what an optimizer's state_dict() returned")
    groups = given.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        raise wrong_argument("state_dict['param_groups']", groups, "what an optimizer's state_dict() has")
    for group in groups:
        check_group(group)


def number(value: Any) -> float:
    """The value as a float, also of a one-element tensor, as schedulers may keep it; NaN for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return float(value) if is_number(value) else math.nan
