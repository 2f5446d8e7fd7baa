"""A plan made by hand is looked at before anything is moved."""

import re
from collections.abc import Callable
from dataclasses import replace

import geminifx
import pytest
import torch
from geminifx.compiler.planner.check import check_plan
from geminifx.passes.program.plan import Plan
from geminifx.runtime.isa.layout import ChunkLayout, Layout, Slot
from geminifx.runtime.isa.mesh import Axis, Mesh
from geminifx.runtime.isa.precision import parameter_dtypes
from homes import homes
from torch import nn

pytestmark = pytest.mark.usefixtures("shared")


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))


def plan() -> Plan:
    return geminifx.compile(model(), example_inputs=(torch.zeros(2, 4),), placement="cpu").plan


def check(changed: Plan, place: int = 0) -> None:
    source = model()
    check_plan(changed, dict(source.named_parameters()), ("0", "1"), parameter_dtypes(source, None), place)


def with_chunk(whole: Plan, **changes: object) -> Plan:
    first: ChunkLayout = replace(whole.layout.chunks[0], **changes)  # type: ignore[arg-type]
    return replace(whole, layout=Layout((first, *whole.layout.chunks[1:])))


def with_slot(whole: Plan, **changes: object) -> Plan:
    first, *others = whole.layout.chunks[0].slots
    return with_chunk(whole, slots=(replace(first, **changes), *others))  # type: ignore[arg-type]


def with_stranger(whole: Plan) -> Plan:
    """A plan with an empty slot behind the last that no parameter of the model has."""
    first = whole.layout.chunks[0]
    return with_chunk(whole, slots=(*first.slots, replace(first.slots[-1], name="stranger", offset=64, shape=(0,))))


def test_the_planners_own_plan_passes() -> None:
    check(plan())


OWNED = (("0.weight", (0,)), ("0.bias", (0,)), ("1.weight", (0, 1)), ("1.bias", (1,)))


def staged(owned: tuple[tuple[str, tuple[int, ...]], ...] = OWNED, place: int = 0) -> Plan:
    """The plan of one process of a pipeline of two."""
    whole, owners = plan(), dict(owned)
    (chunk,) = whole.layout.chunks
    by_owners: dict[tuple[int, ...], list[Slot]] = {}
    for slot in (slot for slot in chunk.slots if place in owners.get(slot.name, ())):
        by_owners.setdefault(owners[slot.name], []).append(slot)
    chunks = tuple(replace(chunk, index=i, slots=tuple(slots)) for i, slots in enumerate(by_owners.values()))
    mesh = Mesh((Axis("pipeline", 2, "pipeline"),))
    return replace(whole, layout=Layout(chunks, owned=owned), homes=whole.homes * len(chunks), mesh=mesh)


