"""Updates of whole parameters in torch's operators, in place, on any device and without synchronization.

Muon is torch.optim's own. Adafactor is torch.optim's except that the norms of weights and updates stay on the device,
where torch's function waits for each of them.
"""

import torch
from torch import Tensor

from ..isa.torch_private import muon as torch_muon
from .update_rules import AdafactorHyper, MuonHyper


def muon(weight: Tensor, gradient: Tensor, momentum: Tensor, hyper: MuonHyper) -> None:
    """Updates a matrix and its momentum by `torch.optim.Muon`."""
    torch_muon(
        [weight], [gradient], [momentum], lr=hyper.lr, weight_decay=hyper.weight_decay, momentum=hyper.momentum,
        nesterov=hyper.nesterov, ns_coefficients=hyper.ns_coefficients, eps=hyper.eps, ns_steps=hyper.ns_steps,
        adjust_lr_fn=hyper.adjust_lr_fn, has_complex=False,
    )  # fmt: skip


def adafactor(weight: Tensor, gradient: Tensor, variances: tuple[Tensor, ...], hyper: AdafactorHyper) -> None:
    """Updates a parameter by `torch.optim.Adafactor`, and `variances`: those of its rows and of its columns, or, for a
    vector, those of its elements."""
    change = hyper.step**hyper.beta2_decay
    eps1 = torch.finfo(weight.dtype).eps if hyper.eps1 is None else hyper.eps1
    rate = min(hyper.lr, 1 / hyper.step**0.5)
    length = _root_mean_square(weight).clamp_(min=hyper.eps2).mul_(rate)
    if hyper.weight_decay:
        weight.mul_(1 - hyper.lr * hyper.weight_decay)
    if weight.dim() > 1:
        rows, columns = variances
        for variance, dim in ((rows, -1), (columns, -2)):
            mean = torch.linalg.vector_norm(gradient, dim=dim, keepdim=True).square_().div_(gradient.size(dim))
            variance.lerp_(mean, change)
        update = (rows @ columns).div_(rows.mean(dim=-2, keepdim=True).clamp_(min=eps1))
    else:
        update = variances[0].lerp_(gradient * gradient, change).clone()
    update.clamp_(min=eps1 * eps1).rsqrt_().mul_(gradient)
    shrunk = _root_mean_square(update).div_(hyper.d).clamp_(min=1.0)
    weight.addcmul_(update, length.div_(shrunk).neg_().to(weight.dtype))


def _root_mean_square(values: Tensor) -> Tensor:
    """The root mean square, a float64 scalar from a norm in the values' own dtype."""
    return values.norm(2).double().div_(values.numel() ** 0.5)
