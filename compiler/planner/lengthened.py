"""Lowers plans of a model from a few of its blocks: what the others take is what equal blocks take.

A block's sections depend on what the plan does with it and with the blocks near it: with as many on either side as
copies start early and end late. So for each block that has other neighbours than those before, a part of the model is
lowered, with the blocks around it, and its sections are kept. A plan that recomputes 40 of 48 blocks is weighed by two
parts of six::

    the model    r r r r r r r r ... r r r r r k k k k k k k k        r: recomputed
    its parts    r r r r r r               r r r k k k                k: kept
                                                     k k k k k k      already there, from another plan
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import nn

from ...passes.offload import MOST_CHUNKS
from ...passes.program.plan import Plan
from ...passes.program.program import Program, note, type_of
from ...passes.splitting.parts import block_finder
from ...runtime.isa.layout import ChunkLayout, Layout
from ..capture.trace import Captured
from ..lowering import Flat, Lowering
from ..rates.rates import Rates
from .packing import Together, Use, pack, uses
from .sections import NotRepeatedError, Place, Section, joined, sections
from .storages import tensors_of
from .weighed import Weighed

FEWEST = 6
"""The fewest blocks of a part: those at both of its ends, and at least two that must turn out equal."""

NEAR = 1
"""How many blocks away a block's sections may depend on another one where chunks are fetched one ahead and no
activations are copied."""

Letter = tuple[int, int, bool, bool]
"""What distinguishes a block in a plan: its kind, that of its chunks, whether it is recomputed, whether offloaded."""

Window = tuple[Letter | bool, ...]


@dataclass(frozen=True)
class Part:
    """A step of the model with its first blocks alone: as captured, and the names of these blocks."""

    captured: Captured
    blocks: tuple[str, ...]


@dataclass
class Lengthened:
    """A model's plans, weighed by parts of it.

    Fields:
        blocks, kinds: the model's blocks and which of them are equal; see `shortened.kinds`.
        parameters, dtypes: the model's parameters, and the dtype each computes in.
        part: makes the part with the given number of blocks.
        lowering: the passes to lower parts by.
    """

    blocks: tuple[str, ...]
    kinds: list[int]
    parameters: Mapping[str, nn.Parameter]
    dtypes: Mapping[str, torch.dtype]
    part: Callable[[int], Part]
    lowering: Lowering
    _parts: dict[int, Part] = field(default_factory=dict)
    _known: dict[object, "_Known"] = field(default_factory=dict)

    @property
    def captured(self) -> Captured:
        """The step of the smallest part."""
        return self._of(self._count(NEAR)).captured

    def layout(self, together: Together) -> Layout:
        """The layout of the whole model. Raises NotRepeatedError where parts do not tell it."""
        part = self._of(self._count(NEAR))
        used, block_of = uses(part.captured.program), block_finder(part.blocks)
        found = dict[str, Use]()
        for block, names in ((block, list(names)) for block, names in groupby(used, block_of)):
            number = part.blocks.index(block) if block else -1
            for like, whole in [(block, block)] if number < len(part.blocks) - 1 else self._last(part):
                group = names if like == block else [name for name in used if block_of(name) == like]
                found |= {whole + name.removeprefix(like): used[name] for name in group}
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        own = {name: use.shape for name, use in found.items() if not use.tied}
        if own != {name: shape for name, shape in shapes.items() if name in own or name not in found}:
            raise NotRepeatedError("the blocks' parameters are not those of equal blocks, or not all are read")
        return pack(found, self.parameters, self.blocks, self.dtypes, together=together)

    def _last(self, part: Part) -> list[tuple[str, str]]:
        """Blocks of the part and of the model that they are like: from the part's last one on."""
        further = [(part.blocks[self._like(part, i)], self.blocks[i]) for i in self._further(len(part.blocks))]
        return [*further, (part.blocks[-1], self.blocks[-1])]

    def lower(self, plan: Plan, rates: Rates) -> Weighed:
        """A plan's program as the search reads it; `flat` is that of one of its parts, with the inputs of the whole."""
        reach = self._reach(plan)
        count = self._count(reach)
        key = (
            count, reach, plan.format.unit, plan.microbatches, plan.rounds, plan.prefetch,
            bool(plan.blocks), bool(plan.offload_sums),
        )  # fmt: skip
        if key not in self._known:
            self._known[key] = _Known(self._of(count), reach, self._chunk_kinds(plan.layout))
        known = self._known[key]
        letters = self._letters(plan, known.chunk_kinds)
        for number in range(len(self.blocks)):
            if window(letters, number, reach, plan.fuse_loss) not in known.windows:
                begin = self._beginning(number, count, reach)
                layout = self._restricted(plan.layout, known.part, begin)
                known.learn(self.lowering, replace(plan, layout=layout), rates, letters, begin)
        likes = [self._like(known.part, block) for block in self._further(count)]
        return known.weighed(self.blocks, letters, plan, rates, likes)

    def _letters(self, plan: Plan, chunk_kinds: list[int]) -> list[Letter]:
        recomputed, offloaded = set(plan.recompute), set(plan.offload)
        return [(kind, of_chunks, name in recomputed, name in offloaded)
                for name, kind, of_chunks in zip(self.blocks, self.kinds, chunk_kinds, strict=True)]  # fmt: skip

    def _chunk_kinds(self, layout: Layout) -> list[int]:
        """For each block the kind of its chunks, as a number: equal where they are alike, have the same parameters of
        the block, and begin and end in the same way."""
        block_of, found = block_finder(self.blocks), defaultdict[str, list[object]](list)
        for chunk in layout.chunks:
            inside = [block_of(slot.name) for slot in chunk.slots]
            for block in dict.fromkeys(inside):
                names = tuple(slot.name for slot, other in zip(chunk.slots, inside, strict=True) if other == block)
                ends = inside[0] == block, inside[-1] == block
                mine = tuple(name.removeprefix(block) for name in names)
                found[block].append((replace(chunk, index=0, slots=()), mine, ends))
        told = [found[block] for block in self.blocks]
        return [told.index(kind) for kind in told]

    def _reach(self, plan: Plan) -> int:
        """How many blocks away a block's sections may depend on what is done with another one."""
        block_of, ahead = block_finder(self.blocks), max(plan.prefetch, 1)
        begun = Counter(block_of(chunk.slots[0].name) for chunk in plan.layout.chunks)
        fewest = max(min(begun[block] for block in self.blocks[1:]), 1)
        near = max(NEAR, -(-ahead // fewest))
        return near + -(-MOST_CHUNKS * ahead // fewest) if plan.offload else near

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

    def _further(self, count: int) -> range:
        """The blocks that a part does not have: all from its last one on, but for the model's last, which that is."""
        return range(count - 1, len(self.blocks) - 1)

    def _like(self, part: Part, block: int) -> int:
        """A block inside a part that is like a further one."""
        return next(inner for inner in range(len(part.blocks) - 2, 0, -1) if self.kinds[inner] == self.kinds[block])

    def _restricted(self, layout: Layout, part: Part, begin: int) -> Layout:
        """The layout with the parameters of the blocks from `begin` on alone, as those of a part. Chunks stay as long
        as they are."""
        block_of = block_finder(self.blocks)
        names = dict(zip(self.blocks[begin : begin + len(part.blocks)], part.blocks, strict=True)) | {"": ""}
        chunks = list[ChunkLayout]()
        for chunk in layout.chunks:
            slots = tuple(replace(slot, name=names[block] + slot.name.removeprefix(block))
                          for slot in chunk.slots if (block := block_of(slot.name)) in names)  # fmt: skip
            if slots:
                chunks.append(replace(chunk, index=len(chunks), slots=slots))
        return replace(layout, chunks=tuple(chunks))


def window(letters: list[Letter], number: int, reach: int, fuse_loss: bool) -> Window:
    """A block's letter between those of its neighbours. Beyond both ends it matters how the loss is computed, whose
    weight may be the embedding's, too."""
    around = range(number - reach, number + reach + 1)
    return tuple(letters[i] if 0 <= i < len(letters) else fuse_loss for i in around)


@dataclass
class _Known:
    """The sections found so far in programs that differ only in what they recompute and offload."""

    part: Part
    reach: int
    chunk_kinds: list[int]
    windows: set[Window] = field(default_factory=set)
    found: dict[tuple[int, Window], Section] = field(default_factory=dict)
    places: tuple[Place, ...] = ()
    lowered: dict[bool, Weighed] = field(default_factory=dict)  # one of each kind of loss

    def learn(self, lowering: Lowering, whole: Plan, rates: Rates, letters: list[Letter],
              begin: int) -> None:  # fmt: skip
        """Lowers the part that begins at a block of the whole, with the layout in `whole`, and keeps the sections of
        blocks that have the same neighbours there. Raises NotRepeatedError where others were found before in the same
        surroundings."""
        blocks = self.part.blocks
        mine = letters[begin : begin + len(blocks)]
        plan = replace(
            whole, blocks=blocks if whole.blocks else (),
            recompute=tuple(name for name, letter in zip(blocks, mine, strict=True) if letter[2]),
            offload=tuple(name for name, letter in zip(blocks, mine, strict=True) if letter[3]),
            offload_sums=("", *blocks) if whole.offload_sums else (),
        )  # fmt: skip
        flat = lowering.flat(self.part.captured.by(plan.microbatches).program, plan)
        self.lowered[plan.fuse_loss] = Weighed.of(flat, plan, rates)
        made = sections(flat.program, self.lowered[plan.fuse_loss].liveness, plan, rates, blocks)
        self.places = tuple(made)
        for place, section in made.items():
            around = window(letters, begin + place.block, self.reach, plan.fuse_loss)
            if around != window(mine, place.block, self.reach, plan.fuse_loss):
                continue
            self.windows.add(around)
            if self.found.setdefault((place.sweep, around), section) != section:
                raise NotRepeatedError(f"block {place.block} differs from others in the same surroundings")

    def weighed(self, blocks: tuple[str, ...], letters: list[Letter], plan: Plan, rates: Rates,
                likes: list[int]) -> Weighed:  # fmt: skip
        """The whole program, of whose further blocks each is like the part's one that `likes` tells."""
        last = self.lowered[plan.fuse_loss]
        parts = [(place, self.found[place.sweep, window(letters, place.block, self.reach, plan.fuse_loss)])
                 for place in self._places(len(blocks))]  # fmt: skip
        of_block = _bytes_of_blocks(last.flat.program, self.part.blocks)
        static_bytes = last.liveness.static_bytes + sum(of_block[like] for like in likes)
        live, timeline = joined(parts, last.liveness, static_bytes, plan.layout, blocks, rates)
        return Weighed(Flat(last.flat.program), live, timeline)

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
