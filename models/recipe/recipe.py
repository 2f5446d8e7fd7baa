"""How to train, and the result: plain values that the fine-tuning loop takes and returns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from ...runtime.isa.moments import Masters, Moments


@dataclass(frozen=True)
class Recipe:
    """How to train. Every field that the loss curve depends on must stay the same when a run is resumed.

    Attributes:
        output: the directory that checkpoints go to.
        batch_size: blocks per step, over all processes.
        lr: the highest learning rate.
        warmup: steps over which the learning rate rises; it then falls linearly to zero at `steps`.
        moments, masters: how training state is stored, as in `model.optimizer`.
        save_every: steps between checkpoints; 0 saves only the last.
        save_every_s: seconds between checkpoints, checked at the end of each step; 0 for none.
        held_out_batches: the most held-out batches to evaluate on.
    """

    output: Path = field(metadata={"curve": False})
    steps: int
    batch_size: int = 8
    lr: float = 1e-4
    weight_decay: float = 0.01
    warmup: int = 10
    max_grad_norm: float = 1.0
    moments: str = "exact"
    masters: str = "exact"
    seed: int = 0
    save_every: int = field(default=0, metadata={"curve": False})
    save_every_s: float = field(default=0.0, metadata={"curve": False})
    held_out_batches: int = field(default=32, metadata={"curve": False})

    def __post_init__(self) -> None:
        """Raise ValueError if a field is out of range."""
        for name in ("steps", "batch_size", "held_out_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        for name in ("warmup", "save_every", "save_every_s", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}; expected 0 or more")
        for name, known in (("moments", get_args(Moments)), ("masters", get_args(Masters))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}; expected one of {', '.join(known)}")
        for name in ("lr", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}; expected a positive number")

    def curve(self) -> dict[str, Any]:
        """Return the fields that the loss curve depends on."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("curve", True)}

    def is_due(self, step: int, since_s: float) -> bool:
        """Return whether a checkpoint is due after `step` steps, `since_s` seconds after the last one began."""
        return bool(self.save_every and step % self.save_every == 0) or 0 < self.save_every_s <= since_s

    def lr_at(self, step: int) -> float:
        """Return the learning rate of `step`, counted from 0."""
        rising = (step + 1) / (self.warmup + 1)
        falling = (self.steps - step) / max(1, self.steps - self.warmup)
        return self.lr * min(1.0, rising, falling)


@dataclass(frozen=True)
class StepInfo:
    """A finished step; `step` counts from 1, and `tokens` are those of all processes."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    step_s: float


@dataclass(frozen=True)
class Report:
    """What a call of `finetune` did; `losses` are those of its own steps, starting with step `first_step` + 1.

    `perplexity_after` is None if a signal ended the run early; it can then be resumed.
    """

    first_step: int
    losses: tuple[float, ...]
    tokens_per_s: float
    perplexity_before: float
    perplexity_after: float | None

    @property
    def interrupted(self) -> bool:
        """Return whether the run ended before its last step."""
        return self.perplexity_after is None
