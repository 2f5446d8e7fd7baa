"""Records: recognised by their fields, or by those that are named."""

import json
from pathlib import Path
from typing import Any

import pytest
from geminifx.models.recipe.records import Chat, Completion, Fields, Text, plain_texts, read_records, summary

TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


def _lines(directory: Path, *values: Any, name: str = "a.jsonl") -> Path:
    file = directory / name
    file.write_text("\n".join(map(json.dumps, values)), encoding="utf-8")
    return file


def test_each_kind_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# words")
    (tmp_path / "b.csv").write_text("prompt,completion,source\n1+1=,2,me\n")
    _lines(tmp_path, {"id": 3, "messages": TURNS}, name="c.jsonl")
    (tmp_path / "d.json").write_text(json.dumps([{"text": "one"}, {"text": " "}]))
    (tmp_path / "e.txt").write_text(" \n")
    records = read_records(str(tmp_path))
    assert records == [
        Text(f"{tmp_path / 'a.md'}", "# words"),
        Completion(f"{tmp_path / 'b.csv'} line 2", "1+1=", "2"),
        Chat(f"{tmp_path / 'c.jsonl'} line 1", TURNS),
        Text(f"{tmp_path / 'd.json'} line 1", "one"),
    ]
    assert summary(records) == "2 texts, 1 completion, 1 chat"
    assert plain_texts(records[:2]) == ["# words", "1+1=2"]
    with pytest.raises(ValueError, match=r"c\.jsonl line 1 is a chat, but a model with random weights has no chat"):
        plain_texts(records)


def test_fields_may_have_other_names(tmp_path: Path) -> None:
    file = _lines(tmp_path, {"q": "1+1=", "a": "2", "text": "no", "talk": TURNS})
    assert read_records(file, Fields.parse("prompt=q, completion=a")) == [Completion(f"{file} line 1", "1+1=", "2")]
    assert read_records(file, Fields.parse("text=q")) == [Text(f"{file} line 1", "1+1=")]
    assert read_records(file, Fields.parse("messages=talk")) == [Chat(f"{file} line 1", TURNS)]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([{"body": "x", "n": 1}], r"a\.jsonl line 1 has the fields 'body', 'n'; expected 'text', .*text=NAME"),
        ([{}], "line 1 has the fields none"),
        ([{"prompt": "x"}], "line 1 has the fields 'prompt'; expected"),
        ([{"text": "x", "messages": TURNS}], "line 1 has the fields 'text', 'messages'; choose those"),
        ([{"text": "x", "prompt": "x", "completion": "y"}], "choose those to learn from with --fields"),
        ([{"text": "x"}, {"body": "y"}], "line 2 has no field 'text'; its fields are 'body'"),
        ([{"text": 3}], "line 1 has no string field 'text': it is 3"),
        ([{"text": None}], "line 1 has no string field 'text': it is None"),
        ([{"text": "x"}, {"text": "\ud800"}], r"line 2: the field 'text' contains \\ud800, half of a surrogate pair"),
        ([{"prompt": "x", "completion": ""}], "line 1: the field 'completion' is empty"),
        ([{"prompt": TURNS, "completion": "x"}], "line 1 has no string field 'prompt'"),
        ([{"messages": "hello"}], "line 1: the field 'messages' is 'hello'; expected a list such as"),
        ([{"messages": []}], r"the field 'messages' is \[\]; expected a list"),
        ([{"messages": ["hello"]}], "line 1: message 1 of the field 'messages' is 'hello'; expected"),
        ([{"messages": [*TURNS, {"role": "user"}]}], "message 3 of the field 'messages' has no string 'content'"),
        ([{"messages": [{"content": "x"}]}], "message 1 of the field 'messages' has no string 'role'"),
        ([{"messages": [{"role": "user", "content": "\udfff"}]}], r"message 1 .* contains \\udfff"),
        ([{"text": " "}], "contains no text"),
        ([], "contains no text"),
    ],
)
def test_says_what_is_wrong_with_a_record(tmp_path: Path, values: list[Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_records(_lines(tmp_path, *values))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ("body", "'body' cannot be parsed; expected text=NAME"),
        ("text=", "'text=' cannot be parsed"),
        ("", "'' cannot be parsed"),
        ("text=a,text=b", "'text=b' cannot be parsed"),
        ("label=a", "names label; expected text=NAME"),
        ("prompt=a", "names prompt; expected"),
        ("text=a,prompt=b,completion=c", "names text and prompt and completion; expected"),
    ],
)
def test_says_what_fields_may_be(fields: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"--fields '{fields}'.*{says}"):
        Fields.parse(fields)


def test_fields_that_a_record_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl line 1 has no field 'body'; its fields are 'text'"):
        read_records(_lines(tmp_path, {"text": "x"}), Fields.parse("text=body"))
