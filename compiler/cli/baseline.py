"""Measures the memory that plain PyTorch needs for the same training, to compare against in the demonstration."""

from __future__ import annotations

import copy

import torch

from ...runtime.memory.tiers import MemoryMeter


def plain_peak_bytes(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Return the peak bytes of two plain AdamW steps on a copy of `model`, on the CPU.

    Parameters, gradients, optimizer state, activations and the batch count. It takes two steps because the optimizer
    creates its state at the end of the first, so only the second has that state and activations at once. `model` itself
    is left unchanged.
    """
    with MemoryMeter() as meter, torch.random.fork_rng():
        plain = copy.deepcopy(model)
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        optimizer = torch.optim.AdamW(plain.parameters())
        for _ in range(2):
            plain(**inputs).loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return meter.peak_bytes
