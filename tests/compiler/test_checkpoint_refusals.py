"""load_checkpoint takes what is of this model and optimizer, exactly, or refuses it with everything as it was."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import geminifx
import pytest
import torch
from geminifx.compiler.checkpoint import checkpoint_contents
from geminifx.runtime.isa.errors import CheckpointError, StateError
from geminifx.runtime.state_io.checksums import CHECKSUMS, seal
from geminifx.runtime.state_io.sharded import save
from saving import OPTIMIZERS, compiled, network, same, train, values
from torch import nn
from torch.optim import SGD, Adam, AdamW, NAdam, RAdam

Make = Callable[[geminifx.CompiledModule], torch.optim.Optimizer]

KINDS: dict[str, Make] = {
    "own AdamW": lambda model: model.optimizer(AdamW, lr=1e-2, fused=True),
    "own Adam": lambda model: model.optimizer(Adam, lr=1e-2, fused=True),
    "own SGD": lambda model: model.optimizer(SGD, lr=1e-2, momentum=0.9),
    "own plain SGD": lambda model: model.optimizer(SGD, lr=1e-2),
    "AdamW": lambda model: AdamW(model.parameters(), lr=1e-2, fused=True),
    "amsgrad": lambda model: AdamW(model.parameters(), lr=1e-2, amsgrad=True),
    "Adam": lambda model: Adam(model.parameters(), lr=1e-2, fused=True),
    "NAdam": lambda model: NAdam(model.parameters(), lr=1e-2),
    "RAdam": lambda model: RAdam(model.parameters(), lr=1e-2),
    "SGD": lambda model: SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "plain SGD": lambda model: SGD(model.parameters(), lr=1e-2),
}
SAME = [{"own AdamW", "AdamW"}, {"own Adam", "Adam"}, {"own SGD", "SGD"}, {"own plain SGD", "plain SGD"}]
"""Between these a run goes on as if it had never stopped. torch's AdamW and Adam are fused, which round as ours do; a
saved group says so, and its options count."""

ALSO = {
    ("own AdamW", "amsgrad"),  # what torch's load_state_dict does: the groups that were saved count
    ("AdamW", "amsgrad"),
    ("amsgrad", "AdamW"),
    ("plain SGD", "SGD"),
    ("own plain SGD", "SGD"),
    ("plain SGD", "own SGD"),
    ("own plain SGD", "own SGD"),
    ("SGD", "plain SGD"),
    ("own SGD", "plain SGD"),
}
"""Of one kind, with other options."""


def state_of(optimizer: torch.optim.Optimizer) -> Any:
    """Numbers and tensors of it that can be compared."""
    found = optimizer.state_dict()
    state = {(i, key): torch.as_tensor(v).tolist() for i, each in found["state"].items() for key, v in each.items()}
    return state, found["param_groups"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[float]]]:
    """What was saved with each kind, and the losses of going on from there."""
    found = {}
    for name, make in KINDS.items():
        model = compiled()
        optimizer = make(model)
        train(model, optimizer)
        folder = tmp_path_factory.mktemp("kinds") / "saved"
        geminifx.save_checkpoint(model, optimizer, folder)
        found[name] = folder, train(model, optimizer)
    return found


def without_kind(folder: Path) -> Path:
    """As older versions saved: neither the kind nor checksums are there."""
    (folder / CHECKSUMS).unlink()
    file, data = folder / "__0_0.distcp", (folder / "__0_0.distcp").read_bytes()
    assert data.count(b"kind") == 1
    file.write_bytes(data.replace(b"kind", b"mind"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("after", KINDS)
@pytest.mark.parametrize("before", KINDS)
def test_a_run_goes_on_with_its_own_kind_alone(
    saved: dict[str, tuple[Path, list[float]]], before: str, after: str
) -> None:
    (folder, losses), model = saved[before], compiled(seed=1)
    optimizer = KINDS[after](model)
    if before == after or any({before, after} <= pair for pair in SAME) or (before, after) in ALSO:
        geminifx.load_checkpoint(model, optimizer, folder)
        if (before, after) not in ALSO:
            assert train(model, optimizer) == losses
        return
    weights, state = values(model), state_of(optimizer)
    with pytest.raises(
        CheckpointError, match=r"the checkpoint was saved with \w+, but the optimizer is|nothing was loaded: "
    ):
        geminifx.load_checkpoint(model, optimizer, folder)
    assert same(values(model), weights) and state_of(optimizer) == state


@pytest.mark.parametrize("before", ["AdamW", "Adam", "NAdam", "RAdam", "SGD", "plain SGD"])
@pytest.mark.parametrize("after", ["own AdamW", "own Adam", "own SGD"])
def test_a_state_dict_is_of_the_same_rule_or_refused(before: str, after: str) -> None:
    model, source = compiled(), network()
    optimizer, other = KINDS[after](model), KINDS[before](source)
    train(source, other)
    if after == f"own {before}" or (after, before) == ("own SGD", "plain SGD"):
        if before != "plain SGD":
            optimizer.load_state_dict(other.state_dict())
        return
    state = state_of(optimizer)
    with pytest.raises(ValueError, match=r"the saved groups have the weight decay of|to another optimizer"):
        optimizer.load_state_dict(other.state_dict())
    assert state_of(optimizer) == state


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("SGD", "own plain SGD", r"nothing was loaded: the momentum of a group is 0\.9, but no group had momentum"),
        ("own SGD", "own AdamW", "the checkpoint was saved with SGD, but the optimizer is AdamW"),
        ("Adam", "own AdamW", "the checkpoint was saved with Adam, but the optimizer is AdamW"),
    ],
)
def test_another_kind_is_refused(tmp_path: Path, before: str, after: str, says: str) -> None:
    model, other = compiled(), compiled(seed=1)
    geminifx.save_checkpoint(model, KINDS[before](model), tmp_path / "saved")
    optimizer, weights = KINDS[after](other), values(other)
    with pytest.raises(CheckpointError, match=says):
        geminifx.load_checkpoint(other, optimizer, tmp_path / "saved")
    assert same(values(other), weights)


@pytest.mark.parametrize(("before", "after"), [("SGD", "own AdamW"), ("own Adam", "AdamW"), ("NAdam", "own AdamW")])
def test_an_older_checkpoint_tells_its_kind_by_its_groups(tmp_path: Path, before: str, after: str) -> None:
    model = compiled()
    optimizer = KINDS[before](model)
    train(model, optimizer)
    geminifx.save_checkpoint(model, optimizer, tmp_path / "saved")
    losses = train(model, optimizer)
    without_kind(tmp_path / "saved")
    other = compiled(seed=1)
    refused, taken = KINDS[after](other), compiled(seed=2)
    with (
        pytest.warns(UserWarning, match="has no checksums"),
        pytest.raises(CheckpointError, match="nothing was loaded"),
    ):
        geminifx.load_checkpoint(other, refused, tmp_path / "saved")
    again = KINDS[before](taken)
    with pytest.warns(UserWarning, match=r"has no checksums\.json"):
        geminifx.load_checkpoint(taken, again, tmp_path / "saved")
    assert train(taken, again) == losses


def test_other_groups_are_refused(tmp_path: Path) -> None:
    model = compiled()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    geminifx.save_checkpoint(model, optimizer, tmp_path / "saved")
    part = SGD([next(model.parameters())], lr=0.1)
    with pytest.raises(geminifx.CheckpointError, match=r"1 group\(s\) of 1 parameters, .* 1 of 6"):
        geminifx.load_checkpoint(model, part, tmp_path / "saved")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda numbers, tensors: numbers.pop("0.bias"), "state of 0.bias has exp_avg, exp_avg_sq, expected .*, step;"),
        (
            lambda numbers, tensors: numbers["0.bias"].update(step=-1),
            "state of 0.bias has step=-1, expected the number of steps",
        ),
        (lambda numbers, tensors: tensors.pop("optimizer.exp_avg.0.bias"), "state of 0.bias has exp_avg_sq, step, exp"),
    ],
)
def test_half_of_a_parameters_state_is_refused(tmp_path: Path, spoil: Callable[..., object], says: str) -> None:
    """Taken for the first step's, old moments would be corrected for a bias that they do not have."""
    model = compiled()
    optimizer = KINDS["own AdamW"](model)
    train(model, optimizer)
    contents, before = checkpoint_contents(model, optimizer, None), state_of(optimizer)
    tensors = dict(contents.tensors)
    spoil(contents.objects["optimizer"]["numbers"], tensors)
    save(tmp_path / "saved", replace(contents, tensors=tensors), model.ranks)
    with pytest.raises(CheckpointError, match=f"nothing was loaded: the optimizer {says}"):
        geminifx.load_checkpoint(model, optimizer, tmp_path / "saved")
    assert state_of(optimizer) == before


