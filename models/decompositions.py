"""Functions that torch's tracer takes apart wrongly, taken apart here.

Of a stack of LSTM, GRU or RNN layers torch forgets the dropout between them, so each layer is called alone. Of
`multilabel_margin_loss` it forgets that targets behind the first -1 do not count.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..runtime.isa.threads import patched
from ..runtime.isa.torch_private import variable_functions

RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def _by_layers(function: Any, *args: Any) -> Any:
    """One of RECURRENT, of a batch (input, states, weights, ...) or of a packed sequence (input, batch sizes, states,
    weights, ...)."""
    at = 3 if isinstance(args[3], list | tuple) else 2
    hx, weights, (bias, layers, dropout, train, bidirectional, *rest) = args[at - 1], args[at], args[at + 1 :]
    if not train or dropout == 0 or layers == 1:
        return function(*args)
    batch_first = any(rest)
    x = args[0].transpose(0, 1) if batch_first else args[0]  # torch drops values in this order
    states, directions, each = hx if isinstance(hx, list | tuple) else (hx,), 1 + bidirectional, len(weights) // layers
    ends: list[tuple[Tensor, ...]] = []
    for layer in range(layers):
        x = F.dropout(x, dropout) if layer else x
        begins = [state[layer * directions : (layer + 1) * directions] for state in states]
        own = weights[layer * each : (layer + 1) * each]
        x, *end = function(x, *args[1 : at - 1], begins if len(begins) > 1 else begins[0], own, bias, 1, 0.0, train,
                           bidirectional, *(False for _ in rest))  # fmt: skip
        ends.append(tuple(end))
    return x.transpose(0, 1) if batch_first else x, *map(torch.cat, zip(*ends, strict=True))


def _multilabel_margin_loss(input: Tensor, target: Tensor, size_average: bool | None = None,
                            reduce: bool | None = None, reduction: str = "mean") -> Tensor:  # fmt: skip
    """torch's function: input [N, C] or [C]; target of the same shape, classes in front of the first -1."""
    if size_average is not None or reduce is not None:
        mean, reduced = size_average is not False, reduce is not False
        reduction = "none" if not reduced else "mean" if mean else "sum"
    counts = (target >= 0).to(target.dtype).cumprod(-1).to(torch.bool)
    classes = torch.where(counts, target, 0)
    asked = torch.zeros_like(target).scatter_add(-1, classes, counts.to(target.dtype)) > 0
    margins = (1 - input.gather(-1, classes).unsqueeze(-1) + input.unsqueeze(-2)).clamp(min=0)
    margins = margins.masked_fill(~counts.unsqueeze(-1) | asked.unsqueeze(-2), 0)
    loss = margins.sum((-2, -1)) / input.shape[-1]
    return {"none": loss, "sum": loss.sum(), "mean": loss.mean()}[reduction]


@contextmanager
def right_decompositions() -> Iterator[None]:
    """Within, these functions of torch are taken apart as above."""
    with ExitStack() as stack:
        for name in RECURRENT:
            for module in (torch, variable_functions):
                stack.enter_context(patched(module, name, partial(_by_layers, getattr(module, name))))
        stack.enter_context(patched(F, "multilabel_margin_loss", _multilabel_margin_loss))
        yield
