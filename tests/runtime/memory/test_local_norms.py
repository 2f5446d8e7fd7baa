"""Optimizers of torch's that are not element-wise, over parameters of which this process has shards."""

from collections.abc import Iterator

import pytest
import torch
from geminifx.runtime.isa.errors import StateError
from geminifx.runtime.memory.local_norms import refuse_them
from torch import nn


class Shards:
    """Holds one parameter's shard."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    def sharded(self) -> Iterator[tuple[nn.Parameter, str]]:
        yield self.parameter, "weight is sharded: other ranks hold other parts of it"


@pytest.mark.parametrize("kind", ["Adafactor", "Muon", "LBFGS"])
def test_a_shard_is_not_taken_for_the_whole(kind: str) -> None:
    shard, whole = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    holder = Shards(shard)
    refuse_them(holder)
    for parameter in (shard, whole):
        parameter.grad = torch.ones(4, 4)
    with pytest.raises(StateError, match=f"{kind} is not element-wise: .*weight is sharded"):
        getattr(torch.optim, kind)([shard]).step(lambda: 0.0)
    assert torch.equal(shard, torch.ones(4, 4))
    getattr(torch.optim, kind)([whole]).step(lambda: torch.tensor(0.0))
    torch.optim.AdamW([shard]).step()
    assert not torch.equal(shard, torch.ones(4, 4))
