"""PEFT's adapters on a compiled model train, are saved and are merged as on a plain one."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from zoo import GPT2, LLAMA, Case, tokens

peft = pytest.importorskip("peft")

import geminifx  # noqa: E402
from geminifx.runtime.isa.errors import StateError  # noqa: E402
from trainers import difference, same  # noqa: E402

LAYERS = {"llama": ["q_proj", "v_proj"], "gpt2, tied": ["c_attn"]}
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:fan_in_fan_out")]
CASES = pytest.mark.parametrize("case", [LLAMA, GPT2], ids=lambda case: case.name)


def adapted(case: Case, **changes: Any) -> Any:
    """With adapters that compute something from the start."""
    model = case.seeded()
    config = {"r": 4, "target_modules": LAYERS[case.name], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(**{**config, **changes}))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[Tensor]:
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**tokens(seed=step)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    return losses


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=1e-2, fused=True)


def check_near(case: Case, model: Any, plain: Any, found: list[Tensor], expected: list[Tensor]) -> None:
    if case.exact:
        assert all(map(torch.equal, found, expected)) and same(model, plain)
    else:
        assert torch.allclose(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=0)
        assert difference(model, plain) <= 1e-4


@CASES
@pytest.mark.parametrize("ours", [False, True], ids=["torch's optimizer", "our own"])
@pytest.mark.parametrize("planned", ["by a guess", "by examples"])
def test_adapters_train_as_those_of_a_plain_model(case: Case, ours: bool, planned: str) -> None:
    plain, source = adapted(case), adapted(case)
    frozen = {name: p.clone() for name, p in source.named_parameters() if not p.requires_grad}
    examples = {"example_inputs": tokens()} if planned == "by examples" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = geminifx.compile(source, **examples)
        optimizer = model.optimizer(torch.optim.AdamW, trained(model), lr=1e-2) if ours else adamw(model)
        found = train(model, optimizer)
    check_near(case, model, plain, found, train(plain, adamw(plain)))
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in frozen.items())


@CASES
@pytest.mark.parametrize("ours", [False, True], ids=["torch's optimizer", "our own"])
def test_the_adapter_alone_is_saved(case: Case, ours: bool, tmp_path: Path) -> None:
    plain, model = adapted(case), geminifx.compile(adapted(case), example_inputs=tokens())
    train(model, model.optimizer(torch.optim.AdamW, trained(model), lr=1e-2) if ours else adamw(model))
    model.save_pretrained(tmp_path / "compiled")
    plain.save_pretrained(tmp_path / "plain")
    written = [{path.name for path in (tmp_path / name).iterdir()} for name in ("compiled", "plain")]
    assert written[0] == written[1] and "adapter_model.safetensors" in written[0]
    saved, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("compiled", "plain"))
    assert saved.keys() == expected.keys() and all("lora_" in name for name in saved)
    loaded = peft.PeftModel.from_pretrained(case.seeded(), tmp_path / "compiled")
    assert same(loaded, model)


@CASES
def test_adapters_are_merged_into_a_model_that_is_trained_by_torchs_optimizer(case: Case) -> None:
    model = geminifx.compile(adapted(case))
    train(model, adamw(model))
    plain = adapted(case)
    plain.load_state_dict(model.state_dict())
    merged, expected = model.merge_and_unload(), plain.merge_and_unload()
    assert same(merged, expected)
    with torch.no_grad():
        found, right = (each(**tokens()).loss for each in (merged, expected))
    assert torch.allclose(found, right, rtol=1e-6, atol=0)


@CASES
@pytest.mark.parametrize("grad", [True, False], ids=["training", "evaluation"])
def test_adapters_that_are_merged_for_a_while(case: Case, grad: bool) -> None:
    """What is merged is read from an attribute: programs are found by it."""
    plain, model = adapted(case), geminifx.compile(adapted(case))
    with torch.set_grad_enabled(grad):
        for act in ("merge_adapter", "unmerge_adapter", "merge_adapter"):
            for each in (plain, model):
                each(**tokens())
                getattr(each, act)()
            found, expected = model(**tokens()).loss, plain(**tokens()).loss
            assert torch.allclose(found, expected, rtol=1e-5, atol=0), act


@CASES
def test_adapters_that_are_switched_off_for_a_while(case: Case) -> None:
    plain, model = adapted(case), geminifx.compile(adapted(case))
    losses = []
    for each in (plain, model):
        found = [each(**tokens()).loss.detach()]
        with each.disable_adapter():
            found.append(each(**tokens()).loss.detach())
        found.append(each(**tokens()).loss.detach())
        losses.append(torch.stack(found))
    assert torch.allclose(*losses, rtol=1e-5, atol=0) and losses[0][0] != losses[0][1]


def test_a_second_adapter_is_refused_after_compile() -> None:
    """It has parameters that the plan knows nothing of."""
    model = geminifx.compile(adapted(LLAMA))
    model(**tokens())
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(StateError, match="was added, removed or replaced after the model was compiled"):
        model(**tokens())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_within_adapters(dropout: float) -> None:
    model = geminifx.compile(adapted(LLAMA, lora_dropout=dropout))
    first, second = (model(**tokens()).loss.detach() for _ in range(2))
    assert torch.equal(first, second) == (dropout == 0.0)
    model.eval()
    plain = copy.deepcopy(model.source)
    assert torch.allclose(model(**tokens()).loss, plain(**tokens()).loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("frozen", [None, "nf4"])
def test_a_base_of_files_is_read_beside_adapters_that_peft_draws(frozen: str | None, tmp_path: Path) -> None:
    """Without ever making the base: it is read into chunks, or into codes."""
    LLAMA.seeded().save_pretrained(tmp_path)
    with geminifx.init_empty():
        empty = adapted(LLAMA, init_lora_weights=True)
    model = geminifx.compile(empty, frozen=frozen, placement="cpu")
    model.load_pretrained(tmp_path, seed=1)
    optimizer = model.optimizer(torch.optim.AdamW, lr=1e-2)
    with torch.no_grad():
        other = geminifx.compile(adapted(LLAMA, init_lora_weights=True), frozen=frozen, placement="cpu")
        assert torch.equal(model(**tokens()).loss, other(**tokens()).loss), "adapters begin with nothing"
    state = model.state_dict()
    drawn = [value for name, value in state.items() if "lora_A" in name]
    assert all(0 < value.std() < 1 / value.shape[1] ** 0.5 for value in drawn) and len(drawn) > 1
    losses = train(model, optimizer)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
    assert changed and all("lora_" in name for name in changed) and losses[-1].isfinite()
