"""What is to be measured: a model, the batches of its step, and within what; the same for every system."""

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from geminifx.compiler.parallel import parse_parallel
from random_models import config_of, empty_model, random_model, reads_images
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

IGNORED = -100
"""The label of a token that does not count."""

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Declared:
    """What is told to `geminifx.compile` alone, as it stands on the command line."""

    host_budget: str | None = None
    plan: str | None = None
    recompute: str = "auto"
    parallel: str | None = None
    offload: str = "auto"
    rates: str | None = None
    kernels: str = "exact"
    warmup: bool = False

    @property
    def degrees(self) -> dict[str, Any] | None:
        return parse_parallel(self.parallel) if self.parallel else None


@dataclass(frozen=True)
class Backward:
    """One process's inputs of one backward.

    Fields:
        inputs: the model's keyword arguments.
        targets: how many of its labels count.
        share: the loss of the step is the sum over its backwards of `share` times each one's loss, averaged over the
            processes, whichever lengths their sequences have.
    """

    inputs: Inputs
    targets: int
    share: float = 1.0


@dataclass(frozen=True)
class Task:
    """One point to measure.

    Fields:
        model: its name, see `random_models`.
        batch: sequences, or images, of one backward, of all processes together.
        seq: tokens per sequence; a model with positions for fewer is given more.
        accumulate: backwards of a step, each with a batch of its own.
        microbatches: in how many parts the system itself is to divide a backward's batch; None: as it thinks best.
        dropout: see `random_models.config_of`.
        pad: whether sequences have random lengths between half of `seq` and all of it, and padding on their right.
        budget: of device memory, such as "24GiB"; None: all there is.
        nprocs: in how many processes.
    """

    model: str
    batch: int
    seq: int
    accumulate: int = 1
    microbatches: int | None = None
    dropout: float = 0.0
    pad: bool = False
    budget: str | None = None
    nprocs: int = 1
    declared: Declared = field(default_factory=Declared)

    def described(self) -> dict[str, Any]:
        """Return what a result says of it; images have no `seq`."""
        said = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "declared"}
        return {**said, "seq": None if self.images else self.seq, "host_budget": self.declared.host_budget}

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def config(self) -> PreTrainedConfig:
        return config_of(self.model, self.dropout, self.seq)

    @property
    def images(self) -> bool:
        """Whether the model reads images, which have no `seq`."""
        return reads_images(self.config)

    def empty_model(self) -> PreTrainedModel:
        return empty_model(self.config)

    def random_model(self, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        return random_model(self.config, device, dtype)

    def inputs(self) -> Inputs:
        """Return all inputs of a step, the same ones at every call, on the CPU."""
        rows = self.batch * self.accumulate
        if self.images:
            return random_images(self.config, rows)
        return random_sequences(self.config, rows, self.seq, self.pad)

    def tokens(self) -> int:
        """Return how many tokens a step trains on, padding left out; for images, how many images."""
        inputs = self.inputs()
        if "attention_mask" in inputs:
            return int(inputs["attention_mask"].sum())
        return inputs.get("input_ids", inputs["labels"]).numel()

    def backwards(self, device: torch.device, parts: int = 1, part: int = 0,
                  pixels: torch.dtype = torch.float32) -> list[Backward]:  # fmt: skip
        """Return the step's backwards, or one of the parts that their sequences are divided into.

        Raises ValueError where the batch does not divide by `parts`.
        """
        if self.batch % parts:
            raise ValueError(f"a batch of {self.batch} does not divide by {parts} processes with batches of their own")
        whole, rows, found = self.inputs(), self.batch // parts, []
        total = targets(whole)
        for i in range(self.accumulate):
            first = i * self.batch + part * rows
            own = {name: tensor[first : first + rows] for name, tensor in whole.items()}
            count = targets(own)
            on_device = {k: t.to(device, dtype=pixels if t.is_floating_point() else None) for k, t in own.items()}
            found.append(Backward(on_device, count, count * parts / total))
        return found


def random_sequences(config: PreTrainedConfig, batch: int, seq: int, pad: bool) -> Inputs:
    """Return int64 [batch, seq]: tokens as inputs and, unshifted, as labels; with `pad` an attention mask, too."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config.vocab_size, (batch, seq), generator=generator)
    if not pad:
        return {"input_ids": tokens, "labels": tokens}
    lengths = torch.randint((seq + 1) // 2, seq + 1, (batch, 1), generator=generator)
    real = torch.arange(seq) < lengths
    return {
        "input_ids": tokens.where(real, torch.tensor(config.pad_token_id or 0)),
        "labels": tokens.where(real, torch.tensor(IGNORED)),
        "attention_mask": real.long(),
    }


def random_images(config: PreTrainedConfig, batch: int) -> Inputs:
    """Return float32 pixels [batch, channels, size, size] and int64 labels [batch]."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, config.num_channels, config.image_size, config.image_size)
    labels = torch.randint(0, config.num_labels, (batch,), generator=generator)
    return {"pixel_values": torch.randn(shape, generator=generator), "labels": labels}


def targets(inputs: Inputs) -> int:
    """Return how many labels count: a token's is that of the next one, so that a sequence's first does not."""
    labels = inputs["labels"]
    return int((labels[:, 1:] != IGNORED).sum()) if labels.dim() == 2 else labels.numel()
