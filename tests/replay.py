"""Replay: whether programs and plans are those of another commit, to the letter.

    python tests/replay.py BASE [--rename OLD=NEW ...] [--only CASE ...]

compiles a few small models in both trees, in processes of their own and by the public API alone, and prints what
differs between their programs and plans, after the renames of words in those of BASE. A refactoring changes nothing.
"""

import argparse
import difflib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path(__file__).resolve().parent / "support" / "replayed.py"


@contextmanager
def tree_of(commit: str, folder: Path) -> Iterator[Path]:
    tree = folder / "tree"
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
    try:
        yield tree
    finally:
        subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def texts_of(tree: Path, folder: Path, names: list[str]) -> dict[str, str]:
    """What the package in `tree` makes of the cases."""
    (folder / "out").mkdir(parents=True)
    (folder / "packages").mkdir()
    (folder / "packages" / "geminifx").symlink_to(tree, target_is_directory=True)
    environment = {**os.environ, "PYTHONPATH": str(folder / "packages"), "OMP_NUM_THREADS": "1",
                   "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    subprocess.run([sys.executable, str(SCRIPT), str(folder / "out"), *names], env=environment, check=True)
    return {path.name: path.read_text(encoding="utf-8") for path in sorted((folder / "out").iterdir())}


def renamed(text: str, renames: list[tuple[str, str]]) -> str:
    for old, new in renames:
        text = re.sub(rf"(?<!\w){re.escape(old)}(?=(_\d+)?(?!\w))", new, text)  # values are numbered by operator
    return text


def compare(before: dict[str, str], after: dict[str, str]) -> tuple[str, str]:
    """A unified diff of all texts; how many differ, and what was refused, so that nothing is compared."""
    diff: list[str] = []
    differing = 0
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, "").splitlines(), after.get(name, "").splitlines()
        found = list(difflib.unified_diff(old, new, f"before/{name}", f"after/{name}", lineterm=""))
        differing += bool(found)
        diff += found
    refused = [name for name in after if name.endswith(": refused")]
    told = f"{len(before.keys() | after.keys())} programs and plans, {differing} differ"
    return "\n".join(diff), told + "".join(f"\n{name}: {after[name].strip()}" for name in refused)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare programs and plans with those of another commit.")
    parser.add_argument("base", help="the commit to compare with")
    parser.add_argument("--rename", nargs="*", default=[], metavar="OLD=NEW", help="words of its programs and plans")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="CASE", help="some of the cases in support/replayed.py"
    )
    given = parser.parse_args()
    renames = [tuple(pair.split("=", 1)) for pair in given.rename]
    with tempfile.TemporaryDirectory() as folder, tree_of(given.base, Path(folder)) as tree:
        before = texts_of(tree, Path(folder) / "before", given.only)
        after = texts_of(ROOT, Path(folder) / "after", given.only)
    diff, told = compare({name: renamed(text, renames) for name, text in before.items()}, after)
    sys.stdout.write(f"{diff}\n{told}\n" if diff else f"{told}\n")
    return int(bool(diff))


if __name__ == "__main__":
    sys.exit(main())
