"""A format of training state is one class: here one of moments in bfloat16, which the product does not have."""

from dataclasses import dataclass
from typing import ClassVar

import geminifx
import pytest
import torch
from geminifx.passes.program.plan import Plan
from geminifx.runtime.isa.formats import OwnFormat
from geminifx.runtime.isa.layout import ChunkLayout
from geminifx.runtime.optimizer.declared import Declared
from optimizing import ADAMW, NET, PLACES, Loop, placed, plain
from torch.optim import AdamW


@dataclass(frozen=True)
class HalfMoments(OwnFormat):
    """AdamW's moments take two bytes each."""

    kind: ClassVar[str] = "half moments"

    def moment_dtypes(self, chunk: ChunkLayout) -> tuple[torch.dtype, ...]:
        return (torch.bfloat16,) * len(super().moment_dtypes(chunk))


@pytest.fixture(autouse=True)
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """`model.optimizer(...)` declares it."""
    monkeypatch.setattr(Declared, "format", lambda self, *_: HalfMoments(2, self.in_backward, self.accumulate))


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("where", PLACES)
def test_it_is_planned_placed_and_updated_wherever_it_lies(where: str, precision: str, in_backward: bool) -> None:
    model = placed(NET, where, precision)
    optimizer = model.optimizer(ADAMW[0], **ADAMW[1], in_backward=in_backward)
    elements = sum(chunk.numel for chunk in model.plan.layout.chunks)
    state = sum(model.plan.format.state_bytes(chunk) for chunk in model.plan.layout.chunks)
    assert state == (4 + 2 * 2) * elements, "a master of four bytes, and two moments"
    reference, expected = plain(NET, ADAMW[0], **ADAMW[1])
    losses, plains = Loop().run(NET, model, optimizer), Loop().run(NET, reference, expected)
    # Moments are rounded to 8 bits: an update is off by 2^-8 of itself at most, and so are losses of what they change.
    moved = (plains[0] - plains[-1]).abs()
    assert all((a.float() - b).abs() <= 0.1 * moved for a, b in zip(losses, plains, strict=True)) and moved > 0
    assert model.stats.step.device_peak_bytes <= model.plan.peak_bytes
    assert model.stats.step.host_peak_bytes <= model.plan.estimate.host_bytes
    moments = {m.dtype for state in model.session.machine.store.states for m in state.moments}
    assert moments == {torch.bfloat16}


def test_it_is_saved_in_plans_and_checkpoints(tmp_path) -> None:
    model = placed(NET, "mixed", "bf16")
    optimizer = model.optimizer(AdamW, lr=1e-2)
    Loop(steps=2).run(NET, model, optimizer)
    assert Plan.from_json(model.plan.to_json()) == model.plan and '"half moments"' in model.plan.to_json()
    geminifx.save_checkpoint(model, optimizer, tmp_path / "saved")
    again = placed(NET, "host", "bf16")
    resumed = again.optimizer(AdamW, lr=1e-2)
    geminifx.load_checkpoint(again, resumed, tmp_path / "saved")
    assert all(map(torch.equal, Loop(steps=2).run(NET, model, optimizer, 2), Loop(steps=2).run(NET, again, resumed, 2)))
