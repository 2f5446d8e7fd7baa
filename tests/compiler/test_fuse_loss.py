"""Losses computed in pieces: the model's own numbers, less memory, and logits that are missed loudly."""

import copy
import itertools
import math
import operator
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import geminifx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from geminifx.compiler.capture.results import COPIES, AbsentOutput, logits_bytes
from geminifx.compiler.capture.trace import CaptureRequest, capture
from geminifx.passes.program.plan import Plan
from geminifx.runtime.isa.errors import BudgetError, StateError
from shared_captures import shared_captures
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.utils import ModelOutput
from zoo import Batch

VOCABULARY, BATCH, LENGTH = 300, 2, 24
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
         "max_position_embeddings": 512}  # fmt: skip
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}


def opt(vocabulary: int = VOCABULARY) -> nn.Module:
    sizes = {**SIZES, "vocab_size": vocabulary}
    return OPTForCausalLM(OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=512,
                                      resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))  # fmt: skip


def bert() -> nn.Module:
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(**SIZES, **rates, intermediate_size=48))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "opt, tied": opt,
    "gpt2, tied": gpt2,
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GATED)),
    "cohere, logits scaled": lambda: CohereForCausalLM(CohereConfig(**GATED, logit_scale=0.0625)),
    "granite, logits divided": lambda: GraniteForCausalLM(GraniteConfig(**GATED, logits_scaling=6.0)),
    "gemma2, softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**GATED, head_dim=8)),
    "bert, masked, with a bias": bert,
}
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
QUICK = ("gpt2, tied", "gemma2, softcap")
IN_BFLOAT16 = list(MODELS.values())


def tokens(batch: int = BATCH, length: int = LENGTH, vocabulary: int = VOCABULARY) -> Batch:
    ids = torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels}


