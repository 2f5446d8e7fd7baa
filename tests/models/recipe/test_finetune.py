"""The fine-tuning loop on a plain model in a compiled model's clothes."""

import math
import os
import random
import resource
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from geminifx.models.presets import load_model
from geminifx.models.recipe.blocks import TokenBlocks
from geminifx.models.recipe.finetune import NonFiniteLoss, finetune, perplexity
from geminifx.models.recipe.recipe import Recipe, StepInfo
from geminifx.models.recipe.training_state import STATE_FILE, load_training_state
from geminifx.runtime.distributed.ranks import Ranks
from geminifx.runtime.isa.errors import BudgetError, CheckpointError
from trainable import ClippedAdamW
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

VOCAB = 300


class Plain(torch.nn.Module):
    """Runs the model as it is; `on_save` is called in the middle of a save."""

    ranks = Ranks()

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.on_save: Callable[[], None] = lambda: None

    def forward(self, **batch: torch.Tensor) -> Any:
        return self.model(**batch)

    def optimizer(self, kind: type, params: Any, *, max_grad_norm: float, **hyper: Any) -> ClippedAdamW:
        return ClippedAdamW(kind, params, max_grad_norm, **hyper)

    def save_pretrained(self, directory: str | Path) -> None:
        self.model.save_pretrained(directory)
        self.on_save()

    def first_nonfinite(self, **_: torch.Tensor) -> str | None:
        bad = (name for name, p in self.model.named_parameters() if not p.isfinite().all())
        return next((name.rpartition(".")[0] for name in bad), None)


def _config() -> OPTConfig:
    # With dropout, so that a resumed run goes wrong unless the random states are restored.
    return OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=64,
        max_position_embeddings=32,
        dropout=0.2,
    )


def _model() -> Plain:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Plain(OPTForCausalLM(_config()))


def _blocks(seed: int = 0) -> TokenBlocks:
    # Text with a pattern, so that there is something to learn.
    tokens = (np.arange(4000) % 50) + 3 + np.random.default_rng(0).integers(0, 3, 4000)
    return TokenBlocks(tokens, 16, seed=seed)


def _recipe(tmp_path: Path, **changes: Any) -> Recipe:
    return Recipe(**{"output": tmp_path / "run", "steps": 6, "batch_size": 4, "lr": 3e-3, "warmup": 2} | changes)


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()


def _ctrl_c_at(step: int) -> Callable[[StepInfo], None]:
    def on_step(info: StepInfo) -> None:
        if info.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


def test_learns_and_saves_a_loadable_checkpoint(tmp_path: Path) -> None:
    model, recipe = _model(), _recipe(tmp_path, steps=40, lr=1e-2)
    seen: list[StepInfo] = []
    report = finetune(model, _blocks(), recipe, on_step=seen.append)
    assert not report.interrupted and report.perplexity_after < report.perplexity_before / 2
    assert [info.step for info in seen] == list(range(1, 41))
    assert tuple(info.loss for info in seen) == report.losses
    assert all(info.tokens == 64 and info.grad_norm > 0 for info in seen) and report.tokens_per_s > 0
    again = Plain(load_model(str(recipe.output)))
    assert perplexity(again, _blocks(), recipe) == report.perplexity_after
    assert model.training


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = _recipe(tmp_path, output=tmp_path / "whole")
    expected = finetune(_model(), _blocks(), whole)

    recipe = _recipe(tmp_path)
    first = finetune(_model(), _blocks(), recipe, on_step=_ctrl_c_at(2))
    assert first.interrupted and len(first.losses) == 2
    random.random(), np.random.rand(), torch.rand(3)
    second = finetune(Plain(load_model(str(recipe.output))), _blocks(), recipe, resume=True, on_step=_ctrl_c_at(5))
    third = finetune(Plain(load_model(str(recipe.output))), _blocks(), recipe, resume=True)

    assert (second.first_step, third.first_step) == (2, 5)
    assert first.losses + second.losses + third.losses == expected.losses
    assert third.perplexity_after == expected.perplexity_after
    assert third.perplexity_before == expected.perplexity_before
    ours, theirs = _weights(recipe.output), _weights(whole.output)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_ctrl_c_twice_stops_at_once_and_once_leaves_the_handler_as_it_was(tmp_path: Path) -> None:
    def twice(info: StepInfo) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        finetune(_model(), _blocks(), _recipe(tmp_path), on_step=twice)
    assert signal.getsignal(signal.SIGINT) == before


def test_saves_every_few_steps(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, save_every=2)
    saved: list[int] = []

    def on_step(info: StepInfo) -> None:
        if (recipe.output / STATE_FILE).exists():
            saved.append(load_training_state(recipe.output).step)

    finetune(_model(), _blocks(), recipe, on_step=on_step)
    assert saved == [2, 2, 4, 4] and load_training_state(recipe.output).step == 6


