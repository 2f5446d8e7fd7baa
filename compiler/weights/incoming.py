"""Sources of values for a model's weights once these have places in chunks: files, or the modules' own initialisers."""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...models.adapters import blocks
from ...models.initialisers import check_initialisers, initialise
from ...models.lora import adapter_names, initialise_adapters
from ...models.weight_names import Matched, matched
from ...runtime.distributed.local_shards import Region
from ...runtime.isa.errors import CheckpointError, StateError
from ...runtime.kernels.packed import Packed
from ...runtime.kernels.quantized import quantize
from ...runtime.memory.state_store import StateStore
from ...runtime.memory.stored import Stored
from ...runtime.state_io.safetensors_files import Entry, WeightFiles
from .packed_files import PackedEntry, own_names, packed_entries
from .quantized_weights import QuantizedWeight, quantized_weights

Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of whole parameters, by all of their names, for parameters that are divided over processes."""

SHOWN = 5
"""How many names an error or a warning lists."""


@dataclass(frozen=True)
class FromInitialisers:
    """Random values, drawn from `seed` by each module's own initialiser, for the parameters in `names`; None: for all.
    `empty` are all parameters on `meta`, by their first names."""

    source: nn.Module
    empty: dict[str, Tensor]
    seed: int
    names: Collection[str] | None = None

    @classmethod
    def of(
        cls, source: nn.Module, seed: int, shapes: Shapes, names: Collection[str] | None = None
    ) -> "FromInitialisers":
        """Raises StateError if weights are quantised, since codes cannot be drawn."""
        if quantized_weights(source):
            raise StateError(
                "quantised weights cannot be initialised at random, and some weights of this model are quantised: "
                "load all of them from files, or initialise the model before compile(frozen=)"
            )
        return cls(source, _empty(source, shapes), seed, names)

    def check(self) -> None:
        """Raises StateError for a module that has parameters and no initialiser."""
        check_initialisers(self.source)

    def digest(self) -> str:
        return repr((self.seed, self.names))

    def bring(self, store: StateStore) -> None:
        def give(name: str, values: Tensor) -> None:
            if self.names is None or name in self.names:
                _write(store.stored_master(name), values)

        initialise(self.source, self.empty, blocks(self.source), self.seed, give)


@dataclass(frozen=True)
class FromPeft:
    """Values of adapters, as PEFT draws them. `empty` are all parameters on `meta`, by their first names."""

    source: nn.Module
    empty: dict[str, Tensor]
    seed: int

    def check(self) -> None:
        """Raises StateError for adapters that PEFT does not initialise; draws them once to find out, as they are
        small."""
        initialise_adapters(self.source, self.empty, self.seed, lambda name, values: None)

    def digest(self) -> str:
        return repr(self.seed)

    def bring(self, store: StateStore) -> None:
        give = lambda name, values: _write(store.stored_master(name), values)  # noqa: E731
        initialise_adapters(self.source, self.empty, self.seed, give)


@dataclass(frozen=True)
class FromFiles:
    """Values in safetensors files. Each is read from disk directly into its chunk; of a sharded one, only this
    process's shard. What the files lack is drawn by the modules' own initialisers, and adapters by PEFT's."""

    source: nn.Module
    files: WeightFiles
    names: Matched
    packed: dict[str, PackedEntry]
    rest: tuple[FromInitialisers | FromPeft, ...]

    @classmethod
    def found(cls, source: nn.Module, directory: Any, strict: bool, seed: int, shapes: Shapes) -> "FromFiles":
        """The files in `directory`; what they lack is drawn from `seed`. Raises CheckpointError if they are not for
        this model, or, if `strict`, lack some of its weights."""
        files, own = WeightFiles.found(directory), _own_tensors(source)
        packed = packed_entries(files)
        entries = own_names(packed, files)
        names = matched(source, own, entries, files.aliases)
        _check_shapes(own, shapes, entries, names)
        adapters = set(adapter_names(source))
        missing = [name for name in names.missing if name not in adapters]
        told = f"{len(missing)} of the model's weights: {_some(missing)}"
        others = f" (the files have {_some(names.unexpected)} instead)" if names.unexpected else ""
        if missing and strict:
            raise CheckpointError(
                f"nothing was loaded: {directory} lacks {told}{others}. With strict=False they are initialised at "
                "random. If the files use other names for the weights, load them with transformers and compile that "
                "model"
            )
        if missing:
            warnings.warn(f"{directory} lacks {told}, which are initialised at random{others}", stacklevel=3)
        elif names.unexpected:
            warnings.warn(
                f"{len(names.unexpected)} weights in {directory} were not loaded, because the model has none with "
                f"these names: {_some(names.unexpected)}",
                stacklevel=3,
            )
        rest: list[FromInitialisers | FromPeft] = []
        if missing:
            rest.append(FromInitialisers.of(source, seed, shapes, missing))
        if not adapters.isdisjoint(names.missing):
            rest.append(FromPeft(source, _empty(source, shapes), seed))
        return cls(source, files, names, packed, tuple(rest))

    def check(self) -> None:
        self.files.check()
        for each in self.rest:
            each.check()

    def digest(self) -> str:
        parts = (part for each in self.packed.values() for part in each.parts.values())
        read = {*self.names.found.values(), *parts}
        return repr((self.files.digest(read), [each.digest() for each in self.rest]))

    def bring(self, store: StateStore) -> None:
        for each in self.rest:
            each.bring(store)
        targets = self._targets(store)

        def take(name: str, slices: Any) -> None:
            if name in self.packed:
                slices = self.packed[name].packed(name, slices[:], self.files)
            for target in targets[name]:
                target.take(name, slices)

        self.files.read(targets, take)

    def _targets(self, store: StateStore) -> dict[str, list["_Target"]]:
        """The parameters and buffers that each of the files' weights is written to, by the name in the files."""
        first = {id(parameter): name for name, parameter in self.source.named_parameters()}
        own, kept, made = _own_tensors(self.source), quantized_weights(self.source), dict[int, _Target]()
        targets: dict[str, list[_Target]] = {}
        for name, there in self.names.found.items():
            tensor = own[name]
            if name in kept:
                made[id(tensor)] = _Codes(kept[name], *map(store.stored_master, (kept[name].codes, kept[name].scales)))
            elif id(tensor) not in made:
                of = first.get(id(tensor))
                made[id(tensor)] = _Values(_buffer(tensor) if of is None else store.stored_master(of))
            found = targets.setdefault(there, [])
            if all(target is not made[id(tensor)] for target in found):
                found.append(made[id(tensor)])
        return targets


