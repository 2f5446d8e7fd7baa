"""Weights that bitsandbytes quantised in safetensors files: several tensors of a file make one weight of the model.

4 bits    W: codes;  W.absmax, W.quant_map, W.quant_state.bitsandbytes__nf4 (JSON, in bytes), and, with double
          quantisation, W.nested_absmax, W.nested_quant_map
8 bits    W: codes;  in the same layer, SCB and weight_format
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...runtime.isa.errors import CheckpointError
from ...runtime.kernels.packed import Packed, eight_bits, four_bits
from ...runtime.state_io.safetensors_files import Entry, WeightFiles

_STATE = ".quant_state.bitsandbytes__"
_TABLE, _SCALES, _ROWS = "quant_map", "SCB", 0


@dataclass(frozen=True)
class PackedEntry:
    """One weight.

    Fields:
        entry: its dtype and shape as a whole, once dequantised, and its file.
        parts: its tensors besides the codes: bitsandbytes' name for each, mapped to the name in the file.
        told: the contents of its JSON; empty for 8 bits.
    """

    entry: Entry
    parts: dict[str, str]
    told: dict[str, Any]

    def packed(self, name: str, codes: Tensor, files: WeightFiles) -> Packed:
        """The weight, from its `codes` and its other tensors in the files."""
        return self._put_together(name, codes, {part: files.tensor(there) for part, there in self.parts.items()})

    def check(self, name: str, files: WeightFiles) -> None:
        """Raises CheckpointError for an unsupported format, or tensors that do not fit each other."""
        on_meta = {part: _on_meta(files.entries[there]) for part, there in self.parts.items()}
        table = {part: files.tensor(there) for part, there in self.parts.items() if part == _TABLE}
        self._put_together(name, _on_meta(files.entries[name]), on_meta | table)

    def _put_together(self, name: str, codes: Tensor, parts: dict[str, Tensor]) -> Packed:
        try:
            if _SCALES in parts:
                return eight_bits(codes, parts[_SCALES], self.entry.dtype)
            return four_bits(codes, {**self.told, **parts})
        except (ValueError, KeyError, IndexError, RuntimeError) as error:
            raise CheckpointError(
                f"nothing was loaded: {name} in {self.entry.file} is not in the format of bitsandbytes: {error}"
            ) from error


def packed_entries(files: WeightFiles) -> dict[str, PackedEntry]:
    """All quantised weights, by the names of their codes. Raises CheckpointError if a description is not understood."""
    found = {}
    for name in files.entries:
        weight, is_state, kind = name.partition(_STATE)
        if is_state and weight in files.entries:
            found[weight] = _four_bits(files, weight, name, kind)
        elif name.endswith(f".{_SCALES}") and f"{name.removesuffix(_SCALES)}weight" in files.entries:
            weight = f"{name.removesuffix(_SCALES)}weight"
            found[weight] = _eight_bits(files, weight, name)
    for name, each in found.items():
        each.check(name, files)
    return found


def _on_meta(entry: Entry) -> Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")


def _four_bits(files: WeightFiles, weight: str, state: str, kind: str) -> PackedEntry:
    entry = files.entries[weight]
    try:
        told = json.loads(bytes(files.tensor(state).tolist()))
        shape, dtype = tuple(map(int, told["shape"])), getattr(torch, told["dtype"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"nothing was loaded: {state} in {entry.file} does not describe a weight: {error}"
        ) from error
    if kind != "nf4":
        raise CheckpointError(f"nothing was loaded: {weight} in {entry.file} is quantised as {kind}; expected nf4")
    own = {name.removeprefix(f"{weight}."): name for name in files.entries if name.startswith(f"{weight}.")}
    parts = {part: name for part, name in own.items() if name != state}
    return PackedEntry(Entry(entry.file, shape, dtype), parts, told)


def _eight_bits(files: WeightFiles, weight: str, scales: str) -> PackedEntry:
    entry, layout = files.entries[weight], f"{weight}_format"
    if layout in files.entries and int(files.tensor(layout)) != _ROWS:
        raise CheckpointError(
            f"nothing was loaded: {weight} in {entry.file} does not store its codes by rows; load it with "
            "bitsandbytes and save it again"
        )
    return PackedEntry(Entry(entry.file, entry.shape, torch.float32), {_SCALES: scales}, {})


def own_names(packed: dict[str, PackedEntry], files: WeightFiles) -> dict[str, Entry]:
    """The files' tensors under the model's names: each quantised weight as one, without its parts."""
    parts = {name for each in packed.values() for name in each.parts.values()}
    states = {name for name in files.entries if name.partition(_STATE)[0] in packed and _STATE in name}
    layouts = {f"{name}_format" for name in packed}
    plain = {name: entry for name, entry in files.entries.items() if name not in parts | states | layouts}
    return plain | {name: each.entry for name, each in packed.items()}
