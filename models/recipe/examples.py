"""From records to tokens: which tokens are learned, and how examples share blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .records import Chat, Completion, Record, Text

NOT_LEARNED = -100
"""The label of tokens that the loss leaves out: the `ignore_index` of torch's cross entropy."""

_MARKS_TURNS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Example:
    """The tokens of a record, int64, and for each whether it is learned.

    A text may be cut anywhere: its parts are texts, too. An example that `is_whole` must not be cut: what it teaches is
    an answer to everything before it.
    """

    where: str
    tokens: np.ndarray
    learned: np.ndarray
    is_whole: bool

    @property
    def labels(self) -> np.ndarray:
        """Return the tokens, with NOT_LEARNED in place of those that are not learned."""
        return np.where(self.learned, self.tokens, NOT_LEARNED)


def encode(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Return the tokens of each record, in order.

    Texts and completions end with the end-of-text token if the tokenizer has one. A prompt and its completion are
    encoded as one text, whose tokens are learned if they reach into the completion. A chat is formatted by the
    tokenizer's chat template; only the assistant's turns are learned if the template marks them, else all of it.

    Raises:
        ValueError: the tokenizer cannot do that, or its template does not take a chat; names the record.
    """
    plain = iter(_encode_plain([record for record in records if not isinstance(record, Chat)], tokenizer))
    return [_encode_chat(record, tokenizer) if isinstance(record, Chat) else next(plain) for record in records]


def _encode_plain(records: list[Text | Completion], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    if not records:
        return []
    completion = next((record for record in records if isinstance(record, Completion)), None)
    if completion is not None:
        _check_knows_places(completion, tokenizer)
    encoded: Any = tokenizer(
        [record.text for record in records],
        add_special_tokens=False,
        verbose=False,
        return_offsets_mapping=completion is not None,
    )
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = []
    for i, record in enumerate(records):
        tokens = np.asarray(encoded["input_ids"][i] + end, dtype=np.int64)
        learned, is_whole = np.ones(len(tokens), dtype=bool), isinstance(record, Completion)
        if isinstance(record, Completion):
            ends = [stop for _, stop in encoded["offset_mapping"][i]]
            learned[: len(ends)] = np.asarray(ends) > len(record.prompt)
        found.append(Example(record.where, tokens, learned, is_whole))
    return found


def _encode_chat(record: Chat, tokenizer: PreTrainedTokenizerBase) -> Example:
    if not tokenizer.chat_template:
        raise ValueError(
            f"{record.where} is a chat, but the tokenizer has no chat template to turn messages into text; train a "
            "model whose tokenizer has one, or write the chats as prompt and completion"
        )
    marks = marks_turns(tokenizer)
    if marks:
        _check_knows_places(record, tokenizer)
    try:
        encoded: Any = tokenizer.apply_chat_template(record.messages, return_assistant_tokens_mask=marks)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{record.where}: the tokenizer's chat template does not accept these messages: {error}"
        ) from error
    tokens = np.asarray(encoded["input_ids"], dtype=np.int64)
    learned = np.asarray(encoded["assistant_masks"], dtype=bool) if marks else np.ones(len(tokens), dtype=bool)
    if not learned.any():
        raise ValueError(
            f"{record.where} has no message of the assistant, but only those are learned from a chat; add one, or "
            "leave the chat out"
        )
    return Example(record.where, tokens, learned, is_whole=True)


def marks_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template marks the assistant's parts of a chat with `{% generation %}`."""
    return bool(tokenizer.chat_template) and _MARKS_TURNS.search(tokenizer.get_chat_template()) is not None


def _check_knows_places(record: Completion | Chat, tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise ValueError(
            f"{record.where} is learned only in part, but this tokenizer ({type(tokenizer).__name__}) does not report "
            "which characters its tokens cover; expected a tokenizer from the tokenizers library"
        )


def pack(examples: Sequence[Example], seq_len: int, filler: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the concatenated tokens and labels of `examples`, to be cut into blocks of `seq_len`.

    An example that is whole and would not fit into the rest of a block begins the next one; the rest is filled with
    `filler` tokens that are not learned.

    Raises:
        ValueError: an example that must not be cut is longer than a block; names it.
    """
    long = [example for example in examples if example.is_whole and len(example.tokens) > seq_len]
    if long:
        longest = max(len(example.tokens) for example in long)
        raise ValueError(
            f"{len(long)} of {len(examples)} examples are longer than seq_len={seq_len} tokens, and truncated "
            f"examples would teach something else: {long[0].where} has {len(long[0].tokens):,}, the longest "
            f"{longest:,}; choose a larger seq_len, or shorten them"
        )
    tokens: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    length = 0

    def add(more: np.ndarray, taught: np.ndarray) -> None:
        nonlocal length
        tokens.append(more)
        labels.append(taught)
        length += len(more)

    def fill() -> None:
        room = -length % seq_len
        add(np.full(room, filler), np.full(room, NOT_LEARNED))

    for example in examples:
        if example.is_whole and len(example.tokens) > -length % seq_len:
            fill()
        add(example.tokens, example.labels)
    if any(example.is_whole for example in examples):
        fill()
    return np.concatenate(tokens), np.concatenate(labels)
