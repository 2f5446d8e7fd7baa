"""State of layers that are divided over a pipeline's processes: trained, saved and loaded as one process does."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import geminifx
import pytest
import torch
from launching import launched
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from staged import STAGES, World, gradients, tied  # noqa: E402
from staged_worker import CLIP, KINDS, STEPS, WORLDS, groups, made, optimizer_state, overflow, train, values  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("staged")]  # they share what the processes found

NORM_EPS = 1e-6
"""Norms are added up in another order; a few dozen sums of float32 squares."""

RUNS = [(ranks, f"{name}, {kind}") for ranks, worlds in WORLDS.items() for kind in KINDS for name in worlds
        if kind == "own" or not worlds[name].zero]  # fmt: skip
EVERY_RUN = pytest.mark.parametrize(("ranks", "run"), RUNS, ids=[f"{run}, {ranks} ranks" for ranks, run in RUNS])
EVERY_WORLD = pytest.mark.parametrize(("ranks", "name"), [(n, name) for n, worlds in WORLDS.items() for name in worlds])


@cache
def alone(kind: str, folder: Path) -> dict[str, Any]:
    """What one process saves."""
    model, optimizer = made(kind, World())
    norms = train(model, optimizer)
    geminifx.save_checkpoint(model, optimizer, folder / f"one, {kind}", extra="one")
    return {"norms": norms, "state": values(model), "optimizer": optimizer_state(kind, optimizer)}


@cache
def plain() -> dict[str, Any]:
    """The same by torch, without geminifx."""
    model = tied()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(groups(parameters), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    norms = []
    for step in range(STEPS):
        for name, gradient in gradients(step).items():
            parameters[name].grad = gradient
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        scheduler.step()
    return {"norms": norms, "state": model.state_dict()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("staged")


@pytest.fixture
def found(folder: Path, ranks: int, request: pytest.FixtureRequest) -> Any:
    """What every rank found of a run, or of a world, whatever it is of."""
    for kind in KINDS:
        alone(kind, folder)
    everything = launched(HERE / "staged_worker.py", folder / f"{ranks} ranks.pt", *WORLDS[ranks], ranks=ranks)
    run = request.getfixturevalue("run") if "run" in request.fixturenames else None
    return everything[run or f"{request.getfixturevalue('name')}, overflow"]


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def same_optimizer(ours: Any, theirs: Any) -> bool:
    """Torch's is each rank's own, and is compared by what training on brings."""
    if ours is None:
        return theirs is None
    states = ours["state"], theirs["state"]
    return states[0].keys() == states[1].keys() and all(same(states[0][i], states[1][i]) for i in states[0])


@EVERY_RUN
def test_all_ranks_train_as_one_process(folder: Path, found: Any, run: str) -> None:
    one, by_torch = alone(run.rpartition(", ")[2], folder), plain()
    for rank in found:
        assert rank["norms"] == found[0]["norms"] and min(rank["norms"]) > CLIP, "all clip by the same norm"
        assert rank["norms"] == pytest.approx(by_torch["norms"], rel=NORM_EPS)
        assert same(rank["state"], found[0]["state"]) and same_optimizer(rank["optimizer"], found[0]["optimizer"])
        for name, value in by_torch["state"].items():
            torch.testing.assert_close(rank["state"][name], value, rtol=NORM_EPS, atol=1e-7)
            torch.testing.assert_close(rank["state"][name], one["state"][name], rtol=NORM_EPS, atol=1e-7)


@EVERY_RUN
def test_ranks_have_the_parameters_of_their_own_layers_alone(found: Any, ranks: int, run: str) -> None:
    world, whole = WORLDS[ranks][run.rpartition(", ")[0]], tied()
    owners, parameters = STAGES[world.pipeline], dict(whole.named_parameters())
    for number, rank in enumerate(found):
        absent, place = rank["absent"], world.mesh.pipeline_rank(number)
        lacking = [name for name in parameters if place not in owners[name.split(".")[0]]]
        assert absent["names"] == lacking
        assert list(absent["shapes"]) == list(parameters), "the order and the names of all are known everywhere"
        assert all(absent["shapes"][name] == tuple(parameters[name].shape) for name in lacking)
        assert absent["trained"] == {name: p.requires_grad for name, p in parameters.items()}
        assert absent["gradients"] == [None] * len(lacking)
        assert absent["in groups"] == [len(group["params"]) for group in groups(parameters)]
        for name, read, written in zip(lacking, absent["read"], absent["written"], strict=True):
            assert read.startswith(
                f"StateError: parameter {name} cannot be read here, because it belongs to layers that other ranks"
            )
            assert written.startswith(f"StateError: parameter {name} cannot be written here by aten.zero_")
            having = [r for r in range(ranks) if world.mesh.pipeline_rank(r) in owners[name.split(".")[0]]]
            assert f"rank(s) {', '.join(map(str, having))}." in read


@EVERY_RUN
@pytest.mark.parametrize("way", ["", ", background"])
def test_what_is_saved_is_loaded_and_trained_on(found: Any, run: str, way: str) -> None:
    for rank in found:
        assert same(rank[f"loaded{way}"][0], rank["state"])
        assert same_optimizer(rank[f"loaded{way}"][1], rank["optimizer"])
        assert rank[f"norms again{way}"] == rank["norms later"] and same(rank[f"state again{way}"], rank["state later"])


@EVERY_RUN
def test_weights_on_meta_come_to_life_where_they_belong(found: Any, run: str) -> None:
    for rank in found:
        assert same(rank["loaded on meta"][0], rank["state"]) and same(rank["loaded whole on meta"], rank["state"])
        assert same_optimizer(rank["loaded on meta"][1], rank["optimizer"])


@EVERY_RUN
def test_whole_states_are_taken_in_parts(found: Any, run: str) -> None:
    for number, rank in enumerate(found):
        assert bool(rank["first only"]) is (number == 0)
        if "loaded whole" in rank:
            assert same(rank["loaded whole"][0], rank["state"])
            assert same_optimizer(rank["loaded whole"][1], rank["optimizer"])


@EVERY_RUN
def test_one_process_goes_on_from_all(folder: Path, found: Any, run: str) -> None:
    name, _, kind = run.rpartition(", ")
    model, optimizer = made(kind, World(), seed=1)
    assert geminifx.load_checkpoint(model, optimizer, folder / run) == name
    assert same(values(model), found[0]["state"])
    assert same_optimizer(optimizer_state(kind, optimizer), found[0]["optimizer"])
    train(model, optimizer, STEPS)
    for key, value in found[0]["state later"].items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=NORM_EPS, atol=1e-7)


@EVERY_RUN
def test_all_go_on_from_another_world(folder: Path, found: Any, ranks: int, run: str) -> None:
    kind = run.rpartition(", ")[2]
    runs = [each for n, each in RUNS if n == ranks and each.endswith(kind)]
    before = runs.index(run) - 1
    if before < 0:
        expected, extra = alone(kind, folder), "one"
    else:
        everything = launched(HERE / "staged_worker.py", folder / f"{ranks} ranks.pt", *WORLDS[ranks], ranks=ranks)
        expected, extra = everything[runs[before]][0], runs[before].rpartition(", ")[0]
    for rank in found:
        assert rank["before"][0] == extra
        assert same(rank["before"][1], expected["state"])
        assert same_optimizer(rank["before"][2], expected["optimizer"])


@EVERY_RUN
def test_rank_0_writes_what_others_read(folder: Path, found: Any, run: str) -> None:
    (written,) = (folder / f"{run}, pretrained").glob("*.safetensors")
    read = load_file(written)
    assert all(torch.equal(value, found[0]["state"][name]) for name, value in read.items())
    assert read.keys() | {"head.weight", "embed.weight"} == found[0]["state"].keys()


@EVERY_WORLD
def test_an_overflow_on_one_stage_is_everybodys(found: Any, name: str) -> None:
    expected = overflow(World())
    for rank in found:
        assert rank["skipped"] == 1 and rank["scales"] == expected["scales"] == [2.0**16, 2.0**15, 2.0**15]
        assert rank["norms"][::2] == pytest.approx(expected["norms"][::2], rel=1e-5)
        assert not torch.isfinite(torch.tensor(rank["norms"][1]))
        assert same(rank["state"], found[0]["state"])
        for key, value in expected["state"].items():
            torch.testing.assert_close(rank["state"][key], value, rtol=1e-5, atol=1e-6)
