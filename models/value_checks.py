"""Checks of tensors' values that only validate, such as `if labels.max() >= self.vocab_size: raise ValueError(...)`.

A captured program has no values to look at, and none of these changes what is computed: they are taken to pass.
"""

from __future__ import annotations

import ast
import dis
import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

_TORCH = f"{Path(torch.__file__).parent}/"
Range = tuple[tuple[int, int], tuple[int, int]]
"""Of source text: the lines and columns where it begins and ends."""


class _ChecksPass(TorchFunctionMode):
    """Answers `bool(tensor)` where nothing but a check asks."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.__bool__, torch.Tensor.item):  # the latter is what functional tensors ask themselves
            passes = _passing_value(sys._getframe(1))
            if passes is not None:
                return passes
        return func(*args, **(kwargs or {}))


def _passing_value(frame: FrameType | None) -> bool | None:
    """What a tensor's truth has to be for the check that asks for it to pass; None where the model goes by it."""
    while frame is not None and (
        frame.f_code.co_filename.startswith(_TORCH) or frame.f_code.co_name == "__torch_function__"
    ):
        frame = frame.f_back
    if frame is None:
        return None
    instructions = _instructions(frame.f_code)
    asks = instructions[frame.f_lasti]
    if asks.opname == "TO_BOOL":  # which Python 3.13 puts in front of the jump
        asks = instructions[min(offset for offset in instructions if offset > frame.f_lasti)]
    jumps_if = {"TRUE": True, "FALSE": False}.get(asks.opname.rpartition("_IF_")[2])
    check = next((check for check in _checks(frame.f_code.co_filename) if _lies_in(asks, check)), None)
    if jumps_if is None or check is None:
        return None
    # Out of the statement is past it; to anywhere else in it is to where it raises.
    passes = not _lies_in(instructions[asks.argval], check)
    return jumps_if if passes else not jumps_if


@cache
def _instructions(code: CodeType) -> dict[int, dis.Instruction]:
    """By their offsets."""
    return {instruction.offset: instruction for instruction in dis.get_instructions(code)}


@cache
def _checks(filename: str) -> tuple[Range, ...]:
    """Where the statements of a file stand that do nothing but raise where a condition does, or does not, hold."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return ()
    return tuple(
        ((node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0))
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
        or (isinstance(node, ast.If) and not node.orelse and all(isinstance(s, ast.Raise) for s in node.body))
    )


def _lies_in(instruction: dis.Instruction, place: Range) -> bool:
    at = instruction.positions
    if at is None or at.lineno is None or at.col_offset is None:
        return False
    return place[0] <= (at.lineno, at.col_offset) < place[1]


_TORCHS_CHECKS = ("_check_tensor_all", "_check_tensor_all_with", "_assert_async")


@contextmanager
def checks_pass() -> Iterator[None]:
    """Within, checks of values pass unseen: Python's, and torch's that hold for tensors of conditions."""
    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    with ExitStack() as stack:
        for name in _TORCHS_CHECKS:
            if hasattr(torch, name):
                stack.enter_context(mock.patch.object(torch, name, nothing))
        stack.enter_context(_ChecksPass())
        yield
