"""The fine-tuning loop on a plain model in a compiled model's clothes."""

import math
import os
import random
import shutil
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from geminifx.models.presets import load_model
from geminifx.models.recipe.blocks import TokenBlocks
from geminifx.models.recipe.finetune import NonFiniteLoss, finetune, perplexity
from geminifx.models.recipe.recipe import Recipe, Report, StepInfo
from geminifx.models.recipe.run_state import random_states, restore_random_states
from geminifx.models.recipe.trainable import Processes
from geminifx.runtime.distributed.ranks import Ranks
from geminifx.runtime.isa.errors import BudgetError, CheckpointError
from geminifx.runtime.isa.mesh import Axis, Mesh
from geminifx.runtime.state_io.background import Saving
from trainable import ClippedAdamW, PlainCheckpoints
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

VOCAB = 300


class Plain(torch.nn.Module):
    """Runs the model as it is."""

    ranks: Processes = Ranks()

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: torch.Tensor) -> Any:
        return self.model(**batch)

    def optimizer(self, kind: type, params: Any, *, max_grad_norm: float, **hyper: Any) -> ClippedAdamW:
        return ClippedAdamW(kind, params, max_grad_norm, **hyper)

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


def _finetune(model: Plain, blocks: TokenBlocks, recipe: Recipe, **options: Any) -> Report:
    return finetune(model, blocks, recipe, PlainCheckpoints(model), **options)


def _step_saved(recipe: Recipe) -> int | None:
    return PlainCheckpoints(_model()).open(recipe.output).extra["step"] if recipe.output.exists() else None


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()


def _signal_at(step: int, *numbers: int) -> Callable[[StepInfo], None]:
    def on_step(info: StepInfo) -> None:
        if info.step == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    return on_step


def _ctrl_c_at(step: int) -> Callable[[StepInfo], None]:
    return _signal_at(step, signal.SIGINT)


def test_learns_and_saves_a_loadable_checkpoint(tmp_path: Path) -> None:
    model, recipe = _model(), _recipe(tmp_path, steps=40, lr=1e-2)
    seen: list[StepInfo] = []
    report = _finetune(model, _blocks(), recipe, on_step=seen.append)
    assert not report.interrupted and report.perplexity_after < report.perplexity_before / 2
    assert [info.step for info in seen] == list(range(1, 41))
    assert tuple(info.loss for info in seen) == report.losses
    assert all(info.tokens == 64 and info.grad_norm > 0 for info in seen) and report.tokens_per_s > 0
    again = Plain(load_model(str(recipe.output)))
    assert perplexity(again, _blocks(), recipe) == report.perplexity_after
    assert model.training


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = _recipe(tmp_path, output=tmp_path / "whole")
    expected = _finetune(_model(), _blocks(), whole)

    recipe = _recipe(tmp_path)
    first = _finetune(_model(), _blocks(), recipe, on_step=_ctrl_c_at(2))
    assert first.interrupted and len(first.losses) == 2
    random.random(), np.random.rand(), torch.rand(3)
    second = _finetune(_model(), _blocks(), recipe, resume=True, on_step=_ctrl_c_at(5))
    third = _finetune(_model(), _blocks(), recipe, resume=True)

    assert (second.first_step, third.first_step) == (2, 5)
    assert first.losses + second.losses + third.losses == expected.losses
    assert third.perplexity_after == expected.perplexity_after
    assert third.perplexity_before == expected.perplexity_before
    ours, theirs = _weights(recipe.output), _weights(whole.output)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


STOPS = (signal.SIGINT, signal.SIGTERM)


def test_ctrl_c_twice_stops_at_once_and_handlers_are_left_as_they_were(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in STOPS]
    with pytest.raises(KeyboardInterrupt):
        _finetune(_model(), _blocks(), _recipe(tmp_path), on_step=_signal_at(1, signal.SIGINT, signal.SIGINT))
    assert [signal.getsignal(number) for number in STOPS] == before