def test_plans_of_a_pipelines_processes_pass_for_these_alone() -> None:
    for place in range(2):
        check(staged(place=place), place)
        with pytest.raises(ValueError, match=r"number of slots of parameter '(0.weight|1.bias)'"):
            check(staged(place=place), 1 - place)


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (lambda: staged(OWNED[1:]), "layout.owned: the names"),
        (lambda: staged((*OWNED[:3], ("1.bias", ()))), "the owners of '1.bias' is (), expected some of 0 to 1"),
        (lambda: staged((*OWNED[:3], ("1.bias", (2,)))), "the owners of '1.bias' is (2,)"),
        (lambda: staged((*OWNED[:2], ("1.weight", (1, 0)), OWNED[3])), "the owners of '1.weight' is (1, 0)"),
        (lambda: replace(staged(), layout=replace(staged().layout, owned=())), "layout.owned: the names is []"),
        (lambda: replace(plan(), layout=replace(plan().layout, owned=OWNED)), "layout.owned: the names"),
        (
            lambda: replace(staged(), layout=replace(plan().layout, owned=OWNED), homes=plan().homes),
            "the same ones for all",
        ),
    ],
)
def test_owners_that_do_not_fit_are_named(damaged: Callable[[], Plan], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check(damaged())


def test_owners_are_in_the_plans_text() -> None:
    assert Plan.from_json(staged().to_json()) == staged()


def test_a_plan_of_parts_passes() -> None:
    half = replace(with_slot(plan(), placement="tp=S0", shape=(4, 4)), mesh=Mesh((Axis("tp", 2, "tensor"),)))
    check(half)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: replace(p, homes=homes(2)),
            "homes is 2 of them, expected 1, one for each chunk;",
        ),
        (lambda p: replace(p, prefetch=-1), "prefetch is -1, expected 0 or more chunks;"),
        (lambda p: replace(p, recompute=("7",)), "recompute is '7' among others, expected names of blocks: 0, 1;"),
        (lambda p: with_chunk(p, index=3), "layout.chunks[0].index is 3, expected 0:"),
        (
            lambda p: with_chunk(p, trainable=False),
            "chunks[0].trainable is False, expected True: '0.weight' is trained",
        ),
        (lambda p: with_chunk(p, dtype=torch.float64), "chunks[0].dtype is torch.float64, expected torch.float32, in"),
        (lambda p: with_chunk(p, numel=8), "chunks[0].numel is 8, expected 32 or more, where '0.weight' ends"),
        (
            lambda p: with_chunk(p, slots=p.layout.chunks[0].slots[1:]),
            "the number of slots of parameter '0.weight' is 0, expected 1;",
        ),
        (lambda p: with_slot(p, shape=(4, 8)), "the shape of '0.weight' is (4, 8), expected (8, 4), the parameter's"),
        (
            lambda p: with_slot(p, placement="tp=S0"),
            "the placement of '0.weight' is 'tp=S0', expected how it lies over the axes of this mesh, which are none;",
        ),
        (
            lambda p: replace(with_slot(p, placement="tp=S0"), mesh=Mesh((Axis("tp", 2, "tensor"),))),
            "the shape of '0.weight' is (8, 4), expected (8, 4), the parameter's, of which it is the part tp=S0;",
        ),
        (
            lambda p: with_chunk(p, reduced_over=("data",)),
            "layout.chunks[0].reduced_over is ('data',), expected (): along these axes of the mesh processes have",
        ),
        (
            lambda p: replace(p, mesh=Mesh((Axis("data", 2, "data"), Axis("tp", 2, "tensor")))),
            "chunks[0].reduced_over is (), expected ('data',): along these axes of the mesh processes have '0.weight'",
        ),
        (lambda p: with_slot(p, offset=1), "the offset of '0.weight' is 1, expected a multiple of 64 (256 bytes)"),
        (
            lambda p: with_slot(p, offset=64),
            "the offset of '0.weight' is 64, expected 72 or more, after '0.bias', which it overlaps",
        ),
        (with_stranger, "the name of a slot is 'stranger', expected a parameter of the model"),
    ],
)
def test_what_does_not_fit_is_named(damage: Callable[[Plan], Plan], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check(damage(plan()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"example_inputs": torch.zeros(2, 4)}, r"example_inputs=\(x,\)"),
        ({"recompute": 3}, "names of blocks"),
        ({"optimizer_state_bytes": "8"}, "whole number"),
        ({"optimizer_state_bytes": -8}, "0 or more"),
        ({"parallel": "tensor"}, "degrees by name"),
        ({"placement": "gpu"}, "did you mean 'cuda'"),
    ],
)
def test_options_of_the_wrong_kind_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        geminifx.compile(model(), **options)


def test_lists_and_single_passes_are_taken() -> None:
    @geminifx.graph_pass(after="chunk")
    def look(program: object, plan: Plan) -> None:
        assert plan.recompute == ("0",)

    compiled = geminifx.compile(model(), example_inputs=[torch.zeros(2, 4)], recompute=["0"], passes=look)
    assert compiled.plan.recompute == ("0",)


def test_only_modules_are_compiled() -> None:
    with pytest.raises(ValueError, match=r"expected a torch\.nn\.Module"):
        geminifx.compile(None)  # type: ignore[arg-type]
