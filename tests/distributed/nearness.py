"""How near several processes have to come to one: as near as plain PyTorch comes to itself.

The ranks add their parts of a gradient, one process adds all rows: the same terms in another order, and so other
roundings, which differ from processor to processor. AdamW divides a gradient by its size, and where it is rounding
alone, as that of a bias that softmax does not see, it moves by lr a step in one direction or the other. How many
parameters that is true of is no property of ours. So plain PyTorch trains twice, with whole batches and with their rows
in as many parts as there are ranks, and what lies between the two, doubled, is what ranks may differ by; or the bounds
below, where these two are the same bits.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM
from worker import STEPS, Torchs, Trained, Training

# Sums of some hundred terms, 2^-24 each; a parameter goes on by the relative error of its gradient in every step anew.
LR, LOSS, MOMENT, PARAMETER = 1e-2, 2**-18, 2**-12, 2**-14
FAR = 0.02
"""The share of parameters that may have gone elsewhere, in any case."""


def check(found: dict[str, Any], expected: Trained, training: Training) -> None:
    """Ranks found the losses, parameters and moments of one process, and all ranks the same."""
    ranks = len(found["ranks"])
    whole, parts = (plain(training.alone(), number) for number in (1, ranks))
    for agrees, ranks_losses, _ in found["ranks"]:
        assert agrees, "all ranks hold the same bits"
        losses = zip(ranks_losses, expected.losses, whole.losses, parts.losses, strict=True)
        for ours, loss, a, b in losses:
            assert abs(ours - loss) <= max(LOSS * loss, 2 * abs(a - b))
    steps = len(expected.losses)
    apart, plainly = distances(found["state"], expected.state), distances(whole.state, parts.state)
    assert apart.max() <= 2 * LR * steps
    near = PARAMETER * LR * steps
    far, allowed = (apart > near).sum(), 2 * (plainly > near).sum() + FAR * apart.numel()
    assert far <= allowed, f"{far} parameters went elsewhere, of plain PyTorch's {(plainly > near).sum()}"
    same_moments(found["optimizer"], expected.optimizer, [whole.optimizer, parts.optimizer])


def distances(one: dict[str, Tensor], other: dict[str, Tensor]) -> Tensor:
    return torch.cat([(one[key] - value).abs().flatten() for key, value in other.items()])


def same_moments(ours: dict[str, Any], theirs: dict[str, Any], plain: list[dict[str, Any]]) -> None:
    assert ours["state"].keys() == theirs["state"].keys() and ours["param_groups"] == theirs["param_groups"]
    for moment in ("exp_avg", "exp_avg_sq"):
        largest = max(state[moment].abs().max().item() for state in theirs["state"].values())
        a, b = ([state[moment] for state in one["state"].values()] for one in plain)
        plainly = max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))
        for number, state in theirs["state"].items():
            mine = ours["state"][number]
            assert mine["step"] == state["step"] and mine[moment].shape == state[moment].shape
            assert (mine[moment] - state[moment]).abs().max() <= max(MOMENT * largest, 2 * plainly)


_trained: dict[tuple[str, int], Trained] = {}


def plain(training: Training, parts: int) -> Trained:
    """What plain PyTorch finds on whole batches, their rows in so many parts; trainings that are alike share it."""
    key = repr(training), parts
    if key not in _trained:
        _trained[key] = _train(training, parts)
    return _trained[key]


def _train(training: Training, parts: int) -> Trained:
    model, losses = training.case.seeded(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    max_norm = None if isinstance(training.optimizer, Torchs) else training.optimizer.max_grad_norm
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(training.micro):
            losses.append(_backward(model, training.batch(10 * step + micro, slice(None)), parts))
        if training.also == "clip":
            losses.append(nn.utils.clip_grad_norm_(model.parameters(), 0.25).item())
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return Trained(losses, model.state_dict(), optimizer.state_dict(), 0, 0)


def _backward(model: nn.Module, batch: dict[str, Tensor], parts: int) -> float:
    """Gradients and value of the mean loss over all tokens that count, which is that of the parts by their tokens."""
    pieces = [
        dict(zip(batch, rows, strict=True)) for rows in zip(*(v.chunk(parts) for v in batch.values()), strict=True)
    ]
    shifts = 0 if isinstance(model, BertForMaskedLM) else 1  # others predict the next token
    counts = [(piece["labels"][:, shifts:] != -100).sum().item() for piece in pieces]
    loss = 0.0
    for piece, count in zip(pieces, counts, strict=True):
        if count:
            part = model(**piece).loss * (count / sum(counts))
            part.backward()
            loss += part.item()
    return loss
