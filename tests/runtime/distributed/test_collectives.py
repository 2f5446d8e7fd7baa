"""Collectives under way: who waits for them, and what becomes of those of a step that failed."""

from typing import Any

import pytest
import torch
from geminifx.runtime.distributed.collectives import Collectives
from geminifx.runtime.distributed.ranks import Ranks
from geminifx.runtime.isa.errors import StateError
from geminifx.runtime.isa.mesh import Axis, Mesh
from torch import Tensor

FIRST = Ranks(Mesh((Axis("tp", 2, "tensor"),)), 0, launched=False)


class Filling:
    """A collectives that has filled its tensor when it has been waited for, unless the other process is lost."""

    def __init__(self, filled: Tensor, lost: bool) -> None:
        self.filled, self.lost = filled, lost

    def wait(self) -> None:
        if self.lost:
            raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")
        self.filled.fill_(1.0)


def all_gather(filled: Tensor, lost: bool = False, **options: Any) -> Filling:
    assert options == {"async_op": True}
    return Filling(filled, lost)


@pytest.fixture
def collectives() -> Collectives:
    return FIRST.collectives


def test_what_is_filled_is_there_once_it_has_been_waited_for(collectives: Collectives) -> None:
    pending, other = (collectives.start(tensor, all_gather, tensor) for tensor in (torch.zeros(2), torch.zeros(2)))
    assert collectives.is_under_way(pending) and pending.tolist() == [0.0, 0.0]
    assert collectives.finish_collective(pending, torch.zeros(1)) is pending
    assert pending.tolist() == [1.0, 1.0] and not collectives.is_under_way(pending)
    assert collectives.is_under_way(other) and other.tolist() == [0.0, 0.0]


def test_the_loss_of_another_process_is_told_with_the_collective(collectives: Collectives) -> None:
    pending = collectives.start(torch.zeros(2), all_gather, torch.zeros(2), lost=True)
    with pytest.raises(StateError, match=r"rank 0 of 2 lost the others in all_gather .*, in step 0.*Connection closed"):
        collectives.finish_collective(pending)


def test_an_error_of_this_process_alone_is_told_as_it_is(collectives: Collectives) -> None:
    def all_reduce(**options: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        collectives.start(torch.zeros(2), all_reduce)


def test_a_step_that_failed_leaves_nothing_under_way(collectives: Collectives) -> None:
    lost, kept = torch.zeros(2), torch.zeros(2)
    collectives.start(lost, all_gather, lost, lost=True)
    collectives.start(kept, all_gather, kept)
    collectives.abandon()
    assert not collectives.is_under_way(lost) and not collectives.is_under_way(kept) and kept.tolist() == [1.0, 1.0]
