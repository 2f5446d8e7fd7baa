"""Tokens packed into blocks of a fixed length, served as batches that any step can be resumed at."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Part:
    """Part number `number`, counted from 0, `of` so many equal parts of every batch."""

    number: int = 0
    of: int = 1

    def rows(self, batch_size: int) -> slice:
        """Return which rows of a batch these are.

        Raises:
            ValueError: a batch of this size has no such parts.
        """
        if batch_size % self.of:
            raise ValueError(
                f"a batch of {batch_size} does not divide into {self.of} equal parts, one for each process with data "
                "of its own; choose a --batch-size that does"
            )
        size = batch_size // self.of
        return slice(self.number * size, (self.number + 1) * size)


WHOLE = Part()


class TokenBlocks:
    """Tokens cut into blocks of `seq_len`, a fixed share held out, the rest in a shuffled endless order.

    Which blocks are held out does not depend on the seed, so a further run judges itself on the same text.
    """

    def __init__(self, tokens: Sequence[int] | np.ndarray, seq_len: int, *, held_out: float = 0.05, seed: int = 0):
        """Take `tokens` [any length]; what does not fill a last block is dropped.

        Raises:
            ValueError: not two blocks long, or `seq_len` or `held_out` out of range.
        """
        if seq_len < 2:
            raise ValueError(f"blocks of {seq_len} tokens hold nothing to predict; expected seq_len of at least 2")
        if not 0 < held_out <= 0.5:
            raise ValueError(f"a held-out share of {held_out} is out of range; expected above 0, at most 0.5")
        count = len(tokens) // seq_len
        if count < 2:
            raise ValueError(
                f"{len(tokens)} tokens are too few: one block of {seq_len} to train on and one to hold out "
                "are the least; give more text or a smaller seq_len"
            )
        blocks = np.asarray(tokens, dtype=np.int64)[: count * seq_len].reshape(count, seq_len)
        every = min(round(1 / held_out), count)
        is_held_out = np.arange(count) % every == every - 1
        self.seq_len, self.seed = seq_len, seed
        self._train, self._held_out = blocks[~is_held_out], blocks[is_held_out]
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, *, seed: int = 0
    ) -> TokenBlocks:
        """Encode `texts`, each closed by the end token where the tokenizer has one."""
        encoded: Any = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return cls(np.concatenate([np.asarray(ids + end, dtype=np.int64) for ids in encoded]), seq_len, seed=seed)

    def __len__(self) -> int:
        """Number of training blocks."""
        return len(self._train)

    @property
    def held_out_count(self) -> int:
        """Number of held-out blocks."""
        return len(self._held_out)

    @property
    def largest_token(self) -> int:
        """The largest token id, which must be below the model's vocabulary size."""
        return int(max(self._train.max(), self._held_out.max()))

    def fingerprint(self) -> str:
        """Return a digest of the data, its split and its order: equal when every batch is equal."""
        digest = hashlib.sha256(f"{self._train.shape} {self._held_out.shape} {self.seed}".encode())
        digest.update(np.ascontiguousarray(self._train).tobytes())
        return digest.hexdigest()

    def batch(self, step: int, batch_size: int, part: Part = WHOLE) -> dict[str, torch.Tensor]:
        """Return training batch `step` as input_ids and labels, int64 [batch_size / part.of, seq_len].

        It depends on the seed and `step` alone. Every block comes once per epoch; a batch may cross its end.
        """
        rows = part.rows(batch_size)
        positions = range(step * batch_size + rows.start, step * batch_size + rows.stop)
        return _as_batch(self._train[[self._block_at(position) for position in positions]])

    def held_out_batches(
        self, batch_size: int, limit: int | None = None, part: Part = WHOLE
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the held-out blocks as equal batches, at most `limit`, of each its `part`.

        A last incomplete batch is left out unless it is the only one: a compiled model then sees one shape.

        Raises:
            ValueError: there are fewer blocks than parts.
        """
        size = min(batch_size, len(self._held_out)) // part.of * part.of
        if size == 0:
            raise ValueError(
                f"{len(self._held_out)} held-out blocks are too few for {part.of} processes with data of their own; "
                "give more text, a smaller seq_len or fewer processes"
            )
        count, rows = len(self._held_out) // size, part.rows(size)
        for i in range(count if limit is None else min(count, limit)):
            yield _as_batch(self._held_out[i * size + rows.start : i * size + rows.stop])

    def _block_at(self, position: int) -> int:
        """Return the training block at `position` of the endless shuffled order."""
        epoch, index = divmod(position, len(self._train))
        if epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self._train))
            self._epoch = epoch
        return int(self._order[index])


def _as_batch(blocks: np.ndarray) -> dict[str, torch.Tensor]:
    """Return `blocks` [batch, seq_len] as what a causal language model takes; it shifts the labels itself."""
    return {"input_ids": torch.from_numpy(blocks.copy()), "labels": torch.from_numpy(blocks.copy())}
