"""Tensor parallel modes as data: what each axis of a mode's mesh shards. The shard pass knows modes only from here.

    mode     axes              activations              linear weight [out, in]    a partial sum becomes
    1d       tp                R (or sequence: S1)      S0, then S1                R (or S1)
    2d       row, col          S0, S-1                  S1, S0                     -, S-1
    2.5d     depth, row, col   S0, S0, S-1              R, S1, S0                  -, -, S-1
    3d       a, b, c           S0, S0, S-1              R, S0, S1, then R, S1, S0  -, S0, S0

1d is Megatron-LM's (Shoeybi et al., 2019), its sequence option that of Korthikanti et al., 2022; 2d is SUMMA as in
Optimus (Xu et al., 2021), 2.5d Tesseract (Wang et al., 2021), 3d that of Bian et al., 2021.
"""

from dataclasses import dataclass
from typing import Literal

from ..program.plan import Plan

ActivationDim = Literal["whole", "batch", "sequence", "hidden"]
"""Which dimension of an activation [batch, ..., hidden] an axis shards; "whole" is none of them."""


@dataclass(frozen=True)
class Role:
    """What one axis shards.

    Fields:
        activation: the dimension that it shards of the activations between blocks.
        partial: the dimension along which a sum over the axis is scattered; "whole": it is all-reduced.
        weight: the dimension that it shards of linear weights [out, in]: "in" or "out"; "turns": out, or in if the
            input arrives sharded along hidden; None: nothing.
        gathered: whether weights are gathered for compute, so that only they, and no activations, are exchanged.
    """

    activation: ActivationDim
    partial: ActivationDim = "whole"
    weight: Literal["in", "out", "turns"] | None = None
    gathered: bool = False


_BATCH = Role("batch")
_SUMMA = {"row": Role("batch", weight="in", gathered=True), "col": Role("hidden", "hidden", weight="out")}

MODES: dict[str, dict[str, Role]] = {
    "1d": {"tp": Role("whole", "whole", weight="turns")},
    "2d": _SUMMA,
    "2.5d": {"depth": _BATCH, **_SUMMA},
    "3d": {"a": _BATCH, "b": Role("batch", "batch", weight="turns"), "c": Role("hidden", "batch", weight="turns")},
}
SEQUENCE: dict[str, Role] = {"tp": Role("sequence", "sequence", weight="turns")}
"""Mode 1d with the activations between blocks sharded along the sequence."""


def roles_of(plan: Plan) -> dict[str, Role]:
    """The roles of a plan's tensor axes, by the axis's name."""
    return SEQUENCE if plan.request.sequence else MODES[plan.request.mode]
