"""Parameters of a pipeline's other layers: in the module as ever, but for values and memory."""

import pytest
import torch
from geminifx.runtime.distributed.local_shards import LocalShards
from geminifx.runtime.distributed.ranks import Ranks
from geminifx.runtime.distributed.zero import Zero
from geminifx.runtime.isa.errors import StateError
from geminifx.runtime.isa.formats import OwnFormat, TorchFormat
from geminifx.runtime.isa.homes import Home, Where
from geminifx.runtime.isa.layout import ChunkLayout, Layout, Slot
from geminifx.runtime.isa.mesh import Axis, Mesh
from geminifx.runtime.memory.chunks import ChunkStore
from geminifx.runtime.memory.hardware import Hardware
from geminifx.runtime.memory.stats import Stats
from geminifx.runtime.memory.tiers import Tier
from geminifx.runtime.memory.torch_store import TorchStore
from geminifx.runtime.optimizer.own_store import OwnStore
from torch import nn

MESH = Mesh((Axis("pipeline", 2, "pipeline"), Axis("data", 2, "data")))
OWNED = (("0.weight", (0,)), ("0.bias", (0,)), ("1.weight", (1,)), ("1.bias", (0, 1)))
STORES = pytest.mark.parametrize("store", ["torch's", "own"])
RANKS = Ranks(MESH, 0)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).bfloat16())


def placed(source: nn.Module, store: str) -> TorchStore | OwnStore:
    """The states of rank 0, which has the first layer, and the second one's bias as others do."""
    parameters = dict(source.named_parameters())
    first = Slot("0.weight", 0, (4, 4)), Slot("0.bias", 64, (4,))
    f32, bf16 = torch.float32, torch.bfloat16
    chunks = (
        ChunkLayout(0, 128, f32, f32, True, first),
        ChunkLayout(1, 128, bf16, f32, True, (Slot("1.bias", 0, (4,)),)),
    )
    hardware = Hardware(torch.device("cpu"), Tier("device", None), Tier("host", None))
    there = ChunkStore(Layout(chunks, owned=OWNED), parameters, LocalShards(RANKS))
    made: TorchStore | OwnStore = TorchStore(there, hardware, TorchFormat(8), Stats(), RANKS)
    if store == "own":
        made = OwnStore(there, hardware, OwnFormat(), Stats(), Zero(RANKS))
    made.place((Home(Where.DEVICE), Home()))
    return made


@STORES
def test_names_shapes_and_groups_stay(store: str) -> None:
    source, before = model(), dict(model().named_parameters())
    identities = {name: id(p) for name, p in source.named_parameters()}
    placed(source, store)
    after = dict(source.named_parameters())
    assert list(after) == list(before) and {name: id(p) for name, p in after.items()} == identities
    assert {n: p.shape for n, p in after.items()} == {n: p.shape for n, p in before.items()}
    assert all(p.requires_grad and isinstance(p, nn.Parameter) for p in after.values())
    assert after["1.weight"].dtype == torch.float32, "that of its master, as it is where it lies"


@STORES
def test_reading_says_where_it_lies(store: str) -> None:
    source = model()
    placed(source, store)
    absent = source[1].weight
    for read in (absent.sum, absent.tolist, lambda: absent + 1, lambda: repr(absent), absent.data.clone):
        with pytest.raises(StateError, match=r"parameter 1.weight .* other ranks run: rank\(s\) 2, 3"):
            read()
    assert absent.shape == (4, 4) and absent.numel() == 16 and absent.grad is None
    torch.testing.assert_close(source[0].weight.detach(), model()[0].weight.detach(), rtol=0, atol=0)
    torch.testing.assert_close(source[1].bias.detach(), model()[1].bias.detach().float(), rtol=0, atol=0)


@STORES
def test_writing_is_refused_but_where_all_load(store: str) -> None:
    source = model()
    states = placed(source, store)
    absent, whole = source[1].weight, {name: value.float() + 1 for name, value in model().state_dict().items()}
    with torch.no_grad():
        for write in (absent.zero_, lambda: absent.copy_(whole["1.weight"]), lambda: nn.init.ones_(absent)):
            with pytest.raises(StateError, match=r"1.weight cannot be written here by .* rank\(s\) 2, 3"):
                write()
    with pytest.raises(StateError, match=r"written here by its .data"):
        absent.data = whole["1.weight"]
    with pytest.raises(StateError, match=r"written here by its .grad"):
        absent.grad = whole["1.weight"]
    with states.writable():
        source.load_state_dict(whole)
    assert torch.equal(source[0].weight.detach(), whole["0.weight"])
    with states.writable(), pytest.raises(RuntimeError, match=r"size mismatch for 1.weight"):
        source.load_state_dict(whole | {"1.weight": torch.ones(4, 5)})


def test_optimizers_of_torch_pass_by() -> None:
    source = model()
    placed(source, "torch's")
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        optimizer = kind(source.parameters(), lr=0.5, weight_decay=0.1)
        source[0].weight.grad = torch.ones(4, 4)
        optimizer.step()
        optimizer.zero_grad()
    assert list(optimizer.state_dict()["param_groups"][0]["params"]) == [0, 1, 2, 3]
    assert not torch.equal(source[0].weight.detach(), model()[0].weight.detach())


@STORES
def test_memory_is_freed_and_nothing_of_it_is_booked(store: str) -> None:
    source = model()
    storage = source[1].weight.untyped_storage()
    states = placed(source, store)
    assert states.chunks.elsewhere.keys() == {"1.weight"} and storage.data_ptr() not in {
        chunk.master.untyped_storage().data_ptr() for chunk in states.chunks.chunks if chunk.master is not None
    }
    stored = states.stored_master("1.weight")
    assert (stored.shape, stored.dtype, stored.regions) == ((4, 4), torch.float32, ())


def test_what_lies_elsewhere_is_moved_on_to_another_store() -> None:
    """As model.optimizer(...) does that is called behind a plan."""
    source = model()
    first = placed(source, "torch's")
    first.leave()
    second = placed(source, "own")
    with second.writable():
        source[1].weight.data.copy_(torch.zeros(4, 4))
    with first.writable(), pytest.raises(StateError, match="written here by"), torch.no_grad():
        source[1].weight.zero_()


@STORES
def test_torch_clips_and_scales_no_part_of_the_gradients(store: str) -> None:
    """Every rank would find another norm, and another rank's overflow would not be seen."""
    source = model()
    placed(source, store)
    with pytest.raises(StateError, match=r"1\.weight belongs to\s+layers that other ranks run.*model\.clip_grad_norm_"):
        nn.utils.clip_grad_norm_(source.parameters(), 1.0)
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(source.parameters(), lr=0.1)
    for step in (scaler.unscale_, scaler.step):
        with pytest.raises(StateError, match="torch clips or scales gradients"):
            step(optimizer)
    with pytest.raises(StateError, match="LBFGS is not element-wise"):
        torch.optim.LBFGS(source.parameters()).step(lambda: 0.0)
    nn.utils.clip_grad_norm_(model().parameters(), 1.0)