class Counting(nn.Module):
    """A model with a buffer of any dtype."""

    def __init__(self, dtype: torch.dtype, more: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 3)
        self.more = nn.Linear(3, 3) if more else nn.Identity()
        self.register_buffer("count", torch.ones(2, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.more(self.inner(x)) + self.count.sum()


def counting(dtype: torch.dtype = torch.float32, **options: Any) -> geminifx.CompiledModule:
    return geminifx.compile(Counting(dtype, **options), example_inputs=(torch.ones(8, 6),))


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ({}, {"more": True}, r"model\.more\.weight has shape \(3, 3\), but the checkpoint lacks it"),
        ({"more": True}, {}, r"the checkpoint has model\.more\.\w+, model\.more\.\w+, which the model lacks"),
        ({"dtype": torch.float64}, {}, r"model\.count is torch\.float32, but torch\.float64 in the checkpoint"),
        ({"dtype": torch.int64}, {}, r"model\.count is torch\.float32, but torch\.int64 in the checkpoint"),
        ({}, {"dtype": torch.int64}, r"model\.count is torch\.int64, but torch\.float32 in the checkpoint"),
    ],
)
def test_another_model_changes_nothing(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], says: str
) -> None:
    geminifx.save_checkpoint(counting(**before), None, tmp_path / "saved")
    model = counting(**after)
    weights = values(model)
    with pytest.raises(CheckpointError, match=f"nothing was loaded: {says}"):
        geminifx.load_checkpoint(model, None, tmp_path / "saved")
    assert same(values(model), weights)


