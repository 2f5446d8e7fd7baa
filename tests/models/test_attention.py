"""Hugging Face models with our attention against their own eager attention, and what stays eager."""

import contextlib

import geminifx
import pytest
import torch
import transformers
from geminifx.models.adapters import capturable, example_inputs
from geminifx.models.attention import NAME, read_pattern
from geminifx.models.functional import functional_attention
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import masking_utils

BATCH, LENGTH = 3, 13
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
GROUPED = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS = {
    "OPT": ("OPTForCausalLM", {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "Llama": ("LlamaForCausalLM", GROUPED),
    "Mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 5}),
    "GPT2": (
        "GPT2LMHeadModel",
        {
            "vocab_size": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 32,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "Bert": ("BertForMaskedLM", {**SMALL, **NO_DROPOUT, "intermediate_size": 64}),
    "Gemma2": ("Gemma2ForCausalLM", {**GROUPED, "head_dim": 8, "sliding_window": 5}),
}


def build(family, implementation="sdpa", **changes):
    torch.manual_seed(0)
    name, options = MODELS[family]
    config = getattr(transformers, f"{family}Config")(**{**options, **changes}, attn_implementation=implementation)
    return getattr(transformers, name)(config).train()


def batch(model, side):
    inputs = example_inputs(model, BATCH, LENGTH)
    if side != "no":
        mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
        mask[0, slice(0, 4) if side == "left" else slice(-4, None)] = 0
        # The last padded position on the left would predict a real token from no key at all.
        mask_out = mask == 0
        mask_out[0, 4] |= side == "left"
        inputs |= {"attention_mask": mask, "labels": inputs["labels"].masked_fill(mask_out, -100)}
    return inputs


def run(model, inputs, *contexts):
    with contextlib.ExitStack() as stack:
        notes = [stack.enter_context(context) for context in contexts]
        out = model(**inputs)
    out.loss.backward()
    return out, [p.grad for p in model.parameters()], (notes or [[]])[0]


@pytest.mark.parametrize("side", ["no", "left", "right"])
@pytest.mark.parametrize("family", ["OPT", "Llama", "Mistral", "GPT2", "Bert"])
def test_logits_and_gradients_equal_eager_attention(family, side):
    eager, model = build(family, "eager"), build(family)
    inputs = batch(model, side)
    expected, wanted, _ = run(eager, inputs)
    out, grads, notes = run(model, inputs, capturable(model, inputs))
    real = inputs.get("attention_mask", torch.ones(BATCH, LENGTH)).bool()
    torch.testing.assert_close(out.logits[real], expected.logits[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert notes == []


def test_seeded_dropout_equals_torch_attention():
    model, other = build("GPT2", attn_pdrop=0.2), build("GPT2", attn_pdrop=0.2)
    inputs = batch(model, "no")
    torch.manual_seed(7)
    expected, wanted, _ = run(other, inputs)
    torch.manual_seed(7)
    out, grads, _ = run(model, inputs, capturable(model, inputs))
    torch.testing.assert_close(out.logits, expected.logits)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def trace(model, inputs):
    def forward(*values):
        return model(**dict(zip(inputs, values, strict=True))).loss

    with (
        capturable(model, inputs) as notes,
        torch._export.utils._compiling_state_context(),
        torch.no_grad(),
    ):
        graph = make_fx(forward, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs.values()).graph
    values = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    square = [v.shape for v in values if tuple(v.shape[-2:]) == (LENGTH, LENGTH)]
    calls = [node for node in graph.nodes if node.target is torch.ops.geminifx.attention.default]
    return calls, square, notes


@pytest.mark.parametrize("side", ["no", "right"])
@pytest.mark.parametrize("family", ["OPT", "Llama", "Mistral", "GPT2", "Bert"])
def test_the_graph_holds_one_node_per_layer_and_nothing_square(family, side):
    model = build(family)
    calls, square, notes = trace(model, batch(model, side))
    assert len(calls) == 2 and square == [] and notes == []
    for call in calls:
        query, key_mask, causal, window = (call.args[i] for i in (0, 3, 5, 7))
        assert tuple(query.meta["val"].shape) == (BATCH, 4, LENGTH, 8)
        # Padding that the model makes up is not a mask.
        assert (key_mask is None) == (side == "no")
        assert causal == (family != "Bert") and window == (5 if family == "Mistral" else 0)


WRITES = {
    "an assignment": lambda ones, hidden: ones.__setitem__(hidden, 0),
    "a method": lambda ones, hidden: ones.masked_fill_(hidden, 0),
    "a view": lambda ones, hidden: ones.view(-1).mul_(~hidden.view(-1)),
    "out=": lambda ones, hidden: torch.mul(ones, ~hidden, out=ones),
    ".detach()": lambda ones, hidden: ones.detach().masked_fill_(hidden, 0),
    ".data": lambda ones, hidden: ones.data.masked_fill_(hidden, 0),
    ".data of a view": lambda ones, hidden: ones.t().data.masked_fill_(hidden.t(), 0),
}


class MasksItself(torch.nn.Module):
    """Padding begins as ones, of which a view is taken, and is then written to."""

    def __init__(self, bert, write):
        super().__init__()
        self.bert, self.write = bert, write

    def forward(self, ids):
        ones = torch.ones_like(ids)
        mask = ones.view(ids.shape)
        self.write(ones, ids == 0)
        logits = self.bert(input_ids=ids, attention_mask=mask).logits
        return (logits.square().mean(-1) * (ids != 0)).sum()


@pytest.mark.parametrize("write", WRITES)
def test_padding_that_a_model_writes_into_ones_is_seen(write):
    plain, source = (
        MasksItself(build("Bert", implementation, initializer_range=0.3), WRITES[write])
        for implementation in ("eager", "sdpa")
    )
    ids = torch.randint(1, 64, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[0, -4:] = 0
    expected, without = plain(ids), MasksItself(plain.bert, lambda ones, hidden: None)(ids)
    assert not torch.allclose(without, expected, rtol=1e-2)  # padding that is not seen would show
    torch.testing.assert_close(geminifx.compile(source)(ids), expected, rtol=1e-5, atol=0)


def test_ones_of_inference_mode_are_a_mask_as_any_other():
    model, ids = build("Bert", "eager").eval(), torch.randint(1, 64, (BATCH, LENGTH))
    expected = model(input_ids=ids).logits
    with torch.inference_mode(), capturable(model, {}):
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(found, expected)


def test_softcap_stays_eager_and_says_so():
    eager, model = build("Gemma2", "eager"), build("Gemma2")
    inputs = batch(model, "right")
    expected, _, _ = run(eager, inputs)
    out, _, notes = run(model, inputs, capturable(model, inputs))
    torch.testing.assert_close(out.logits, expected.logits)
    assert len(notes) == 1 and "softcap" in notes[0]


def test_packed_sequences_stay_eager_only_if_the_caller_passes_positions():
    eager, model = build("Llama", "eager"), build("Llama")
    positions = torch.cat((torch.arange(6), torch.arange(LENGTH - 6))).expand(BATCH, -1)
    inputs = {**batch(model, "no"), "position_ids": positions, "use_cache": False}
    expected, _, _ = run(eager, inputs)
    out, _, notes = run(model, inputs, capturable(model, inputs))
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert any("may pack several" in note for note in notes)


@pytest.mark.parametrize("configured", ["sdpa", "eager"])
def test_where_the_model_makes_a_cache_positions_pack_nothing(configured):
    """transformers looks for packed sequences only where it makes no key-value cache."""
    plain, model = build("Llama", "eager"), build("Llama", configured)
    positions = torch.cat((torch.arange(6), torch.arange(LENGTH - 6))).expand(BATCH, -1)
    inputs = {**batch(model, "no"), "position_ids": positions}
    expected, _, _ = run(plain, inputs)
    apart, _, _ = run(plain, {**inputs, "use_cache": False})
    assert not torch.allclose(apart.logits, expected.logits, atol=1e-3)
    out, _, notes = run(model, inputs, capturable(model, inputs))
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert any("position_ids pack no sequences" in note for note in notes)
    model.model.gradient_checkpointing = True  # for which it gives up the cache
    out, _, _ = run(model.train(), inputs, capturable(model, inputs))
    torch.testing.assert_close(out.logits, apart.logits, rtol=1e-5, atol=1e-5)


def test_a_four_dimensional_mask_of_the_caller_stays_eager():
    eager, model = build("Llama", "eager"), build("Llama")
    additive = torch.zeros(BATCH, 1, LENGTH, LENGTH).masked_fill(torch.rand(LENGTH, LENGTH) < 0.3, -1e9)
    inputs = {**batch(model, "no"), "attention_mask": additive}
    expected, _, _ = run(eager, inputs)
    out, _, notes = run(model, inputs, capturable(model, inputs))
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert any("a mask float32" in note for note in notes)


def test_the_name_works_without_capture_too():
    eager, model = build("Mistral", "eager"), build("Mistral", NAME)
    inputs = batch(model, "right")
    torch.testing.assert_close(model(**inputs).loss, eager(**inputs).loss, rtol=1e-5, atol=1e-6)


def test_mask_functions_are_read():
    read = read_pattern
    window = masking_utils.sliding_window_causal_mask_function
    assert read(masking_utils.causal_mask_function, 9) == read(window(9), 9)
    assert (read(window(4), 9).causal, read(window(4), 9).window) == (True, 4)
    assert read(masking_utils.bidirectional_mask_function, 9).causal is False
    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long))
    assert "chunked" in (read(chunked, 9).reason or "")
    assert read(lambda b, h, q, k: k < q, 9).reason is not None
    assert read(masking_utils.sliding_window_bidirectional_mask_function(3), 9).reason is not None
    assert read(masking_utils.sliding_window_bidirectional_mask_function(8), 9).reason is None


CASES = {
    "plain": ({}, False),
    "causal": ({"is_causal": True}, False),
    "scaled": ({"scale": 0.7}, False),
    "padding": ({"attn_mask": torch.arange(6).view(1, 1, 1, 6) < 4}, False),
    "flat padding": ({"attn_mask": torch.arange(6).view(1, 6) < 4}, False),
    "per query": ({"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril()}, True),
    "blind row": ({"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril(-1)}, True),
    "additive": ({"attn_mask": torch.randn(2, 4, 6, 6)}, True),
    "additive blind row": ({"attn_mask": torch.full((6, 6), -torch.inf).triu()}, True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dims", [3, 4, 5])
def test_direct_calls_equal_torch(case, dims):
    options, noted = CASES[case]
    if dims == 3 and case in ("padding", "additive"):
        pytest.skip("masks of four dimensions")
    torch.manual_seed(0)
    shape = {3: (2, 6, 8), 4: (2, 4, 6, 8), 5: (3, 2, 4, 6, 8)}[dims]
    mine = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    call = torch.nn.functional.scaled_dot_product_attention
    expected = call(*mine, **options)
    notes: list[str] = []
    with functional_attention(notes):
        out = torch.nn.functional.scaled_dot_product_attention(*mine, **options)
    assert torch.nn.functional.scaled_dot_product_attention is call
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(o.sin().sum(), mine) for o in (out, expected)]
    for a, b in zip(*grads, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b.nan_to_num(), rtol=1e-4, atol=1e-5)
    assert bool(notes) == (noted or dims == 5)


def test_direct_grouped_calls_and_contradictions():
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    call = torch.nn.functional.scaled_dot_product_attention
    expected = call(query, key, key, is_causal=True, enable_gqa=True)
    notes: list[str] = []
    with functional_attention(notes):
        routed = torch.nn.functional.scaled_dot_product_attention
        torch.testing.assert_close(routed(query, key, key, is_causal=True, enable_gqa=True), expected)
        assert notes == []
        torch.testing.assert_close(routed(query, key, key, attn_mask=mask, enable_gqa=True), expected)
        assert len(notes) == 1
        one_head = query[:, :1]  # query heads may broadcast over key heads, too
        torch.testing.assert_close(routed(one_head, query, query, attn_mask=mask), call(one_head, query, query, mask))
        with pytest.raises(ValueError, match="exclude each other"):
            routed(query, query, query, attn_mask=mask, is_causal=True)
