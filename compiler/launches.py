"""What an operator takes of the thread that launches it, measured on training steps of a small model.

A loop over a few operators tells it but roughly (`rates.measure.LOOP_FACTOR`). A model of small blocks has so many
launches for so little work that its step takes as long as they do.
"""

import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..runtime.isa.errors import BudgetError
from .api import compile
from .module import CompiledModule
from .planner.simulate import LAUNCHES
from .rates.calibrate import BusyError

BLOCKS, HEADS, SIZE, TOKENS = 16, 4, 256, 128
STEPS, FIRST = 40, 8
"""How many steps are made, of which the first ones do not count: kernels are chosen and memory is allocated in them."""


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)
        self.projections = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(3))
        self.out = nn.Linear(SIZE, SIZE)
        self.up, self.down = nn.Linear(SIZE, 4 * SIZE), nn.Linear(4 * SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        query, key, value = (part(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.projections)
        x = x + self.out(F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.behind(x))))


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_Block() for _ in range(BLOCKS)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).square().mean()


def measured_launch_s(device: torch.device) -> float:
    """Seconds that a usual operator takes the launching thread of this process on a device. Raises BusyError if the
    device has no room for the model."""
    try:
        return _measured_launch_s(device)
    except (BudgetError, torch.OutOfMemoryError) as error:
        raise BusyError(f"there is not enough free memory to measure: {error}") from error


def _measured_launch_s(device: torch.device) -> float:
    with torch.random.fork_rng(devices=[]):
        source = _Model()
    x = torch.ones(1, TOKENS, SIZE, device=device)
    options = {"device": device.type, "precision": "bf16", "placement": "cuda", "rates": "h200"}
    model = compile(source, **options, example_inputs={"x": x})
    optimizer = model.optimizer(torch.optim.AdamW, in_backward=True)
    seconds = [_step_s(model, optimizer, x) for _ in range(STEPS)]
    launches = dict(model.plan.estimate.busy_s)[LAUNCHES] / model.session.planning.limits.rates.launch_s
    return statistics.median(seconds[FIRST:]) / launches


def _step_s(model: CompiledModule, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    began_s = time.perf_counter()
    model(x).backward()
    optimizer.step()
    optimizer.zero_grad()
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - began_s
