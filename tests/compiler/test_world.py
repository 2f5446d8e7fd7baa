"""The automatic plan for a world: what `compile` chooses where nobody says how processes share the work."""

from typing import Any

import geminifx
import pytest
import torch
from geminifx.compiler.capture.trace import CaptureRequest
from geminifx.compiler.memory.device import ALLOCATOR_SLACK, WORKSPACE_BYTES, Device
from geminifx.compiler.memory.device_memory import DeviceMemory
from geminifx.compiler.options import Options
from geminifx.compiler.planner.problem import Planning
from geminifx.compiler.planner.world.costs import Costed, Costs
from geminifx.compiler.planner.world.model import Model
from geminifx.compiler.planner.world.search import WorldPlan
from geminifx.compiler.planner.world.ways import Way
from geminifx.compiler.planner.world.world import World
from geminifx.compiler.rates.clusters import one_node
from geminifx.compiler.rates.rates import ARENA
from geminifx.compiler.world import FROZEN as FROZEN_NOTE
from geminifx.compiler.world import choose_world, settle, settle_otherwise
from geminifx.runtime.distributed.ranks import Ranks
from geminifx.runtime.isa.errors import ArgumentError, BudgetError
from geminifx.runtime.isa.mesh import Axis, Mesh
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

pytestmark = pytest.mark.usefixtures("shared")

SHAPE = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "ffn_dim": 256, "word_embed_proj_dim": 64,
         "vocab_size": 128, "max_position_embeddings": 64, "layerdrop": 0.0}  # fmt: skip
NODE = {"devices": 8, "within": {"latency_s": 1e-5, "bytes_per_s": 1e10}}


def opt() -> nn.Module:
    return OPTForCausalLM(OPTConfig(**SHAPE))


def tokens(examples: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros((examples, 16), dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}


def compiled(**options: Any) -> geminifx.CompiledModule:
    return geminifx.compile(opt(), **{"example_inputs": tokens(2), **options})


def test_a_world_that_is_not_launched_can_be_looked_at() -> None:
    model = compiled(world_size=8)
    assert model.world is not None
    assert model.plan.mesh.size == 8
    assert model.plan.mesh.data_size == model.world.chosen.way.data
    notes = "\n".join(model.plan.notes)
    assert "one node of 8 of this device" in notes
    assert notes.count("the next best for 8 processes") == len(model.world.others) == 5


@pytest.mark.parametrize(
    ("options", "host_bytes"),
    [
        ({"world_size": 8, "host_budget": "8GB"}, 10**9),
        ({"world_size": 8, "parallel": {"data": 8}, "host_budget": "8GB"}, 10**9),
        ({"cluster": {**NODE, "nodes": 2, "devices": 4, "between": NODE["within"]}, "host_budget": "8GB"}, 2 * 10**9),
        ({"cluster": {**NODE, "host_memory": "80GB"}}, 9 * 10**9),
        ({"cluster": {**NODE, "host_memory": "80GB"}, "host_budget": "10%"}, 10**9),
        ({"host_budget": "8GB"}, 8 * 10**9),
    ],
)
def test_processes_share_the_memory_of_their_host(options: dict[str, Any], host_bytes: int) -> None:
    """As those do that are launched: what is planned for them is of the same machine."""
    model = compiled(**options)
    assert model.session.limits.host_bytes == host_bytes
    assert model.world is None or model.world.world.host_bytes == host_bytes


@pytest.mark.slow
def test_each_group_passes_its_part_of_the_step() -> None:
    """Two examples of each of eight processes are sixteen, however they are divided. What blocks take fits for fewer
    groups than what programs take: the next best is taken, and that is told."""
    model = compiled(cluster=NODE, device_budget="1.2MB", placement="cuda")
    assert model.world is not None and model.world.chosen.way.data < 8
    assert model.world.examples_per_group * model.world.chosen.way.data == 16
    training = model.session.last["training"]
    assert training.captured.examples in (0, model.world.examples_per_group), "0: tensors are sharded"


@pytest.mark.slow
def test_the_way_that_was_chosen_is_the_one_that_is_compiled() -> None:
    model = compiled(world_size=4, microbatches=2, device_budget="2.5MB")
    way = model.world.chosen.way
    assert model.plan.mesh == model.session.options.degrees.mesh(4, 1)
    assert model.plan.request.zero == way.zero and way.microbatches == 2


@pytest.mark.slow
def test_degrees_that_are_given_are_kept() -> None:
    model = compiled(world_size=4, parallel={"data": 2, "pipeline": 2}, microbatches=2)
    assert model.world is None and model.plan.mesh.data_size == 2


def test_one_process_has_nothing_to_choose() -> None:
    assert compiled(world_size=1).world is None
    assert compiled(parallel="auto").world is None


def test_of_a_model_whose_inputs_nobody_knows_each_process_has_its_part_of_the_batch() -> None:
    assert geminifx.compile(nn.Linear(2, 2), world_size=4).session.ranks.mesh.data_size == 4
    with pytest.raises(ArgumentError, match="pass the batch of one process as example_inputs"):
        geminifx.compile(nn.Linear(2, 2), world_size=4, parallel="auto")


def test_no_way_is_chosen_for_weights_that_are_kept_as_codes() -> None:
    source = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    source[0].requires_grad_(False)
    batch = (torch.zeros(4, 4),)
    with pytest.raises(ArgumentError, match="choose how the processes share the work"):
        geminifx.compile(source, frozen="int8", world_size=4, parallel="auto", example_inputs=batch)
    model = geminifx.compile(source, frozen="int8", world_size=4, example_inputs=batch)
    assert model.world is None and model.plan.mesh.data_size == 4
    assert FROZEN_NOTE in model.plan.notes


@pytest.mark.parametrize("on_this_host, told", [(8, "8 on this machine"), (4, "4 on this machine")])
def test_a_cluster_that_is_not_the_launched_one_is_refused(
    on_this_host: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16" if on_this_host == 8 else "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_this_host))
    with pytest.raises(ArgumentError, match=told):
        compiled(cluster=NODE)


