"""What `geminifx train` leaves in its directory: a model for others and a state to go on from, both or neither."""

import os
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import geminifx
import numpy as np
import pytest
import torch
from geminifx.compiler.cli.job import TrainOptions, prepare
from geminifx.compiler.cli.run_directory import STATE, RunDirectory
from geminifx.models.recipe.blocks import TokenBlocks
from geminifx.models.recipe.finetune import finetune, make_optimizer
from geminifx.models.recipe.recipe import Recipe, Report, StepInfo
from geminifx.models.recipe.text import train_tokenizer
from geminifx.runtime.isa.errors import CheckpointError
from geminifx.runtime.state_io.checksums import CHECKSUMS
from shared_captures import shared_captures
from trainable import SMALL_OPT
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

BATCH, SEQ_LEN = 2, 16


def _blocks() -> TokenBlocks:
    return TokenBlocks(np.random.default_rng(0).integers(0, 300, 1600), SEQ_LEN)


def _recipe(directory: Path, **changes: Any) -> Recipe:
    settings = {"steps": 3, "batch_size": BATCH, "lr": 1e-2, "warmup": 0, "held_out_batches": 1}
    return Recipe(**{"output": directory / "run", **settings, **changes})


def _model() -> geminifx.CompiledModule:
    config = AutoConfig.for_model(**SMALL_OPT, dropout=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    with shared_captures():
        return geminifx.compile(model, device="cpu", example_inputs=_blocks().batch(0, BATCH))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["the quick brown fox jumps over the lazy dog. " * 40], 300)


def _train(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, **options: Any) -> Report:
    model = _model()
    return finetune(model, _blocks(), recipe, RunDirectory(model, tokenizer), **options)


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()