class _Target(Protocol):
    """A destination of a weight in a file; `slices` gives the weight's values by slicing."""

    def take(self, name: str, slices: Any) -> None: ...


@dataclass(eq=False)
class _Values:
    """A parameter or a buffer. Values that come under another of its names must be the same."""

    stored: Stored
    is_written: bool = False

    def take(self, name: str, slices: Any) -> None:
        if self.is_written:
            _check_same(name, self.stored, slices)
        else:
            _write(self.stored, slices)
        self.is_written = True


@dataclass(eq=False)
class _Codes:
    """A quantised weight. It is read whole, then quantised, unless the file has it quantised in the same format."""

    kept: QuantizedWeight
    codes: Stored
    scales: Stored

    def take(self, name: str, slices: Any) -> None:
        if not self.codes.regions and not self.scales.regions:  # it belongs to another stage
            return
        weight = self.kept.weight
        if isinstance(slices, Packed) and slices.format == weight.format:
            _write(self.codes, slices.codes)
            _write(self.scales, slices.scales)
            return
        whole = slices[tuple(slice(0, size) for size in weight.shape)]
        try:
            codes, scales = quantize(whole.to(weight.dtype_before), weight.format)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from error
        _write(self.codes, codes)
        _write(self.scales, scales)


def _own_tensors(source: nn.Module) -> dict[str, Tensor]:
    """The model's state_dict, by all names, with each quantised weight on `meta` in place of its codes and scales."""
    own = dict(source.state_dict(keep_vars=True))
    for name, kept in quantized_weights(source).items():
        del own[kept.codes], own[kept.scales]
        own[name] = torch.empty(kept.weight.shape, dtype=kept.weight.dtype, device="meta")
    return own


def _empty(source: nn.Module, shapes: Shapes) -> dict[str, Tensor]:
    """All parameters on `meta` with their whole shapes, by their first names."""
    return {
        name: p.detach() if p.is_meta else torch.empty(shapes.get(name, p.shape), dtype=p.dtype, device="meta")
        for name, p in source.named_parameters()
    }


def _check_shapes(own: dict[str, Tensor], shapes: Shapes, entries: dict[str, Entry], names: Matched) -> None:
    """Raises CheckpointError if a weight in the files has another shape, or is an integer where a float is needed or
    the other way round."""
    for name, there in names.found.items():
        entry, tensor = entries[there], own[name]
        shape = shapes.get(name, tuple(tensor.shape))
        if entry.shape != shape:
            raise CheckpointError(
                f"nothing was loaded: size mismatch for {name}: {entry.file} has shape {entry.shape}, but {shape} in "
                "the model; the files belong to another model"
            )
        if entry.dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise CheckpointError(
                f"nothing was loaded: {name} is {tensor.dtype}, but {entry.dtype} in {entry.file}; the only quantised "
                "files that can be read are those of bitsandbytes"
            )


def _buffer(buffer: Tensor) -> Stored:
    return Stored.of(
        buffer, tuple(buffer.shape), (Region((0,) * buffer.ndim, tuple(buffer.shape), 0, buffer.stride()),)
    )


def _write(target: Stored, slices: Any) -> None:
    for region in target.regions:
        target.write(region, _everywhere(region), slices[_slices(region)])


def _check_same(name: str, target: Stored, slices: Any) -> None:
    """Raises CheckpointError if two names of one parameter have different values. Compares them as stored, which may be
    rounded."""
    for region in target.regions:
        before = target.read(region).clone()
        target.write(region, _everywhere(region), slices[_slices(region)])
        if not torch.equal(before, target.read(region)):
            raise CheckpointError(
                f"{name} and another weight have different values in the files, but are tied to one parameter in the "
                "model; set tie_word_embeddings=False in the configuration, or use files of this model"
            )


def _slices(region: Region) -> tuple[slice, ...]:
    """A region's slices in the whole tensor."""
    return tuple(slice(start, start + size) for start, size in zip(region.offsets, region.sizes, strict=True))


def _everywhere(region: Region) -> tuple[slice, ...]:
    """Slices that cover all of a region."""
    return tuple(slice(0, size) for size in region.sizes)


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:SHOWN]) + ", ..." * (len(names) > SHOWN)
