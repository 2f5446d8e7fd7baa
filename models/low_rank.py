"""Low-rank adapters beside frozen layers, with the shapes of PEFT's LoRA: for plans, which read no values."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class _LowRank(nn.Module):
    """A linear layer with a trained low-rank adapter beside it."""

    def __init__(self, layer: nn.Linear | Conv1D, rank: int) -> None:
        super().__init__()
        self.layer = layer
        wide = (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else (layer.nx, layer.nf)
        self.down = nn.Linear(wide[0], rank, bias=False)
        self.up = nn.Linear(rank, wide[1], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def adapted(model: nn.Module, blocks: tuple[str, ...], rank: int) -> nn.Module:
    """The model, modified in place: frozen, in bfloat16, with an adapter beside every linear layer of its blocks."""
    model.requires_grad_(False).to(torch.bfloat16)
    device = next(model.parameters()).device
    for path in blocks:
        for parent in list(model.get_submodule(path).modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear | Conv1D) and not isinstance(parent, _LowRank):
                    with device:
                        setattr(parent, name, _LowRank(child, rank))
    return model
