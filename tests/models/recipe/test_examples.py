"""Examples: what of a record is learned, and how they share blocks."""

import numpy as np
import pytest
import torch
from geminifx.models.recipe.blocks import TokenBlocks
from geminifx.models.recipe.examples import NOT_LEARNED, Example, encode, marks_turns, pack
from geminifx.models.recipe.records import Chat, Completion, Text
from geminifx.models.recipe.text import embedded_texts, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

TEMPLATE = """{% for message in messages -%}
{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif -%}
<{{ message.role }}>
{%- if message.role == 'assistant' -%}
{% generation %}{{ message.content + eos_token }}{% endgeneration %}
{%- else %}{{ message.content }}{% endif %}{{ '\\n' }}
{%- endfor %}"""
UNMARKED = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
TURNS = [
    {"role": "user", "content": "an identifier?"},
    {"role": "assistant", "content": "a name"},
    {"role": "user", "content": "and a name?"},
    {"role": "assistant", "content": "an atom"},
]


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(embedded_texts()[:20], 600)


@pytest.fixture
def tokenizer(trained: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    trained.chat_template = None
    return trained


def _learned(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    assert (example.labels == np.where(example.learned, example.tokens, NOT_LEARNED)).all()
    return tokenizer.decode(example.tokens[example.learned])


def test_all_of_a_text_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["An identifier", "is a name"]
    examples = encode([Text(text, text) for text in texts], tokenizer)
    assert [example.where for example in examples] == texts
    assert [_learned(example, tokenizer) for example in examples] == [f"{text}</s>" for text in texts]
    assert not any(example.is_whole for example in examples)


@pytest.mark.parametrize(
    ("prompt", "completion", "learned"),
    [
        ("Is it a name?", " It is.", " It is.</s>"),
        ("", "It is.", "It is.</s>"),
        # A token that reaches into the completion is learned whole.
        ("Is it a name? ", "It is.", " It is.</s>"),
        ("Grüße: \u2603\U0001f600", "\U0001f600\u2603", "\U0001f600\u2603</s>"),
        ("identif", "ier", "ntifier</s>"),
    ],
)
def test_of_a_prompt_and_its_completion_the_completion_is_learned(
    tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str, learned: str
) -> None:
    (example,) = encode([Completion("here", prompt, completion)], tokenizer)
    assert tokenizer.decode(example.tokens) == f"{prompt}{completion}</s>" and example.is_whole
    assert _learned(example, tokenizer) == learned
    assert len(example.tokens) == len(tokenizer(prompt + completion)["input_ids"]) + 1


def test_of_a_chat_the_marked_turns_are_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATE
    assert marks_turns(tokenizer)
    (example,) = encode([Chat("here", TURNS)], tokenizer)
    assert _learned(example, tokenizer) == "a name</s>an atom</s>" and example.is_whole
    assert "<user>an identifier?\n<assistant>a name</s>" in tokenizer.decode(example.tokens)


def test_of_a_chat_whose_template_marks_nothing_all_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = UNMARKED
    assert not marks_turns(tokenizer)
    (example,) = encode([Chat("here", TURNS)], tokenizer)
    assert _learned(example, tokenizer) == "".join(f"<{turn['role']}>{turn['content']}\n" for turn in TURNS)


def test_kinds_keep_their_order(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATE
    records = [Chat("a", TURNS), Text("b", "one"), Chat("c", TURNS[2:]), Completion("d", "two", "three")]
    assert [example.where for example in encode(records, tokenizer)] == ["a", "b", "c", "d"]
    assert encode([], tokenizer) == []


def test_chats_that_cannot_be_written(tokenizer: PreTrainedTokenizerFast) -> None:
    assert not marks_turns(tokenizer)
    with pytest.raises(ValueError, match=r"x line 3 is a chat, but the tokenizer has no chat template"):
        encode([Chat("x line 3", TURNS)], tokenizer)
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match=r"x line 3: .*does not accept these messages: no system here"):
        encode([Chat("x line 3", [{"role": "system", "content": "be nice"}, *TURNS])], tokenizer)
    with pytest.raises(ValueError, match=r"x line 3 has no message of the assistant"):
        encode([Chat("x line 3", TURNS[:1])], tokenizer)
    tokenizer.chat_template = "{% for"
    with pytest.raises(ValueError, match=r"x line 3: the tokenizer's chat template"):
        encode([Chat("x line 3", TURNS)], tokenizer)


def test_a_tokenizer_without_places(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(ValueError, match=r"x line 3 is learned only in part, but this tokenizer"):
        encode([Completion("x line 3", "a", "b")], tokenizer)
    assert len(encode([Text("x line 3", "a")], tokenizer)) == 1


def _example(first: int, length: int, prompt: int = 0, is_whole: bool = True) -> Example:
    return Example(f"at {first}", np.arange(first, first + length), np.arange(length) >= prompt, is_whole)


@settings(max_examples=100)
@given(st.integers(2, 9), st.lists(st.tuples(st.integers(1, 9), st.integers(0, 8), st.booleans()), min_size=1))
def test_packed_examples_are_whole(seq_len: int, drawn: list[tuple[int, int, bool]]) -> None:
    examples = [
        _example(100 * i + 1, min(length, seq_len), min(prompt, length - 1), is_whole)
        for i, (length, prompt, is_whole) in enumerate(drawn)
    ]
    tokens, labels = pack(examples, seq_len, 0)
    assert tokens[tokens != 0].tolist() == [token for example in examples for token in example.tokens]
    assert labels[tokens == 0].tolist() == [NOT_LEARNED] * int((tokens == 0).sum())
    assert labels[tokens != 0].tolist() == [label for example in examples for label in example.labels]
    for example in examples:
        start = int(np.flatnonzero(tokens == example.tokens[0])[0])
        assert not example.is_whole or start // seq_len == (start + len(example.tokens) - 1) // seq_len
    assert len(tokens) % seq_len == 0 or not any(example.is_whole for example in examples)


def test_an_example_longer_than_a_block_is_refused() -> None:
    examples = [_example(1, 4), _example(101, 6), _example(201, 9), _example(301, 9, is_whole=False)]
    with pytest.raises(ValueError, match=r"2 of 4 examples .* seq_len=5 tokens.*: at 101 has 6, the longest 9"):
        pack(examples, 5, 0)


def test_blocks_with_nothing_to_learn_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    # What is first in a block is predicted by nothing.
    examples = [_example(10, 4, 2), _example(20, 4, 4), _example(30, 4, 3), _example(40, 1), _example(50, 4, 1)]
    blocks = TokenBlocks.of(examples, tokenizer, 4)
    batches = [blocks.batch(step, 1) for step in range(len(blocks))] + [b for b, _ in blocks.held_out_batches(1)]
    assert sorted(int(batch["input_ids"][0, 0]) for batch in batches) == [10, 30, 50]
    for batch in batches:
        ids, labels = batch["input_ids"], batch["labels"]
        assert torch.equal(labels[labels != NOT_LEARNED], ids[labels != NOT_LEARNED])
        assert (labels == NOT_LEARNED).any()


def test_the_loss_is_that_of_completions_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=600, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=1, ffn_dim=16,
                       num_attention_heads=2, max_position_embeddings=64, dropout=0.0)  # fmt: skip
    model = OPTForCausalLM(config).eval()
    records = [Completion(str(i), f"What is {i}?", f" It is {i * i}.") for i in range(8)]
    blocks = TokenBlocks.of(encode(records, tokenizer), tokenizer, 40)
    batch, learned = next(blocks.held_out_batches(4))
    logits, labels = model(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    counted = labels != NOT_LEARNED
    assert learned == counted.sum() and 0 < learned < labels.numel()
    torch.testing.assert_close(model(**batch).loss, each[counted].mean())
