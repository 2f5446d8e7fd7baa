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

from ..runtime.isa.threads import in_this_thread

_TORCH = f"{Path(torch.__file__).parent}/"
_TAKES = {"LOAD_ATTR": 1, "LOAD_METHOD": 1, "BINARY_SUBSCR": 2, "BINARY_OP": 2}
"""How much Python's instructions take off its stack, of those that read what a comparison is with."""
_TORCHS_CHECKS = ("_check_tensor_all", "_check_tensor_all_with", "_assert_async")


class _ChecksPass(TorchFunctionMode):
    """Answers `bool(tensor)` and `tensor.item()` where nothing but a check asks."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.__bool__, torch.Tensor.item):  # the latter is what functional tensors ask themselves
            frame = _asking(sys._getframe(1))
            passes = None if frame is None else _passing_value(frame)
            if passes is not None:
                return passes
            if frame is not None and _compares_in_a_check(frame):
                return _Compared(args[0])
        return func(*args, **(kwargs or {}))


class _Compared:
    """In the place of a number that a check compares: the comparison comes out as the check would have it."""

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
    """The frame outside of torch that asks for a tensor's value."""
    while frame is not None and (
        frame.f_code.co_filename.startswith(_TORCH) or frame.f_code.co_name == "__torch_function__"
    ):
        frame = frame.f_back
    return frame


def _compares_in_a_check(frame: FrameType) -> bool:
    """Whether a check goes on to compare what it was given by the call that it has made."""
    code = _Code(frame.f_code)
    above = 0  # of that on Python's stack
    for step in code.instructions[code.at(frame.f_lasti) + 1 :]:
        if step.opname == "COMPARE_OP":
            return above < 2 and _lines_of_check(frame, step) is not None
        takes = _TAKES.get(step.opname, 0 if step.opname.startswith("LOAD_") else above + 1)
        if above < takes:
            return False
        above += dis.stack_effect(step.opcode, step.arg)
    return False


def _lines_of_check(frame: FrameType, step: dis.Instruction) -> range | None:
    """The lines of the check that an instruction is of; None for one that is of no check."""
    line = step.positions.lineno if step.positions is not None else None
    return next((lines for lines in _checks(frame.f_code.co_filename) if line in lines), None)


def _passing_value(frame: FrameType) -> bool | None:
    """What a tensor's truth has to be for the check that asks for it to pass; None where the model goes by it."""
    code = _Code(frame.f_code)
    at = code.at(frame.f_lasti)
    if code.instructions[at].opname in ("TO_BOOL", "COMPARE_OP"):  # which Python 3.13 has in front of the jump
        at += 1
    asks = code.instructions[at]
    jumps_if = {"TRUE": True, "FALSE": False}.get(asks.opname.rpartition("_IF_")[2])
    lines = _lines_of_check(frame, asks)
    if jumps_if is None or lines is None:
        return None
    # `a or b` asks for b where a is false, and may raise then: of two ways that can raise, the one that need not.
    for raises in (code.can_raise, code.must_raise):
        there, behind = raises(code.place[asks.argval], lines), raises(at + 1, lines)
        if there != behind:
            return jumps_if if behind else not jumps_if
    return None


class _Code:
    """Where the ways through a function's instructions lead."""

    def __init__(self, code: CodeType) -> None:
        self.instructions = list(dis.get_instructions(code))
        self.place = {instruction.offset: i for i, instruction in enumerate(self.instructions)}

    def at(self, offset: int) -> int:
        """The place of the instruction that is being executed, where the offset may be within its inline caches."""
        return max(i for i, instruction in enumerate(self.instructions) if instruction.offset <= offset)

    def can_raise(self, start: int, lines: range) -> bool:
        """Whether a statement on these lines, entered at an instruction, raises in one of its ways."""
        return self._follow(start, lines, any)

    def must_raise(self, start: int, lines: range) -> bool:
        return self._follow(start, lines, all)

    def _follow(self, at: int, lines: range, together: Callable[[list[bool]], bool]) -> bool:
        while at < len(self.instructions):
            step = self.instructions[at]
            name, line = step.opname, step.positions.lineno if step.positions is not None else None
            if name == "RAISE_VARARGS":
                return True
            # A loop's way back and a function's end have no line of their own: they count to the statement before.
            if name.startswith("RETURN") or "BACKWARD" in name or name == "FOR_ITER" or line not in lines:
                return False
            if "JUMP" in name and "_IF_" in name:
                ways = (self.place[step.argval], at + 1)
                return together([self._follow(way, lines, together) for way in ways])
            at = self.place[step.argval] if name.startswith("JUMP") else at + 1
        return False


@cache
def _checks(filename: str) -> tuple[range, ...]:
    """The lines of the statements of a file that do nothing but raise where a condition does, or does not, hold, and
    whose exception nobody catches there."""
    linecache.checkcache(filename)  # the source may have been edited
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


@contextmanager
def checks_pass() -> Iterator[None]:
    """Within, checks of values pass unseen: Python's, and torch's that hold for tensors of conditions."""
    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    with ExitStack() as stack:
        stack.callback(_checks.cache_clear)
        for name in _TORCHS_CHECKS:
            if hasattr(torch, name):
                passes = in_this_thread(nothing, getattr(torch, name))
                stack.enter_context(mock.patch.object(torch, name, passes))
        stack.enter_context(_ChecksPass())
        yield
