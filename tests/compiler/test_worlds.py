"""Worlds of 64 and 1,024 on one process: the plan and the program of one rank, for layers as wide as OPT-66B's."""

from math import prod

import geminifx
import pytest
import torch
from geminifx.models.presets import PRESETS
from geminifx.runtime.isa.errors import StateError
from geminifx.runtime.isa.mesh import names_of, taken_together
from more_models import Detached
from transformers import OPTConfig, OPTForCausalLM

LAYERS = 2


@pytest.fixture(scope="module")
def shape() -> OPTConfig:
    config = PRESETS["opt-66b"].config()
    config.num_hidden_layers, config.dropout = LAYERS, 0.0
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel, world",
    [
        ({"tensor": {"mode": "2.5d", "size": 64, "depth": 1}}, 64),
        pytest.param({"tensor": {"mode": "3d", "size": 64}}, 64, marks=pytest.mark.slow),
        pytest.param({"data": 16, "tensor": {"mode": "2.5d", "size": 64, "depth": 4}}, 1024, marks=pytest.mark.slow),
        ({"data": 128, "tensor": {"mode": "1d", "size": 8}, "zero": 3}, 1024),
    ],
    ids=str,
)
def test_every_rank_has_its_part(shape: OPTConfig, parallel: dict, world: int) -> None:
    with geminifx.init_empty():
        model = OPTForCausalLM(shape).train()
    tokens = torch.zeros(16, 64, dtype=torch.int64)
    compiled = geminifx.compile(
        model, world_size=world, parallel=parallel, precision="bf16", device="cpu", host_budget="1000TB",
        placement="cpu", example_inputs={"input_ids": tokens, "labels": tokens},
    )  # fmt: skip
    plan, text = compiled.plan, compiled.graph["training"]
    assert plan.mesh.size == world
    ranks = prod(axis.size for axis in plan.mesh.weight_axes)
    # Positions are sharded along hidden alone, and so are biases and norms, which are few.
    whole = sum(parameter.numel() for name, parameter in model.named_parameters() if "positions" not in name)
    slots = (slot for chunk in plan.layout.chunks for slot in chunk.slots if "positions" not in slot.name)
    mine = sum(slot.numel for slot in slots)
    assert whole / ranks <= mine <= 1.01 * whole / ranks
    axes = {axis.name for axis in plan.mesh.axes}
    assert {collective.axis for collective in plan.estimate.collectives} == axes | {
        taken_together(names_of(plan.mesh.replica_axes))
    } - {""}
    for axis in plan.mesh.tensor_axes:
        assert f"'{axis.name}'" in text
    if plan.request.zero:
        compiled.optimizer(torch.optim.AdamW, lr=1e-3)
    with pytest.raises(StateError, match=f"torchrun --nproc-per-node {world}"):
        compiled(input_ids=tokens, labels=tokens)


@pytest.mark.parametrize("outputs", ["loss", "all"])
def test_sharded_outputs_beside_the_loss_are_put_together_where_all_are_asked_for(outputs: str) -> None:
    ids = torch.zeros(2, 8, dtype=torch.int64)
    compiled = geminifx.compile(
        Detached(), world_size=2, parallel={"tensor": "1d:2"}, outputs=outputs, example_inputs=(ids,)
    )
    assert compiled.plan.request.outputs == outputs
    assert ("absent" in compiled.graph["training"]) == (outputs == "loss")
