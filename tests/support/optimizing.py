"""`model.optimizer(...)` wherever its state may lie, and the same training by torch.optim on a plain model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import geminifx
import torch
from geminifx.passes.program.plan import Plan
from geminifx.runtime.isa.homes import Home, Homes, Where
from geminifx.runtime.optimizer.chunk_optimizer import ChunkOptimizer
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from zoo import Case, compiled, cross_entropy, vectors

Kind = type[Optimizer]
ADAMW: tuple[Kind, dict[str, Any]] = (AdamW, {"lr": 1e-2, "weight_decay": 0.1})
KINDS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "adamw": ADAMW,
    "adam": (Adam, {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
    "momentum": (SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.1}),
    "nesterov": (SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "plain sgd": (SGD, {"lr": 1e-2}),
}

NET = Case(
    "net",
    lambda: nn.Sequential(*(nn.Sequential(nn.Linear(48, 48), nn.GELU()) for _ in range(4)), nn.Linear(48, 3)),
    vectors,
    cross_entropy,
)
"""Three chunks in float32, two in lower precision, and compiled in a tenth of a second."""

MIXED = (Where.DEVICE, Where.STREAMED, Where.HOST)
PLACES: dict[str, Callable[[int], Home]] = {
    "device": lambda index: Home(Where.DEVICE),
    "host": lambda index: Home(),
    "host, resident": lambda index: Home(resident=True),
    "host, spare": lambda index: Home(resident=index % 2 == 0, spare=True),
    "streamed": lambda index: Home(Where.STREAMED),
    "streamed, resident": lambda index: Home(Where.STREAMED, resident=True),
    "mixed": lambda index: Home(MIXED[index % 3], resident=index % 2 == 0),
}


def homes_of(where: str, plan: Plan) -> Homes:
    """A home in one of these places for every chunk; what is frozen is not streamed."""
    homes = map(PLACES[where], range(len(plan.layout.chunks)))
    pairs = zip(plan.layout.chunks, homes, strict=True)
    return tuple(h if c.trainable or not h.streamed else replace(h, where=Where.HOST) for c, h in pairs)


@cache
def _plan(case: Case, precision: str | None) -> Plan:
    return compiled(case, precision=precision, recompute="none").plan


def placed(case: Case, where: str, precision: str | None = None, **options: Any) -> geminifx.CompiledModule:
    """The case's model, compiled by a plan made by hand that puts all training state `where`."""
    plan = _plan(case, precision)
    return compiled(case, precision=precision, plan=replace(plan, homes=homes_of(where, plan)), **options)


@dataclass(frozen=True)
class Loop:
    """A training loop: so many steps of so many backwards each, and what happens between them and `step()`."""

    steps: int = 4
    micro: int = 1
    clip: float | None = None

    def run(self, case: Case, model: nn.Module, optimizer: Optimizer, start: int = 0) -> list[Tensor]:
        torch.manual_seed(1)
        losses = []
        for step in range(start, start + self.steps):
            optimizer.zero_grad()
            for part in range(self.micro):
                loss = case.loss(model, case.batch(seed=10 * step + part))
                loss.backward()
                losses.append(loss.detach().clone())
            if self.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            optimizer.step()
        return losses


def plain(case: Case, kind: Kind, **hyper: Any) -> tuple[nn.Module, Optimizer]:
    """The model as it is, and torch's optimizer in the version whose numbers ours has in float32."""
    model = case.seeded()
    return model, kind(model.parameters(), **hyper, fused=True)


def same_weights(model: nn.Module, other: nn.Module) -> bool:
    found, expected = model.state_dict(), other.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def same_moments(optimizer: Optimizer, other: Optimizer) -> bool:
    """Equal states, but for SGD's without momentum, which holds nothing, and the dtype of counts."""
    found, expected = optimizer.state_dict()["state"], other.state_dict()["state"]
    pairs = [(found.get(i, {}), expected.get(i, {})) for i in {*found, *expected}]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


def held_gradients(model: geminifx.CompiledModule) -> dict[str, Tensor]:
    """The gradients as a backward left them, read without making sums of them as `.grad` does."""
    model.session.machine.store.held.finish()
    states = [model.session.machine.store.state_of(name) for name, _ in model.named_parameters()]
    pairs = zip((name for name, _ in model.named_parameters()), states, strict=True)
    return {name: s.slice(s.held, slot).float() for name, (s, slot) in pairs if slot in s.present}


def last(optimizer: ChunkOptimizer) -> float:
    assert optimizer.grad_norm is not None
    return optimizer.grad_norm.item()


def values(model: geminifx.CompiledModule, optimizer: Optimizer) -> list[Tensor]:
    states = optimizer.state_dict()["state"].values()
    return [*model.state_dict().values(), *(tensor.clone() for state in states for tensor in state.values())]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))
