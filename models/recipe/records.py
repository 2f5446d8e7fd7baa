"""What data teaches: texts, completions of prompts, and chats, recognised by the fields of its records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import Row, files_of, is_text, read_rows, read_text

GRAMMAR = "text=NAME, prompt=NAME,completion=NAME or messages=NAME"


@dataclass(frozen=True)
class Text:
    """A text, all of which is learned; `where` says where it comes from."""

    where: str
    text: str


@dataclass(frozen=True)
class Completion:
    """A completion to learn, and the prompt that it directly follows."""

    where: str
    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """Return the prompt and the completion, joined."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Chat:
    """Messages in order, each with a role and content."""

    where: str
    messages: list[dict[str, Any]]


Record = Text | Completion | Chat


class Fields(dict[str, str]):
    """Maps what fields hold ("text", "prompt" and "completion", or "messages") to their names."""

    @classmethod
    def parse(cls, text: str) -> Fields:
        """Parse the command line's --fields.

        Raises:
            ValueError: it cannot be parsed, or no kind of record has these fields.
        """
        fields = cls()
        for item in text.split(","):
            role, _, name = (part.strip() for part in item.partition("="))
            if not role or not name or role in fields:
                raise ValueError(f"--fields {text!r}: {item!r} cannot be parsed; expected {GRAMMAR}")
            fields[role] = name
        if tuple(sorted(fields)) not in map(tuple, map(sorted, _KINDS)):
            raise ValueError(f"--fields {text!r} names {' and '.join(fields)}; expected {GRAMMAR}")
        return fields


def read_records(path: str | Path, fields: Fields | None = None) -> list[Record]:
    """Return the records in a file, or in all files of known kinds in a folder.

    `fields` says which fields to read; by default they are the ones in the first record: "text", "prompt" and
    "completion", or "messages". All records of a file must have the same. Text files, which have no fields, are one
    record each. Texts of nothing but white space are left out.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: there is nothing to learn in it, or something unexpected; names file and line.
    """
    files = files_of(Path(path))
    records = [record for file in files for record in _read(file, fields) if not _is_blank(record)]
    if not records:
        raise ValueError(
            f"{path} contains no text: {len(files)} file(s) were read, and all are empty; expected some text"
        )
    return records


def plain_texts(records: Iterable[Record]) -> list[str]:
    """Return the records' texts, to train a tokenizer on.

    Raises:
        ValueError: a record is a chat, which a new tokenizer has no template for; names it.
    """
    found = []
    for record in records:
        if isinstance(record, Chat):
            raise ValueError(
                f"{record.where} is a chat, but a model with random weights has no chat template; train a model whose "
                "tokenizer has one, or write the chats as prompt and completion"
            )
        found.append(record.text)
    return found


def summary(records: Sequence[Record]) -> str:
    """Return how many records there are of each kind."""
    names = {Text: "text", Completion: "completion", Chat: "chat"}
    counts = {name: sum(type(record) is kind for record in records) for kind, name in names.items()}
    return ", ".join(f"{count:,} {name}{'s' * (count > 1)}" for name, count in counts.items() if count)


def _is_blank(record: Record) -> bool:
    return isinstance(record, Text) and not record.text.strip()


def _read(file: Path, fields: Fields | None) -> Iterator[Record]:
    if is_text(file):
        if fields is not None:
            raise ValueError(f"{file} is text, which has no fields; leave --fields out")
        yield Text(str(file), read_text(file))
        return
    for row in read_rows(file):
        fields = fields or _recognised(row)
        make = _KINDS[next(kind for kind in _KINDS if set(kind) == set(fields))]
        yield make(row, fields)


def _recognised(row: Row) -> Fields:
    """Return the fields of the only kind of record whose field names the row has."""
    found = [kind for kind in _KINDS if all(name in row.fields for name in kind)]
    if len(found) == 1:
        return Fields({name: name for name in found[0]})
    has = ", ".join(map(repr, row.fields)) or "none"
    if not found:
        raise ValueError(
            f"{row.where} has the fields {has}; expected 'text', 'prompt' and 'completion', or 'messages', or choose "
            f"the fields to learn from with --fields: {GRAMMAR}"
        )
    raise ValueError(f"{row.where} has the fields {has}; choose those to learn from with --fields: {GRAMMAR}")


def _text(row: Row, fields: Mapping[str, str]) -> Text:
    return Text(row.where, _string(row, fields["text"]))


def _completion(row: Row, fields: Mapping[str, str]) -> Completion:
    prompt, completion = (_string(row, fields[role]) for role in ("prompt", "completion"))
    if not completion:
        raise ValueError(f"{row.where}: the field {fields['completion']!r} is empty; expected the text to learn")
    return Completion(row.where, prompt, completion)


def _chat(row: Row, fields: Mapping[str, str]) -> Chat:
    name = fields["messages"]
    messages = _value(row, name)
    expected = 'expected a list such as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{row.where}: the field {name!r} is {_shown(messages)}; {expected}")
    for number, message in enumerate(messages, 1):
        where = f"{row.where}: message {number} of the field {name!r}"
        if not isinstance(message, dict):
            raise ValueError(f"{where} is {_shown(message)}; {expected}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f"{where} has no string {key!r}; {expected}")
            _check_unicode(where, message[key])
    return Chat(row.where, messages)


def _value(row: Row, name: str) -> Any:
    if name not in row.fields:
        has = ", ".join(map(repr, row.fields)) or "none"
        raise ValueError(f"{row.where} has no field {name!r}; its fields are {has}")
    return row.fields[name]


def _string(row: Row, name: str) -> str:
    value = _value(row, name)
    if not isinstance(value, str):
        raise ValueError(f"{row.where} has no string field {name!r}: it is {_shown(value)}; expected text")
    _check_unicode(f"{row.where}: the field {name!r}", value)
    return value


def _check_unicode(where: str, text: str) -> None:
    """JSON can encode lone surrogates, which no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"{where} contains {half}, half of a surrogate pair; expected complete characters") from None


def _shown(value: Any) -> str:
    """Return a value for an error message, cut to its beginning."""
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."


_KINDS: dict[tuple[str, ...], Callable[[Row, Mapping[str, str]], Record]] = {
    ("text",): _text,
    ("prompt", "completion"): _completion,
    ("messages",): _chat,
}
