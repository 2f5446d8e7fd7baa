"""What ranks raise for another one's error says all that this does."""

import pickle

import pytest
from geminifx.runtime.distributed.failures import Failure, raise_any
from geminifx.runtime.isa.errors import BudgetError, ShardingError, StateError


class FullError(BudgetError):
    """A refusal of a kind that others may not know."""


@pytest.mark.parametrize(
    ("error", "kind", "attributes"),
    [
        (FullError("no room", 7, "host"), BudgetError, {"smallest_bytes": 7, "tier": "host"}),
        (BudgetError("no room", 7), BudgetError, {"smallest_bytes": 7, "tier": ""}),
        (ShardingError("no room"), ShardingError, {}),
        (OSError(28, "no room"), StateError, {}),
    ],
)
def test_the_others_raise_what_the_one_that_failed_does(
    error: Exception, kind: type[Exception], attributes: dict[str, object]
) -> None:
    told = {rank: pickle.loads(pickle.dumps(Failure.of(error if rank == 1 else None))) for rank in range(3)}
    with pytest.raises(kind, match=r"^rank 1 failed with \w+: .*no room$") as raised:
        raise_any(None, told)
    assert type(raised.value) is kind and vars(raised.value) == attributes
    with pytest.raises(type(error)) as own:
        raise_any(error, told)
    assert own.value is error
    raise_any(None, {0: None, 1: None})
