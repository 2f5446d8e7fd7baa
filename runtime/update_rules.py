"""What an optimizer update needs besides weights: gradients, state, and hyper-parameters as `torch.optim` has them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Gradient:
    """A gradient in bfloat16, float16 or float32 and the factor it is multiplied by in float32.

    The factor clips, unscales, averages or, being negative, maximizes; 1.0 changes no bit.
    """

    values: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class AdamMoments:
    """Running means of the gradient and of its square, float32, updated in place."""

    mean: Tensor
    square: Tensor


@dataclass(frozen=True)
class Scalars:
    """The factors of one update as `torch.optim` computes them, in double precision; both routes round to float32.

    Attributes:
        l2: this times the weight is added to the gradient.
        decay: multiplies the weight.
        step: multiplies what is added to the weight; negative.
        keep, add: the second moment, or the momentum buffer, becomes keep * itself + add * the new term.
        lerp: how far Adam's mean moves towards the gradient.
        root: the square root of Adam's second bias correction.
        eps: added to Adam's denominator.
    """

    l2: float
    decay: float
    step: float
    keep: float
    add: float
    lerp: float = 0.0
    root: float = 1.0
    eps: float = 0.0


@dataclass(frozen=True)
class AdamHyper:
    """Hyper-parameters of `torch.optim.AdamW`, or of `Adam` where `decoupled` is False.

    Attributes:
        step: number of this update, the first being 1.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    decoupled: bool = True

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"updates count from 1, but this one is number {self.step}")

    def scalars(self) -> Scalars:
        """Return the factors of this update."""
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
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    first: bool = False

    def scalars(self) -> Scalars:
        """Return the factors of this update."""
        return Scalars(l2=self.weight_decay, decay=1.0, step=-self.lr, keep=self.momentum, add=1 - self.dampening)
