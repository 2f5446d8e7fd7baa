"""Files of data: what each kind holds, and what is said of one that holds something else."""

import json
from pathlib import Path
from typing import Any

import pytest
from geminifx.models.recipe.files import files_of, read_rows, read_text
from hypothesis import given, settings
from hypothesis import strategies as st


def _write(directory: Path, name: str, content: bytes | str) -> Path:
    file = directory / name
    file.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return file


def _rows(file: Path) -> list[tuple[str, dict[str, Any]]]:
    return [(row.where.removeprefix(f"{file} "), dict(row.fields)) for row in read_rows(file)]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT", "a.markdown"])
def test_text_is_read_as_it_stands(tmp_path: Path, name: str) -> None:
    file = _write(tmp_path, name, b"\xef\xbb\xbf# Gr\xc3\xbc\xc3\x9fe\r\n\nzwei ")
    assert files_of(file) == [file]
    assert read_text(file) == "# Grüße\r\n\nzwei "


def test_json_lines_may_hold_other_separators(tmp_path: Path) -> None:
    file = _write(tmp_path, "a.jsonl", '{"text": "one\u2028still one"}\r\n\n  {"text": "two", "n": 1}')
    assert _rows(file) == [("line 1", {"text": "one\u2028still one"}), ("line 3", {"text": "two", "n": 1})]


def test_values_of_a_json_list_are_known_by_their_lines(tmp_path: Path) -> None:
    file = _write(tmp_path, "a.json", '\n[\n  {"text": "one\\nline"},\n\n  {\n"text":\n"two"}\n, {"a": [1, 2]}]\n ')
    assert _rows(file) == [("line 3", {"text": "one\nline"}), ("line 5", {"text": "two"}), ("line 8", {"a": [1, 2]})]
    assert _rows(_write(tmp_path, "b.json", b"\xef\xbb\xbf[]")) == []


def test_csv_rows_begin_in_the_line_they_are_known_by(tmp_path: Path) -> None:
    long = "word " * 40_000  # longer than Python's reader takes by itself
    file = _write(tmp_path, "a.csv", f'text,n\r\n"two\r\nlines, ""quoted""",1\r\n\r\nplain,2\r\n{long},3\r\n')
    assert _rows(file) == [
        ("line 2", {"text": 'two\r\nlines, "quoted"', "n": "1"}),
        ("line 5", {"text": "plain", "n": "2"}),
        ("line 6", {"text": long, "n": "3"}),
    ]
    assert _rows(_write(tmp_path, "b.csv", "")) == []


@settings(max_examples=60)
@given(st.lists(st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.none(), max_size=3), max_size=4))
def test_whatever_json_writes_is_read(tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, Any]]) -> None:
    directory = tmp_path_factory.mktemp("json")
    whole = _write(directory, "a.json", json.dumps(values, indent=1))
    lines = _write(directory, "a.jsonl", "\n".join(map(json.dumps, values)))
    assert [fields for _, fields in _rows(whole)] == [fields for _, fields in _rows(lines)] == values


def test_a_folder_is_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "folder.txt").mkdir()
    for name in ("b.txt", "deep/c.jsonl", "a.csv", "image.png"):
        _write(tmp_path, name, "")
    assert [str(file.relative_to(tmp_path)) for file in files_of(tmp_path)] == ["a.csv", "b.txt", "deep/c.jsonl"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"fine\nf\xffne", r"a\.txt is not UTF-8: byte 0xff at offset 6 \(line 2\)"),
        (b"\xef\xbb\xbfab\xff", "offset 5"),
        (b"\xff\xfea\0b\0", "UTF-16"),
        (b"\xfe\xff\0a\0b", "UTF-16"),
        (b"a\nb\0c", r"a\.txt line 2 contains a NUL character"),
    ],
)
def test_what_is_no_text(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_text(_write(tmp_path, "a.txt", content))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"text": "x"}\nnope', r"a\.jsonl line 2 is not JSON: .* at column 1"),
        ("a.jsonl", '\n{"text": "x"', r"a\.jsonl line 2 is not JSON"),
        ("a.jsonl", "[1]", "line 1 is a list; expected an object"),
        ("a.jsonl", "3", "line 1 is a int; expected an object"),
        ("a.jsonl", "[" * 200_000, "line 1: this JSON cannot be read"),
        ("a.jsonl", '{"text": ' + "9" * 10_000 + "}", "line 1: this JSON cannot be read"),
        ("a.json", "", r"a\.json line 1: found 'the end' where '\[' was expected"),
        ("a.json", '{"text": "x"}\n{"text": "y"}', r"line 1: found '\{' where '\[' was expected.*name .* \.jsonl"),
        ("a.json", '\n[{"text": "x"},\n{"text": nope}]', r"a\.json line 3 is not JSON: .* at column 10"),
        ("a.json", '[{"text": "x"},\n]', "line 2 is not JSON"),
        ("a.json", '[{"text": "x"}\n{"text": "y"}]', r"line 2: found '\{' where ',' was expected"),
        ("a.json", '[{"text": "x"}', "line 1: found 'the end' where ',' was expected"),
        ("a.json", "[{}]\n[]", "line 2: expected nothing after the list"),
        ("a.json", "[\n3]", "line 2 is a int; expected an object"),
        ("a.csv", "text,n\none,1\ntwo", r"a\.csv line 3 has 1 field\(s\); expected the 2 of line 1 \(text, n\)"),
        ("a.csv", "text,n\none,1,2", r"line 2 has 3 field\(s\)"),
        ("a.csv", "text,text\na,b", "line 1: expected a different name for every field; found text, text"),
        ("a.csv", "text,\na,b", "line 1: expected a different name for every field"),
        ("a.csv", 'text\n"never closed', r"a\.csv line 2 is not CSV"),
        ("a.csv", 'text\n"a" b', r"a\.csv line 2 is not CSV"),
    ],
)
def test_what_holds_no_rows(tmp_path: Path, name: str, content: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        list(read_rows(_write(tmp_path, name, content)))


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no data at"):
        files_of(tmp_path / "none.txt")
    with pytest.raises(ValueError, match=r"contains no data; expected a file of text \(\.txt"):
        files_of(tmp_path)
    with pytest.raises(
        ValueError, match=r"the kind of data in .*a\.parquet cannot be told from its name; expected a file of text"
    ):
        files_of(_write(tmp_path, "a.parquet", b"PAR1"))
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        files_of(Path("/dev/null"))
