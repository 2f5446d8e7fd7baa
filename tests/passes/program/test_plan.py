"""Plan: frozen data that survives JSON and reads as a table."""

import json
from dataclasses import FrozenInstanceError

import pytest
import torch
from geminifx.passes.program.plan import MemoryEstimate, Plan
from geminifx.runtime.isa.formats import TorchFormat
from geminifx.runtime.isa.homes import Home, Where
from geminifx.runtime.isa.layout import ChunkLayout, Layout, Slot
from geminifx.runtime.isa.mesh import Axis, Mesh
from geminifx.runtime.isa.units import format_bytes

PLAN = Plan(
    placement="cpu",
    budget_bytes=24_000_000_000,
    layout=Layout(
        (
            ChunkLayout(
                0,
                192,
                torch.bfloat16,
                torch.float32,
                True,
                (Slot("a", 0, (8, 8)), Slot("b", 128, ())),
                reduced_over=("data", "depth"),
            ),
            ChunkLayout(
                1, 64, torch.float32, torch.float32, False, (Slot("frozen", 0, (64,)),), reduced_over=("data",)
            ),
        ),
        (("head", "a"),),
    ),
    mesh=Mesh((Axis("data", 2, "data"), Axis("depth", 2, "replica"), Axis("row", 2, "tensor"))),
    recompute=("layers.0", "layers.1"),
    prefetch=2,
    homes=(Home(resident=True), Home(Where.DEVICE, resident=True)),
    format=TorchFormat(4),
    memory=MemoryEstimate(1000, 2_500_000, 3000, 4, (("activations", 1500), ("chunk 0", 384))),
    notes=("a note",),
)


@pytest.mark.parametrize("plan", [PLAN, Plan()])
def test_json_round_trip(plan, tmp_path):
    assert Plan.from_json(plan.to_json()) == plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    again = Plan.load(tmp_path / "plan.json")
    assert again.layout.places == plan.layout.places
    assert hash(again.homes) == hash(plan.homes)


def test_json_round_trip_of_a_packed_model(captured):
    _, plan = captured
    assert Plan.from_json(plan.to_json()) == plan


def test_json_can_be_edited_by_hand():
    data = json.loads(PLAN.to_json())
    data["prefetch"], data["recompute"] = 0, []
    edited = Plan.from_json(json.dumps(data))
    assert edited.prefetch == 0 and edited.recompute == () and edited.layout == PLAN.layout


def _without(field):
    data = json.loads(PLAN.to_json())
    del data[field]
    return json.dumps(data)


def _with(**changes):
    return json.dumps({**json.loads(PLAN.to_json()), **changes})


@pytest.mark.parametrize(
    "text, named",
    [
        ("{}", "its version has none, expected 2"),
        (_with(version=1), "its version is 1, expected 2"),
        (_without("layout"), "layout"),
        ("[1, 2]", "not a geminifx plan"),
        ("null", "not a geminifx plan"),
        ("{prefetch: 1}", "not a geminifx plan"),
        (_without("memory"), "memory"),
        (_with(prefetched=1), "prefetched"),
        (_with(placement="gpu"), "gpu"),
        (_with(prefetch=1.5), "1.5, expected a whole number @ plan.prefetch"),
        (_with(homes=[{"where": "moon", "resident": False}]), "'moon' is not a valid Where @ plan.homes\\[0\\].where"),
        (_with(format={"kind": "mine"}), "'mine', expected a kind of training state: torch, own"),
        (_with(outputs="logits"), "'logits', expected one of loss, all @ plan.outputs"),
        (_with(reduce_dtype="bf16"), "'bf16', expected one of fp32, compute @ plan.reduce_dtype"),
        (PLAN.to_json().replace('"replica"', '"copies"'), "'copies', expected one of data, .* @ plan.mesh.axes"),
        (PLAN.to_json().replace("bfloat16", "float17"), "float17"),
        (PLAN.to_json().replace("bfloat16", "nn"), "nn"),
    ],
)
def test_other_text_is_refused_and_the_field_named(text, named):
    with pytest.raises(ValueError, match=named):
        Plan.from_json(text)


def test_a_plan_is_frozen():
    with pytest.raises(FrozenInstanceError):
        PLAN.prefetch = 3
    changed = PLAN.with_homes((Home(), Home()), MemoryEstimate(peak_bytes=7))
    assert changed.peak_bytes == 7 and PLAN.peak_bytes == 2_500_000


def test_str_is_a_table():
    lines = str(PLAN).splitlines()
    table = dict(line.split("  ", 1) for line in (line.strip() for line in lines))
    table = {name: text.strip() for name, text in table.items()}
    assert table["device budget"] == "24.0 GB" and table["planned device peak"] == "2.50 MB"
    assert table["chunks"] == "2, largest 384 B" and table["at the peak: activations"] == format_bytes(1500)
    assert table["training state on the device"] == "1 of 2" and table["note"] == "a note"
    starts = {len(line) - len(line[line.index("  ", 2) :].lstrip()) for line in lines}
    assert len(starts) == 1, "the second column starts at one place"
    assert "unlimited" in str(Plan())