def test_what_another_dtype_holds_exactly_is_taken(tmp_path: Path) -> None:
    source = counting(torch.bfloat16)
    geminifx.save_checkpoint(source, None, tmp_path / "saved")
    model = counting(torch.float32)
    model.count.zero_()
    geminifx.load_checkpoint(model, None, tmp_path / "saved")
    assert model.count.tolist() == [1.0, 1.0] and model.count.dtype == torch.float32


def test_weights_on_meta_do_not_train_where_they_were_not_read(tmp_path: Path) -> None:
    geminifx.save_checkpoint(counting(), None, tmp_path / "saved")
    with geminifx.init_empty():
        empty = Counting(torch.float32, more=True)
    model = geminifx.compile(empty, example_inputs=(torch.ones(8, 6),))
    with pytest.raises(CheckpointError, match="nothing was loaded"):
        geminifx.load_checkpoint(model, None, tmp_path / "saved")
    with pytest.raises(StateError):
        model(torch.ones(8, 6))


@pytest.mark.parametrize("ours", [False, True], ids=["torch's optimizer", "our own"])
def test_a_load_that_waits_is_made_where_a_checkpoint_is_of_another_model(tmp_path: Path, ours: bool) -> None:
    source = counting()
    expected = source(torch.ones(8, 6))
    source.save_pretrained(tmp_path / "weights")
    geminifx.save_checkpoint(counting(more=True), None, tmp_path / "saved")
    with geminifx.init_empty():
        empty = Counting(torch.float32)
    model = geminifx.compile(empty, example_inputs=(torch.ones(8, 6),))
    model.load_pretrained(tmp_path / "weights")
    with pytest.raises(CheckpointError, match="nothing was loaded"):
        geminifx.load_checkpoint(model, None, tmp_path / "saved")
    assert all(parameter.is_meta for parameter in model.parameters())
    if ours:
        model.optimizer(AdamW, lr=1e-2)
    assert torch.equal(model(torch.ones(8, 6)), expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_after_half_a_load_every_step_is_refused_until_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    model = compiled()
    first = OPTIMIZERS[optimizer](model)
    train(model, first)
    geminifx.save_checkpoint(model, first, tmp_path / "saved")
    expected, losses = values(model), train(model, first)
    other = compiled(seed=1)
    second = OPTIMIZERS[optimizer](other)
    train(other, second)
    with monkeypatch.context() as patched:
        reads = iter(range(99))

        def fails_late(*arguments: Any) -> Any:
            if next(reads) == 9:
                raise OSError(5, "Input/output error")
            return narrow(*arguments)

        narrow = torch.distributed.checkpoint.filesystem.narrow_tensor_by_index
        patched.setattr("torch.distributed.checkpoint.filesystem.narrow_tensor_by_index", fails_late)
        with pytest.raises(CheckpointError, match=r"could not load .*Input/output error"):
            geminifx.load_checkpoint(other, second, tmp_path / "saved")
    half = "loading a checkpoint failed halfway: some values of the model and the optimizer come from it"
    for refused in (
        lambda: other(torch.ones(8, 6)),
        lambda: geminifx.save_checkpoint(other, second, tmp_path / "half"),
        lambda: other.save_pretrained(tmp_path / "half"),
    ):
        with pytest.raises(StateError, match=half):
            refused()
    geminifx.load_checkpoint(other, None, tmp_path / "saved")
    with pytest.raises(StateError, match="some values of the optimizer come from it"):
        other(torch.ones(8, 6))
    geminifx.load_checkpoint(other, second, tmp_path / "saved")
    assert same(values(other), expected) and train(other, second) == losses


def test_values_of_a_whole_state_dict_make_up_for_half_a_load(tmp_path: Path) -> None:
    model = compiled()
    model.session.half_loaded.add("model")
    with pytest.raises(StateError):
        model(torch.ones(8, 6))
    model.load_state_dict(network(seed=1).state_dict())
    model(torch.ones(8, 6))


def rewritten(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    """A checkpoint whose metadata was changed by who knows how to."""
    file = folder / ".metadata"
    file.write_bytes(change(file.read_bytes()))
    (folder / CHECKSUMS).unlink()
    seal(folder)
    return folder


def drop_a_part(metadata: bytes) -> bytes:
    found = pickle.loads(metadata)
    found.state_dict_metadata["model.inner.weight"].chunks.clear()
    return pickle.dumps(found)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        # As long as the name that stands there.
        (lambda data: data.replace(b"__0_0.distcp", b"../../secret"), r"would be read from \.\./\.\./secret, outside"),
        (drop_a_part, r"the parts of model\.inner\.weight do not make up"),
    ],
    ids=["a file outside", "a part that is not there"],
)
def test_metadata_that_would_leave_something_unread_is_refused(
    tmp_path: Path, change: Callable[[bytes], bytes], says: str
) -> None:
    geminifx.save_checkpoint(counting(), None, tmp_path / "saved")
    with pytest.raises(CheckpointError, match=f"cannot read .*{says}"):
        geminifx.load_checkpoint(counting(), None, rewritten(tmp_path / "saved", change))
