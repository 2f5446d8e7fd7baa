"""Writes weights for other programs, holding one file's worth of them at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.saving import save_all_but_weights, saved_names, saves_plainly, tell_dtype
from ...runtime.isa.errors import ArgumentError, wrong_argument
from ...runtime.isa.units import parse_bytes
from ...runtime.state_io.safetensors_files import write
from ..session import Session
from .state_dict import Readable, readable_state

DONE_ANYWAY = {"is_main_process": True, "safe_serialization": True, "push_to_hub": False, "variant": None,
               "state_dict": None}  # fmt: skip
"""Options of Hugging Face's `save_pretrained`, with the values that ask only for what happens without them."""


@dataclass(frozen=True)
class SaveRequest:
    """The arguments of a `save_pretrained`.

    Fields:
        max_shard_bytes: the size limit of a file.
        dtype: the dtype that weights are written in; None: their own.
        options: Hugging Face's options that ask for more than `DONE_ANYWAY` does.
    """

    max_shard_bytes: int
    dtype: torch.dtype | None
    options: dict[str, Any]

    @classmethod
    def of(cls, max_shard_size: int | str, dtype: torch.dtype | None, options: dict[str, Any]) -> "SaveRequest":
        """Raises ArgumentError for values that make no sense."""
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise wrong_argument("dtype", dtype, "a floating-point dtype, such as torch.bfloat16, or None")
        try:
            max_shard_bytes = parse_bytes(max_shard_size, of=0)
        except ValueError as error:
            raise ArgumentError(f"max_shard_size: {error}") from error
        given = {name: value for name, value in options.items() if value is not DONE_ANYWAY.get(name, options)}
        return cls(max_shard_bytes, dtype, given)

    def refusal(self, source: Any, rank: int) -> ArgumentError | None:
        """The error for options that would otherwise be ignored; None if there are none. Ranks other than 0, which
        write nothing, may pass is_main_process=False."""
        given = self.options.keys() - {"is_main_process"}
        if "is_main_process" in self.options and rank == 0:
            return wrong_argument("is_main_process", False, "True on rank 0, which writes; on others it may be False")
        if given and not hasattr(source, "save_pretrained"):
            return ArgumentError(
                f"{min(given)}= is for models that define save_pretrained(), but {type(source).__name__} does not: "
                "expected only max_shard_size= and dtype=; use safetensors.torch.save_file for anything else"
            )
        if "safe_serialization" in given and "safe_serialization" not in signature(source.save_pretrained).parameters:
            return wrong_argument("safe_serialization", False, "True: transformers writes only safetensors")
        return None

    def streams(self, source: Any) -> bool:
        """Whether weights can be written one by one; otherwise Hugging Face's own method writes them, which needs
        all."""
        if self.options.keys() - {"is_main_process"}:
            return False
        return not hasattr(source, "save_pretrained") or saves_plainly(source)

    def with_all(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        """Arguments for a model's own `save_pretrained`, given all weights. Leaves out the default `max_shard_size`, as
        not every such method takes one."""
        sized = {} if self.max_shard_bytes == DEFAULT.max_shard_bytes else {"max_shard_size": self.max_shard_bytes}
        given = self.options.get("state_dict", weights)
        return {**sized, **self.options, "state_dict": {name: self.cast(value) for name, value in given.items()}}

    def cast(self, values: Tensor) -> Tensor:
        return values.to(self.dtype) if self.dtype is not None and values.is_floating_point() else values


DEFAULT = SaveRequest.of("5GB", None, {})


def save_streamed(session: Session, directory: Path, request: SaveRequest) -> None:
    """All ranks gather each weight together, and rank 0 writes it. If writing fails, rank 0 keeps gathering for the
    others' sake before it raises."""
    state, source = readable_state(session), session.source
    is_hf = hasattr(source, "save_pretrained")
    names = saved_names(source, list(state.first)) if is_hf else list(state.first)
    left = dict.fromkeys(names)

    def read(name: str) -> Tensor:
        del left[name]
        return request.cast(state.first[name].read())

    if session.ranks.rank == 0:
        try:
            tensors = {name: _saved_as(state.first[name], request) for name in names}
            if is_hf:
                save_all_but_weights(source, directory)
                tell_dtype(directory, (dtype for _, dtype in tensors.values()))
            write(directory, tensors, read, request.max_shard_bytes, {} if is_hf else state.aliases)
            return
        except Exception:
            if session.ranks.together:
                _read_all(list(left), read)
            raise
    _read_all(names, read)


def save_at_once(source: Any, directory: Path, request: SaveRequest, weights: dict[str, Tensor]) -> None:
    """Lets the model write all weights itself, and sets the dtype in its configuration to the one written."""
    arguments = request.with_all(weights)
    dtypes = [value.dtype for value in arguments["state_dict"].values()]
    source.save_pretrained(directory, **arguments)
    tell_dtype(directory, dtypes)


def _saved_as(readable: Readable, request: SaveRequest) -> tuple[tuple[int, ...], torch.dtype]:
    dtype = readable.dtype
    return readable.shape, request.dtype if request.dtype is not None and dtype.is_floating_point else dtype


def _read_all(names: list[str], read: Callable[[str], Tensor]) -> None:
    for name in names:
        read(name)
