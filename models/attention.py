"""Hugging Face attention as one operator: `attn_implementation="geminifx"`.

Models ask for a mask and for an attention function by name. Ours makes no S x S mask where the pattern is causal,
sliding-window causal or bidirectional, with or without padding: the mask is None, or the padding mask [B, Sk], which
the attention function passes to `geminifx::attention` as its key mask. Everything else (packed sequences, chunks,
blocks, softcap, sinks, position bias, additive masks) stays the model's own eager attention, and a note says why.

A query that sees no key (left padding) gives zeros here and the mean of all values in eager attention. Both are
meaningless, and neither reaches a position that is attended.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from ..runtime.isa.attention import attention
from ..runtime.isa.errors import CaptureError

NAME = "geminifx"


@dataclass(frozen=True)
class Pattern:
    """Which keys a query sees, padding aside. Window 0 means none; `reason`: why our operator cannot express it."""

    causal: bool = False
    window: int = 0
    packed: bool = False
    reason: str | None = None


@dataclass
class _Capture:
    """What one capture learns."""

    notes: list[str]
    windows_due: set[int] = field(default_factory=set)
    windows_used: set[int] = field(default_factory=set)


_CAPTURE: ContextVar[_Capture | None] = ContextVar("geminifx_capture", default=None)
# The pattern behind a padding mask, by identity: the model hands nothing but this tensor from the mask
# function to the attention function.
_PATTERNS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# Tensors filled with ones, with their versions at that time: a padding mask that a model makes up itself hides
# nothing, as long as nobody writes to it. Views share the version of their base.
_ONES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

_MAKES_ONES = {torch.ones, torch.ones_like, torch.Tensor.new_ones}
_CASTS = ("to", "bool", "float", "half", "long", "int", "type")
_VIEWS = ("view", "reshape", "expand", "__getitem__")
_KEEPS_ONES = {getattr(torch.Tensor, name) for name in _CASTS + _VIEWS}
_GET_DATA = torch.Tensor.data.__get__  # a descriptor


class _FollowOnes(TorchFunctionMode):
    """Remembers which tensors of the forward are all ones, through casts, views and slices."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and (func in _MAKES_ONES or (func in _KEEPS_ONES and _is_of_ones(args[0]))):
            if not result.is_inference():  # inference tensors have no version
                _ONES[result] = result._version
        elif func == _GET_DATA and args[0].layout is torch.strided:  # writes through .data leave the version as it is
            _forget(args[0])
        return result


def _is_of_ones(tensor: Tensor) -> bool:
    return tensor in _ONES and bool(_ONES[tensor] == tensor._version)


def _forget(written: Tensor) -> None:
    """No longer take anything that shares memory with `written` to be all ones."""
    storage = written.untyped_storage()._cdata
    for tensor in [known for known in _ONES if known.untyped_storage()._cdata == storage]:
        del _ONES[tensor]


def note(text: str) -> None:
    capture = _CAPTURE.get()
    if capture is not None and text not in capture.notes:
        capture.notes.append(text)


