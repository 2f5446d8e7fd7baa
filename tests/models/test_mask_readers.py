"""Models whose attention reads its mask keep their own attention, and compute what they do in plain PyTorch."""

from typing import Any

import geminifx
import pytest
import torch
from geminifx.models.mask_readers import mask_readers, mask_replacers
from geminifx.runtime.isa.errors import CaptureError
from torch import nn
from transformers import (
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    MiniMaxM3VLForCausalLM,
    MiniMaxM3VLTextConfig,
)
from zoo import CASES, VOCAB, Case, tokens

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCAB}


def sparse() -> nn.Module:
    """Each token sees two others, those that score highest."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8}
    widths = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16}
    index = {"index_topk": 2, "index_n_heads": 2, "index_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    return DeepseekV32ForCausalLM(DeepseekV32Config(**SIZES, **heads, **widths, **index, **experts)).train()


def sparse_by_blocks() -> nn.Module:
    """Each token sees two blocks of two, its own and the one that scores highest, and asks for them outside of its
    forward."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4}
    index = {"index_block_size": 2, "index_topk_blocks": 2, "index_n_heads": 2, "index_head_dim": 8}
    dense = {"mlp_layer_types": ["dense"] * 2, "dense_intermediate_size": 48, "num_local_experts": 4}
    layers = {"layer_types": ["minimax_m3_sparse"] * 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    return MiniMaxM3VLForCausalLM(MiniMaxM3VLTextConfig(**SIZES, **heads, **index, **dense, **layers)).train()


def dynamic(implementation: str) -> nn.Module:
    """Each token sees four others, which its own mask chooses."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "keep_window_size": 4}
    return DogeForCausalLM(DogeConfig(**SIZES, **heads, attn_implementation=implementation)).train()


READERS = {
    "DeepseekV32Attention reads its mask": Case("sparse attention", sparse, exact=False),
    "MiniMaxM3VLAttention reads its mask": Case("sparse attention by blocks", sparse_by_blocks, exact=False),
    "attention stays eager, as configured": Case("dynamic masks", lambda: dynamic("eager"), exact=False),
}


def padded(padding: int) -> dict[str, torch.Tensor]:
    batch = tokens()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 8 - padding :] = 0
    return batch


def check_trains_alike(case: Case, batch: dict[str, torch.Tensor], note: str) -> None:
    plain, model = case.seeded(), geminifx.compile(case.seeded(), outputs="all")
    expected, found = plain(**batch), model(**batch)
    seen = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    assert torch.allclose(found.logits[seen], expected.logits[seen], rtol=1e-4, atol=1e-5)
    expected.loss.backward(), found.loss.backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.allclose(q.grad, p.grad, rtol=1e-3, atol=1e-6)
    assert any(note in each for each in model.plan.notes)


@pytest.mark.slow
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("note", READERS)
def test_attention_leaves_out_the_keys_that_it_chooses_to(note: str, padding: int) -> None:
    check_trains_alike(READERS[note], padded(padding), note)


def test_a_mask_that_is_left_out_by_its_values_is_refused() -> None:
    """Where nothing is padded, later tokens are seen, and else not."""
    case = Case("dynamic masks", lambda: dynamic("sdpa"), exact=False)
    assert mask_replacers(case.seeded()) == ["DogeAttention"]
    with pytest.raises(
        CaptureError, match=r"DogeAttention attends to all keys.* attn_implementation='eager', or call it with"
    ):
        geminifx.compile(case.seeded())(**padded(0))
    check_trains_alike(case, tokens(), "cannot express a mask")


def test_attention_that_hands_its_mask_on_is_ours() -> None:
    assert mask_readers(sparse()) == ["DeepseekV32Attention"]
    assert [mask_readers(case.seeded()) + mask_replacers(case.seeded()) for case in CASES] == [[]] * len(CASES)
