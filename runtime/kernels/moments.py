"""The formats of stored moments, in plain torch, with the same bits as the kernels on either side.

As bfloat16, each value is rounded to nearest, ties to even. As 8 bits, a block's scale A is its largest magnitude:

    mean, momentum    code q is the signed integer nearest to 127 m / A, and stands for q / 127 * A
    mean of squares   code q is the integer nearest to 255 sqrt(v) / A, where A is the largest root, but at least 1 if
                      v is not 0; it stands for (q / 255 * A) ** 2

A mean of squares is a divisor. Coding its root doubles the range in decades, and a value that is not 0 never becomes 0,
which would make the step of a small gradient arbitrarily large. A value that was read is stored as the same bits again.
A block with a value that is not finite is NaN as a whole.
"""

import torch
from torch import Tensor

from ..isa.moments import BLOCK, stored_numel

_SIGNED, _UNSIGNED = 127, 255


def widened(stored: Tensor, numel: int, dtype: torch.dtype, *, squares: bool) -> Tensor:
    """A copy of a stored moment's values, `numel` of them, in `dtype`; `squares`: it is a mean of squares."""
    if stored.dtype != torch.uint8:
        return stored.to(dtype, copy=True)
    blocks = stored.view(-1, stored_numel(torch.uint8, BLOCK))
    scale = blocks[:, BLOCK:].contiguous().view(torch.float32)
    codes = blocks[:, :BLOCK] if squares else blocks[:, :BLOCK].view(torch.int8)
    values = codes.float().mul_(1 / (_UNSIGNED if squares else _SIGNED)).mul_(scale)
    return (values.square_() if squares else values).view(-1)[:numel].to(dtype)


def narrow(values: Tensor, stored: Tensor, *, squares: bool) -> None:
    """Stores `values` in `stored`, in the format that its dtype tells; the inverse of `widened`."""
    if stored.dtype != torch.uint8:
        stored.copy_(values)
        return
    whole = values.new_zeros(-(-values.numel() // BLOCK), BLOCK, dtype=torch.float32)
    whole.view(-1)[: values.numel()] = values
    if squares:
        whole = whole.double().sqrt_().float()
    scale = whole.abs().amax(dim=1, keepdim=True)
    divisor = torch.where(scale > 0, scale, 1.0)
    codes = (whole / divisor).mul_(_UNSIGNED if squares else _SIGNED).round_()
    if squares:
        codes = torch.where(whole > 0, codes.clamp(min=1.0), codes)
    codes = torch.where(scale.isfinite(), codes, 0.0)
    scale = torch.where(scale.isfinite(), scale, torch.nan).view(-1)  # flat, else an empty one could not be viewed
    blocks = stored.view(-1, stored_numel(torch.uint8, BLOCK))
    blocks[:, :BLOCK] = codes.to(torch.int16).to(torch.uint8)  # modulo 256: the bits of a signed code
    blocks[:, BLOCK:] = scale.view(torch.uint8).view(-1, 4)
