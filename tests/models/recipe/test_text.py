"""Text that is always there, and training a tokenizer on it."""

from pathlib import Path

import pytest
from geminifx.models.recipe.text import embedded_texts, train_tokenizer
from transformers import AutoTokenizer, OPTConfig, PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(embedded_texts()[:20], 600)


def test_every_python_carries_enough_text() -> None:
    texts = embedded_texts()
    assert all(isinstance(text, str) and text for text in texts)
    assert sum(map(len, texts)) > 300_000


def test_tokenizer_gives_back_any_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Unknown: \u2603 \U0001f600 and  two spaces , so"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 600
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (1, 2)


def test_tokenizer_loads_beside_a_checkpoint(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    OPTConfig().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "An identifier occurring as an atom is a name.\n  x"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.pad_token_id, loaded.eos_token_id) == (1, 2)


def test_vocabulary_too_small() -> None:
    with pytest.raises(ValueError, match="need 259"):
        train_tokenizer(["a"], 258)