def test_where_nobody_tells_how_many_run_on_a_machine_their_number_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of processes that srun or mpirun started. Of weights kept as codes nothing is weighed, so that none meet."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    options = Options.of({"cluster": NODE, "frozen": "int8"})
    assert settle(nn.Linear(2, 2), options).notes == (FROZEN_NOTE,)
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(ArgumentError, match="16 processes were launched; expected one process per device"):
        settle(nn.Linear(2, 2), options)


GPU_BYTES = 10 * 2**30


class Gpu(Device):
    """One that others leave nine tenths of, for plans: computed is on the CPU."""

    is_cuda = True
    memory = DeviceMemory(torch.device("cpu"), GPU_BYTES, 2**30, GPU_BYTES * 9 // 10)

    @classmethod
    def choose(cls, options: Options) -> Device:
        return cls(torch.device("cpu"))

    def total_bytes(self) -> int:
        return GPU_BYTES


EIGHT = Mesh((Axis("data", 8, "data"),))
PLANNED = Ranks(EIGHT, launched=False, on_this_host=8)


def planned_for_gpus(monkeypatch: pytest.MonkeyPatch, ranks: Ranks = PLANNED, **options: Any) -> WorldPlan:
    monkeypatch.setattr("geminifx.compiler.world.Device", Gpu)
    batch = (torch.zeros(2, 64),)
    return choose_world(Stack(), Options.of({"precision": "fp32", **options}), (batch, {}), ranks)


def test_what_is_not_torchs_is_left_free_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    reserve_bytes = Gpu.memory.reserve_bytes + WORKSPACE_BYTES
    for options, device_bytes in (
        ({}, Gpu.memory.available_bytes),
        ({"cluster": NODE}, Gpu.memory.available_bytes),
        ({"device_budget": 2**32}, 2**32),
        ({"device_budget": 2**35}, GPU_BYTES),
    ):
        plan = planned_for_gpus(monkeypatch, **options)
        assert plan.world.device_bytes == device_bytes
        assert plan.world.reserve_bytes == reserve_bytes + int(device_bytes * ALLOCATOR_SLACK)
        assert plan.chosen.device_bytes > plan.world.reserve_bytes
    with pytest.raises(BudgetError, match="none of") as refused:
        planned_for_gpus(monkeypatch, device_budget=2**30)
    assert refused.value.smallest_bytes > 2**30


def test_of_a_cluster_of_cards_that_are_not_here_the_budget_must_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for budget in (None, "50%"):
        with pytest.raises(ArgumentError, match="the devices of the cluster 8-nvlink have is not known here; expected"):
            planned_for_gpus(monkeypatch, cluster="8-nvlink", device_budget=budget)
    assert planned_for_gpus(monkeypatch, cluster="8-nvlink", device_budget=2**36).world.device_bytes == 2**36


@pytest.mark.parametrize("options", [{}, {"parallel": {"data": 8}}], ids=str)
def test_a_budget_for_cards_that_are_not_here_is_no_share_of_this_machines_memory(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Device, "total_bytes", lambda self: GPU_BYTES)
    batch = (torch.zeros(2, 64),)
    with pytest.raises(ArgumentError, match="device_budget='50%', but how much memory the devices of the cluster 8-nv"):
        geminifx.compile(Stack(), "50%", cluster="8-nvlink", example_inputs=batch, **options)
    model = geminifx.compile(Stack(), 2 * GPU_BYTES, cluster="8-nvlink", example_inputs=batch, **options)
    assert model.session.limits.device_bytes == 2 * GPU_BYTES
    assert geminifx.compile(Stack(), "50%", example_inputs=batch).session.limits.device_bytes == GPU_BYTES // 2


def test_of_a_launched_cluster_the_devices_memory_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    together = Ranks(EIGHT)
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value])
    world = planned_for_gpus(monkeypatch, together, cluster="8-nvlink").world
    assert together.together and world.device_bytes == Gpu.memory.available_bytes


