"""Errors of ours that are raised from others."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from geminifx.runtime.isa.errors import BudgetError, as_cause
from torch import Tensor


@contextmanager
def told() -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise BudgetError("too much") from as_cause(error)


def fails(found: list[weakref.ref[Tensor]]) -> None:
    activation = torch.ones(1)
    found.append(weakref.ref(activation))
    raise MemoryError


def told_error(found: list[weakref.ref[Tensor]]) -> str:
    try:
        with told():
            fails(found)
    except BudgetError as error:
        return type(error.__cause__).__name__
    return ""


def test_what_a_failed_step_holds_dies_with_its_error_without_a_collection():
    found: list[weakref.ref[Tensor]] = []
    gc.disable()
    try:
        assert told_error(found) == "MemoryError"
        assert found[0]() is None
    finally:
        gc.enable()