def compiled(build: Callable[[], nn.Module] = opt, batch: Batch | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    with shared_captures():
        return geminifx.compile(build().train(), example_inputs=tokens() if batch is None else batch, **options)


def step(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    # A key's bias has no gradient but rounding: softmax does not see it. The largest of all gradients counts there.
    largest = max(g.abs().max() for g in theirs.values())
    for name, expected in theirs.items():
        scale = max(expected.abs().max(), 1e-3 * largest)
        assert (ours[name] - expected).abs().max() <= tolerance * scale, name


# -- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_model
def test_loss_and_gradients_are_plain_pytorchs(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    plain, model = build().train(), compiled(build, fuse_loss=True)
    assert model.plan.fuse_loss and "linear_cross_entropy_backward" in model.graph["training"]
    (a, ours), (b, theirs) = step(model, tokens()), step(plain, tokens())
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    assert_near(ours, theirs, 1e-5)


@pytest.mark.slow
@every_model
def test_the_loss_has_the_bits_of_the_program_with_logits(build: Callable[[], nn.Module]) -> None:
    fused, whole = compiled(build, fuse_loss=True), compiled(build, fuse_loss=False)
    (a, ours), (b, theirs) = step(fused, tokens()), step(whole, tokens())
    # A division became a product with the inverse, exact only for powers of two.
    exact = build not in (MODELS["granite, logits divided"], MODELS["gemma2, softcap"])
    assert torch.equal(a, b) if exact else (a - b).abs() <= 1e-6 * b.abs()
    assert_near(ours, theirs, 4e-6)


@pytest.mark.slow
@pytest.mark.parametrize("build", IN_BFLOAT16, ids=MODELS)
def test_in_bfloat16_gradients_are_as_near_to_float32s(build: Callable[[], nn.Module]) -> None:
    _, exact = step(compiled(build, fuse_loss=False), tokens())
    _, ours = step(compiled(build, fuse_loss=True, precision="bf16"), tokens())
    _, theirs = step(compiled(build, fuse_loss=False, precision="bf16"), tokens())
    distance = lambda found: math.sqrt(sum((found[n] - exact[n]).square().sum().item() for n in exact))  # noqa: E731
    assert distance(ours) <= 1.2 * distance(theirs)


@pytest.mark.parametrize("count", [torch.tensor(37), 37], ids=["tensor", "int"])
def test_num_items_in_batch_as_trainers_pass_it(count: Any) -> None:
    """A sum divided by a count that spans several batches."""
    batch = {**tokens(), "num_items_in_batch": count}
    torch.manual_seed(0)
    plain, model = opt().train(), compiled(batch=batch, fuse_loss=True)
    assert model.plan.fuse_loss
    (a, ours), (b, theirs) = step(model, batch), step(plain, batch)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    assert_near(ours, theirs, 1e-5)


@pytest.mark.parametrize("frozen", ["lm_head", "model"])
def test_frozen_heads_and_frozen_trunks(frozen: str) -> None:
    def build() -> nn.Module:
        model = MODELS["llama"]()
        model.get_submodule(frozen).requires_grad_(False)
        return model

    torch.manual_seed(0)
    plain, model = build().train(), compiled(build, fuse_loss=True)
    assert model.plan.fuse_loss
    (a, ours), (b, theirs) = step(model, tokens()), step(plain, tokens())
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    assert_near(ours, theirs, 1e-5)


def test_recomputed_blocks_and_streamed_weights_go_with_it() -> None:
    torch.manual_seed(0)
    plain, model = opt().train(), compiled(fuse_loss=True, recompute="all", placement="cpu")
    (_, ours), (_, theirs) = step(model, tokens()), step(plain, tokens())
    assert_near(ours, theirs, 1e-5)


# -- memory ------------------------------------------------------------------------------------------------

LARGE = 8192


def large() -> nn.Module:
    return opt(LARGE)


def large_batch() -> Batch:
    return tokens(4, 256, LARGE)


def test_the_planned_peak_falls_by_the_logits_and_is_kept() -> None:
    whole, fused = (compiled(large, large_batch(), fuse_loss=f, placement="cpu") for f in (False, True))
    logits = 4 * LARGE * 4 * 256
    # Three of the logits' size are there at once, and a piece takes a quarter of two.
    assert whole.plan.peak_bytes - fused.plan.peak_bytes >= 2.3 * logits
    for model in (whole, fused):
        step(model, large_batch())
        assert model.stats.device_peak_bytes <= model.plan.peak_bytes
    assert whole.stats.device_peak_bytes - fused.stats.device_peak_bytes >= 2.3 * logits


def test_smaller_budgets_will_do() -> None:
    def least(fuse_loss: Any) -> int:
        with pytest.raises(BudgetError) as refused:
            compiled(large, large_batch(), fuse_loss=fuse_loss, device_budget=1)
        assert refused.value.smallest_bytes is not None
        return refused.value.smallest_bytes

    whole, fused, auto = least(False), least(True), least("auto")
    assert auto == fused < 0.5 * whole
    model = compiled(large, large_batch(), device_budget=fused)
    assert model.plan.fuse_loss, "nothing else fits"
    step(model, large_batch())
    assert model.stats.device_peak_bytes <= fused
    assert not compiled(large, large_batch(), device_budget=2 * whole).plan.fuse_loss, "there is room for logits"
    assert not compiled(large, large_batch()).plan.fuse_loss, "there is no limit"


def test_what_would_be_saved_is_known_from_the_captured_step() -> None:
    captured = capture(opt().train(), (), tokens(), CaptureRequest())
    assert logits_bytes(captured.program) == COPIES * 4 * BATCH * LENGTH * VOCABULARY
    evaluation = capture(opt().train(), (), tokens(), CaptureRequest(backward=False))
    assert logits_bytes(evaluation.program) == 0


# -- which losses, and who decides -------------------------------------------------------------------------


class Own(nn.Module):
    """A language model that does one more thing with its logits, or returns something else of them."""

    def __init__(self, extra: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.embed, self.head, self.extra = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY), extra

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.embed(input_ids))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        if self.extra is None:
            return {"logits": logits, "loss": loss}
        return {"loss": loss + self.extra(logits).mean(), "logits": logits}


EXTRAS: dict[str, Callable[[Tensor], Tensor]] = {
    "penalty": lambda logits: 1e-4 * logits.logsumexp(-1).square(),
    "entropy": lambda logits: -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1),
    "a number without gradient": lambda logits: logits.detach().max(),
}


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
def test_a_model_with_its_own_use_of_the_logits_is_left_alone(extra: Callable[[Tensor], Tensor]) -> None:
    model = compiled(lambda: Own(extra), fuse_loss=True)
    torch.manual_seed(0)
    plain = Own(extra)
    assert not model.plan.fuse_loss and any("fuse_loss" in text for text in model.plan.notes)
    out = model(**tokens())
    assert out["logits"].shape == (BATCH, LENGTH, VOCABULARY)
    out["loss"].backward()
    plain(**tokens())["loss"].backward()
    assert torch.equal(model.head.weight.grad, plain.head.weight.grad)


def test_logits_may_come_before_the_loss() -> None:
    model = compiled(Own, fuse_loss=True)
    torch.manual_seed(0)
    plain = Own()
    out, expected = model(**tokens()), plain(**tokens())
    assert isinstance(out["logits"], AbsentOutput) and torch.equal(out["loss"], expected["loss"])
    out["loss"].backward()
    expected["loss"].backward()
    torch.testing.assert_close(model.head.weight.grad, plain.head.weight.grad)


def test_evaluation_has_its_logits() -> None:
    torch.manual_seed(0)
    plain, model = opt().eval(), compiled(fuse_loss=True)
    model.eval()
    with torch.no_grad():
        out, expected = model(**tokens()), plain(**tokens())
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.loss, expected.loss)
    assert "linear_cross_entropy" not in model.graph["evaluation"]


