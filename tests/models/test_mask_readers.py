"""Models whose attention reads its mask keep their own attention, and compute what they do in plain PyTorch."""

from typing import Any

import geminifx
import pytest
import torch
from geminifx.models.mask_readers import mask_readers
from torch import nn
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM
from zoo import CASES, VOCAB, Case, tokens


def sparse() -> nn.Module:
    """Each token sees two others, those that score highest."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8}
    widths = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16}
    index = {"index_topk": 2, "index_n_heads": 2, "index_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    return DeepseekV32ForCausalLM(DeepseekV32Config(**sizes, **heads, **widths, **index, **experts)).train()


SPARSE = Case("sparse attention", sparse, exact=False)


@pytest.mark.slow
@pytest.mark.parametrize("padding", [0, 3])
def test_sparse_attention_leaves_out_the_keys_that_it_chooses_to(padding: int) -> None:
    batch = tokens()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 8 - padding :] = 0
    plain, model = SPARSE.seeded(), geminifx.compile(SPARSE.seeded(), outputs="all")
    expected, found = plain(**batch), model(**batch)
    seen = batch["attention_mask"].bool()
    assert torch.allclose(found.logits[seen], expected.logits[seen], rtol=1e-4, atol=1e-5)
    expected.loss.backward(), found.loss.backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.allclose(q.grad, p.grad, rtol=1e-3, atol=1e-6)
    assert any("DeepseekV32Attention reads its mask" in note for note in model.plan.notes)


def test_attention_that_hands_its_mask_on_is_ours() -> None:
    assert mask_readers(sparse()) == ["DeepseekV32Attention"]
    assert [mask_readers(case.seeded()) for case in CASES] == [[]] * len(CASES)
