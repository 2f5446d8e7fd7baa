"""Attention whose own Python reads the mask: to score keys that it then leaves out, as sparse attention does, or to
join it with another. Our masks are no such tensors: these models keep the attention that their configuration names."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import nn

_INTERFACES, _MASK = "ALL_ATTENTION_FUNCTIONS", "attention_mask"


def mask_readers(model: nn.Module) -> list[str]:
    """Names of the classes of modules that take an attention function by name and read its mask besides."""
    kinds = {type(module) for module in model.modules()}
    return sorted({kind.__name__ for kind in kinds if _reads_mask(inspect.unwrap(kind.forward))})


@cache
def _reads_mask(forward: Callable[..., Any]) -> bool:
    if _INTERFACES not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, SyntaxError):  # made at run time: there is no text
        return False
    passed = {id(node) for node in _passed_on(tree)}
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == _MASK)
    return any(isinstance(name.ctx, ast.Load) and id(name) not in passed for name in names)


def _passed_on(tree: ast.AST) -> Iterator[ast.AST]:
    """What is given to functions, and what is only compared, as with None."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield from ast.walk(node)
        elif isinstance(node, ast.Call):
            yield from (*node.args, *(keyword.value for keyword in node.keywords))