def test_the_plan_says_and_decides(tmp_path: Path) -> None:
    plan = compiled(fuse_loss=True).plan
    assert Plan.from_json(plan.to_json()) == plan and "logits are not computed" in str(plan)
    plan.save(tmp_path / "plan.json")
    assert compiled(plan=tmp_path / "plan.json").plan.fuse_loss
    by_hand = compiled(plan=replace(plan, fuse_loss=False))
    assert not by_hand.plan.fuse_loss and "logits" not in str(by_hand.plan)
    assert by_hand(**tokens()).logits.shape == (BATCH, LENGTH, VOCABULARY)
    with pytest.raises(ValueError, match="fuse_loss"):
        Plan.from_json(plan.to_json().replace('"fuse_loss": true', '"fuse_loss": "yes"'))


@pytest.mark.parametrize("wrong", ["always", 1, "True"])
def test_other_values_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"fuse_loss=.*'auto', True or False"):
        compiled(fuse_loss=wrong)


def test_all_outputs_and_no_logits_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="outputs='all'"):
        compiled(fuse_loss=True, outputs="all")
    assert not compiled(outputs="all", device_budget="1GB").plan.fuse_loss


# -- the place of the logits -------------------------------------------------------------------------------

USES: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda x: x.shape,
    "method": lambda x: x.argmax(-1),
    "assignment": lambda x: setattr(x, "grad", None),
    "index": lambda x: x[..., :-1, :],
    "iteration": list,
    "unpacking": lambda x: (lambda *_: None)(*x),
    "membership": lambda x: 1 in x,
    "len": len,
    "bool": bool,
    "float": float,
    "call": lambda x: x(),
    "equality": lambda x: x == 1,
    "comparison": lambda x: x > 0,
    "negation": operator.neg,
    "torch function": lambda x: F.cross_entropy(x, torch.zeros(2)),
    "stack": lambda x: torch.stack([x]),
    "tensor on the left": lambda x: torch.ones(2) + x,
    "numpy": np.asarray,
    **{f"{f.__name__} {side}": (lambda x, f=f, side=side: f(x, 2) if side == "left" else f(2, x))
       for f, side in itertools.product((operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul,
                                         operator.pow), ("left", "right"))},
}  # fmt: skip


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_every_use_says_what_to_do(use: Callable[[Any], Any]) -> None:
    with pytest.raises(StateError, match=r"fuse_loss=False.*outputs='all'"):
        use(AbsentOutput())


def test_code_that_only_reads_the_loss_does_not_notice() -> None:
    model = compiled(fuse_loss=True)
    out = model(**tokens())
    assert isinstance(out, ModelOutput) and isinstance(out["loss"], Tensor) and out[0] is out.loss
    assert "not computed" in repr(out) and "logits" in out and len(out.to_tuple()) == 2
    assert [type(leaf) for leaf in pytree.tree_leaves(out)] == [Tensor, AbsentOutput]
    scaled = pytree.tree_map(lambda leaf: leaf * 2 if isinstance(leaf, Tensor) else leaf, out)
    assert torch.equal(scaled.loss, 2 * out.loss)
    # Wrappers for mixed precision and data movement ask everything for these before they touch it.
    assert not any(hasattr(out.logits, name) for name in ("dtype", "to", "device", "__deepcopy__"))
    assert not isinstance(out.logits, Tensor) and not torch.is_tensor(out.logits) and {out.logits: 1}
    for again in (copy.deepcopy(out.logits), pickle.loads(pickle.dumps(out.logits))):
        assert isinstance(again, AbsentOutput)
    out.loss.backward()
    with pytest.raises(StateError, match="fuse_loss=False"):
        _ = out.logits.argmax(-1)