def test_a_scheduler_that_ends_the_run_may_say_so_twice(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    report = _finetune(_model(), _blocks(), recipe, on_step=_signal_at(2, signal.SIGTERM, signal.SIGTERM))
    assert report.interrupted and len(report.losses) == 2 and _step_saved(recipe) == 2


def test_saves_every_few_steps(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, save_every=2)
    saved: list[int | None] = []
    _finetune(_model(), _blocks(), recipe, on_step=lambda info: saved.append(_step_saved(recipe)))
    assert saved == [None, None, 2, 2, 4, 4] and _step_saved(recipe) == 6


def test_saves_when_so_much_time_has_passed(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, steps=3, save_every_s=1e-9)
    saved: list[int | None] = []
    _finetune(_model(), _blocks(), recipe, on_step=lambda info: saved.append(_step_saved(recipe)))
    assert saved == [None, 1, 2] and _step_saved(recipe) == 3
    assert recipe.is_due(1, since_s=1e-9) and not recipe.is_due(1, since_s=1e-10)


def test_one_process_whose_clock_is_early_makes_all_save(tmp_path: Path) -> None:
    """All take part in saving: none may go by its own clock."""

    class Early(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [value, (False, True, False)] if isinstance(value, tuple) and len(value) == 3 else [value]

    model, recipe = _model(), _recipe(tmp_path, steps=3, save_every_s=1e9)
    model.ranks = Early()
    saved: list[int | None] = []
    _finetune(model, _blocks(), recipe, on_step=lambda info: saved.append(_step_saved(recipe)))
    assert saved == [None, 1, 2]


def test_resuming_a_finished_run_only_judges_it(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, steps=2)
    done = _finetune(_model(), _blocks(), recipe)
    again = _finetune(_model(), _blocks(), recipe, resume=True)
    assert (again.losses, again.perplexity_after) == ((), done.perplexity_after)


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, steps=2)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        _finetune(_model(), _blocks(), recipe, resume=True)
    _finetune(_model(), _blocks(), recipe)
    with pytest.raises(ValueError, match=r"steps was 2, now 3; lr was 0\.003, now 0\.1"):
        _finetune(_model(), _blocks(), _recipe(tmp_path, steps=3, lr=0.1), resume=True)
    with pytest.raises(ValueError, match="trained on different data"):
        _finetune(_model(), _blocks(seed=1), recipe, resume=True)
    # How often to save may change.
    _finetune(_model(), _blocks(), _recipe(tmp_path, steps=2, save_every=1), resume=True)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    model, recipe = _model(), _recipe(tmp_path)
    checkpoints = PlainCheckpoints(model)
    checkpoints.save(recipe.output, model.optimizer(torch.optim.AdamW, model.parameters(), max_grad_norm=1.0), {"a": 1})
    with pytest.raises(
        CheckpointError, match=r"was not written by geminifx train: expected the values curve, data, .*--resume"
    ):
        finetune(model, _blocks(), recipe, checkpoints, resume=True)


def test_nothing_is_loaded_for_a_run_that_is_refused(tmp_path: Path) -> None:
    _finetune(_model(), _blocks(), _recipe(tmp_path, steps=2))
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="trained with different settings"):
        _finetune(model, _blocks(), _recipe(tmp_path, steps=3), resume=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@dataclass(frozen=True)
class Second:
    """The second of two processes along `axis`, which find what it does itself; `first` is the other's randomness."""

    axis: str
    first: dict[str, Any] = field(default_factory=random_states)
    rank = 1

    @property
    def mesh(self) -> Mesh:
        return Mesh((Axis(self.axis, 2, "data"),))

    @property
    def data_rank(self) -> int:
        return self.mesh.coordinate(self.rank, "data")

    def failing_alike(self) -> AbstractContextManager[None]:
        return nullcontext()

    def gather(self, value: Any) -> list[Any]:
        return [self.first, value] if isinstance(value, dict) else [value, value]

    def check_alike(self, what: str, digest: str) -> None:
        pass


def _as_second(axis: str) -> Plain:
    model = _model()
    model.ranks = Second(axis)
    return model


def test_each_process_goes_on_with_its_own_randomness(tmp_path: Path) -> None:
    expected = _finetune(_as_second("data"), _blocks(), _recipe(tmp_path, output=tmp_path / "whole"))
    recipe = _recipe(tmp_path)
    first = _finetune(_as_second("data"), _blocks(), recipe, on_step=_ctrl_c_at(2))
    second = _finetune(_as_second("data"), _blocks(), recipe, resume=True)
    assert first.losses + second.losses == expected.losses


def test_on_another_mesh_randomness_is_new_and_always_the_same(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    _finetune(_as_second("data"), _blocks(), recipe, on_step=_ctrl_c_at(2))
    kept = PlainCheckpoints(_model()).open(recipe.output).extra["random"]
    begun: list[list[torch.Tensor]] = []
    for axis in ("row", "row", "data"):
        model = _as_second(axis)
        states: list[torch.Tensor] = []
        model.register_forward_pre_hook(lambda *_, states=states: states.append(torch.random.get_rng_state()))
        copied = shutil.copytree(recipe.output, tmp_path / "again", dirs_exist_ok=True)
        _finetune(model, _blocks(), _recipe(tmp_path, output=copied), resume=True)
        begun.append(states)
    assert torch.equal(begun[0][0], begun[1][0])
    assert torch.equal(begun[2][0], kept[1]["torch"]) and not torch.equal(begun[0][0], kept[1]["torch"])


def test_random_states_come_back(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()]

    draw()
    torch.save(random_states(), tmp_path / "states.pt")
    expected = draw()
    restore_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert draw() == expected


def test_a_loss_that_is_not_a_number_names_step_and_module(tmp_path: Path) -> None:
    model = _model()
    broken = model.model.model.decoder.layers[1].fc1

    def on_step(info: StepInfo) -> None:
        if info.step == 3:
            broken.weight.data[0, 0] = math.nan

    says = r"loss of step 4 is nan; .* comes from model\.decoder\.layers\.1\.fc1\. .*--lr"
    with pytest.raises(NonFiniteLoss, match=says):
        _finetune(model, _blocks(), _recipe(tmp_path), on_step=on_step)


def test_a_budget_without_room_for_the_search_still_names_the_step(tmp_path: Path) -> None:
    def refuse(**_: torch.Tensor) -> None:
        raise BudgetError("the device tier is full")

    model = _model()
    model.model.model.decoder.layers[1].fc1.weight.data.fill_(math.nan)
    model.first_nonfinite = refuse  # type: ignore[method-assign,assignment]
    with pytest.raises(NonFiniteLoss, match=r"loss of step 1 is nan; the budget leaves too little memory to search"):
        _finetune(model, _blocks(), _recipe(tmp_path))


def test_an_infinite_gradient_is_stopped_before_the_update(tmp_path: Path) -> None:
    model = _model()
    weight = model.model.model.decoder.layers[0].fc1.weight
    weight.register_hook(lambda gradient: gradient * math.inf)
    before = weight.detach().clone()
    with pytest.raises(NonFiniteLoss, match=r"gradient of step 1 is .*; every value of the forward is finite"):
        _finetune(model, _blocks(), _recipe(tmp_path))
    assert torch.equal(weight, before)


def test_a_step_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    class Full(PlainCheckpoints):
        def save(self, directory: Path, optimizer: Any, extra: dict[str, Any], **how: bool) -> Saving:
            if extra["step"] == 4:
                raise CheckpointError("the disk is full")
            return super().save(directory, optimizer, extra, **how)

    model, recipe = _model(), _recipe(tmp_path, save_every=2)
    with pytest.raises(CheckpointError, match=r"step 4 was not saved: the disk is full; free some space .*--resume"):
        finetune(model, _blocks(), recipe, Full(model))
    assert _step_saved(recipe) == 2


def test_output_that_is_not_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="contains files that are not a checkpoint"):
        _finetune(_model(), _blocks(), _recipe(tmp_path))
    with pytest.raises(ValueError, match="is a file"):
        _finetune(_model(), _blocks(), _recipe(tmp_path, output=tmp_path / "run" / "thesis.tex"))


def test_a_place_that_cannot_be_written_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    steps: list[StepInfo] = []
    with pytest.raises(CheckpointError, match=r"cannot be written to .*choose another --output"):
        _finetune(_model(), _blocks(), _recipe(tmp_path, output=tmp_path / "file" / "run"), on_step=steps.append)
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
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.*expected"):
        _recipe(tmp_path, **change)
