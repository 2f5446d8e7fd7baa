"""Reading text and training a tokenizer on it."""

from pathlib import Path

import pytest
from geminifx.models.recipe.text import embedded_texts, read_texts, train_tokenizer
from transformers import AutoTokenizer, OPTConfig, PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(embedded_texts()[:20], 600)


def test_every_python_carries_enough_text() -> None:
    texts = embedded_texts()
    assert all(isinstance(text, str) and text for text in texts)
    assert sum(map(len, texts)) > 300_000


def test_reads_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Grüße\nzwei", encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == ["Grüße\nzwei"]


def test_reads_json_lines_with_separators_inside(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028still one"}\n\n{"text": "two", "n": 1}\n', encoding="utf-8")
    assert read_texts(str(tmp_path / "a.jsonl")) == ["one\u2028still one", "two"]


def test_reads_a_folder_in_order_and_skips_what_is_empty(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "deep" / "c.jsonl").write_text('{"text": "c"}')
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "image.png").write_bytes(b"\xff\xff")
    assert read_texts(tmp_path) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n ", "holds no text"),
        ("a.txt", b"fine\nf\xffne", r"a\.txt is not UTF-8: byte 0xff at offset 6 \(line 2\)"),
        ("a.txt", b"\xef\xbb\xbfab\xff", "offset 5"),
        ("a.csv", b"text", r"expected a \.txt file"),
        ("a.jsonl", b'{"text": "x"}\nnope', r"a\.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"text": 3}', "line 1 has no string field 'text'"),
        ("a.jsonl", b"[1]", "line 1 has no string field"),
    ],
)
def test_says_what_is_wrong_with_the_data(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_texts(tmp_path / name)


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no data at"):
        read_texts(tmp_path / "none.txt")
    with pytest.raises(ValueError, match=r"holds no \.txt"):
        read_texts(tmp_path)


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
