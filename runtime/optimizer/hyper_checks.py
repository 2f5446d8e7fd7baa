"""Checks of parameter groups' options, made before any update runs."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from ..isa.errors import ArgumentError, StateError, wrong_argument

UNSUPPORTED = ("amsgrad", "maximize", "capturable", "differentiable")
NOT_NEGATIVE = ("lr", "weight_decay", "momentum")
ADJUSTMENTS = (None, "original", "match_rms_adamw")
"""How Muon may adjust its rate to a matrix's shape."""
MOST_ITERATIONS = 99
"""The most Newton-Schulz iterations that torch.optim.Muon runs."""


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_norm(name: str, norm: Any) -> None:
    """Raises ArgumentError unless `norm` is a number, 0 or more, to clip to; an infinite one only measures."""
    if not (is_number(norm) and norm >= 0):
        raise wrong_argument(name, norm, "a number, 0 or more")


def check_kind_stays(planned: type, now: type) -> None:
    """Raises StateError if a group's kind is no longer the one that its memory was planned for."""
    if now is not planned:
        raise StateError(
            f"the kind of a group is now {now.__name__!r}, but its memory was planned for {planned.__name__}; set it "
            f"back to {planned.__name__!r}, or make another optimizer"
        )


def check_unchanged(used: Sequence[object], now: Sequence[object]) -> None:
    """Raises StateError if the groups' hyper-parameters are no longer those of updates made in the backward."""
    if used != now:
        raise StateError(
            "an option of a parameter group was set between backward() and optimizer.step(), but with in_backward=True "
            "the backward has updated the parameters already, by the options before; set options, or call "
            "scheduler.step(), before backward() or after step()"
        )


def check_group(group: Mapping[str, Any]) -> None:
    """Raises ArgumentError for options that are not numbers, are out of range, or that no update here supports."""
    asked = next((name for name in UNSUPPORTED if group.get(name)), None)
    if asked is not None:
        raise ArgumentError(f"model.optimizer({asked}=True) is not supported; leave {asked} out")
    for name in NOT_NEGATIVE:
        if name in group and not _is_not_negative(group[name]):
            raise wrong_argument(name, group[name], "a number, 0 or more")
    if "beta2_decay" in group:
        _check_adafactor(group)
    elif "eps" in group and not _is_not_negative(group["eps"]):
        raise wrong_argument("eps", group["eps"], "a number, 0 or more")
    if "ns_steps" in group:
        _check_muon(group)
    if "dampening" in group and not math.isfinite(number(group["dampening"])):
        raise wrong_argument("dampening", group["dampening"], "a number")
    if "betas" in group:
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(0 <= number(beta) < 1 for beta in betas):
            raise wrong_argument("betas", betas, "two numbers, 0 or more and below 1, such as (0.9, 0.999)")


def _check_adafactor(group: Mapping[str, Any]) -> None:
    if not -math.inf < number(group["beta2_decay"]) <= 0:
        raise wrong_argument("beta2_decay", group["beta2_decay"], "a number, 0 or less")
    if "d" in group and not number(group["d"]) >= 1:
        raise wrong_argument("d", group["d"], "a number, 1 or more")
    if "eps" in group:
        eps = group["eps"]
        pair = isinstance(eps, tuple | list) and len(eps) == 2
        if not (pair and (eps[0] is None or _is_not_negative(eps[0])) and _is_not_negative(eps[1])):
            raise wrong_argument("eps", eps, "two numbers, 0 or more, the first of which may be None: (None, 1e-3)")


def _check_muon(group: Mapping[str, Any]) -> None:
    steps = group["ns_steps"]
    if type(steps) is not int or not 0 <= steps <= MOST_ITERATIONS:
        raise wrong_argument("ns_steps", steps, f"an int from 0 to {MOST_ITERATIONS}")
    if "ns_coefficients" in group:
        factors = group["ns_coefficients"]
        if (
            not isinstance(factors, tuple | list)
            or len(factors) != 3
            or not all(map(math.isfinite, map(number, factors)))
        ):
            raise wrong_argument("ns_coefficients", factors, "three numbers, such as (3.4445, -4.775, 2.0315)")
    if group.get("adjust_lr_fn") not in ADJUSTMENTS:
        raise wrong_argument("adjust_lr_fn", group["adjust_lr_fn"], f"one of {', '.join(map(repr, ADJUSTMENTS))}")


def check_state_dict(given: Any) -> None:
    """Raises ArgumentError unless `given` has the form of an optimizer's state_dict, with valid group options."""
    if not isinstance(given, Mapping) or not isinstance(given.get("state"), Mapping):
        raise wrong_argument("state_dict", given, "the result of an optimizer's state_dict()")
    groups = given.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        raise wrong_argument(
            "state_dict['param_groups']", groups, "the parameter groups of an optimizer's state_dict()"
        )
    for group in groups:
        check_group(group)


def _is_not_negative(value: Any) -> bool:
    """Whether the value is a finite number, 0 or more."""
    return 0 <= number(value) < math.inf


def number(value: Any) -> float:
    """The value as a float, also of a one-element tensor, as schedulers may keep it; NaN for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return float(value) if is_number(value) else math.nan
