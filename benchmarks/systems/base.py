"""What every system offers to be measured, and what several of them do alike."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from geminifx.runtime.isa.units import parse_bytes
from task import Backward, Inputs, Task
from torch import Tensor

ADAMW = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.1}

CONTEXT_BYTES = 768 * 2**20
"""What driver and libraries take outside of torch's allocator; leaves it that much less than the budget."""


class Contestant(ABC):
    """A system with a model ready to train; making one does all that comes before the first step.

    All train the same weights on the same batches with AdamW and compute in bfloat16 (ours on a machine without a
    GPU in float32). What differs is said in the class's docstring.

    Fields:
        facts: what goes into the result besides what is measured.
        package: the Python package that it needs, where torch does not bring it.
        several: whether it can be measured in several processes.
    """

    package: ClassVar[str | None] = None
    several: ClassVar[bool] = False

    def __init__(self, task: Task):
        self.task = task
        self.facts: dict[str, Any] = {}

    @classmethod
    def refusal(cls, task: Task) -> str | None:
        """Return why it cannot be measured here, or not at this task; None where it can."""
        if cls.package and find_spec(cls.package) is None:
            return f"{cls.package} is not installed: pip install {cls.package}"
        if task.microbatches is not None:
            return (
                "it does not divide a batch into microbatches by itself; use --accumulate, or leave --microbatches out"
            )
        return None

    @abstractmethod
    def step(self) -> Tensor:
        """Run one training step and return its loss, a mean over all tokens that count."""

    def final_facts(self) -> dict[str, Any]:
        """Return what is known only after the last step."""
        return {}

    def profile(self, trace: str) -> object | None:
        """Write the trace of one step more to a file and return a table, where the system can do so."""
        return None


def train(forward: Callable[[Inputs], Tensor], backwards: list[Backward], optimizer: Any) -> Tensor:
    """Run the usual training loop's body and return the loss; `forward` returns that of one backward."""
    total = accumulate(forward, backwards)
    optimizer.step()
    optimizer.zero_grad()
    return total


def accumulate(forward: Callable[[Inputs], Tensor], backwards: list[Backward]) -> Tensor:
    """Add up the gradients of all backwards and return the loss."""
    losses = []
    for backward in backwards:
        loss = forward(backward.inputs)
        if len(backwards) > 1 or backward.share != 1:
            loss = loss * backward.share
        loss.backward()
        losses.append(loss.detach())
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def cap_memory(task: Task) -> None:
    """Keep torch's allocator to the budget, less what the driver takes besides."""
    if task.budget is not None and task.device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        share = (parse_bytes(task.budget, of=total) - CONTEXT_BYTES) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))


def use_all_cores() -> None:
    """Give the host's part of an update every core: launchers leave one to each process."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
