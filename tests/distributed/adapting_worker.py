"""One rank of the tests of homes that move in training: `torchrun --nproc-per-node 2 adapting_worker.py OUT NAME...`.

Rank 0 writes to OUT what all ranks found of the names; `test_adapting.py` looks at that.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

import geminifx
import torch
from geminifx.compiler.adaptation import pressure
from geminifx.compiler.adaptation.rehoming import Rehoming
from geminifx.compiler.adaptation.step_watch import StepWatch
from geminifx.compiler.planner.correction import MeasuredStep
from geminifx.passes.program.plan import Plan
from optimizing import homes_of
from torch import distributed as dist
from torch.optim import AdamW
from zoo import OPT, compiled, tokens

STEPS = 6
BUDGET = 1_000_000
"""For all of it."""

RANK = int(os.environ.get("RANK", 0))
Found = dict[str, Any]
"""Losses, which homes were in force behind each step, and the parameters."""


def trained(zero: int, disturb: Callable[[int, geminifx.CompiledModule], None], **options: Any) -> Found:
    given = {"precision": "bf16", "recompute": "none", "device_budget": BUDGET, "parallel": {"zero": zero}, **options}
    model = compiled(OPT, **given)
    optimizer = model.optimizer(AdamW, lr=1e-2)
    losses, homes = [], []
    for step in range(STEPS):
        disturb(step, model)
        optimizer.zero_grad()
        loss = OPT.loss(model, OPT.batch(seed=2 * step + RANK))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        homes.append("; ".join(home.text for home in model.plan.homes))
    return {"losses": losses, "homes": homes, "state": {n: value.clone() for n, value in model.state_dict().items()}}


def calm(zero: int) -> Found:
    return trained(zero, lambda step, model: None)


def warmed_up(zero: int) -> Found:
    """Rank 0 finds other homes better. Rank 1 alone has measured that a step takes longer with them."""
    told = [MeasuredStep(0.8, 0.0, 0.0, 0.0, 0), MeasuredStep(0.4 + 0.8 * RANK, 0.0, 0.0, 0.0, 0)]

    def chosen(rehoming: Rehoming, key: Any, limits: Any) -> Plan:
        assert RANK == 0
        return replace(rehoming.now[key], homes=homes_of("mixed", rehoming.now[key]))

    with (
        mock.patch.object(Rehoming, "chosen", chosen),
        mock.patch.object(Rehoming, "step_s", lambda rehoming, key, plans, limits: 1.0 + (plans == rehoming.now)),
        mock.patch.object(StepWatch, "measured", lambda *about: told.pop(0)),
    ):
        return trained(zero, lambda step, model: None, warmup=1)


def shrunk(zero: int) -> Found:
    """Rank 1 alone lacks room for some steps, and both move."""
    limits: list[int | None] = []

    def disturb(step: int, model: geminifx.CompiledModule) -> None:
        tier = model.session.hardware.device_tier
        limits.append(tier.limit_bytes)
        if RANK == 1 and step in (1, 4):
            tier.limit_bytes = limits[0] if step == 4 else model.plan.peak_bytes * 2 // 3

    pressure.AGREED_STEPS = pressure.PATIENT_STEPS = 1
    return trained(zero, disturb)


def larger(zero: int) -> Found:
    """A batch comes that would need states to move, which processes do only together."""
    said: list[str] = []

    def disturb(step: int, model: geminifx.CompiledModule) -> None:
        if step == 1:
            try:
                OPT.loss(model, tokens(16, 32))
            except geminifx.BudgetError as refusal:
                said.append(str(refusal))

    return {**trained(zero, disturb), "said": said}


CASES = {
    f"{name}, zero {zero}": (found, zero)
    for name, found in {"calm": calm, "warmed up": warmed_up, "shrunk": shrunk, "larger": larger}.items()
    for zero in (0, 2)
}


def main(out: Path, *names: str) -> None:
    found: dict[str, list[Found]] = {}
    for name in names:
        work, zero = CASES[name]
        own = work(zero)
        found[name] = [{}] * dist.get_world_size()
        dist.all_gather_object(found[name], own)
    if RANK == 0:
        torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
