"""By what rule a saved optimizer was updated, as far as its groups tell: a state_dict does not name its class."""

from collections.abc import Mapping, Sequence
from typing import Any

Group = Mapping[str, Any]


def check_rule(kind: str, defaults: Group, own: Sequence[Group], saved: Sequence[Group]) -> None:
    """Raises ValueError where saved groups are of another rule than `own` groups of the class `kind`."""
    for group in saved:
        lacking = [key for key, default in defaults.items() if _tells(key, default) and key not in group]
        if lacking:
            raise ValueError(
                f"the optimizer is {kind}, and the groups that were saved have no {', '.join(lacking)}; they are of "
                "another optimizer"
            )
        if "eps" in group and "eps" not in defaults:
            raise ValueError(f"the optimizer is {kind}, and the groups that were saved have eps, as another's do")
    for mine, group in zip(own, saved, strict=False):
        key = "decoupled_weight_decay"
        if key in mine and group.get(key, mine[key]) != mine[key]:
            theirs = "AdamW" if group[key] else "Adam"
            raise ValueError(f"the optimizer is {kind}, and what was saved has the weight decay of {theirs}")


def _tells(key: str, default: object) -> bool:
    """Whether every version of a class has an option: most switches come and go with torch's. `amsgrad` is one that
    stays, and that other optimizers with betas lack."""
    return key == "amsgrad" or not isinstance(default, bool | None)
