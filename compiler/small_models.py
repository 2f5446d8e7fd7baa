"""Rates corrected by training steps of small models: what loops over a few operators or updates tell but roughly.

In a step, launches share the processor's caches with all else that the thread does (`rates.measure.LOOP_FACTOR`),
matrix products are quicker than many of them in a row, which the card's power limits, and the host's updates share
cores and memory with the launching thread and with copies.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..passes.program.estimate import Estimate
from ..runtime.isa.errors import BudgetError
from .api import compile
from .module import CompiledModule
from .planner.simulate import DEVICE, HOST, LAUNCHES
from .planner.solution import estimated
from .rates.calibrate import BusyError
from .rates.rates import Rates, Slowdown


@dataclass(frozen=True)
class Shape:
    """A model of `blocks` transformer blocks that trains on sequences of `tokens`."""

    blocks: int
    size: int
    heads: int
    tokens: int
    sequences: int = 1


LAUNCHING = Shape(blocks=16, size=256, heads=4, tokens=128)
"""So many launches for so little work that a step takes as long as they do."""

UPDATING = Shape(blocks=6, size=2048, heads=16, tokens=1024)
"""300 million parameters, whose updates on the host take longer than the rest of a step."""

COMPUTING = tuple(Shape(blocks, size=2048, heads=16, tokens=1024, sequences=4) for blocks in (2, 5))
"""Two models of 100 and 250 million parameters, for whose blocks the device takes longer than launches do, within 6 GB.
What the second one's step takes more than the first one's are blocks alone, without what every step begins with."""

STEPS, FIRST = 40, 8
"""How many steps are made, of which the first ones do not count: kernels are chosen and memory is allocated in them."""

MOST, MOST_OF_PRODUCTS = 4.0, 1.5
"""The most that a small model's steps slow the host's updates, or products, down, or speed them up."""

BINDING = 0.9
"""The share of a step for which the device must be busy if the step is to tell how fast it is."""

HALVINGS = 12


class _Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        size, self.heads = shape.size, shape.heads
        self.before, self.behind = nn.LayerNorm(size), nn.LayerNorm(size)
        self.projections = nn.ModuleList(nn.Linear(size, size) for _ in range(3))
        self.out = nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        query, key, value = (part(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.projections)
        x = x + self.out(F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.behind(x))))


class _Model(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_Block(shape) for _ in range(shape.blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).square().mean()


class _Training:
    """Training of a small model with bfloat16 weights, states on the device or, with "cpu", on the host."""

    def __init__(self, shape: Shape, placement: str, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            source = _Model(shape)
        random = torch.Generator(device).manual_seed(0)  # products of random numbers take more power than those of ones
        self.x = torch.randn(shape.sequences, shape.tokens, shape.size, device=device, generator=random)
        options = {"device": device.type, "precision": "bf16", "placement": placement, "rates": "h200"}
        self.model: CompiledModule = compile(source, **options, example_inputs={"x": self.x})
        self.optimizer = self.model.optimizer(torch.optim.AdamW, in_backward=True)

    def step_s(self) -> float:
        """Makes a step and returns its seconds."""
        began_s = time.perf_counter()
        self.model(self.x).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.x.is_cuda:
            torch.cuda.synchronize(self.x.device)
        return time.perf_counter() - began_s

    def updating_s(self) -> float:
        """Makes a step and returns the seconds for which the host updated."""
        store = self.model.session.store()
        before_s = store.host_update_s
        self.step_s()
        return store.host_update_s - before_s

    def busy_s(self, resource: str, rates: Rates) -> float:
        """Modelled seconds of a step for which a resource is busy."""
        return dict(self.modelled(rates).busy_s).get(resource, 0.0)

    def modelled(self, rates: Rates) -> Estimate:
        """What the planner expects of a step at these rates."""
        session = self.model.session
        compiled = next(iter(session.programs().values()))
        limits = replace(session.planning.limits, rates=rates)
        return estimated(compiled.plan, compiled.flat, limits).plan.estimate


def corrected_by_steps(rates: Rates, device: torch.device) -> Rates:
    """Rates whose launches and updates on the host take what they take in training steps of this process on a device.

    Raises BusyError if the machine has no room for the models.
    """
    try:
        rates = _with_launches(rates, _Training(LAUNCHING, "cuda", device))
        rates = _with_products(rates, device)
        return _with_updates(rates, _Training(UPDATING, "cpu", device))
    except (BudgetError, MemoryError, torch.OutOfMemoryError) as error:
        raise BusyError(f"there is not enough free memory to measure: {error}") from error


def _with_launches(rates: Rates, training: _Training) -> Rates:
    launches = training.busy_s(LAUNCHES, rates) / rates.launch_s
    return replace(rates, launch_s=_usual(training.step_s) / launches)


def _with_products(rates: Rates, device: torch.device) -> Rates:
    """The rates whose products make modelled blocks take as long as measured ones, if the device binds them and has the
    room."""
    try:
        steps = [_timed(shape, device) for shape in COMPUTING]
    except (BudgetError, MemoryError, torch.OutOfMemoryError):
        return rates
    (fewer, fewer_s), (more, more_s) = steps
    expected = more.modelled(rates)
    if dict(expected.busy_s).get(DEVICE, 0.0) < BINDING * expected.step_s:
        return rates
    low, high = 1 / MOST_OF_PRODUCTS, MOST_OF_PRODUCTS
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        slower = rates.with_slower_products(middle)
        modelled_s = more.modelled(slower).step_s - fewer.modelled(slower).step_s
        low, high = (middle, high) if modelled_s < more_s - fewer_s else (low, middle)
    return rates.with_slower_products(high)


def _timed(shape: Shape, device: torch.device) -> tuple[_Training, float]:
    """A model that stays on the device, and the seconds of its steps."""
    training = _Training(shape, "cuda", device)
    return training, _usual(training.step_s)


def _with_updates(rates: Rates, training: _Training) -> Rates:
    modelled_s = training.busy_s(HOST, rates)
    if not modelled_s:
        return rates
    slower = _usual(training.updating_s) / modelled_s
    return replace(rates.slowed(Slowdown(host=min(MOST, max(1 / MOST, slower)))), name=rates.name)


def _usual(measure: Callable[[], float]) -> float:
    return statistics.median([measure() for _ in range(STEPS)][FIRST:])