def test_resuming_a_finished_run_only_judges_it(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, steps=2)
    done = finetune(_model(), _blocks(), recipe)
    again = finetune(Plain(load_model(str(recipe.output))), _blocks(), recipe, resume=True)
    assert (again.losses, again.perplexity_after) == ((), done.perplexity_after)


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, steps=2)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        finetune(_model(), _blocks(), recipe, resume=True)
    finetune(_model(), _blocks(), recipe)
    with pytest.raises(ValueError, match=r"steps was 2, now 3; lr was 0\.003, now 0\.1"):
        finetune(_model(), _blocks(), _recipe(tmp_path, steps=3, lr=0.1), resume=True)
    with pytest.raises(ValueError, match="trained on other data"):
        finetune(_model(), _blocks(seed=1), recipe, resume=True)
    # How often to save may change.
    finetune(_model(), _blocks(), _recipe(tmp_path, steps=2, save_every=1), resume=True)


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, steps=2)
    finetune(_model(), _blocks(), recipe)
    file = recipe.output / STATE_FILE
    for content in (file.read_bytes()[:1000], b"", b"nothing of ours"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"cannot read .*{STATE_FILE}"):
            finetune(_model(), _blocks(), recipe, resume=True)


def test_a_loss_that_is_not_a_number_names_step_and_module(tmp_path: Path) -> None:
    model = _model()
    broken = model.model.model.decoder.layers[1].fc1

    def on_step(info: StepInfo) -> None:
        if info.step == 3:
            broken.weight.data[0, 0] = math.nan

    says = r"loss of step 4 is nan; .* comes from model\.decoder\.layers\.1\.fc1\. .*--lr"
    with pytest.raises(NonFiniteLoss, match=says):
        finetune(model, _blocks(), _recipe(tmp_path), on_step=on_step)


def test_a_budget_without_room_for_the_search_still_names_the_step(tmp_path: Path) -> None:
    def refuse(**_: torch.Tensor) -> None:
        raise BudgetError("the device tier is full")

    model = _model()
    model.model.model.decoder.layers[1].fc1.weight.data.fill_(math.nan)
    model.first_nonfinite = refuse  # type: ignore[method-assign,assignment]
    with pytest.raises(NonFiniteLoss, match=r"loss of step 1 is nan; the budget has no room to search"):
        finetune(model, _blocks(), _recipe(tmp_path))


def test_an_infinite_gradient_is_stopped_before_the_update(tmp_path: Path) -> None:
    model = _model()
    weight = model.model.model.decoder.layers[0].fc1.weight
    weight.register_hook(lambda gradient: gradient * math.inf)
    before = weight.detach().clone()
    with pytest.raises(NonFiniteLoss, match=r"gradient of step 1 is .*; every value of the forward is finite"):
        finetune(model, _blocks(), _recipe(tmp_path))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path: Path, interruption: BaseException) -> None:
    recipe = _recipe(tmp_path, save_every=2)
    model = _model()
    saves = iter([None, interruption])

    def on_save() -> None:
        failure = next(saves)
        if failure is not None:
            raise failure

    model.on_save = on_save
    with pytest.raises((KeyboardInterrupt, CheckpointError)):
        finetune(model, _blocks(), recipe)
    assert load_training_state(recipe.output).step == 2 and _weights(recipe.output)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_is_a_clear_error_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, save_every=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill_disk(info: StepInfo, limit_bytes: int) -> None:
        # A limit on the size of files makes real writes fail, in the libraries' own code.
        if info.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limits[1]))

    try:
        # Too small for the weights; then large enough for the weights but not for the optimizer's state.
        for limit_bytes in (50_000, 150_000):
            with pytest.raises(CheckpointError, match=r"could not save step 4 .*File too large.* is intact; free some"):
                finetune(_model(), _blocks(), recipe, on_step=partial(fill_disk, limit_bytes=limit_bytes))
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert load_training_state(recipe.output).step == 2 and _weights(recipe.output)
            assert [path.name for path in tmp_path.iterdir()] == ["run"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_output_that_is_not_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds files but no checkpoint"):
        finetune(_model(), _blocks(), _recipe(tmp_path))
    with pytest.raises(ValueError, match="is a file"):
        finetune(_model(), _blocks(), _recipe(tmp_path, output=tmp_path / "run" / "thesis.tex"))


def test_a_place_that_cannot_be_written_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    steps: list[StepInfo] = []
    with pytest.raises(CheckpointError, match=r"cannot be written to .*choose another --output"):
        finetune(_model(), _blocks(), _recipe(tmp_path, output=tmp_path / "file" / "run"), on_step=steps.append)
    assert not steps and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_learning_rate_rises_and_falls(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, steps=10, lr=1.0, warmup=4)
    rates = [recipe.lr_at(step) for step in range(10)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8]) and rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.2
    assert all(0 < _recipe(tmp_path, steps=2, lr=1.0, warmup=100).lr_at(step) < 1 for step in range(2))


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": math.nan}, {"weight_decay": -1.0}, {"warmup": -1}],
)
def test_settings_out_of_range(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} must"):
        _recipe(tmp_path, **change)
