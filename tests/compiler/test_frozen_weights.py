"""Frozen parameters keep their own dtype: no master, no gradient, no moments, and the numbers of wider ones."""

import geminifx
import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

pytestmark = pytest.mark.usefixtures("shared")

WIDTH, DEPTH = 64, 4


class Adapted(nn.Module):
    """Frozen layers in a dtype, each with a small trained one beside it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.ModuleList(nn.Linear(WIDTH, WIDTH).bfloat16().to(dtype) for _ in range(DEPTH))
        self.beside = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for base, beside in zip(self.base, self.beside, strict=True):
            x = x + torch.tanh(base(x.to(base.weight.dtype)) + beside(x.to(beside.weight.dtype)))
        return x.float().square().mean()


def compiled(dtype: torch.dtype, placement: str) -> geminifx.CompiledModule:
    return geminifx.compile(
        Adapted(dtype), device="cpu", precision="bf16", placement=placement, example_inputs={"x": torch.zeros(4, WIDTH)}
    )


def trained(model: geminifx.CompiledModule, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    losses = []
    for step in range(3):
        loss = model(torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("own", [True, False], ids=["ours", "torch's"])
def test_a_frozen_bf16_weight_takes_2_bytes_and_computes_as_a_float32_one_does(own: bool) -> None:
    found, taken = [], []
    for dtype in (torch.bfloat16, torch.float32):
        model = compiled(dtype, "cpu")
        optimizer = model.optimizer(AdamW, lr=1e-2) if own else AdamW(model.parameters(), lr=1e-2)
        losses = trained(model, optimizer)
        chunks = [chunk for chunk in model.plan.layout.chunks if not chunk.trainable]
        assert {chunk.master_dtype for chunk in chunks} == {dtype}
        homes = model.plan.homes
        taken.append(
            sum(model.plan.format.host_bytes(c, homes[c.index]) for c in chunks) / sum(c.numel for c in chunks)
        )
        assert {value.dtype for name, value in model.state_dict().items() if "base" in name} == {dtype}
        assert model.stats.host_peak_bytes <= model.plan.estimate.host_bytes
        found.append([*losses, *(value.float() for value in model.state_dict().values())])
    assert taken[0] == 2 < taken[1]
    assert all(map(torch.equal, *found))


def test_frozen_weights_are_as_they_were() -> None:
    model, before = compiled(torch.bfloat16, "auto"), Adapted(torch.bfloat16).state_dict()
    trained(model, model.optimizer(AdamW, lr=1e-2, moments="int8"))
    after = model.state_dict()
    assert all(torch.equal(value, before[name]) == ("base" in name) for name, value in after.items())
