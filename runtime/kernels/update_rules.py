"""What an optimizer update needs besides weights: gradients, state, and hyper-parameters as `torch.optim` has them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..isa.moments import stored_numel
from .split_pairs import SplitPair

GRADIENT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STORED_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)
"""The dtypes of stored moments; `moments` tells what the bytes stand for."""
SCALE_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Gradient:
    """A gradient and the factor it is multiplied by, in float32 unless both and the master are float64.

    The factor clips, unscales, averages or, if negative, maximizes; 1.0 changes no bit. It may be a 0-d tensor, float32
    or, if any master is, float64, which is read when the update runs: by the device kernel without synchronization, by
    the host kernel as a number, which blocks if the tensor is on a device.
    """

    values: Tensor
    scale: float | Tensor = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.scale, Tensor) and (self.scale.dtype not in SCALE_DTYPES or self.scale.dim()):
            raise ValueError(
                "the scale of a gradient must be a number or a float32 or float64 tensor without dimensions, not "
                f"{self.scale.dtype} {tuple(self.scale.shape)}"
            )


@dataclass(frozen=True)
class AdamMoments:
    """Adam's running means of the gradient and of its square, stored as one of `STORED_DTYPES`; updated in place."""

    mean: Tensor
    square: Tensor


@dataclass(frozen=True)
class Scalars:
    """The factors of one update as `torch.optim` computes them, in double precision; both sides round to float32.

    Attributes:
        l2: coupled weight decay: this times the weight is added to the gradient.
        decay: multiplies the weight.
        step: multiplies what is added to the weight; negative.
        keep, add: the second moment, or the momentum buffer, becomes keep * itself + add * the new term.
        lerp: how far Adam's mean moves towards the gradient.
        root: the square root of Adam's second bias correction.
        eps: added to Adam's denominator.
        mix_keep, mix_add: Lion steps by the sign of mix_keep * its mean + mix_add * the gradient.
    """

    l2: float
    decay: float
    step: float
    keep: float
    add: float
    lerp: float = 0.0
    root: float = 1.0
    eps: float = 0.0
    mix_keep: float = 0.0
    mix_add: float = 0.0


@dataclass(frozen=True)
class AdamHyper:
    """Hyper-parameters of `torch.optim.AdamW`, or of `Adam` if `decoupled` is False.

    Attributes:
        step: the number of this update, from 1.
        key: the 64-bit key of stochastic rounding (`rounding.key_of`); None if masters are exact.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    decoupled: bool = True
    key: int | None = None

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"updates are numbered from 1, but this one has number {self.step}")

    def scalars(self) -> Scalars:
        """Returns the factors of this update."""
        return Scalars(
            l2=0.0 if self.decoupled else self.weight_decay,
            decay=1 - self.lr * self.weight_decay if self.decoupled else 1.0,
            step=-(self.lr / (1 - self.beta1**self.step)),
            keep=self.beta2,
            add=1 - self.beta2,
            lerp=1 - self.beta1,
            root=(1 - self.beta2**self.step) ** 0.5,
            eps=self.eps,
        )


@dataclass(frozen=True)
class SgdHyper:
    """Hyper-parameters of `torch.optim.SGD`.

    Attributes:
        first: whether this is the first update, which fills the momentum buffer instead of reading it.
        key: as `AdamHyper`'s.
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    first: bool = False
    key: int | None = None

    def scalars(self) -> Scalars:
        """Returns the factors of this update."""
        return Scalars(l2=self.weight_decay, decay=1.0, step=-self.lr, keep=self.momentum, add=1 - self.dampening)


@dataclass(frozen=True)
class LionHyper:
    """Hyper-parameters of `optimizer.lion.Lion`.

    Attributes:
        key: as `AdamHyper`'s.
    """

    lr: float
    beta1: float
    beta2: float
    weight_decay: float = 0.0
    key: int | None = None

    def scalars(self) -> Scalars:
        """Returns the factors of this update."""
        return Scalars(
            l2=0.0,
            decay=1 - self.lr * self.weight_decay,
            step=-self.lr,
            keep=self.beta2,
            add=1 - self.beta2,
            mix_keep=self.beta1,
            mix_add=1 - self.beta1,
        )


