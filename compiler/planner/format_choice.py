"""The format of training state that a plan is made for: the declared one, or the first that fits."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ...passes.program.plan import Plan
from ...runtime.isa.errors import BudgetError, StateError
from ...runtime.isa.formats import OwnFormat, StateFormat
from .microbatches import Decision
from .solution import Solution

ONLY_OURS = "only model.optimizer(...) fits: the training state of a torch optimizer needs too much memory"
NOT_DIVIDED = (
    "zero={} divides only the training state of model.optimizer(...): call model.optimizer(torch.optim.AdamW, lr=...) "
    "before the first step and use that optimizer, or leave zero out of parallel="
)
LEANER = (
    OwnFormat(),
    OwnFormat(in_backward=True),
    OwnFormat(in_backward=True, stored="bf16"),
    OwnFormat(in_backward=True, stored="int8"),
    OwnFormat(in_backward=True, stored="int8", masters="bf16-stochastic"),
)
"""Formats that `model.optimizer(...)` may still declare, those that take most memory first."""

HOST_ALONE, ANY_TIER = ("host",), ("host", "device", "")
"""The tiers of a BudgetError for which a leaner format is tried."""


@dataclass(frozen=True)
class Formats:
    """The formats that training state may have: the one that `model.optimizer(...)` declared, or, before it is called,
    torch's, and where that does not fit the first of `ours` that does."""

    declared: OwnFormat | None
    torchs: StateFormat
    ours: tuple[StateFormat, ...] = ()


def decided(find: Callable[[Plan], Solution], plan: Plan, formats: Formats,
            excused: tuple[str, ...]) -> Decision:  # fmt: skip
    """Decides for the optimizer in use. Returns a plan, and an error that refuses steps until
    `model.optimizer(...)` is called, or None. The error comes where torch's state does not fit but one of `ours`
    does, since the user chooses an optimizer only after compiling, and where chunks are sharded, which only our own
    optimizer supports. A refusal of torch's state is an error at once where its tier is not `excused`."""
    declared, ours = formats.declared, formats.ours
    if declared is None and any(chunk.shards > 1 for chunk in plan.layout.chunks):
        return find(replace(plan, format=next(iter(ours), OwnFormat()))), StateError(
            NOT_DIVIDED.format(plan.request.zero)
        )
    try:
        return find(replace(plan, format=declared or formats.torchs)), None
    except BudgetError as refusal:
        if declared is not None or not ours or refusal.tier not in excused:
            raise
        own = _first_that_fits(find, replace(plan, notes=(*plan.notes, ONLY_OURS)), ours, excused)
        return own, refusal.with_traceback(None)  # which would keep the frame of the call that is planned for alive


def _first_that_fits(find: Callable[[Plan], Solution], plan: Plan, formats: tuple[StateFormat, ...],
                     excused: tuple[str, ...]) -> Solution:  # fmt: skip
    """The plan for the first format that fits. Where none does, raises the error of the last."""
    *others, last = formats
    for format in others:
        try:
            return find(replace(plan, format=format))
        except BudgetError as refusal:
            if refusal.tier not in excused:
                raise
    return find(replace(plan, format=last))
