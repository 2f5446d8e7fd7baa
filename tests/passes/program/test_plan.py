"""Plan: frozen data that survives JSON and reads as a table."""

import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from geminifx.passes.program.estimate import CollectiveTraffic, Estimate
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.request import Request
from geminifx.runtime.isa.formats import TorchFormat
from geminifx.runtime.isa.homes import Home, Where
from geminifx.runtime.isa.layout import ChunkLayout, Layout, Slot
from geminifx.runtime.isa.mesh import Axis, Mesh
from geminifx.runtime.isa.schedule import Schedule
from geminifx.runtime.isa.units import format_bytes

PLAN = Plan(
    request=Request("cpu", 24_000_000_000, "all", "1d", True, (("head", "tp=S0"),), 2, "compute"),
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
    offload=("layers.1",),
    prefetch=2,
    homes=(Home(resident=True), Home(Where.DEVICE, resident=True)),
    format=TorchFormat(4),
    estimate=Estimate(
        step_s=0.1474,
        busy_s=(("device", 0.12), ("bus up", 0.0805)),
        rates="the preset h200",
        static_bytes=1000,
        peak_bytes=2_500_000,
        reserve_bytes=4,
        at_peak=(("activations", 1500), ("chunk 0", 384)),
        host_bytes=3000,
        collectives=(CollectiveTraffic("data x depth", "all-reduce", 3, 4096),),
    ),
    notes=("a note",),
)

SCHEDULE = Schedule.parse("gpipe stages=2 microbatches=1\nrank 0: F0.0 B0.0\nrank 1: F1.0 B1.0")
PIPELINE = Plan(stages=("", "layers.1"), schedule=SCHEDULE, line=1)


@pytest.mark.parametrize("plan", [PLAN, PIPELINE, Plan()])
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


def test_json_has_the_request_the_decisions_and_the_estimate():
    data = json.loads(PLAN.to_json())
    assert list(data) == ["version", *(field.name for field in fields(Plan))] and data["version"] == 6
    assert set(data["request"]) == {field.name for field in fields(Request)}
    assert data["request"]["policy"] == "cpu" and data["request"]["zero"] == 2
    assert data["recompute"] == ["layers.0", "layers.1"]
    assert data["homes"][1] == {"where": "device", "resident": True, "spare": False, "lands_apart": False}
    assert set(data["estimate"]) == {field.name for field in fields(Estimate)}
    assert data["estimate"]["busy_s"] == [["device", 0.12], ["bus up", 0.0805]]
    assert PLAN.estimate.bound_s == 0.12 and PLAN.estimate.binds == "device" and Plan().estimate.binds == ""
    assert data["estimate"]["step_s"] == 0.1474 and data["estimate"]["collectives"][0]["axis"] == "data x depth"


def _without(field, part=None):
    data = json.loads(PLAN.to_json())
    del (data[part] if part else data)[field]
    return json.dumps(data)


def _with(**changes):
    return json.dumps({**json.loads(PLAN.to_json()), **changes})


def _asking(**changes):
    data = json.loads(PLAN.to_json())
    return json.dumps({**data, "request": {**data["request"], **changes}})


def _of_version_2():
    """As it was written before requests and estimates were parts of their own."""
    data = json.loads(PLAN.to_json())
    request, estimate = data.pop("request"), data.pop("estimate")
    flat = {
        "placement": request.pop("policy"),
        **request,
        "collectives": estimate.pop("collectives"),
        "memory": estimate,
    }
    for name in ("step_s", "busy_s", "rates"):
        del estimate[name]
    return json.dumps({**data, **flat, "version": 2})


@pytest.mark.parametrize(
    "text, named",
    [
        ("{}", "it has no version, expected 6; save a new one"),
        (_of_version_2(), r"its version is 2, expected 6; save a new one with geminifx\.compile"),
        (_without("layout"), "layout"),
        ("[1, 2]", "not a geminifx plan"),
        ("null", "not a geminifx plan"),
        ("{prefetch: 1}", "not a geminifx plan"),
        (_without("estimate"), "it has no estimate @ plan"),
        (_without("zero", part="request"), r"it has no zero @ plan\.request"),
        (_without("step_s", part="estimate"), r"it has no step_s @ plan\.estimate"),
        (_without("busy_s", part="estimate"), r"it has no busy_s @ plan\.estimate"),
        (PLAN.to_json().replace("0.0805", "Infinity"), r"inf, expected a number @ plan\.estimate\.busy_s"),
        (_with(request=None), r"None, expected Request with policy, budget_bytes, .* @ plan\.request"),
        (_with(prefetched=1), "prefetched"),
        (_asking(policy="gpu"), r"'gpu', expected one of cuda, cpu, auto @ plan\.request\.policy"),
        (_asking(budget_bytes="24GB"), r"'24GB', expected a whole number @ plan\.request\.budget_bytes"),
        (_asking(placement="cpu"), r"placement.* @ plan\.request"),
        (_with(prefetch=1.5), "1.5, expected a whole number @ plan.prefetch"),
        (
            _with(homes=[{"where": "moon", "resident": False, "spare": False, "lands_apart": False}]),
            "'moon' is not a valid Where @ plan.homes\\[0\\].where",
        ),
        (_with(format={"kind": "mine"}), "'mine', expected a kind of training state: torch, own"),
        (_asking(outputs="logits"), r"'logits', expected one of loss, all @ plan\.request\.outputs"),
        (_asking(reduce_dtype="bf16"), r"'bf16', expected one of fp32, compute @ plan\.request\.reduce_dtype"),
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
    changed = replace(PLAN, estimate=replace(PLAN.estimate, peak_bytes=7))
    assert changed.peak_bytes == 7 and PLAN.peak_bytes == 2_500_000


def test_str_is_a_table():
    lines = str(PLAN).splitlines()
    table = dict(line.split("  ", 1) for line in (line.strip() for line in lines))
    table = {name: text.strip() for name, text in table.items()}
    assert table["device budget"] == "24.0 GB" and table["planned device peak"] == "2.50 MB"
    assert table["placement"] == "cpu" and table["tensor parallel"] == "1d, along the sequence"
    assert table["modelled step"] == "147 ms, at the rates of the preset h200"
    assert table["at least"] == "120 ms, by what binds: device" and table["busy"] == "device 120 ms, bus up 80.5 ms"
    assert table["received along data x depth"] == "4.10 kB by 3 all-reduce(s)"
    assert table["chunks"] == "2, largest 384 B" and table["at the peak: activations"] == format_bytes(1500)
    assert table["training state on the device"] == "1 of 2" and table["note"] == "a note"
    starts = {len(line) - len(line[line.index("  ", 2) :].lstrip()) for line in lines}
    assert len(starts) == 1, "the second column starts at one place"
    alone = str(replace(Plan(), estimate=Estimate(step_s=0.0012))).splitlines()
    assert [line.split("  ")[-1].strip() for line in alone[1:3]] == ["unlimited", "1.20 ms"]
