"""Masters for torch's optimizers: chunks move between the tiers with their values, and accounts follow to the byte."""

import pytest
import torch
from geminifx.runtime.isa.errors import BudgetError
from geminifx.runtime.isa.formats import TorchFormat
from geminifx.runtime.isa.homes import Home, Where
from geminifx.runtime.isa.layout import ChunkLayout, Layout, Slot
from geminifx.runtime.memory.chunks import ChunkStore
from geminifx.runtime.memory.hardware import Hardware
from geminifx.runtime.memory.state_store import Run
from geminifx.runtime.memory.stats import Stats
from geminifx.runtime.memory.tiers import Tier
from geminifx.runtime.memory.torch_store import TorchStore
from homes import homes
from late_copies import BY_NAME
from torch import nn

F32, BF16 = torch.float32, torch.bfloat16


def chunk(index: int, numel: int, dtype: torch.dtype = F32, trainable: bool = True) -> ChunkLayout:
    return ChunkLayout(index, numel, dtype, F32, trainable, (Slot(f"p{index}", 0, (numel,)),))


THREE = (chunk(0, 64), chunk(1, 128, BF16), chunk(2, 64, trainable=False))
# fp32 master and gradient and 8 bytes of optimizer state; with a bf16 copy where the host streams one.
DEVICE_BYTES = (64 * 16, 128 * 16, 64 * 4)
HOST_BYTES = (64 * 16, 128 * 18, 64 * 4)


def store(device_limit: int | None = None, host_limit: int | None = None) -> TorchStore:
    torch.manual_seed(0)
    parameters = {f"p{c.index}": nn.Parameter(torch.randn(c.numel), requires_grad=c.trainable) for c in THREE}
    tiers = Tier("device", device_limit), Tier("host", host_limit)
    hardware = Hardware(torch.device("cpu"), *tiers)
    return TorchStore(ChunkStore(Layout(THREE), parameters), hardware, TorchFormat(8), Stats())


def values(placed: TorchStore) -> list[torch.Tensor]:
    return [c.parameters[0].detach().clone() for c in placed.chunks.chunks]


def accounts(placed: TorchStore) -> tuple[int, int]:
    device, host = placed.hardware.tiers
    return device.used_bytes, host.used_bytes


NONE: frozenset[int] = frozenset()
RESIDENCIES = [
    (frozenset(masters), frozenset(weights))
    for masters in ((), (0,), (1, 2), (0, 1, 2))
    for weights in ((), (0, 1), (0, 1, 2))
]


def expected(masters: frozenset[int], weights: frozenset[int]) -> tuple[int, int]:
    device = sum(DEVICE_BYTES[i] for i in masters)
    device += sum(THREE[i].compute_bytes for i in weights if i not in masters or THREE[i].casts)
    return device, sum(HOST_BYTES[i] for i in range(3) if i not in masters)


def test_state_bytes_by_hand() -> None:
    assert tuple(TorchFormat(8).device_bytes(c, Home(Where.DEVICE)) for c in THREE) == DEVICE_BYTES
    assert tuple(TorchFormat(8).host_bytes(c, Home()) for c in THREE) == HOST_BYTES


@pytest.mark.parametrize("start", RESIDENCIES)
def test_values_stay_and_accounts_follow_through_every_move(
    start: tuple[frozenset[int], frozenset[int]],
) -> None:
    placed = store()
    before = values(placed)
    parameters = [c.parameters[0] for c in placed.chunks.chunks]
    for residency in [start, *RESIDENCIES, start]:
        placed.place(homes(3, *residency))
        assert accounts(placed) == expected(*residency)
        for c, old, parameter in zip(placed.chunks.chunks, before, parameters, strict=True):
            index = c.layout.index
            assert c.parameters[0] is parameter and torch.equal(parameter, old)
            assert c.master is not None and parameter.data_ptr() == c.master.data_ptr()
            holds_copy = index in residency[1] and (c.layout.casts or index not in residency[0])
            assert placed.stays(c) is (index in residency[0] or holds_copy)
            assert (c.resident is not None) is holds_copy
            assert (c.cast is not None) is (c.layout.casts and index not in residency[0])


def test_gradients_come_along() -> None:
    placed = store()
    placed.place(homes(3, NONE, NONE))
    placed.begin_backward()
    first = placed.chunks.chunks[0]
    first.accumulate(torch.full((64,), 3.0), [0])
    placed.place(homes(3, frozenset({0}), NONE))
    assert torch.equal(first.parameters[0].grad, torch.full((64,), 3.0))  # type: ignore[arg-type]
    placed.begin_backward()
    first.accumulate(torch.full((64,), 4.0), [0])
    assert torch.equal(first.parameters[0].grad, torch.full((64,), 7.0))  # type: ignore[arg-type]


def test_frozen_chunks_get_no_gradient_memory() -> None:
    placed = store()
    placed.place(homes(3, NONE, NONE))
    placed.begin_backward()
    assert [c.gradient is not None for c in placed.chunks.chunks] == [True, True, False]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_full_device_raises_and_books_nothing_of_the_chunk(index: int) -> None:
    fits = sum(DEVICE_BYTES[:index])
    placed = store(device_limit=fits + DEVICE_BYTES[index] - 1)
    placed.place(homes(3, NONE, NONE))
    before = values(placed)
    with pytest.raises(BudgetError, match=f"training state of chunk {index} needs {DEVICE_BYTES[index]:,}"):
        placed.place(homes(3, frozenset(range(3)), NONE))
    # What had moved before stays moved, and every account is that of where the chunks are now.
    assert accounts(placed) == expected(frozenset(range(index)), NONE)
    assert all(map(torch.equal, before, values(placed)))
    placed.place(homes(3, NONE, NONE))
    assert accounts(placed) == expected(NONE, NONE)


def test_a_device_without_room_for_resident_weights_raises_and_books_nothing() -> None:
    placed = store(device_limit=255)
    with pytest.raises(BudgetError, match="the weights of chunk 0 needs 256"):
        placed.place(homes(3, NONE, frozenset({0})))
    assert accounts(placed) == expected(NONE, NONE) and placed.chunks.chunks[0].resident is None


def test_a_full_host_raises_and_leaves_parameters_readable() -> None:
    placed = store(host_limit=sum(HOST_BYTES) - 1)
    before = values(placed)
    with pytest.raises(BudgetError, match="host tier is full"):
        placed.place(homes(3, NONE, NONE))
    assert placed.hardware.host_tier.used_bytes == sum(HOST_BYTES[:2])
    assert all(map(torch.equal, before, values(placed)))


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("copies", ["immediate", *BY_NAME], indirect=True)
def test_masters_that_were_copied_from_may_be_written_when_a_program_rests(copies: str) -> None:
    """As by an optimizer's step, or by values that are loaded, behind an evaluation."""
    placed = store()
    placed.place(homes(3, NONE, NONE))
    run, kept = Run(), values(placed)
    weights = [placed.fetch(chunk, run) for chunk in placed.chunks.chunks]
    for chunk, fetched in zip(placed.chunks.chunks, weights, strict=True):
        placed.arrive(chunk, fetched)
    placed.rest()
    with torch.no_grad():
        for chunk in placed.chunks.chunks:
            chunk.parameters[0].zero_()
    assert all(torch.equal(found[: v.numel()], v.to(found.dtype)) for found, v in zip(weights, kept, strict=True))
    placed.fetch(placed.chunks.chunks[1], Run())  # its copy starts from a cast, which waits by itself
    for arrival in list(placed._arrivals.values()):
        placed.copies.finish(arrival)