def test_where_nothing_fits_compile_says_so() -> None:
    with pytest.raises(BudgetError, match=r"none of .* ways to share the work over 8 processes"):
        compiled(world_size=8, device_budget="10kB")


def test_what_is_given_must_be_degrees_or_auto() -> None:
    with pytest.raises(ArgumentError, match="'auto', or degrees by name"):
        compiled(parallel="automatic")


@pytest.mark.slow
def test_a_way_whose_whole_program_does_not_fit_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here formulas know nothing of what is held for good."""
    monkeypatch.setattr(Costed, "_held", lambda self: 0.0 * self.numel)
    model = compiled(world_size=4, device_budget="2.5MB", placement="cuda", microbatches=2)
    assert model.plan.mesh.data_size == model.world.chosen.way.data
    assert any("not taken: data 4" in note for note in model.plan.notes)


def test_a_refused_program_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where inputs are made from the configuration."""
    tried: list[dict[str, Any]] = []

    def refuse(self: Planning, *args: Any) -> None:
        tried.append({"parallel": self.options.parallel, "schedule": self.options.schedule})
        raise BudgetError("no room; here", 2 * 10**9)

    monkeypatch.setattr(Planning, "decide", refuse)
    monkeypatch.setattr("geminifx.compiler.planner.world.search.MOST_REFUSED", 2)
    with pytest.raises(BudgetError, match="no room"):
        geminifx.compile(opt(), world_size=4, device_budget="1GB")
    assert len(tried) == len({str(each) for each in tried}) == 3


@pytest.mark.parametrize(
    ("budgets", "is_of_the_device"), [({"device_budget": "10kB"}, True), ({"host_budget": "1kB"}, False)]
)
def test_what_the_host_lacks_is_not_asked_of_the_device(
    budgets: dict[str, Any], is_of_the_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A way that takes less of the device is no answer to it."""
    asked: list[tuple[bool, int]] = []
    monkeypatch.setattr(WorldPlan, "without_chosen", lambda self, why, *how: asked.append(how))
    settled = settle(opt(), Options.of({"world_size": 4, "example_inputs": tokens(2)}))
    with pytest.raises(BudgetError) as refused:
        compiled(placement="cpu", **budgets)
    with pytest.raises(BudgetError):
        settle_otherwise(settled, settled.options, refused.value)
    assert asked == [(is_of_the_device, refused.value.smallest_bytes if is_of_the_device else 0)]


class Stack(nn.Module):
    """Its loss is made by whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).relu()
        return x


