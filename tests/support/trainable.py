"""What fine-tuning asks of a model and its checkpoints, for models that are not compiled."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from geminifx.runtime.isa.errors import CheckpointError
from geminifx.runtime.state_io.background import Saving
from transformers import AutoModelForCausalLM

SMALL_OPT = {
    "model_type": "opt",
    "vocab_size": 300,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "ffn_dim": 64,
    "max_position_embeddings": 64,
}
"""A config file for `geminifx train`."""


class ClippedAdamW(torch.optim.AdamW):
    """What a compiled model's own optimizer offers, by torch's."""

    loss_scale = 1.0

    def __init__(self, kind: type, groups: Any, max_grad_norm: float, *, moments: str = "exact", masters: str = "exact",
                 seed: int = 0, **hyper: Any) -> None:  # fmt: skip
        assert kind is torch.optim.AdamW
        super().__init__(groups, **hyper)
        self.max_grad_norm = max_grad_norm
        self.stored = (moments, masters, seed)

    def gradients(self) -> list[torch.Tensor]:
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

    def gradient_norm(self) -> torch.Tensor:
        return torch.nn.utils.get_total_norm(self.gradients())

    def step(self, closure: Any = None) -> None:
        scale = (self.max_grad_norm / (self.gradient_norm() + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(self.gradients(), scale)
        super().step(closure)


class PlainCheckpoints:
    """Those of `model.model`, by Hugging Face, with what torch saves beside it: not replaced as a whole."""

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.model, self.tokenizer = model.model, tokenizer

    def save(self, directory: Path, optimizer: Any, extra: dict[str, Any], *, background: bool = False) -> Saving:
        self.model.save_pretrained(directory)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)
        torch.save({"optimizer": optimizer.state_dict(), "extra": extra}, directory / "rest.pt")
        return Saving.finished()

    def open(self, directory: Path) -> "PlainRun":
        if not (directory / "rest.pt").is_file():
            raise CheckpointError(f"there is nothing to resume in {directory}")
        return PlainRun(self.model, directory, **torch.load(directory / "rest.pt", weights_only=True))


@dataclass
class PlainRun:
    """What `PlainCheckpoints` has opened; `optimizer` is that one's state_dict."""

    model: Any
    directory: Path
    optimizer: Any
    extra: Any

    def load(self, optimizer: Any) -> None:
        saved = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32)
        self.model.load_state_dict(saved.state_dict())
        optimizer.load_state_dict(self.optimizer)
