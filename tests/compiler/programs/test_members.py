"""What a model consists of is walked again where it was changed, and only there."""

import pytest
import torch
from geminifx.compiler.programs.members import Census
from torch import nn


def _model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.add_module("tied", model[0])
    return model


def test_it_is_what_modules_say() -> None:
    model = _model()
    found = Census(model).now()
    assert found.modules == dict(model.named_modules())
    assert list(found.parameters) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(found.buffers) == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]


CHANGES = {
    "a parameter replaced": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(2, 2))),
    "a parameter removed": lambda m: setattr(m[0], "bias", None),
    "a buffer replaced by an equal one": lambda m: setattr(m[1], "running_mean", torch.zeros(2)),
    "a buffer added": lambda m: m[0].register_buffer("more", torch.zeros(())),
    "a module added": lambda m: m.append(nn.ReLU()),
    "a module replaced": lambda m: m.__setitem__(0, nn.Linear(2, 2)),
    "a module renamed": lambda m: m._modules.update(other=m._modules.pop("tied")),
    "a deep module added": lambda m: m[1].add_module("inner", nn.ReLU()),
    "a dict replaced": lambda m: vars(m[0]).update(_buffers={"new": torch.ones(1)}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change) -> None:  # type: ignore[no-untyped-def]
    model = _model()
    census = Census(model)
    before = census.now()
    assert census.now() is before, "nothing was changed"
    change(model)
    after = census.now()
    assert after is not before
    assert after.modules == dict(model.named_modules())
    assert [*map(id, after.parameters.values())] == [*map(id, model.parameters())]
    buffers = dict(model.named_buffers(remove_duplicate=False))
    assert {n: id(b) for n, b in after.buffers.items()} == {n: id(b) for n, b in buffers.items()}
    assert census.now() is after
