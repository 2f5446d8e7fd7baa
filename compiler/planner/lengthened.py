"""Lowers plans of a model from a few of its blocks: what the others take is what equal blocks take.

A block's sections depend on what the plan does with it and with the blocks near it: with as many on either side as
copies start early and end late. So for each block that has other neighbours than those before, a part of the model is
lowered, with the blocks around it, and its sections are kept. A plan that recomputes 40 of 48 blocks is weighed by two
parts of six::

    the model    r r r r r r r r ... r r r r r k k k k k k k k        r: recomputed
    its parts    r r r r r r               r r r k k k                k: kept
                                                     k k k k k k      already there, from another plan
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ...passes.offload import MOST_CHUNKS
from ...passes.program.plan import Plan
from ...passes.program.program import Program, note, type_of
from ...passes.splitting.parts import block_finder
from ...runtime.isa.layout import ChunkLayout, Layout, Slot
from ..capture.trace import Captured
from ..lowering import Flat, Lowering
from ..rates.rates import Rates
from .packing import Together, pack
from .sections import NotRepeatedError, Place, Section, chunk_names, joined, sections
from .storages import tensors_of
from .weighed import Weighed

FEWEST = 6
"""The fewest blocks of a part: those at both of its ends, and at least two that must turn out equal."""

Letter = tuple[int, bool, bool]
"""What distinguishes a block in a plan: its kind, whether it is recomputed, whether it is offloaded."""


@dataclass(frozen=True)
class Part:
    """A step of the model with its first blocks alone: as captured, its parameters and their dtypes, its blocks."""

    captured: Captured
    parameters: dict[str, nn.Parameter]
    dtypes: Mapping[str, torch.dtype]
    blocks: tuple[str, ...]

    def layout(self, together: Together) -> Layout:
        return pack(self.captured.program, self.parameters, self.blocks, self.dtypes, together=together)


@dataclass
class Lengthened:
    """A model's plans, weighed by parts of it.

    Fields:
        blocks, kinds: the model's blocks and which of them are equal; see `shortened.kinds`.
        parameters: the model's parameters.
        part: makes the part with the given number of blocks.
        lowering: the passes to lower parts by.
    """

    blocks: tuple[str, ...]
    kinds: list[int]
    parameters: Mapping[str, nn.Parameter]
    part: Callable[[int], Part]
    lowering: Lowering
    _parts: dict[int, Part] = field(default_factory=dict)
    _known: dict[object, "_Known"] = field(default_factory=dict)

    @property
    def captured(self) -> Captured:
        """The step of the smallest part."""
        return self._of(self._count(1)).captured

    def layout(self, together: Together) -> Layout:
        """The layout of the whole model. Raises NotRepeatedError where parts do not tell it."""
        part = self._of(self._count(1))
        found = self._repeated(part, part.layout(together))
        whole = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        tied = dict(found.tied)
        told = {slot.name: slot.shape for chunk in found.chunks for slot in chunk.slots}
        if told != {name: shape for name, shape in whole.items() if name not in tied}:
            raise NotRepeatedError("the blocks' parameters are not those of equal blocks, or not all are read")
        return found

    def lower(self, plan: Plan, rates: Rates) -> Weighed:
        """A plan's program as the search reads it; `flat` is that of one of its parts, with the inputs of the whole."""
        reach = self._reach(plan)
        count = self._count(reach)
        key = (
            count, reach, plan.format.unit, plan.microbatches, plan.rounds, plan.prefetch, plan.fuse_loss,
            bool(plan.blocks), bool(plan.offload_sums),
        )  # fmt: skip
        known = self._known.setdefault(key, _Known(self._of(count), reach))
        letters = self._letters(plan)
        for number in range(len(self.blocks)):
            if window(letters, number, reach) not in known.windows:
                begin = self._beginning(number, count, reach)
                known.learn(self.lowering, plan, rates, letters[begin : begin + count])
        return known.weighed(self.blocks, letters, plan, rates, [self._like(known.part, i) for i in self._further(count)])

    def _letters(self, plan: Plan) -> list[Letter]:
        recomputed, offloaded = set(plan.recompute), set(plan.offload)
        return [(kind, name in recomputed, name in offloaded)
                for name, kind in zip(self.blocks, self.kinds, strict=True)]  # fmt: skip

    def _reach(self, plan: Plan) -> int:
        """How many blocks away a block's sections may depend on what is done with another one."""
        if not plan.offload:
            return 1
        part = self._of(self._count(1))
        chunks = sum(name.block == 1 for name in chunk_names(part.layout(Together()), part.blocks))
        return 1 + -(-MOST_CHUNKS * max(plan.prefetch, 1) // max(chunks, 1))

    def _count(self, reach: int) -> int:
        """The blocks of a part: enough for the reach on both sides, with the same kinds at its end as the model has."""
        for count in range(max(FEWEST, 2 * reach + 2), len(self.kinds) - 1):
            if self.kinds[-count:] == self.kinds[:count]:
                return count
        raise NotRepeatedError("there are not enough equal blocks for a part to be worth it")

    def _beginning(self, number: int, count: int, reach: int) -> int:
        """Where a part begins that has a block's neighbours, or the model's end where it has not as many."""
        last = len(self.kinds) - count
        for begin in range(min(max(number - reach, 0), last), -1, -1):
            is_inside = begin == last or number + reach < begin + count
            if is_inside and self.kinds[begin : begin + count] == self.kinds[:count]:
                return begin
        raise NotRepeatedError("no part of the model begins with the kinds of blocks that it begins with itself")

    def _of(self, count: int) -> Part:
        if count not in self._parts:
            self._parts[count] = self.part(count)
        return self._parts[count]

    def _repeated(self, part: Part, short: Layout) -> Layout:
        """The layout of a part with the chunks of its inner blocks for all further ones."""
        names, count = chunk_names(short, part.blocks), len(part.blocks)
        more = len(self.blocks) - count
        last = [name.block for name in names].index(count - 1)
        chunks = [*short.chunks[:last]]
        for block in self._further(count):
            like = self._like(part, block)
            chunks += [self._renamed(chunk, part, block - like)
                       for chunk, name in zip(short.chunks, names, strict=True) if name.block == like]  # fmt: skip
        chunks += [self._renamed(chunk, part, more) for chunk in short.chunks[last:]]
        return replace(short, chunks=tuple(replace(chunk, index=index) for index, chunk in enumerate(chunks)))

    def _further(self, count: int) -> range:
        """The blocks that a part does not have: all from its last one on, but for the model's last, which that is."""
        return range(count - 1, len(self.blocks) - 1)

    def _like(self, part: Part, block: int) -> int:
        """A block inside a part that is like a further one."""
        return next(inner for inner in range(len(part.blocks) - 2, 0, -1) if self.kinds[inner] == self.kinds[block])

    def _renamed(self, chunk: ChunkLayout, part: Part, further: int) -> ChunkLayout:
        block_of = block_finder(part.blocks)

        def renamed(slot: Slot) -> Slot:
            block = block_of(slot.name)
            if not block:
                return slot
            name = self.blocks[part.blocks.index(block) + further]
            return replace(slot, name=name + slot.name.removeprefix(block))

        return replace(chunk, slots=tuple(map(renamed, chunk.slots)))


def window(letters: list[Letter], number: int, reach: int) -> tuple[Letter | None, ...]:
    """A block's letter between those of its neighbours; None beyond the first and the last block."""
    return tuple(
        letters[i] if 0 <= i < len(letters) else None for i in range(number - reach, number + reach + 1)
    )


@dataclass
class _Known:
    """The sections found so far in programs that differ only in what they recompute and offload."""

    part: Part
    reach: int
    windows: set[tuple[Letter | None, ...]] = field(default_factory=set)
    found: dict[tuple[int, tuple[Letter | None, ...]], Section] = field(default_factory=dict)
    places: tuple[Place, ...] = ()
    last: Weighed | None = None

    def learn(self, lowering: Lowering, whole: Plan, rates: Rates, letters: list[Letter]) -> None:
        """Lowers the part with these letters, and keeps its sections. Raises NotRepeatedError where others were found
        before in the same surroundings."""
        blocks = self.part.blocks
        plan = replace(
            whole, layout=self.part.layout(Together(whole.format.unit)), blocks=blocks if whole.blocks else (),
            recompute=tuple(name for name, letter in zip(blocks, letters, strict=True) if letter[1]),
            offload=tuple(name for name, letter in zip(blocks, letters, strict=True) if letter[2]),
            offload_sums=("", *blocks) if whole.offload_sums else (),
        )  # fmt: skip
        flat = lowering.flat(self.part.captured.by(plan.microbatches).program, plan)
        self.last = Weighed.of(flat, plan, rates)
        made = sections(flat.program, self.last.liveness, plan, rates, blocks)
        self.places = tuple(made)
        for place, section in made.items():
            around = window(letters, place.block, self.reach)
            self.windows.add(around)
            if self.found.setdefault((place.sweep, around), section) != section:
                raise NotRepeatedError(f"block {place.block} differs from others in the same surroundings")

    def weighed(self, blocks: tuple[str, ...], letters: list[Letter], plan: Plan, rates: Rates,
                likes: list[int]) -> Weighed:  # fmt: skip
        """The whole program, of whose further blocks each is like the part's one that `likes` tells."""
        assert self.last is not None
        parts = [(place, self.found[place.sweep, window(letters, place.block, self.reach)])
                 for place in self._places(len(blocks))]  # fmt: skip
        of_block = _bytes_of_blocks(self.last.flat.program, self.part.blocks)
        static_bytes = self.last.liveness.static_bytes + sum(of_block[like] for like in likes)
        live, timeline = joined(parts, self.last.liveness, static_bytes, plan.layout, blocks, rates)
        return Weighed(Flat(self.last.flat.program), live, timeline)

    def _places(self, count: int) -> Iterator[Place]:
        """The places of a program with `count` blocks, in its order."""
        short = len(self.part.blocks)
        for first in self.places[::short]:
            numbers = range(count) if first.block == 0 else range(count - 1, -1, -1)
            yield from (Place(first.sweep, number) for number in numbers)


def _bytes_of_blocks(program: Program, blocks: tuple[str, ...]) -> list[int]:
    """Bytes of the buffers and constants that each block alone reads."""
    block_of, found = block_finder(blocks), dict.fromkeys(blocks, 0)
    for node in program.placeholders:
        readers = {block_of(note(user).module) for user in node.users}
        if len(readers) == 1 and (block := readers.pop()):
            found[block] += sum(type.num_bytes for type in tensors_of(type_of(node)))
    return list(found.values())
