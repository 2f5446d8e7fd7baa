"""The optimizers that `model.optimizer(...)` takes: the state each keeps of a parameter, and how it updates one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import SGD, Adafactor, Adam, AdamW, Muon, Optimizer

from ..isa.layout import Rule, Slot
from ..kernels.update_rules import AdafactorHyper, AdamHyper, LionHyper, MuonHyper, SgdHyper
from .lion import Lion
from .states import Hyper

Group = Mapping[str, Any]
Make = Callable[[Group, int, int | None], Hyper]
"""Maps a parameter group, the number of an update (from 1) and the key that masters are rounded with (None if exact)
to the update's hyper-parameters."""


@dataclass(frozen=True)
class Kind:
    """One optimizer.

    Fields:
        moments: torch's names for the values it keeps of a parameter.
        make: gives the hyper-parameters of an update.
        rule: which elements are updated together.
        counts: whether the number of updates is part of a parameter's state.
    """

    moments: tuple[str, ...]
    make: Make
    rule: Rule = "elements"
    counts: bool = False

    def moments_of(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The values that it keeps of a parameter of this shape: their names and shapes."""
        if self.rule != "factored":
            return dict.fromkeys(self.moments, shape)
        names = self.moments[:2] if len(shape) > 1 else self.moments[2:]
        return dict(zip(names, Slot("", 0, shape).factor_shapes, strict=True))


def _adam(group: Group, number: int, key: int | None, *, decoupled: bool = False) -> Hyper:
    beta1, beta2 = map(float, group["betas"])
    decoupled = decoupled or bool(group.get("decoupled_weight_decay"))
    return AdamHyper(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], number, decoupled, key)


def _adamw(group: Group, number: int, key: int | None) -> Hyper:
    return _adam(group, number, key, decoupled=True)


def _sgd(group: Group, number: int, key: int | None) -> Hyper:
    momentum = float(group["momentum"])
    return SgdHyper(
        float(group["lr"]), momentum, group["dampening"], group["weight_decay"], group["nesterov"],
        number == 1 and momentum != 0, key,
    )  # fmt: skip


def _lion(group: Group, number: int, key: int | None) -> Hyper:
    beta1, beta2 = map(float, group["betas"])
    return LionHyper(float(group["lr"]), beta1, beta2, group["weight_decay"], key)


def _muon(group: Group, number: int, key: int | None) -> Hyper:
    a, b, c = map(float, group["ns_coefficients"])
    return MuonHyper(
        float(group["lr"]), float(group["weight_decay"]), float(group["momentum"]), bool(group["nesterov"]),
        (a, b, c), float(group["eps"]), group["ns_steps"], group["adjust_lr_fn"], key,
    )  # fmt: skip


def _adafactor(group: Group, number: int, key: int | None) -> Hyper:
    eps1, eps2 = group["eps"]
    return AdafactorHyper(
        float(group["lr"]), float(group["beta2_decay"]), None if eps1 is None else float(eps1), float(eps2),
        float(group["d"]), float(group["weight_decay"]), number, key,
    )  # fmt: skip


KINDS: dict[type[Optimizer], Kind] = {
    Adam: Kind(("exp_avg", "exp_avg_sq"), _adam, counts=True),
    AdamW: Kind(("exp_avg", "exp_avg_sq"), _adamw, counts=True),
    SGD: Kind(("momentum_buffer",), _sgd),
    Lion: Kind(("exp_avg",), _lion),
    Muon: Kind(("momentum_buffer",), _muon, "matrices"),
    Adafactor: Kind(("row_var", "col_var", "variance"), _adafactor, "factored", counts=True),
}


def restore(kind: type[Optimizer], group: dict[str, Any]) -> None:
    """Fills in the options that a saved group lacks as torch's class does when it loads one: with the value they stood
    for before the class had them."""
    loading: Optimizer = object.__new__(kind)  # as in unpickling, which __setstate__ is made for
    loading.__setstate__({"state": {}, "param_groups": [group], "defaults": {}})


def check_complete(kind: type[Optimizer], group: Group) -> None:
    """Raises ValueError if a group lacks an option that its updates read."""
    try:
        KINDS[kind].make(group, 1, None)
    except KeyError as lacking:
        raise ValueError(
            f"a saved parameter group has no {lacking.args[0]!r}, which {name_of(kind)} needs; expected a group from "
            f"the state_dict() of a {name_of(kind)}"
        ) from None


def name_of(kind: type[Optimizer]) -> str:
    """The class as users write it."""
    return f"geminifx.{kind.__name__}" if kind is Lion else f"torch.optim.{kind.__name__}"


ALL = ", ".join(map(name_of, KINDS))
