"""Reads data files: plain text, and rows of fields from JSON, JSON Lines and CSV."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SPACE, _DECODER = re.compile(r"[ \t\r\n]*"), json.JSONDecoder()
_ANY_SIZE = 2**31 - 1


@dataclass(frozen=True)
class Row:
    """Fields by name, and where they come from: file and line."""

    where: str
    fields: Mapping[str, Any]


def files_of(path: Path) -> list[Path]:
    """Return the file at `path` or, for a folder, all files of known kinds in it, sorted by name.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: nothing there is of a known kind.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no data at {path}; expected {_EXPECTED}, or a folder of them")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _is_known(file) and file.is_file())
        if not files:
            raise ValueError(f"the folder {path} contains no data; expected {_EXPECTED} in it")
        return files
    if not path.is_file():
        raise ValueError(f"{path} is neither a file nor a folder; expected {_EXPECTED}, or a folder of them")
    if not _is_known(path):
        raise ValueError(f"the kind of data in {path} cannot be told from its name; expected {_EXPECTED}")
    return [path]


def is_text(file: Path) -> bool:
    """Return whether the whole of `file` is one text."""
    return file.suffix.lower() in _TEXT


def read_text(file: Path) -> str:
    """Return the content of a UTF-8 file, without its byte order mark.

    Raises:
        ValueError: the file is not UTF-8, or not text; names the line.
    """
    data = file.read_bytes()
    if data.startswith(_UTF16):
        raise ValueError(f"{file} is UTF-16, according to its first two bytes; convert the file to UTF-8")
    mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        text = data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = mark + error.start
        line = data.count(b"\n", 0, offset) + 1
        raise ValueError(
            f"{file} is not UTF-8: byte 0x{data[offset]:02x} at offset {offset} (line {line}); "
            "convert the file to UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{file} line {line} contains a NUL character, so it is not text; expected text in UTF-8")
    return text


def read_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a JSON, JSON Lines or CSV file.

    Raises:
        ValueError: the content is not what the file's name says; names the line.
    """
    return _ROWS[file.suffix.lower()](file, read_text(file))


def _json_lines(file: Path, text: str) -> Iterator[Row]:
    # Not splitlines(): JSON strings may hold U+2028 and other separators that do not end a line here.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            with _json_errors(file, number):
                value = json.loads(line)
            yield _row(f"{file} line {number}", value)


def _json(file: Path, text: str) -> Iterator[Row]:
    listed = _JsonList(file, text)
    listed.take("[")
    more = not listed.is_next("]")
    while more:
        yield listed.row()
        more = not listed.is_next("]") and listed.take(",") == ","
    listed.take("]")
    listed.end()


class _JsonList:
    """Reads a JSON list value by value, to know the line of each."""

    def __init__(self, file: Path, text: str) -> None:
        self._file, self._text, self._at, self._line = file, text, 0, 1

    def is_next(self, character: str) -> bool:
        """Skip white space and return whether `character` comes next."""
        self._go(_SPACE.match(self._text, self._at).end())  # type: ignore[union-attr]
        return self._text.startswith(character, self._at)

    def take(self, character: str) -> str:
        """Consume `character`, which must come next."""
        if not self.is_next(character):
            found = self._text[self._at : self._at + 1]
            raise ValueError(
                f"{self._file} line {self._line}: found {found or 'the end'!r} where {character!r} was expected in a "
                "list of objects, [{...}, {...}]; name a file with one object per line .jsonl"
            )
        self._go(self._at + 1)
        return character

    def row(self) -> Row:
        """Consume and return the next value."""
        self.is_next("")
        where = f"{self._file} line {self._line}"
        with _json_errors(self._file, 1):
            value, end = _DECODER.raw_decode(self._text, self._at)
        self._go(end)
        return _row(where, value)

    def end(self) -> None:
        """Make sure that nothing follows."""
        self.is_next("")
        if self._at < len(self._text):
            raise ValueError(f"{self._file} line {self._line}: expected nothing after the list of objects")

    def _go(self, to: int) -> None:
        self._line += self._text.count("\n", self._at, to)
        self._at = to


@contextmanager
def _json_errors(file: Path, first_line: int) -> Iterator[None]:
    """Reports errors of the JSON parser by file and line; the parsed text begins at `first_line`."""
    try:
        yield
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{file} line {line} is not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # too many digits, or too deeply nested
        raise ValueError(f"{file} line {first_line}: this JSON cannot be read: {error}") from None


def _row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f'{where} is a {type(value).__name__}; expected an object such as {{"text": "..."}}')
    return Row(where, value)


def _csv(file: Path, text: str) -> Iterator[Row]:
    """The first line holds the names of the fields."""
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    before = csv.field_size_limit(_ANY_SIZE)  # a field may be a whole document
    try:
        names = next(lines, None)
        if names is None:
            return
        if len(set(names)) < len(names) or "" in names:
            raise ValueError(f"{file} line 1: expected a different name for every field; found {', '.join(names)}")
        begins = lines.line_num + 1
        for values in lines:
            where, begins = f"{file} line {begins}", lines.line_num + 1
            if not values:
                continue
            if len(values) != len(names):
                raise ValueError(
                    f"{where} has {len(values)} field(s); expected the {len(names)} of line 1 ({', '.join(names)}), "
                    "separated by commas, and quoted where they contain commas"
                )
            yield Row(where, dict(zip(names, values, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{file} line {lines.line_num} is not CSV: {error}") from None
    finally:
        csv.field_size_limit(before)


_TEXT = (".txt", ".md", ".markdown")
_ROWS: dict[str, Callable[[Path, str], Iterator[Row]]] = {".jsonl": _json_lines, ".json": _json, ".csv": _csv}
_EXPECTED = f"a file of text ({', '.join(_TEXT)}) or of records ({', '.join(_ROWS)})"


def _is_known(file: Path) -> bool:
    return file.suffix.lower() in (*_TEXT, *_ROWS)