@dataclass(frozen=True)
class MuonHyper:
    """Hyper-parameters of `torch.optim.Muon`.

    Attributes:
        key: as `AdamHyper`'s.
    """

    lr: float
    weight_decay: float
    momentum: float
    nesterov: bool
    ns_coefficients: tuple[float, float, float]
    eps: float
    ns_steps: int
    adjust_lr_fn: str | None = None
    key: int | None = None


@dataclass(frozen=True)
class AdafactorHyper:
    """Hyper-parameters of `torch.optim.Adafactor`, whose `eps` are `eps1` and `eps2`.

    Attributes:
        step: the number of this update, from 1.
        key: as `AdamHyper`'s.
    """

    lr: float
    beta2_decay: float
    eps1: float | None
    eps2: float
    d: float
    weight_decay: float
    step: int
    key: int | None = None


def choose_variant(wanted: str | None, available: tuple[str, ...]) -> str:
    """Returns the wanted variant of a kernel, by default the first. Raises ValueError if this machine lacks it."""
    if wanted is not None and wanted not in available:
        raise ValueError(f"no variant {wanted!r} on this machine, which has {', '.join(available)}")
    return available[0] if wanted is None else wanted


def check_update(pair: SplitPair, gradient: Gradient, state: tuple[Tensor, ...], device: torch.device, *,
                 widens: bool = False) -> None:  # fmt: skip
    """Checks the tensors of an update, which kernels would otherwise read out of bounds or misinterpret.

    Raises:
        ValueError: a tensor has another size than the weights, a dtype that its role does not allow, is not contiguous,
            or is not on `device`.
    """
    if gradient.values.dtype not in GRADIENT_DTYPES:
        raise ValueError(f"gradients must be bfloat16, float16 or float32, not {gradient.values.dtype}")
    dtypes = STORED_DTYPES if widens else (torch.float32,)
    if any(moment.dtype not in dtypes or moment.dtype != state[0].dtype for moment in state):
        raise ValueError(f"optimizer state must be float32, not {', '.join(str(moment.dtype) for moment in state)}")
    for tensor in (*pair.tensors, gradient.values, *state):
        numel = stored_numel(tensor.dtype, pair.hi.numel()) if tensor.dtype == torch.uint8 else pair.hi.numel()
        if tensor.numel() != numel or not tensor.is_contiguous() or tensor.device != device:
            raise ValueError(
                f"an update of {pair.hi.numel()} weights needs contiguous tensors of that size on {device}, not "
                f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
            )


def check_sum(total: Tensor, gradient: Gradient, threads: int) -> None:
    """Checks the arguments of a sum on the host, which would otherwise be read out of bounds or misinterpreted.

    Raises:
        ValueError: a tensor has another dtype, length, layout or device than the kernel takes, or `threads` is below 1.
    """
    values = gradient.values
    if threads < 1:
        raise ValueError(f"a sum needs at least one thread, not {threads}")
    if total.dtype != torch.float32 or values.dtype not in GRADIENT_DTYPES:
        raise ValueError(
            f"expected bfloat16, float16 or float32 to add to float32, not {values.dtype} to {total.dtype}"
        )
    if total.numel() != values.numel() or not all(
        t.is_contiguous() and t.device.type == "cpu" for t in (total, values)
    ):
        raise ValueError(
            f"a sum needs contiguous tensors of the same size on the host, not {tuple(total.shape)} with strides "
            f"{total.stride()} on {total.device} and {tuple(values.shape)} with {values.stride()} on {values.device}"
        )


def check_momentum(buffer: Tensor | None, hyper: SgdHyper) -> None:
    """Checks that there is a buffer if and only if there is momentum.

    Raises:
        ValueError: there is momentum without a buffer, or a buffer without momentum.
    """
    if (buffer is None) != (hyper.momentum == 0):
        raise ValueError(f"momentum {hyper.momentum} needs {'a' if buffer is None else 'no'} momentum buffer")
