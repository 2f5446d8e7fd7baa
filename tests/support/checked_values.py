"""Forwards that ask for the values of tensors. They stand here because pytest rewrites what a test module asserts."""

from collections.abc import Callable

from torch import Tensor


def in_a_loop(x: Tensor) -> Tensor:
    for y in (x, x):
        if (y > 3).any():
            raise ValueError("too large")
    return x


def last(x: Tensor) -> None:
    if (x > 3).any():
        raise ValueError("too large")


def nested(x: Tensor) -> None:
    if x.ndim == 2:  # noqa: SIM102
        if (x > 3).any():
            raise ValueError("too large")


def asserted(x: Tensor) -> None:
    assert (x < 3).all()


def by_a_helper(check: Callable[[Tensor], None]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        check(x)
        return x

    return forward


def joined(x: Tensor) -> Tensor:
    if x is not None and (x > 3).any():
        raise ValueError("and")
    if (x > 4).any() or (x > 5).any():
        raise ValueError("or")
    if not ((x < 3).all() and (x < 4).all()):
        raise ValueError("not and")
    if not (x < 3).all() or (x.ndim == 2 and (x > 6).any()):
        raise ValueError("not or and")
    assert (x < 3).all() and (x < 4).all(), "assert and"
    assert (x > 3).any() or (x < 3).all(), "assert or"
    return x


def of_a_number(x: Tensor) -> Tensor:
    lowest = -3
    assert x.max().item() <= x.shape[0]
    assert lowest < x.min().item(), f"{x.min().item()} is too small"
    assert x.max().item() < x.shape[0] * 2 + 1
    if x.sum().item() > 100.0 or not x.shape[0] >= x.min().item():
        raise ValueError("too large")
    return x


PASSING = {
    "of a number": of_a_number,
    "in a loop": in_a_loop,
    "the last of a function": by_a_helper(last),
    "in another if": by_a_helper(nested),
    "an assert at the end": by_a_helper(asserted),
    "joined": joined,
}


def decides(x: Tensor) -> Tensor:
    if x.sum() > 0:
        x = x * 2
    return x


def decides_by_a_number(x: Tensor) -> Tensor:
    if x.sum().item() > 0:
        x = x * 2
    return x


def computes_with_what_it_checks(x: Tensor) -> Tensor:
    assert x.max().item() * 2 < 6
    return x * x.max().item()


def is_caught(x: Tensor) -> Tensor:
    try:
        if (x > 100).any():
            raise OverflowError
    except OverflowError:
        return x * 0
    return x


def raises_or_goes_on(x: Tensor) -> Tensor:
    if (x > 100).any():
        raise OverflowError
    else:
        x = x + 1
    return x