def _step_saved(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> int:
    return RunDirectory(_model(), tokenizer).open(recipe.output).extra["step"]


@pytest.fixture
def run(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """A finished run of two steps."""
    recipe = _recipe(tmp_path, steps=2)
    _train(tokenizer, recipe)
    return recipe


def test_it_holds_a_model_for_others_and_a_checkpoint_of_ours(run: Recipe) -> None:
    assert len(AutoTokenizer.from_pretrained(run.output)("quick fox")["input_ids"]) > 1
    model = _model()
    optimizer = make_optimizer(model, run)
    extra = geminifx.load_checkpoint(model, optimizer, run.output / STATE)
    assert extra["step"] == 2 and extra["mesh"] == "one process"
    published, own = _weights(run.output), model.state_dict()
    assert all(torch.equal(published[name], own[name]) for name in own)
    assert all(state["step"] == 2 and state["exp_avg"].any() for state in optimizer.state_dict()["state"].values())


@pytest.mark.slow
def test_what_is_missing_or_damaged_is_named(run: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    metadata, data = run.output / STATE / ".metadata", next((run.output / STATE).glob("*.distcp"))
    for file, content, says in (
        (metadata, metadata.read_bytes()[:1000], r"run/state is damaged: \.metadata has 1000 bytes instead of"),
        (data, data.read_bytes()[:3000], r"run/state is damaged: __0_0\.distcp has 3000 bytes instead of"),
        (
            data,
            bytes(data.stat().st_size),
            r"run/state is damaged: __0_0\.distcp differs from the bytes that were saved",
        ),
        (run.output / STATE / CHECKSUMS, b"", r"run/state is damaged: checksums\.json cannot be read"),
    ):
        whole = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{says}.*; start the run without --resume"):
            _train(tokenizer, run, resume=True)
        file.write_bytes(whole)
    shutil.rmtree(run.output / STATE)
    with pytest.raises(CheckpointError, match=r"nothing to resume in .*run: no state; start the run"):
        _train(tokenizer, run, resume=True)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_what_others_read_is_verified_before_it_is_read(run: Recipe, name: str) -> None:
    """When the run is resumed, and when another one starts from it."""
    (run.output.parent / "data.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    resumed = TrainOptions(data=run.output.parent / "data.txt", seq_len=16, output=run.output, resume=True)
    further = TrainOptions(str(run.output), run.output.parent / "data.txt", seq_len=16)
    prepare(resumed)
    content = bytearray((run.output / name).read_bytes())
    content[len(content) // 2] ^= 1
    (run.output / name).write_bytes(content)
    for options, advice in ((resumed, "; start the run without --resume$"), (further, "")):
        with pytest.raises(CheckpointError, match=f"damaged: {name} differs from the bytes that were saved.*{advice}"):
            prepare(options)
    (run.output / name).unlink()
    with pytest.raises(CheckpointError, match=f"damaged: {name} is missing"):
        prepare(resumed)


def test_a_run_that_a_killed_save_left_beside_its_place_goes_on(
    run: Recipe, tokenizer: PreTrainedTokenizerBase
) -> None:
    run.output.rename(run.output.parent / ".run.old-0123abcd")
    with pytest.warns(UserWarning, match="a save was killed"):
        assert _step_saved(tokenizer, run) == 2
    assert [path.name for path in run.output.parent.iterdir()] == ["run"]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["model", "tokenizer", "state"])
@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_save_leaves_the_old_checkpoint(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch,
    part: str, interruption: BaseException,
) -> None:  # fmt: skip
    def fail(*_: object, **__: object) -> None:
        raise interruption

    def on_step(info: StepInfo) -> None:
        targets = {
            "model": "transformers.PreTrainedModel.save_pretrained",
            "tokenizer": "transformers.PreTrainedTokenizerBase.save_pretrained",
            "state": "torch.distributed.checkpoint.filesystem._write_item",
        }
        if info.step == 3:
            _wait_for_save(tmp_path)
            monkeypatch.setattr(targets[part], fail)

    recipe = _recipe(tmp_path, steps=4, save_every=2)
    says = (
        "^$" if isinstance(interruption, KeyboardInterrupt) else r"step 4 was not saved: could not save to .*No space"
    )
    expected = KeyboardInterrupt if isinstance(interruption, KeyboardInterrupt) else CheckpointError
    with pytest.raises(expected, match=says):
        _train(tokenizer, recipe, on_step=on_step)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert _step_saved(tokenizer, recipe) == 2 and _weights(recipe.output)


def _wait_for_save(folder: Path) -> None:
    """Until the checkpoint that is written in the background is at its place, and nothing else there."""
    while os.listdir(folder) != ["run"]:
        time.sleep(0.01)


def test_a_full_disk_is_a_clear_error_and_the_old_checkpoint_stays(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    recipe = _recipe(tmp_path, steps=4, save_every=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill_disk(info: StepInfo, limit_bytes: int) -> None:
        # A limit on the size of files makes real writes fail, in the libraries' own code.
        if info.step == 3:
            _wait_for_save(tmp_path)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limits[1]))

    says = r"step 4 was not saved: could not save to .*File too large.* is intact; free some"
    try:
        # Too small for the weights; then large enough for them, but not for masters and moments.
        for limit_bytes in (20_000, 120_000):
            with pytest.raises(CheckpointError, match=says):
                _train(tokenizer, recipe, on_step=partial(fill_disk, limit_bytes=limit_bytes))
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert [path.name for path in tmp_path.iterdir()] == ["run"]
            assert _step_saved(tokenizer, recipe) == 2 and _weights(recipe.output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("has_room", [True, False])
def test_a_save_in_the_background_is_of_its_moment(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, has_room: bool
) -> None:
    """Where the host has no room for a copy, it is written at once."""
    recipe = _recipe(tmp_path, steps=2)
    model = _model()
    optimizer = make_optimizer(model, recipe)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    tier = model.session.hardware.host_tier
    tier.limit_bytes = None if has_room else tier.used_bytes
    saving = RunDirectory(model, tokenizer).save(recipe.output, optimizer, {"step": 0}, background=True)
    assert has_room or saving.done()
    batch = _blocks().batch(0, BATCH)
    model(**batch).loss.backward()
    optimizer.step()
    saving.result()
    published = _weights(recipe.output)
    assert all(torch.equal(published[name], weights[name]) for name in published)
    RunDirectory(model, tokenizer).open(recipe.output).load(optimizer)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert os.listdir(tmp_path) == ["run"]
