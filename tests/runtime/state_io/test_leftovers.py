"""What killed saves leave: used where there is nothing else, swept by the next, and never that of a save that runs."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from geminifx.runtime.state_io import exchange
from geminifx.runtime.state_io.atomic_directory import atomic_directory
from geminifx.runtime.state_io.checksums import seal, verify
from geminifx.runtime.state_io.leftovers import put_back


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "ck"


def leave(target: Path, kind: str, text: str, sealed: bool = True) -> Path:
    """What a killed save leaves."""
    path = target.parent / f".{target.name}.{kind}-{len(os.listdir(target.parent)):08x}"
    path.mkdir()
    (path / "weights").write_text(text)
    if sealed:
        seal(path)
    return path


def save(target: Path, text: str) -> None:
    with atomic_directory(target) as temporary:
        (temporary / "weights").write_text(text)


def names(target: Path) -> list[str]:
    return sorted(os.listdir(target.parent))


def test_what_is_whole_is_put_back_where_there_is_nothing(target: Path) -> None:
    leave(target, "new", "half", sealed=False)
    leave(target, "old", "old", sealed=False)
    with pytest.warns(UserWarning, match=r"nothing at .*ck, but \.ck\.old-\w+ next to it is complete"):
        assert put_back(target) == target
    assert (target / "weights").read_text() == "old"
    assert put_back(target) == target and len(names(target)) == 2


def test_the_newest_is_put_back(target: Path) -> None:
    for kind, text, age_s in (("old", "oldest", 30), ("new", "newest", 10), ("new", "older", 20)):
        path = leave(target, kind, text)
        os.utime(path, (0, path.stat().st_mtime - age_s))
    with pytest.warns(UserWarning):
        put_back(target)
    assert (target / "weights").read_text() == "newest"


def test_a_half_written_one_is_not_used_and_the_next_save_sweeps_all(target: Path) -> None:
    leave(target, "new", "half", sealed=False)
    assert put_back(target) == target and not target.exists()
    save(target, "whole")
    leave(target, "old", "old")
    leave(target, "new", "new")
    assert put_back(target) == target and (target / "weights").read_text() == "whole"
    (target.parent / ".other.new-1").mkdir()
    save(target, "next")
    assert names(target) == [".other.new-1", "ck"]


def test_a_save_that_fails_has_put_back_what_was_there(target: Path) -> None:
    leave(target, "old", "old")
    with pytest.warns(UserWarning), pytest.raises(ZeroDivisionError), atomic_directory(target):
        raise ZeroDivisionError
    assert names(target) == ["ck"] and (target / "weights").read_text() == "old"


def test_links_and_what_others_may_have_planted_are_left_alone(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights").write_text("precious")
    seal(tmp_path / "elsewhere")
    (tmp_path / ".ck.new-1").symlink_to(tmp_path / "elsewhere")
    put_back(target)
    assert not target.exists()
    save(target, "new")
    assert (tmp_path / "elsewhere" / "weights").read_text() == "precious"
    (tmp_path / ".ck.new-1").unlink()
    target.rename(tmp_path / ".ck.new-2")
    if os.geteuid() == 0:
        os.chown(tmp_path / ".ck.new-2", 12345, -1)
        put_back(target)
        assert not target.exists()


WRITES = """
import sys
from geminifx.runtime.state_io.atomic_directory import atomic_directory
with atomic_directory(sys.argv[1]) as temporary:
    (temporary / "weights").write_text("of another")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def another(target: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that saves to `target`, for as long as its input is open."""
    command = [sys.executable, "-c", WRITES, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        yield process


@pytest.mark.slow
def test_what_another_process_writes_now_is_not_swept(target: Path, another: "subprocess.Popen[str]") -> None:
    save(target, "mine")
    assert len(names(target)) == 2, "theirs is there"
    another.communicate()
    assert another.returncode == 0 and names(target) == ["ck"]
    assert (target / "weights").read_text() == "of another", "who is last wins"


@pytest.mark.slow
def test_what_a_killed_process_wrote_is_swept(target: Path, another: "subprocess.Popen[str]") -> None:
    another.kill()
    another.wait()
    assert len(names(target)) == 1
    save(target, "mine")
    assert names(target) == ["ck"] and (target / "weights").read_text() == "mine"


@pytest.mark.parametrize("at_once", [True, False])
def test_of_saves_at_once_one_wins_and_nothing_is_torn(
    target: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    if not at_once:
        monkeypatch.setattr(exchange, "exchange", lambda one, other: False)
    errors: list[BaseException] = []

    def saves(text: str) -> None:
        try:
            for _ in range(20):
                with atomic_directory(target) as temporary:
                    (temporary / "weights").write_text(text)
                    (temporary / text).write_text(text)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=saves, args=(text,)) for text in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and names(target) == ["ck"]
    winner = (target / "weights").read_text()
    assert sorted(os.listdir(target)) == sorted(["checksums.json", winner, "weights"])
    verify(target)
