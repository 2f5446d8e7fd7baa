"""What fine-tuning asks of a model, for models that are not compiled."""

from typing import Any

import torch

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

    def __init__(self, kind: type, groups: Any, max_grad_norm: float, **hyper: Any) -> None:
        assert kind is torch.optim.AdamW
        super().__init__(groups, **hyper)
        self.max_grad_norm = max_grad_norm

    def gradients(self) -> list[torch.Tensor]:
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

    def gradient_norm(self) -> torch.Tensor:
        return torch.nn.utils.get_total_norm(self.gradients())

    def state_dict(self, *, first_only: bool = False) -> dict[str, Any]:
        return super().state_dict()

    def step(self, closure: Any = None) -> None:
        scale = (self.max_grad_norm / (self.gradient_norm() + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(self.gradients(), scale)
        super().step(closure)
