"""Chunks divided into shards: what each has of every parameter, what it takes, and what programs see of it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from geminifx.runtime.distributed.collectives import Collectives
from geminifx.runtime.distributed.ranks import Ranks
from geminifx.runtime.distributed.zero import Zero
from geminifx.runtime.isa.errors import StateError
from geminifx.runtime.isa.formats import OwnFormat, StateFormat, TorchFormat, longest_of_each_kind
from geminifx.runtime.isa.homes import Home, Where
from geminifx.runtime.isa.layout import ChunkLayout, Layout, Slot
from geminifx.runtime.isa.mesh import Axis, Mesh
from geminifx.runtime.kernels.update_rules import SgdHyper
from geminifx.runtime.machine import Machine
from geminifx.runtime.memory.chunks import ChunkStore
from geminifx.runtime.memory.hardware import Hardware
from geminifx.runtime.memory.lazy_parameter import gathered_gradient
from geminifx.runtime.memory.stats import Stats
from geminifx.runtime.memory.tiers import Tier
from geminifx.runtime.optimizer.own_store import OwnStore
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

PLACES = {
    "device": Home(Where.DEVICE),
    "device, resident": Home(Where.DEVICE, resident=True),
    "host": Home(),
    "host, resident": Home(resident=True),
    "streamed": Home(Where.STREAMED),
    "streamed, resident": Home(Where.STREAMED, resident=True),
}
EVERYWHERE = pytest.mark.parametrize("where", PLACES)


def chunk(sizes: list[int], shards: int, dtype: torch.dtype = torch.float32) -> ChunkLayout:
    """Slots one behind the other, at multiples of 64 elements."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // 64) * 64)
    slots = tuple(Slot(f"p{i}", offset, (size,)) for i, (offset, size) in enumerate(zip(offsets, sizes, strict=False)))
    numel = -(-offsets[-1] // (64 * shards)) * 64 * shards
    return ChunkLayout(0, numel, dtype, torch.float32, True, slots, shards)


# -- layouts -----------------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=6), shards=st.integers(1, 5))
def test_the_shards_of_a_chunk_are_the_chunk(sizes: list[int], shards: int) -> None:
    whole = chunk(sizes, shards)
    values = [torch.arange(1.0, size + 1) + 1000 * i for i, size in enumerate(sizes)]
    flat = torch.zeros(whole.numel)
    for slot, value in zip(whole.slots, values, strict=True):
        flat[slot.offset : slot.offset + slot.numel] = value
    found = [torch.zeros(0) for _ in sizes]
    for number in range(shards):
        shard, mine = whole.shard(number), flat.view(shards, -1)[number]
        assert (shard.numel, shard.shards, shard.index) == (whole.shard_numel, 1, whole.index)
        for i, slot in enumerate(shard.slots):
            inside = mine[slot.offset : slot.offset + slot.numel]
            assert torch.equal(inside, values[i][whole.held(i, number)]), "no less, and nothing of its neighbours"
            found[i] = torch.cat([found[i], inside])
    assert all(torch.equal(a, b) for a, b in zip(found, values, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", [OwnFormat(), OwnFormat(accumulate=2), OwnFormat(in_backward=True), TorchFormat()])
def test_a_shard_takes_its_share_of_the_bytes_and_programs_the_whole(dtype: torch.dtype, format: StateFormat) -> None:
    whole = chunk([300, 200], 1, dtype)
    divided = replace(whole, shards=4)
    assert divided.compute_bytes == whole.compute_bytes == 4 * divided.shard_bytes
    for home in (Home(), Home(Where.STREAMED)):
        assert 4 * format.host_bytes(divided, home) == format.host_bytes(whole, home)
        assert format.host_bytes(divided, home) == format.host_bytes(divided.shard(2), home)
        assert format.stream_bytes([(divided, home)]) == format.stream_bytes([(divided.shard(0), home)])
    assert 4 * format.device_bytes(divided, Home(Where.DEVICE)) == format.device_bytes(whole, Home(Where.DEVICE))


def test_of_divided_chunks_the_longest_shard_is_streamed_longest() -> None:
    chunks = [replace(chunk([256], 1), index=0), replace(chunk([512], 4), index=1)]
    assert [layout.index for layout in longest_of_each_kind((c, Home(Where.STREAMED)) for c in chunks)] == [0]


# -- states and programs -----------------------------------------------------------------------------------


class TwoRanks(Zero):
    """The second of two processes, of which the first holds sevens and has no gradients."""

    def gather(self, collectives: Collectives, whole: Tensor, shard: Tensor, layout: ChunkLayout) -> None:
        mine = shard.clone()

        class Filling:
            def wait(self) -> None:
                whole.fill_(7.0)
                whole[whole.numel() // 2 :] = mine

        def all_gather(async_op: bool) -> Filling:
            return Filling()

        collectives.start(whole, all_gather)

    def reduce(self, gradients: Tensor, layout: ChunkLayout) -> Tensor:
        return self.own(gradients, layout)


class Second:
    """One chunk of two parameters, the second of which lies in both shards, trained by plain SGD of rate 1."""

    def __init__(self, where: str, **declared: Any) -> None:
        layout = ChunkLayout(
            0, 256, torch.float32, torch.float32, True, (Slot("a", 0, (4,)), Slot("b", 64, (2, 64))), 2, ("data",)
        )
        self.parameters = {"a": nn.Parameter(torch.zeros(4)), "b": nn.Parameter(torch.arange(128.0).view(2, 64))}
        self.tiers = Tier("device"), Tier("host")
        ranks = Ranks(Mesh((Axis("data", 2, "data"),)), 1, launched=False)
        chunks, format = ChunkStore(Layout((layout,)), self.parameters), OwnFormat(moments=0, **declared)
        hardware = Hardware(torch.device("cpu"), *self.tiers)
        self.store = OwnStore(chunks, hardware, format, Stats(), TwoRanks(ranks, 3))
        self.machine = Machine(self.store, ranks)
        self.store.updater.schedule = lambda asked: [SgdHyper(lr=1.0) for _ in asked]
        self.store.check_groups = lambda: None
        self.store.place((PLACES[where],))

    def backward(self) -> None:
        self.store.begin_backward()
        gradients = self.machine.gradients(256, torch.float32)
        self.machine.put(gradients, 0, torch.ones(4))
        self.machine.put(gradients, 64, torch.ones(2, 64))
        self.machine.reduce(gradients, 0, [0, 1])
        self.machine.accumulate_grad(gradients, 0, [0, 1])
        self.store.end_backward()

    def weights(self) -> Tensor:
        weights = self.machine.wait(self.machine.fetch(0, 256, torch.float32), 0).clone()
        self.machine.release(weights, 0)
        return weights


@EVERYWHERE
@pytest.mark.parametrize("declared", [{}, {"in_backward": True}, {"accumulate": 2}], ids=["step", "backward", "two"])
def test_programs_see_the_whole_after_an_update_of_the_shard(where: str, declared: dict[str, Any]) -> None:
    second = Second(where, **declared)
    (state,) = second.store.states
    assert state.weights.numel() == 128 and [slot.numel for slot in state.layout.slots] == [0, 64]
    for step in range(3):
        for _ in range(2):  # the forward's and the backward's
            weights = second.weights()
            assert torch.equal(weights[:128], torch.full((128,), 7.0))
            assert torch.equal(weights[128:192], torch.arange(64.0, 128.0) - step) and not weights[192:].any()
        for _ in range(declared.get("accumulate", 1)):
            second.backward()
        second.store.update_all(1.0 / declared.get("accumulate", 1))
        second.store.backwards = 0
        assert state.steps == [step + 1] * 2, "counted on every process, whoever holds the parameter"


@EVERYWHERE
def test_what_lies_where_is_what_is_booked(where: str) -> None:
    second = Second(where)
    (state,), resident = second.store.states, second.machine.chunks[0].resident
    assert (resident is not None) == ("resident" in where)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (state.weights, resident, state.held)
            if t is not None}  # fmt: skip
    buffers = OwnFormat(moments=0).stream_bytes([(state.layout, state.home)])
    assert sum(tier.used_bytes for tier in second.tiers) == sum(held.values()) + buffers
    if resident is not None and state.where is not Where.HOST:
        assert state.weights.untyped_storage().data_ptr() == resident.untyped_storage().data_ptr(), "one memory"


@pytest.mark.parametrize("to", PLACES)
@EVERYWHERE
def test_states_of_shards_move_between_any_two_places(where: str, to: str) -> None:
    second = Second(where)
    second.weights()
    second.backward()
    second.store.place((PLACES[to],))
    second.store.update_all(1.0)
    assert torch.equal(second.weights()[128:192], torch.arange(64.0, 128.0) - 1)
    fresh = [tier.used_bytes for tier in Second(to).tiers]
    assert [tier.used_bytes for tier in second.tiers] == fresh


def test_a_resident_chunk_is_gathered_once_after_each_update(monkeypatch: pytest.MonkeyPatch) -> None:
    for where, expected in (("device, resident", 2), ("device", 4)):
        second, gathers, gather = Second(where), [], TwoRanks.gather
        with monkeypatch.context() as patch:
            patch.setattr(TwoRanks, "gather", lambda *args: gathers.append(1) or gather(*args))  # noqa: B023
            for _ in range(2):
                second.weights(), second.weights()
                second.backward()
                second.store.update_all(1.0)
        assert len(gathers) == expected


def test_a_gathered_gradient_refuses_to_be_written() -> None:
    gradient = gathered_gradient(torch.ones(3), "w")
    assert torch.equal(gradient * 2, torch.full((3,), 2.0)) and gradient[1:].sum() == 2
    for write in (lambda: gradient.mul_(2), lambda: torch._foreach_mul_([gradient], 2.0), lambda: gradient[:1].zero_()):
        with pytest.raises(StateError, match=r"gradient of w .* each process has a shard .* max_grad_norm="):
            write()
