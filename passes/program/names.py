"""Names and texts of a model inside of a program's text, which is run: nothing of them may become code.

A model's modules, parameters and buffers may be called anything that holds no dot.
"""

import keyword
import re

RESERVED = frozenset({"aten", "geminifx", "box", "DEVICE", "torch", "inf", "nan", "slice"})
"""Names that the text of every program uses for itself."""


def identifier(text: str) -> str:
    """A name like `text` that values and functions of a program can have; whoever gives it sees that it is free."""
    name = re.sub(r"[^0-9A-Za-z_]", "_", text)
    if not name or name[0].isdigit():
        name = f"_{name}"
    return name if is_identifier(name) else f"{name}_1"


def is_identifier(name: str) -> bool:
    """Whether the text can use it: Python would read letters beyond ASCII as other ones, which look alike."""
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name) and name not in RESERVED


def escaped(text: str, special: str = "") -> str:
    """On one line, and readable back by `unescaped`; the characters of `special` do not stand in it."""
    return "".join(
        _escape(char) if char in special or char == "\\" or not char.isprintable() else char for char in text
    )


def _escape(char: str) -> str:
    code = ord(char)
    if char == "\\":
        return "\\\\"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def unescaped(text: str) -> str:
    """The inverse of `escaped`. Raises ValueError where a backslash begins nothing that it writes."""
    return text.encode("latin-1", "backslashreplace").decode("unicode_escape")


def quoted(text: str) -> str:
    """Python's literal of a text, in double quotes."""
    return '"' + escaped(text).replace('"', '\\"') + '"'
