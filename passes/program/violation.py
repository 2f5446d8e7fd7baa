"""What a check of a program finds."""

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Violation:
    """A node that breaks a rule, with what was found and what was expected."""

    node: fx.Node
    found: str
    expected: str
