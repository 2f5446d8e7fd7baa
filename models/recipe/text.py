"""Reading text and training a tokenizer on it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# In this order so that they get the ids that OPT's configuration expects: pad 1, end of text 2.
_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>")
SMALLEST_VOCABULARY = 256 + len(_SPECIAL_TOKENS)
_SUFFIXES = (".txt", ".jsonl")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def embedded_texts() -> list[str]:
    """Return the Python language reference that every CPython carries: about 80 texts, 0.5 MB of English."""
    return [topics[name] for name in sorted(topics)]


def read_texts(path: str | Path) -> list[str]:
    """Return the texts in a .txt file, the "text" fields of a .jsonl file, or all of those in a folder.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: no text is in it, or it is not UTF-8, or a line is not JSON with a "text"; names
            file and line.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no data at {path}; give a .txt or .jsonl file or a folder of them")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise ValueError(f"the folder {path} holds no .txt or .jsonl file")
    elif path.suffix in _SUFFIXES:
        files = [path]
    else:
        raise ValueError(f"cannot tell what {path} holds; expected a .txt file or a .jsonl file with a 'text' field")
    texts = [text for file in files for text in _read_file(file) if text.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text: {len(files)} file(s) read, all empty")
    return texts


def _read_file(file: Path) -> list[str]:
    """Return the texts in one file: the whole of a .txt, one per line of a .jsonl."""
    data = file.read_bytes()
    mark = len(_BYTE_ORDER_MARK) if data.startswith(_BYTE_ORDER_MARK) else 0
    try:
        text = data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = mark + error.start
        line = data.count(b"\n", 0, offset) + 1
        raise ValueError(
            f"{file} is not UTF-8: byte 0x{data[offset]:02x} at offset {offset} (line {line}); "
            "convert the file to UTF-8"
        ) from None
    if file.suffix != ".jsonl":
        return [text]
    # Not splitlines(): JSON strings may hold U+2028 and other separators that are not line ends here.
    return [_json_text(line, f"{file} line {i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _json_text(line: str, where: str) -> str:
    """Return the "text" field of one line of a .jsonl file."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'{where} has no string field \'text\'; expected lines such as {{"text": "..."}}')
    return record["text"]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens on `texts`: it can encode any text.

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
