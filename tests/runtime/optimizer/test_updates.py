"""Updates of whole parameters: the memory that they take while they run is what plans count."""

from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from geminifx.runtime.isa.formats import OwnFormat
from geminifx.runtime.isa.layout import ChunkLayout, Rule, Slot
from geminifx.runtime.isa.moments import Masters, Moments, stored_bytes, stored_dtype
from geminifx.runtime.isa.whole_updates import working_bytes
from geminifx.runtime.kernels.update_rules import (
    AdafactorHyper,
    AdamHyper,
    Gradient,
    LionHyper,
    MuonHyper,
    SgdHyper,
)
from geminifx.runtime.optimizer import updates
from geminifx.runtime.optimizer.states import Hyper, Range, StateSlice
from geminifx.runtime.optimizer.updates import UpdateKernels
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KERNELS = UpdateKernels(torch.device("cpu"))
KEY: dict[Masters, int | None] = {"exact": None, "bf16-stochastic": 7}
Shape = tuple[int, ...]


class Live(TorchDispatchMode):
    """Measures the most bytes that tensors made in its context take at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._given: dict[int, StorageWeakRef] = {}  # a reference keeps the number of its storage from another's use
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        refs = map(self._ref, self._tensors((args, kwargs)))
        self._given |= {ref.cdata: ref for ref in refs if ref.cdata not in self._made}
        result = func(*args, **(kwargs or {}))
        for tensor in self._tensors(result):
            ref = self._ref(tensor)
            if ref.cdata not in self._given:
                self._made[ref.cdata] = ref, tensor.untyped_storage().nbytes()
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(nbytes for _, nbytes in self._made.values()))
        return result

    @staticmethod
    def _tensors(tree: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]

    @staticmethod
    def _ref(tensor: Tensor) -> StorageWeakRef:
        return StorageWeakRef(tensor.untyped_storage())


def layout_of(rule: Rule, shape: Shape, dtype: torch.dtype, master_dtype: torch.dtype = torch.float32) -> ChunkLayout:
    return ChunkLayout(0, prod(shape), dtype, master_dtype, True, (Slot("weight", 0, shape),), rule=rule)


def hyper_of(rule: Rule, masters: Masters) -> Hyper:
    if rule == "factored":
        return AdafactorHyper(1e-2, -0.8, None, 1e-3, 1.0, 0.1, 3, KEY[masters])
    return MuonHyper(1e-2, 0.1, 0.95, True, (3.4445, -4.775, 2.0315), 1e-7, 5, None, KEY[masters])


def peak_bytes(layout: ChunkLayout, stored: Moments, masters: Masters) -> int:
    """What an update of the layout's one parameter takes beside its state and its gradient."""
    numel, shape = layout.numel, layout.slots[0].shape
    rest = OwnFormat(masters=masters).rest_dtype(layout)
    if layout.rule == "factored":
        moments = tuple(torch.zeros(factor, dtype=layout.master_dtype) for factor in layout.slots[0].factor_shapes)
    else:
        dtype = stored_dtype(stored, layout.master_dtype)
        moments = (torch.zeros(stored_bytes(dtype, numel) // dtype.itemsize, dtype=dtype),)
    part = StateSlice(
        torch.randn(numel).to(layout.dtype), None if rest is None else torch.zeros(numel, dtype=rest), moments
    )
    gradient = Gradient(torch.randn(numel).to(layout.dtype), torch.tensor(0.5))
    with torch.no_grad(), Live() as live:
        KERNELS.update(layout, part, gradient, Range(0, numel, hyper_of(layout.rule, masters), 0, shape))
    return live.peak_bytes


SHAPES: dict[Rule, tuple[Shape, ...]] = {
    "matrices": ((256, 256), (512, 128), (128, 512)),
    "factored": ((256, 256), (65536,), (65536, 1), (64, 16, 8, 8)),
}
CASES = [
    *product(["matrices"], SHAPES["matrices"], ["exact", "bf16", "int8"]),
    *product(["factored"], SHAPES["factored"], ["exact"]),
]


@pytest.mark.parametrize("masters", ["exact", "bf16-stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("rule", "shape", "stored"), CASES, ids=str)
def test_an_update_of_a_whole_parameter_takes_no_more_than_is_counted(
    rule: Rule, shape: Shape, stored: Moments, dtype: torch.dtype, masters: Masters
) -> None:
    layout = layout_of(rule, shape, dtype)
    assert 0 < peak_bytes(layout, stored, masters) <= working_bytes(layout, masters)


@pytest.mark.parametrize("rule", SHAPES)
def test_float64_takes_no_more_than_is_counted(rule: Rule) -> None:
    layout = layout_of(rule, (256, 256), torch.float64, torch.float64)
    assert 0 < peak_bytes(layout, "exact", "exact") <= working_bytes(layout, "exact")


@pytest.mark.parametrize("masters", ["exact", "bf16-stochastic"])
@pytest.mark.parametrize("rule", SHAPES)
def test_no_more_is_counted_than_bfloat16_takes(rule: Rule, masters: Masters) -> None:
    layout = layout_of(rule, (256, 256), torch.bfloat16)
    assert peak_bytes(layout, "exact", masters) == working_bytes(layout, masters)


ELEMENTWISE = [
    AdamHyper(1e-2, 0.9, 0.95, 1e-8, 0.1, 3),
    SgdHyper(1e-2, momentum=0.9, nesterov=True, first=True),
    SgdHyper(1e-2, momentum=0.9, weight_decay=0.1),
    LionHyper(1e-2, 0.9, 0.99, 0.1),
]


def random_part(layout: ChunkLayout, moments: int) -> StateSlice:
    """A state of masters that are kept whole, the same at every call."""
    random = torch.Generator().manual_seed(1)
    master, *values = (torch.rand(layout.numel, generator=random).to(layout.master_dtype) for _ in range(1 + moments))
    weights = master.to(layout.dtype) if layout.casts else master
    return StateSlice(weights, master if layout.casts else None, tuple(values))


@pytest.mark.parametrize(
    "dtypes", [(torch.float16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2], ids=str
)
@pytest.mark.parametrize("hyper", ELEMENTWISE, ids=lambda hyper: type(hyper).__name__)
def test_masters_that_are_kept_whole_are_updated_in_pieces_with_the_bits_of_whole_parameters(
    dtypes: tuple[torch.dtype, torch.dtype], hyper: Hyper, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = (1000,), (7, 31), (3,)
    slots = tuple(Slot(str(start), start, shape) for start, shape in zip((0, 1024, 1280), shapes, strict=True))
    layout = ChunkLayout(0, 1536, *dtypes, True, slots)
    before, pieces, whole = (random_part(layout, 2 if isinstance(hyper, AdamHyper) else 1) for _ in range(3))
    gradient = Gradient(torch.randn(1536, generator=torch.Generator().manual_seed(2)).to(dtypes[0]), 1 / 3)
    KERNELS.update(layout, whole, gradient, Range(0, 1536, hyper))
    monkeypatch.setattr(updates, "PIECE", 64)
    KERNELS.update(layout, pieces, gradient, Range(0, 1536, hyper))
    for slot in slots:
        cut = slice(slot.offset, slot.offset + slot.numel)
        for old, one, other in zip(*(each.cut(cut).tensors for each in (before, pieces, whole)), strict=True):
            assert torch.equal(one, other) and not torch.equal(one, old)
