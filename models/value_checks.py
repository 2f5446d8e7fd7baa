"""Checks of tensors' values that only validate, such as `if labels.max() >= self.vocab_size: raise ValueError(...)`.

A capture has no values to look at, and these checks do not change what is computed: they are assumed to pass. Whether
a mask is causal decides only how torch's transformers compute with it: to them it is not, unless they are told.
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

import torch
from torch.nn.modules import transformer
from torch.overrides import TorchFunctionMode

from ..runtime.isa.threads import patched

_TORCH = f"{Path(torch.__file__).parent}/"
_DISTRIBUTIONS = f"{_TORCH}distributions/"
_TAKES = {"LOAD_ATTR": 1, "LOAD_METHOD": 1, "BINARY_SUBSCR": 2, "BINARY_OP": 2}
"""How many stack entries an instruction consumes, for those that may compute the other operand of a comparison."""
_TORCHS_CHECKS = ("_check_tensor_all", "_check_tensor_all_with", "_assert_async")


class _ChecksPass(TorchFunctionMode):
    """Answers `bool(tensor)` and `tensor.item()` if only a check asks."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.__bool__, torch.Tensor.item):  # functional tensors call item
            frame = _asking(sys._getframe(1))
            passes = None if frame is None else _passing_value(frame)
            if passes is not None:
                return passes
            if frame is not None and _compares_in_a_check(frame):
                return _Compared(args[0])
        return func(*args, **(kwargs or {}))


class _Compared:
    """Stands in for a number that a check compares: the comparison's result makes the check pass."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __bool__(self) -> bool:
        passes = _passing_value(sys._getframe(1))
        return bool(self._tensor) if passes is None else passes

    def _other(self, _: object) -> _Compared:
        return self

    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _other  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


def _asking(frame: FrameType | None) -> FrameType | None:
    """The innermost frame outside of torch, which asks for a tensor's value. Distributions check their arguments, so
    they count as outside."""
    while frame is not None:
        file = frame.f_code.co_filename
        is_inside = file.startswith(_TORCH) and not file.startswith(_DISTRIBUTIONS)
        if not is_inside and frame.f_code.co_name != "__torch_function__":
            break
        frame = frame.f_back
    return frame


def _compares_in_a_check(frame: FrameType) -> bool:
    """Whether the value that the frame's current call returns is compared in a check."""
    code = _Code(frame.f_code)
    above = 0  # entries on the stack above the value
    for step in code.instructions[code.at(frame.f_lasti) + 1 :]:
        if step.opname == "COMPARE_OP":
            return above < 2 and _lines_of_check(frame, step) is not None
        takes = _TAKES.get(step.opname, 0 if step.opname.startswith("LOAD_") else above + 1)
        if above < takes:
            return False
        above += dis.stack_effect(step.opcode, step.arg)
    return False


def _lines_of_check(frame: FrameType, step: dis.Instruction) -> range | None:
    """The lines of the check that an instruction belongs to, or None."""
    line = step.positions.lineno if step.positions is not None else None
    return next((lines for lines in _checks(frame.f_code.co_filename) if line in lines), None)


def _passing_value(frame: FrameType) -> bool | None:
    """The truth value of a tensor with which the asking check passes; None if the model branches on it instead."""
    code = _Code(frame.f_code)
    at = code.at(frame.f_lasti)
    if code.instructions[at].opname in ("TO_BOOL", "COMPARE_OP"):  # Python 3.13 has these in front of the jump
        at += 1
    asks = code.instructions[at]
    jumps_if = {"TRUE": True, "FALSE": False}.get(asks.opname.rpartition("_IF_")[2])
    lines = _lines_of_check(frame, asks)
    if jumps_if is None or lines is None:
        return None
    # `a or b` goes on to b, which may raise, if a is false: if both ways can raise, take the one that need not.
    for raises in (code.can_raise, code.must_raise):
        there, behind = raises(code.place[asks.argval], lines), raises(at + 1, lines)
        if there != behind:
            return jumps_if if behind else not jumps_if
    return None


class _Code:
    """Follows the control flow through a function's instructions."""

    def __init__(self, code: CodeType) -> None:
        self.instructions = list(dis.get_instructions(code))
        self.place = {instruction.offset: i for i, instruction in enumerate(self.instructions)}

    def at(self, offset: int) -> int:
        """The index of the instruction being executed; `offset` may lie within its inline caches."""
        return max(i for i, instruction in enumerate(self.instructions) if instruction.offset <= offset)

    def can_raise(self, start: int, lines: range) -> bool:
        """Whether the statement on `lines`, entered at instruction `start`, raises on some path."""
        return self._follow(start, lines, any)

    def must_raise(self, start: int, lines: range) -> bool:
        return self._follow(start, lines, all)

    def _follow(self, at: int, lines: range, together: Callable[[list[bool]], bool]) -> bool:
        while at < len(self.instructions):
            step = self.instructions[at]
            name, line = step.opname, step.positions.lineno if step.positions is not None else None
            if name == "RAISE_VARARGS":
                return True
            # A loop's back jump and a function's end carry the line of the statement before them.
            if name.startswith("RETURN") or "BACKWARD" in name or name == "FOR_ITER" or line not in lines:
                return False
            if "JUMP" in name and "_IF_" in name:
                ways = (self.place[step.argval], at + 1)
                return together([self._follow(way, lines, together) for way in ways])
            at = self.place[step.argval] if name.startswith("JUMP") else at + 1
        return False


@cache
def _checks(filename: str) -> tuple[range, ...]:
    """The line ranges of a file's checks: statements that only raise, depending on a condition, outside of any `try` of
    that file with handlers."""
    linecache.checkcache(filename)  # the file may have been edited
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return ()
    caught = {node for each in ast.walk(tree) if isinstance(each, ast.Try) and each.handlers
              for statement in each.body for node in ast.walk(statement)}  # fmt: skip
    return tuple(
        range(node.lineno, (node.end_lineno or node.lineno) + 1)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assert, ast.If)) and node not in caught and _only_raises(node)
    )


def _only_raises(node: ast.Assert | ast.If) -> bool:
    return isinstance(node, ast.Assert) or (not node.orelse and all(isinstance(s, ast.Raise) for s in node.body))


def _causal_if_told(mask: torch.Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True


@contextmanager
def checks_pass() -> Iterator[None]:
    """Within, checks of values are assumed to pass: Python's, and torch's that take tensors of conditions."""
    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    with ExitStack() as stack:
        stack.callback(_checks.cache_clear)
        for name in _TORCHS_CHECKS:
            if hasattr(torch, name):
                stack.enter_context(patched(torch, name, nothing))
        stack.enter_context(patched(transformer, "_detect_is_causal_mask", _causal_if_told))
        stack.enter_context(_ChecksPass())
        yield
