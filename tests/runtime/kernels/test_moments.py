"""Moments that are not stored as float32: what they stand for, and the same bits on every side."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from geminifx.runtime.isa.layout import ChunkLayout, Slot
from geminifx.runtime.isa.moments import BLOCK, stored_bytes
from geminifx.runtime.kernels.host_updates import TORCH, HostKernel, available_variants
from geminifx.runtime.kernels.moments import narrow, widened
from geminifx.runtime.kernels.rounding import key_of
from geminifx.runtime.kernels.update_rules import AdamHyper, AdamMoments, Gradient, LionHyper, SgdHyper
from geminifx.runtime.optimizer import updates
from geminifx.runtime.optimizer.states import Range, StateSlice
from geminifx.runtime.optimizer.updates import UpdateKernels
from torch import Tensor
from updates import (
    ADAMS,
    ADAMW,
    DRAWS,
    LIONS,
    RULES,
    SGDS,
    STORED,
    Hyper,
    Problem,
    any_bits,
    same,
    same_pair,
    same_stored,
    stored,
    usual,
)

COMPILED = [variant for variant in available_variants() if variant != TORCH]
NARROW = {name: dtype for name, dtype in STORED.items() if name != "exact"}


def read(moment: Tensor, numel: int, *, squares: bool) -> Tensor:
    return widened(moment, numel, torch.float32, squares=squares)


def test_bytes() -> None:
    assert [stored_bytes(dtype, 1024) for dtype in (torch.float32, torch.bfloat16, torch.uint8)] == [4096, 2048, 1040]


@pytest.mark.parametrize("dtype", NARROW.values(), ids=NARROW)
@pytest.mark.parametrize("squares", [False, True])
def test_what_was_read_is_stored_as_the_same_bits_again(dtype: torch.dtype, squares: bool) -> None:
    values = usual(3 * BLOCK + 5, seed=1)
    values = values.square() if squares else values
    once = stored(values, dtype, squares=squares)
    again = stored(read(once, values.numel(), squares=squares), dtype, squares=squares)
    assert same_stored(once, again)


def test_8_bits_are_near() -> None:
    """By half a code of the largest in the block, a square by its root; a square that is not 0 stays so."""
    values = torch.randn(4 * BLOCK, generator=torch.Generator().manual_seed(0))
    most = values.view(-1, BLOCK).abs().amax(1, keepdim=True)
    found = read(stored(values, torch.uint8, squares=False), values.numel(), squares=False)
    assert ((found - values).view(-1, BLOCK).abs() <= most * (0.5001 / 127)).all()
    roots = read(stored(values.square(), torch.uint8, squares=True), values.numel(), squares=True).sqrt()
    assert (
        ((roots - values.abs()).view(-1, BLOCK).abs() <= most * (0.5001 / 255))
        .logical_or((roots * 255).view(-1, BLOCK) <= most * 1.0001)
        .all()
    )
    assert (roots > 0).all() and not read(stored(torch.zeros(BLOCK), torch.uint8, squares=True), 1, squares=True).any()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("squares", [False, True])
def test_a_value_that_is_not_finite_makes_its_block_nan_and_no_other(bad: float, squares: bool) -> None:
    values = torch.ones(3 * BLOCK)
    values[BLOCK + 7] = bad
    found = read(stored(values, torch.uint8, squares=squares), values.numel(), squares=squares).view(3, BLOCK)
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], torch.ones(2, BLOCK))


def updated(problem: Problem, moments: AdamMoments, hyper: Hyper, variant: str) -> AdamMoments:
    problem.moments = moments
    problem.update(HostKernel(variant), hyper, threads=3)
    return problem.moments


@pytest.mark.parametrize("values", [usual, any_bits], ids=["usual", "any bits"])
@pytest.mark.parametrize("dtype", NARROW.values(), ids=NARROW)
@pytest.mark.parametrize("variant", COMPILED)
def test_a_compiled_update_has_the_bits_of_widening_updating_and_narrowing(
    variant: str, dtype: torch.dtype, values: Callable[[int, int], Tensor]
) -> None:
    cases = [(2 * BLOCK + 43, rule, None) for rule in RULES]
    cases += [(BLOCK, ADAMW, DRAWS), (3, ADAMW, None), (2 * BLOCK + 43, ADAMW, DRAWS), (2 * BLOCK + 43, SGDS[2], DRAWS)]
    for numel, hyper, draws in cases:
        problem, reference = (Problem(numel, 3, torch.bfloat16, values=values, draws=draws) for _ in range(2))
        mean = stored(problem.moments.mean, dtype, squares=False)
        square = stored(problem.moments.square, dtype, squares=True)
        wide = AdamMoments(read(mean, numel, squares=False), read(square, numel, squares=True))
        updated(reference, wide, hyper, TORCH)
        found = updated(problem, AdamMoments(mean.clone(), square.clone()), hyper, variant)
        assert same_pair(problem.pair, reference.pair)
        if not isinstance(hyper, SgdHyper) or hyper.momentum:
            narrow(wide.mean, mean, squares=False)
        if isinstance(hyper, AdamHyper):
            narrow(wide.square, square, squares=True)
        assert same_stored(found.mean, mean) and same_stored(found.square, square)


@pytest.mark.parametrize("variant", COMPILED)
def test_a_compiled_update_can_be_written_elsewhere(variant: str) -> None:
    numel, kernel = 4 * BLOCK, HostKernel(variant)
    here, there, before = (Problem(numel, 5, torch.bfloat16, values=usual) for _ in range(3))
    for problem in (here, there, before):
        old = problem.moments
        problem.moments = AdamMoments(
            stored(old.mean, torch.uint8, squares=False), stored(old.square, torch.uint8, squares=True)
        )
    here.update(kernel, ADAMW)
    into = Problem(numel, 9, torch.bfloat16)
    kept = torch.zeros_like(here.moments.mean), torch.zeros_like(here.moments.square)
    kernel.adam(there.pair, there.gradient, there.moments, ADAMW, 2, (into.pair, kept))
    assert same_pair(into.pair, here.pair) and torch.equal(kept[0], here.moments.mean)
    assert torch.equal(kept[1], here.moments.square)
    assert same_pair(there.pair, before.pair) and torch.equal(there.moments.mean, before.moments.mean)


def test_a_kernel_refuses_moments_that_it_cannot_take() -> None:
    problem = Problem(BLOCK, 1, torch.bfloat16)
    kernel, short = HostKernel(), torch.zeros(BLOCK, dtype=torch.uint8)
    problem.moments = AdamMoments(short, short.clone())
    with pytest.raises(ValueError, match="contiguous tensors of that size"):
        problem.update(kernel, ADAMW)
    mixed = torch.zeros(BLOCK, dtype=torch.bfloat16)
    problem.moments = replace(problem.moments, mean=mixed)
    with pytest.raises(ValueError, match="optimizer state must be"):
        problem.update(kernel, ADAMW)


@pytest.mark.cuda
@pytest.mark.parametrize("values", [usual, any_bits], ids=["usual", "any bits"])
@pytest.mark.parametrize("dtype", NARROW.values(), ids=NARROW)
def test_a_device_reads_and_stores_the_host_s_bits(dtype: torch.dtype, values: Callable[[int, int], Tensor]) -> None:
    for squares in (False, True):
        numbers = values(64 * BLOCK + 9, 5)
        numbers = numbers.abs() if squares else numbers
        here, there = (stored(numbers.to(device), dtype, squares=squares) for device in ("cpu", "cuda"))
        assert same_stored(here, there.cpu())
        read_there = read(there, numbers.numel(), squares=squares).cpu()
        assert same(read(here, numbers.numel(), squares=squares), read_there)


KEY = key_of(0, 3, "weight")
STATEFUL = (*ADAMS, *LIONS, replace(ADAMW, key=KEY), replace(LIONS[1], key=KEY))
"""Rules of AdamW and Lion, the last ones of masters that are rounded."""


def updated_by(kernels: UpdateKernels, device: str, dtype: torch.dtype, hyper: AdamHyper | LionHyper) -> list[Tensor]:
    """A state of five blocks and a part of one, updated where it lies."""
    numel = 5 * BLOCK + 11
    layout = ChunkLayout(0, numel, torch.bfloat16, torch.float32, True, (Slot("weight", 0, (numel,)),))
    made = Problem(numel, 3, torch.bfloat16, values=usual)
    moments = (stored(made.moments.mean, dtype, squares=False), stored(made.moments.square, dtype, squares=True))
    kept = moments[: 2 if isinstance(hyper, AdamHyper) else 1]
    rest = made.pair.lo.to(device) if hyper.key is None else None
    part = StateSlice(made.pair.hi.to(device), rest, tuple(m.to(device) for m in kept))
    gradient = Gradient(made.gradient.values.to(device), made.gradient.scale)
    kernels.update(layout, part, gradient, Range(0, numel, hyper, first=77))
    return [tensor.cpu() for tensor in part.tensors]


def same_state(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(same_stored(*pair) for pair in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", NARROW.values(), ids=NARROW)
def test_where_no_kernel_takes_them_pieces_are_widened_with_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "PIECE", 2 * BLOCK)
    kernels, plain = (UpdateKernels(torch.device("cpu")) for _ in range(2))
    plain._host = HostKernel(TORCH)
    for hyper in STATEFUL:
        assert same_state(*(updated_by(each, "cpu", dtype, hyper) for each in (kernels, plain)))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)
def test_an_update_on_the_device_has_the_host_s_bits(dtype: torch.dtype) -> None:
    for hyper in STATEFUL:
        places = ((UpdateKernels(torch.device(device)), device) for device in ("cpu", "cuda"))
        assert same_state(*(updated_by(kernels, device, dtype, hyper) for kernels, device in places))