def test_a_model_whose_loss_is_made_outside_gets_no_pipeline() -> None:
    model = geminifx.compile(Stack(), world_size=4, example_inputs=(torch.zeros(2, 64),))
    assert model.world.chosen.way.pipeline == 1
    assert all(other.way.pipeline == 1 for other in model.world.others)


def costed(source: nn.Module, way: Way, **world: Any) -> Costed:
    cluster = one_node(4, ARENA)
    model = Model.of(source, ((torch.zeros(2, 64),), {}), CaptureRequest())
    return Costed(costs := Costs(model, World(cluster, ARENA, 8, **world)), way, costs.stages(way))


FROZEN, TRAINED = 3 * (64 * 64 + 64), 64 * 64 + 64
"""Parameters of a stack of whose four layers three are frozen."""


def half_frozen() -> nn.Module:
    source = Stack()
    source.layers[:3].requires_grad_(False)
    return source


@pytest.mark.parametrize(
    "way", [Way(), Way(home="host"), Way(data=4), Way(data=4, zero=2), Way(data=4, zero=3)], ids=str
)
def test_of_frozen_weights_nothing_is_held_but_themselves(way: Way) -> None:
    whole, partly = costed(Stack(), way), costed(half_frozen(), way)
    shares = way.replicas if way.zero else 1
    spared = 4 * FROZEN / (shares if way.zero >= 2 else 1) + 8 * FROZEN / shares
    if way.home == "host":
        assert whole.host_bytes - partly.host_bytes == 12 * FROZEN
    else:
        assert whole._held() - partly._held() == pytest.approx(spared)
    assert list(partly.numel) == list(whole.numel) == [FROZEN + TRAINED]
    assert list(partly.trained_numel) == [TRAINED]
    assert partly._tail_s(0.0)[0] == pytest.approx(whole._tail_s(0.0)[0] / 4) or way.home == "host" or way.data > 1
    assert partly._reduce_s()[0] <= whole._reduce_s()[0]


def test_what_the_optimizer_keeps_is_counted() -> None:
    none, two = (costed(Stack(), Way(), optimizer_state_bytes=each) for each in (0, 8))
    assert two._held() - none._held() == 8 * (FROZEN + TRAINED)
    batch = (torch.zeros(2, 64),)
    model = geminifx.compile(Stack(), world_size=4, optimizer_state_bytes=0, example_inputs=batch)
    assert model.world.world.optimizer_state_bytes == 0


def test_a_loss_that_is_given_is_measured_with_the_model() -> None:
    source, loss_fn = Stack(), lambda output, y: (output - y).square().mean()
    batch = {"x": torch.randn(2, 64), "y": torch.randn(2, 64)}
    model = geminifx.compile(source, world_size=4, loss_fn=loss_fn, example_inputs=batch)
    assert model.world is not None
    assert "forward" not in vars(source)
    assert Model.of(source, ((batch["x"],), {}), CaptureRequest()).makes_its_loss is False
    far = {"devices": 4, "within": {"latency_s": 1e-4, "bytes_per_s": 1e7}}
    examples = {name: torch.zeros(8, 64) for name in batch}
    assert geminifx.compile(source, cluster=far, loss_fn=loss_fn, example_inputs=examples).plan.mesh.pipeline_axes


def test_a_model_that_does_not_train_is_not_planned_for() -> None:
    frozen = Stack().requires_grad_(False)
    model = geminifx.compile(frozen, world_size=4, example_inputs=(torch.zeros(2, 64),))
    assert model.world is None and model.plan.mesh.data_size == 4
    assert any("no other way was considered" in note for note in model.plan.notes)


class Mixing(Stack):
    """Its examples depend on each other, so that no part of a batch can run alone, though a pipeline would be fast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(0)).square().mean()


def test_a_way_that_the_model_cannot_be_divided_by_is_not_taken() -> None:
    far = {"devices": 4, "within": {"latency_s": 1e-4, "bytes_per_s": 1e7}}
    model = geminifx.compile(Mixing(), cluster=far, example_inputs=(torch.zeros(8, 64),))
    assert model.plan.mesh.data_size == 4
    assert any("not taken: " in note and "pipeline" in note for note in model.plan.notes)
