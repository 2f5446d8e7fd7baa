"""Whole steps: any module, trained in any way, under any placement and budget, is what plain PyTorch makes of it."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import geminifx
import pytest
import torch
from geminifx.compiler.capture.results import AbsentOutput
from geminifx.runtime.isa.errors import BudgetError
from random_modules import Task, trained
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils import _pytree as pytree

SIZE = 200
STEPS, ROUNDING = 3, 1e-5
KINDS: dict[str, tuple[type[Optimizer], dict[str, Any], dict[str, Any]]] = {
    "adamw": (AdamW, {"lr": 1e-2, "weight_decay": 0.1}, {"fused": True}),
    "adam": (Adam, {"lr": 1e-2}, {"fused": True}),
    "momentum": (SGD, {"lr": 1e-2, "momentum": 0.9}, {"foreach": False}),
    "sgd": (SGD, {"lr": 1e-2}, {"fused": True}),
}
"""Optimizers, their numbers, and the version of torch's that ours has the bits of: its fused SGD with momentum takes
no gradients that come and go."""


@dataclass(frozen=True)
class Way:
    """How a case is trained: by `route`, under `placement`, with a budget that has room for a `share` of the training
    state beyond the least one (None: no budget)."""

    route: str
    kind: str
    placement: str
    share: float | None
    recompute: str
    shown: bool

    @classmethod
    def of(cls, chance: random.Random) -> "Way":
        route = chance.choice(["torch's", "ours", "in backward"])
        placement, share = chance.choice(["cuda", "cpu", "auto"]), chance.choice([None, None, 0.0, 0.3])
        recompute, shown = chance.choice(["auto", "auto", "all", "none"]), chance.random() < 0.7
        return cls(route, chance.choice(list(KINDS)), placement, share, recompute, shown)


@dataclass
class Seen:
    """What a training run shows."""

    values: list[tuple[str, Any]] = field(default_factory=list)

    def add(self, name: str, value: Any) -> None:
        self.values.append((name, value.detach().clone() if isinstance(value, Tensor) else value))


def run(task: Task, module: nn.Module, optimizer: Optimizer, has_loss: bool, gradients: bool) -> Seen:
    seen = Seen()
    for step in range(STEPS):
        batch = task.batch(step)
        torch.manual_seed(step)
        result = module(**task.arguments(batch, has_loss))
        for i, leaf in enumerate(pytree.tree_leaves(result)):
            seen.add(f"output {i} of step {step}", leaf)
        loss = task.loss(result, batch, step, has_loss)
        seen.add(f"loss of step {step}", loss)
        loss.backward()
        seen.add(f"gradient of x in step {step}", batch.x.grad)
        for name, parameter in module.named_parameters() if gradients else ():
            seen.add(f"gradient of {name} in step {step}", parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in {**module.state_dict(), **dict(module.named_buffers())}.items():
            seen.add(f"{name} behind step {step}", value)
    module.eval()
    with torch.no_grad():
        result = module(**task.arguments(task.batch(STEPS), has_loss))
    for i, leaf in enumerate(pytree.tree_leaves(result)):
        seen.add(f"output {i} of the evaluation", leaf)
    return seen


def compiled(task: Task, way: Way, has_loss: bool) -> tuple[geminifx.CompiledModule, Optimizer]:
    """The case's module and optimizer, with the budget that its way asks for."""
    kind, hyper, version = KINDS[way.kind]

    def made(budget: int | None) -> tuple[geminifx.CompiledModule, Optimizer]:
        options = {"placement": way.placement, "device_budget": budget, "recompute": way.recompute}
        shown = {"example_inputs": task.arguments(task.batch(0), has_loss)} if way.shown else {}
        module = geminifx.compile(task.module(), **options, **shown)
        for step in range(2):  # of both branches
            module.prepare(**task.arguments(task.batch(step), has_loss))
        if way.route == "torch's":
            return module, kind(trained(module), **hyper, **version)
        return module, module.optimizer(kind, **hyper, in_backward=way.route == "in backward")

    if way.share is None:
        return made(None)
    least, states = 1, 16 * sum(parameter.numel() for parameter in task.module().parameters())
    for _ in range(4):  # each branch may need more, and ours more than torch's optimizers
        try:
            return made(least if least == 1 else least + int(way.share * states))
        except BudgetError as refused:
            assert refused.smallest_bytes is not None
            least = refused.smallest_bytes
    raise AssertionError(f"the budget that is named, {least} bytes, is refused")


def differences(found: Seen, expected: Seen, tolerance: float) -> Iterator[str]:
    assert [name for name, _ in found.values] == [name for name, _ in expected.values]
    for (name, value), (_, plain) in zip(found.values, expected.values, strict=True):
        if isinstance(value, AbsentOutput):
            continue
        if not isinstance(plain, Tensor) or not isinstance(value, Tensor):
            if value is not plain and value != plain:
                yield f"{name} is {value!r}, expected {plain!r}"
        elif (value.dtype, value.shape) != (plain.dtype, plain.shape):
            yield f"{name} is {value!r}, expected {plain!r}"
        elif not torch.equal(value.nan_to_num(7.0), plain.nan_to_num(7.0)):
            error = (value.double() - plain.double()).abs().max()
            if not error <= tolerance * (1 + plain.double().abs().max()):
                yield f"{name} is off by {error:.3g}"


def compare(task: Task, way: Way, tolerance: float) -> list[str]:
    """In what the compiled module differs from plain PyTorch's. Raises RuntimeError where that cannot train it."""
    plain, gradients = task.module(), way.route != "in backward"
    has_loss = plain.loss is not None
    kind, hyper, version = KINDS[way.kind]
    expected = run(task, plain, kind(trained(plain), **hyper, **version), has_loss, gradients)
    module, optimizer = compiled(task, way, has_loss)
    found = run(task, module, optimizer, has_loss, gradients)
    measured, budget = module.stats.device_peak_bytes, module.plan.request.budget_bytes
    planned = max(program.plan.peak_bytes for _, program in module.session._programs.items())
    assert measured <= planned <= (budget or planned), f"{measured} bytes measured, {planned} planned, {budget} allowed"
    return list(differences(found, expected, tolerance))


def check(number: int) -> str:
    """Whether a case has plain PyTorch's bits, or its values to rounding, or writes to what its own backward reads.

    Values are rounded otherwise where sums are taken in another order: gradients of several outputs are added up with
    those of outputs that no loss uses, and some operators are traced as others. That is compared by an optimizer which
    does not divide by gradients.
    """
    task, way = Task(number), Way.of(random.Random(number))
    try:
        if not compare(task, way, 0.0):
            return "exact"
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        return "refused by plain PyTorch"
    wrong = compare(task, replace(way, kind="sgd"), ROUNDING)
    assert not wrong, f"{way}: {len(wrong)} values differ; {wrong[:3]}"
    return "rounded"


@pytest.mark.campaign
def test_a_random_step_is_plain_pytorchs(cases: Iterator[int]) -> None:
    found = Counter()
    for number in cases:
        try:
            found[check(number)] += 1
        except Exception as error:
            error.add_note(f"in case {number}")
            raise
    assert found["exact"] >= found.total() / 2, found
