"""Tokens packed into blocks of a fixed length and served as batches, from any step on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .examples import NOT_LEARNED, Example, pack


@dataclass(frozen=True)
class Part:
    """One of `of` equal parts of every batch; `number` counts from 0."""

    number: int = 0
    of: int = 1

    def rows(self, batch_size: int) -> slice:
        """Return the rows of a batch that are this part.

        Raises:
            ValueError: a batch of this size does not divide into `of` parts.
        """
        if batch_size % self.of:
            raise ValueError(
                f"a batch of {batch_size} cannot be divided into {self.of} equal parts, one for each data-parallel "
                f"process; choose a --batch-size that is a multiple of {self.of}"
            )
        size = batch_size // self.of
        return slice(self.number * size, (self.number + 1) * size)


WHOLE = Part()


class TokenBlocks:
    """Tokens cut into blocks of `seq_len`; a fixed share is held out, the rest is served in an endless shuffled order.

    Which blocks are held out does not depend on the seed, so a later run is evaluated on the same text.
    """

    def __init__(
        self,
        tokens: Sequence[int] | np.ndarray,
        seq_len: int,
        *,
        labels: np.ndarray | None = None,
        held_out: float = 0.05,
        seed: int = 0,
    ):
        """Take `tokens` [any length] and their labels, by default the tokens themselves. An incomplete last block is
        dropped, and so are blocks with nothing to learn.

        Raises:
            ValueError: there are fewer than two blocks, or `seq_len` or `held_out` is out of range.
        """
        if seq_len < 2:
            raise ValueError(f"blocks of {seq_len} tokens contain nothing to predict; expected seq_len of at least 2")
        if not 0 < held_out <= 0.5:
            raise ValueError(f"a held-out share of {held_out} is out of range; expected above 0, at most 0.5")
        blocks, taught = (_cut(each, seq_len) for each in (tokens, tokens if labels is None else labels))
        teaches = (taught[:, 1:] != NOT_LEARNED).any(axis=1)  # nothing predicts the first token of a block
        blocks, taught, count = blocks[teaches], taught[teaches], int(teaches.sum())
        if count < 2:
            raise ValueError(
                f"{len(tokens)} tokens are too few: training needs at least one block of {seq_len} tokens and one "
                "more to hold out; provide more text or a smaller seq_len"
            )
        every = min(round(1 / held_out), count)
        is_held_out = np.arange(count) % every == every - 1
        self.seq_len, self.seed = seq_len, seed
        self._train, self._held_out = blocks[~is_held_out], blocks[is_held_out]
        self._train_labels, self._held_out_labels = taught[~is_held_out], taught[is_held_out]
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @classmethod
    def of(
        cls, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, seq_len: int, *, seed: int = 0
    ) -> TokenBlocks:
        """Return `examples`, which `tokenizer` encoded, packed into blocks.

        Raises:
            ValueError: there are too few, or one that must not be cut does not fit into a block.
        """
        filler = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
        tokens, labels = pack(examples, seq_len, filler)
        return cls(tokens, seq_len, labels=labels, seed=seed)

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

    def steps(self, epochs: int, batch_size: int) -> int:
        """Return the steps it takes to see every training block `epochs` times; some fill up the last batch once more.

        Raises:
            ValueError: `epochs` is less than 1.
        """
        if epochs < 1:
            raise ValueError(f"epochs={epochs}; expected at least 1")
        return ceil(epochs * len(self) / batch_size)

    def fingerprint(self) -> str:
        """Return a digest of the data, its split and its order: equal if every batch is equal."""
        digest = hashlib.sha256(f"{self._train.shape} {self._held_out.shape} {self.seed}".encode())
        for blocks in (self._train, self._train_labels):
            digest.update(np.ascontiguousarray(blocks).tobytes())
        return digest.hexdigest()

    def batch(self, step: int, batch_size: int, part: Part = WHOLE) -> dict[str, torch.Tensor]:
        """Return training batch `step` as input_ids and labels, int64 [batch_size / part.of, seq_len].

        It depends only on the seed and the arguments. Every block is seen once per epoch; a batch may span two epochs.
        """
        rows = part.rows(batch_size)
        positions = range(step * batch_size + rows.start, step * batch_size + rows.stop)
        chosen = [self._block_at(position) for position in positions]
        return _as_batch(self._train[chosen], self._train_labels[chosen])

    def held_out_batches(
        self, batch_size: int, limit: int | None = None, part: Part = WHOLE
    ) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
        """Yield at most `limit` held-out batches of equal size: `part` of each, and how many tokens all of it teaches.

        An incomplete last batch is left out unless it is the only one, so that a compiled model sees a single shape.

        Raises:
            ValueError: there are fewer blocks than parts.
        """
        size = min(batch_size, len(self._held_out)) // part.of * part.of
        if size == 0:
            raise ValueError(
                f"{len(self._held_out)} held-out blocks are too few for {part.of} data-parallel processes; provide "
                "more text, a smaller seq_len or fewer processes"
            )
        count, rows = len(self._held_out) // size, part.rows(size)
        for i in range(count if limit is None else min(count, limit)):
            blocks, labels = (each[i * size : (i + 1) * size] for each in (self._held_out, self._held_out_labels))
            yield _as_batch(blocks[rows], labels[rows]), int((labels[:, 1:] != NOT_LEARNED).sum())

    def _block_at(self, position: int) -> int:
        """Return the index of the training block at `position` of the endless shuffled order."""
        epoch, index = divmod(position, len(self._train))
        if epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self._train))
            self._epoch = epoch
        return int(self._order[index])


def _cut(tokens: Sequence[int] | np.ndarray, seq_len: int) -> np.ndarray:
    """Return `tokens` as int64 [blocks, seq_len]."""
    count = len(tokens) // seq_len
    return np.asarray(tokens, dtype=np.int64)[: count * seq_len].reshape(count, seq_len)


def _as_batch(blocks: np.ndarray, labels: np.ndarray) -> dict[str, torch.Tensor]:
    """Return `blocks` and `labels` [batch, seq_len] as a causal language model takes them; it shifts labels itself."""
    return {"input_ids": torch.from_numpy(blocks.copy()), "labels": torch.from_numpy(labels.copy())}
