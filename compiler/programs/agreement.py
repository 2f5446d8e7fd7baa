"""Agreement of several programs and ranks on which weights stay on the device and when the others are fetched."""

from collections.abc import Iterable
from dataclasses import replace

from ...passes.program.plan import Plan
from ...runtime.distributed.failures import raise_any
from ...runtime.distributed.ranks import Ranks
from ...runtime.isa.homes import Homes
from .programs import chunks_alike


def shared_homes(plan: Plan, others: Iterable[Plan]) -> Homes:
    """The homes of `plan`, except that weights stay on the device only if all `others` have room for them, too."""
    return tuple(
        replace(home, resident=home.resident and all(other.resident for other in same))
        for home, *same in zip(plan.homes, *(other.homes for other in others), strict=True)
    )


def is_agreed_on(plan: Plan, ranks: Ranks) -> bool:
    """Whether the ranks must run one plan: they shard weights, and so meet in every fetch of weights that do not stay.
    Ranks of a pipeline have chunks and plans of their own."""
    return ranks.together and not plan.mesh.pipeline_axes and any(chunk.shards > 1 for chunk in plan.layout.chunks)


def all_refuse(refusal: Exception | None, ranks: Ranks) -> bool:
    """Whether every rank refuses steps, as before a `model.optimizer(...)` that may still come; the step then raises
    the refusal. Raises on all ranks if only some refuse."""
    told = ranks.failures(refusal)
    if all(told.values()):
        return True
    raise_any(refusal, told)
    return False


def agreed(plan: Plan, ranks: Ranks) -> Plan:
    """The plan of the rank with the least room for weights and activations, such as one with a larger batch than
    others, and the least `prefetch` of all. All ranks call it. Raises StateError if they have different models."""
    ranks.check_alike("the model", chunks_alike(plan))
    plans = [Plan.from_json(text) for text in ranks.gather(plan.to_json())]
    return replace(min(plans, key=_room), prefetch=min(each.prefetch for each in plans))


def _room(plan: Plan) -> tuple[int, int]:
    stays = sum(chunk.compute_bytes for chunk, home in plan.placed(plan.homes) if home.resident or home.on_device)
    return stays, -len(plan.recompute)
