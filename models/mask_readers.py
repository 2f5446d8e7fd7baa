"""Attention modules whose own Python reads the mask: to score keys that it then drops, as sparse attention does, or to
combine it with another mask. Our masks are not suited to that, so these models keep the attention that their
configuration names.

Some modules replace the mask by another, and see all keys if they are given none. Under "sdpa", transformers gives none
if nothing is padded, which it decides by the mask's values: what such a model computes depends on them.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal

from torch import nn

_INTERFACES, _MASK, _MAKES_MASKS = "ALL_ATTENTION_FUNCTIONS", "attention_mask", "create_causal_mask"
_Use = Literal["handed on", "read", "replaced"]


def mask_readers(model: nn.Module) -> list[str]:
    """Class names of the modules that take an attention function by name and also read its mask themselves."""
    return _that_have_it(model, "read")


def mask_replacers(model: nn.Module) -> list[str]:
    """Class names of the modules that read transformers' mask and give the attention function another one instead."""
    return _that_have_it(model, "replaced")


def _that_have_it(model: nn.Module, use: _Use) -> list[str]:
    kinds = {type(module) for module in model.modules()}
    return sorted({kind.__name__ for kind in kinds if _use_of_mask(inspect.unwrap(kind.forward)) == use})


@cache
def _use_of_mask(forward: Callable[..., Any]) -> _Use:
    if _INTERFACES not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return "handed on"
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, SyntaxError):  # made at run time, without source
        return "handed on"
    loads = (node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
    names = {id(node) for node in loads if node.id == _MASK} - {id(node) for node in _not_read(tree)}
    # The attention function is called by a plain name; calls of attributes (modules, libraries) read the mask.
    to_attention, to_others = ({id(node) for node in _given(tree, kind)} for kind in (ast.Name, ast.Attribute))
    if names <= to_attention:
        return "handed on"
    replaced = names & to_others and not names & to_attention and _MAKES_MASKS in forward.__globals__
    return "replaced" if replaced else "read"


def _given(tree: ast.AST, kind: type[ast.expr]) -> Iterator[ast.AST]:
    """The arguments of all calls whose callee is an expression of type `kind`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, kind):
            yield from (*node.args, *(keyword.value for keyword in node.keywords))


def _not_read(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that are only compared (as with None) or type-checked, and those that only run under eager attention."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) or _asks_type(node):
            yield from ast.walk(node)
        elif isinstance(node, ast.If) and any(isinstance(n, ast.Name) and "eager" in n.id for n in ast.walk(node.test)):
            yield from (each for line in node.body for each in ast.walk(line))


def _asks_type(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == isinstance.__name__
