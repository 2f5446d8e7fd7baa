"""A text that every Python comes with, and a tokenizer trained on text."""

from __future__ import annotations

from collections.abc import Iterable
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# In this order, they get the ids that OPT's configuration expects: pad 1, end of text 2.
_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>")
SMALLEST_VOCABULARY = 256 + len(_SPECIAL_TOKENS)


def embedded_texts() -> list[str]:
    """Return the Python language reference that comes with every CPython: about 80 texts, 0.5 MB of English."""
    return [topics[name] for name in sorted(topics)]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens on `texts`; it can encode any text.

    Raises:
        ValueError: the vocabulary cannot hold the 256 bytes and the special tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"a vocabulary of {vocab_size} is too small: 256 bytes and {len(_SPECIAL_TOKENS)} special tokens "
            f"need {SMALLEST_VOCABULARY}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    _, pad, end = _SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
    )
