"""Turns names from a model into identifiers and literals of a program's text, so that none of them can become code.

Modules, parameters and buffers of a model may have any name without a dot, and a program's text is executed.
"""

import keyword
import re

RESERVED = frozenset({"aten", "geminifx", "box", "DEVICE", "torch", "inf", "nan", "slice"})
"""Names that the text of every program uses itself."""


def identifier(text: str) -> str:
    """A valid name like `text` for a value or function of a program. The caller must check that it is free."""
    name = re.sub(r"[^0-9A-Za-z_]", "_", text)
    if not name or name[0].isdigit():
        name = f"_{name}"
    return name if is_identifier(name) else f"{name}_1"


def is_identifier(name: str) -> bool:
    """Whether a program's text can use a name. Non-ASCII letters are rejected: Python normalises some to others."""
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name) and name not in RESERVED


def escaped(text: str, special: str = "") -> str:
    """`text` on one line, with the characters of `special` escaped too; `unescaped` is the inverse."""
    if text.isprintable() and not any(char in text for char in ("\\", *special)):
        return text  # as nearly all are, and a program's text has very many
    return "".join(
        _escape(char) if char in special or char == "\\" or not char.isprintable() else char for char in text
    )


def _escape(char: str) -> str:
    code = ord(char)
    if char == "\\":
        return "\\\\"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def unescaped(text: str) -> str:
    """The inverse of `escaped`. Raises ValueError on a truncated escape sequence."""
    return text.encode("latin-1", "backslashreplace").decode("unicode_escape")


def quoted(text: str) -> str:
    """`text` as a Python literal in double quotes."""
    return '"' + escaped(text).replace('"', '\\"') + '"'