def _leaves(mask_function: Callable[..., Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The names of the closures that `and_masks` combines into a mask, each with the values it encloses."""
    code = mask_function.__code__ if hasattr(mask_function, "__code__") else None
    cells = getattr(mask_function, "__closure__", None) or ()
    enclosed = dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True)) if code else {}
    name = getattr(mask_function, "__qualname__", repr(mask_function)).split(".")[0]
    if name == "and_masks":
        for part in enclosed["mask_functions"]:
            yield from _leaves(part)
    else:
        yield name, enclosed


def read_pattern(mask_function: Callable[..., Any], kv_length: int) -> Pattern:
    """The pattern behind a mask function of transformers.masking_utils, for `kv_length` keys."""
    causal, window, packed = False, 0, False
    for name, enclosed in _leaves(mask_function):
        if name == "causal_mask_function":
            causal = True
        elif name == "sliding_window_overlay":
            size = int(enclosed["sliding_window"])
            window = min(size, window or size) if size < kv_length else window
        elif name == "packed_sequence_mask_function":
            packed = True
        elif name == "sliding_window_bidirectional_overlay":
            if enclosed["sliding_window"] < kv_length - 1:
                return Pattern(reason="a sliding window in both directions")
        elif name != "bidirectional_mask_function":
            return Pattern(reason=f"the mask pattern {name.removesuffix('_overlay')}")
    if window and not causal:
        return Pattern(reason="a sliding window without a causal mask")
    return Pattern(causal, window, packed)


def _why_materialise(pattern: Pattern, options: dict[str, Any]) -> str | None:
    """Why the caller must get a real 4-D mask, or None."""
    if pattern.reason:
        return pattern.reason
    if pattern.packed:
        return "position_ids, which may pack several sequences into a row"
    offsets = (options.get("q_offset", 0), options.get("kv_offset", 0))
    if any(isinstance(offset, Tensor) or offset for offset in offsets):
        return "a key-value cache"
    skips = options.get("allow_is_causal_skip", True) or options.get("allow_is_bidirectional_skip", False)
    return None if skips else "a mask that the model combines with another"


def mask(**options: Any) -> Tensor | None:
    """The mask for `geminifx_attention`: None, padding [B, Sk], or, where unavoidable, additive [B, 1, Sq, Sk].

    Takes the keyword arguments of `transformers.masking_utils.sdpa_mask`.
    """
    kv_length = options["kv_length"]
    pattern = read_pattern(options["mask_function"], kv_length)
    padding: Tensor | None = options.get("attention_mask")
    if padding is not None and _is_of_ones(padding):
        padding = options["attention_mask"] = None
    reason = _why_materialise(pattern, options)
    if reason is not None:
        note(f"attention stays eager: {reason} cannot be expressed by geminifx::attention")
        # transformers would skip a bidirectional mask that hides nothing; finding that out reads data.
        return eager_mask(**{**options, "allow_is_bidirectional_skip": False})
    capture = _CAPTURE.get()
    layers = getattr(options.get("config"), "layer_types", None)
    if padding is None:
        if capture is not None and pattern.window and (layers is None or "sliding_attention" in layers):
            capture.windows_due.add(pattern.window)
        return None
    # As in transformers: keys beyond the end of a short padding mask are hidden, and a long one is cut off.
    key_mask = torch.nn.functional.pad(padding, (0, max(kv_length - padding.shape[-1], 0)))[:, :kv_length]
    # A new tensor, so that two masks over the same padding have two identities.
    key_mask = key_mask.clone()
    _PATTERNS[key_mask] = pattern
    return key_mask


def _pattern_for(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> Pattern:
    """Which keys the queries of this call see, decided as in transformers' sdpa_attention_forward."""
    if attention_mask is not None and attention_mask in _PATTERNS:
        known: Pattern = _PATTERNS[attention_mask]
        return known
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal) and query.shape[2] > 1
    window = options.get("sliding_window") or 0
    window = int(window) if causal and window < key.shape[2] else 0
    capture = _CAPTURE.get()
    if capture is not None and window:
        capture.windows_used.add(window)
    return Pattern(causal, window)


def _why_eager(
    module: torch.nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    options: dict[str, Any],
) -> str | None:
    """Why our operator cannot express a call, or None."""
    query, key, value = tensors
    extras = {
        "softcap": options.get("softcap"),
        "attention sinks": options.get("s_aux", getattr(module, "sinks", None)),
        "a position bias": options.get("position_bias"),
        "a head mask": options.get("head_mask"),
        "output_attentions": options.get("output_attentions") or None,
    }
    for name, found in extras.items():
        if found is not None:
            return name
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (key.shape[0], key.shape[2])):
        return f"a mask {str(mask.dtype).removeprefix('torch.')}{list(mask.shape)}"
    if query.dim() != 4 or not query.dtype == key.dtype == value.dtype or query.shape[1] % key.shape[1]:
        return "its shapes or dtypes"
    return None


def _additive(query: Tensor, key: Tensor, mask: Tensor | None, pattern: Pattern) -> Tensor | None:
    """The eager mask [B or 1, 1, Sq, Sk]: 0 where a query sees a key, the dtype's lowest number elsewhere."""
    if mask is not None and mask.dim() != 2:
        if mask.dtype != torch.bool:
            return mask
        seen = mask
    else:
        seen = torch.ones((), dtype=torch.bool, device=query.device) if mask is None else mask[:, None, None]
        if pattern.causal:
            rows = torch.arange(query.shape[2], device=query.device)[:, None]
            columns = torch.arange(key.shape[2], device=query.device)
            band = columns <= rows
            seen = seen & (band & (columns > rows - pattern.window) if pattern.window else band)
        elif mask is None:
            return None
    zeros = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(seen, zeros, torch.finfo(query.dtype).min)


def geminifx_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function for transformers: query [B, H, Sq, D], key and value [B, Hkv, Sk, D] to [B, Sq, H, D].

    Raises:
        CaptureError: a feature needs eager attention, and the model's source file has none.
    """
    pattern = _pattern_for(module, query, key, attention_mask, options)
    reason = _why_eager(module, (query, key, value), attention_mask, options)
    if reason is None:
        scale = options.get("scaling")
        out = attention(
            query,
            key,
            value,
            key_mask=attention_mask,
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
            causal=pattern.causal,
            dropout=float(options.get("dropout", 0.0)),
            window=pattern.window,
        )
        return out.transpose(1, 2).contiguous(), None
    kind = type(module)
    eager = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
    if eager is None:
        raise CaptureError(
            f"{kind.__name__} uses {reason}, which geminifx::attention cannot express, and {kind.__module__} "
            "has no eager_attention_forward to fall back on; load the model with attn_implementation='eager'"
        )
    note(f"{kind.__name__} stays eager: geminifx::attention cannot express {reason}")
    result: tuple[Tensor, Tensor | None] = eager(
        module, query, key, value, _additive(query, key, attention_mask, pattern), **options
    )
    return result


@contextmanager
def hugging_face_attention() -> Iterator[list[str]]:
    """While a model is traced, follow padding that it makes up and collect notes on attention that stays eager.

    Raises:
        CaptureError: on leaving, if a sliding-window mask was asked for but no layer passed a window.
    """
    capture = _Capture([])
    token = _CAPTURE.set(capture)
    try:
        with _FollowOnes():
            yield capture.notes
    finally:
        _CAPTURE.reset(token)
    missing = capture.windows_due - capture.windows_used
    if missing:
        raise CaptureError(
            f"the model requested a sliding-window mask of {min(missing)} keys, but no attention layer passed "
            "sliding_window; expected both. Load it with attn_implementation='eager', or set sliding_window to None "
            "in its configuration"
        )


AttentionInterface.register(NAME, geminifx_attention)
AttentionMaskInterface.register(NAME, mask)
