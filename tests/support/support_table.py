"""The table of architectures, as a page of the documentation: each part of a run replaces its rows there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from architectures import CHECKS, Support
from filelock import FileLock

HEAD = """# Architectures

Classes of transformers, one for each kind of configuration, as small as the configuration lets them be. *Training*:
losses and gradients of three batches, one of them padded, are plain PyTorch's; *evaluation*: loss and logits;
*recomputed, offloaded*: training with `recompute="all", placement="cpu"`; *generate*: the same tokens. Written by
`make campaigns`, which makes the models, runs them, and fails where one is neither right nor refused. *Not tried* says
why this table could not make so small a model, or inputs for it: it is about the table, not about the model.

"""
COLUMNS = ("model", *CHECKS)


def record(rows: Iterable[Support], path: Path) -> None:
    """Replace the rows of these classes in a table that other processes may be writing, too."""
    path.parent.mkdir(exist_ok=True)
    with FileLock(Path(tempfile.gettempdir()) / f"{path.name}.lock"):
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        table = {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}
        table |= {row.name: _line(row) for row in rows}
        body = [table[name] for name in sorted(table) if name not in ("model", "---")]
        head = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
        path.write_text(HEAD + "\n".join([_summary(body), "", *head, *body]) + "\n", encoding="utf-8")


def _summary(lines: list[str]) -> str:
    """How many classes are right in all columns, refused in some, or not tried."""
    cells = [line.strip("| ").split(" | ")[1:] for line in lines]
    right = sum(all(cell in ("yes", "-") for cell in row) for row in cells)
    untried = sum(row[0].startswith("not tried") for row in cells)
    refused = len(cells) - right - untried
    return f"{len(cells)} classes: {right} right in every column, {refused} refused in some, {untried} not tried."


def _line(row: Support) -> str:
    cells = list(row.found.values()) or [f"not tried: {row.absent}", *[""] * (len(CHECKS) - 1)]
    # A reason that is the same for all columns is told in the first.
    same = ("", "yes", "-")
    cells = [cell if cell in same or cell not in cells[:i] else "as before" for i, cell in enumerate(cells)]
    return f"| {row.name} | {' | '.join(cell.replace('|', '/') for cell in cells)} |"
