"""A checkpoint's directory is the old one or the new one, whatever goes wrong in between."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from geminifx.runtime.state_io import atomic_directory as checkpoint
from geminifx.runtime.state_io import exchange
from geminifx.runtime.state_io.atomic_directory import atomic_directory
from geminifx.runtime.state_io.checksums import CHECKSUMS


def write(directory: Path, text: str = "new") -> None:
    (directory / "sub").mkdir()
    (directory / "weights").write_text(text)
    (directory / "sub" / "more").write_text(text)


def contents(directory: Path) -> dict[str, str]:
    """Every file below `directory` with its text, hidden ones and leftovers included, but for checksums."""
    files = [f for f in directory.rglob("*") if f.is_file() and f.name != CHECKSUMS]
    return {str(f.relative_to(directory)): f.read_text() for f in files}


NEW = {"ck/weights": "new", "ck/sub/more": "new"}
OLD = {"ck/weights": "old", "ck/only": "old"}


@pytest.fixture(params=["in one step", "in two steps"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How directories change places: as this system can, and as one can that cannot do it at once."""
    if request.param == "in two steps":
        monkeypatch.setattr(exchange, "exchange", lambda one, other: False)
    return request.param


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "weights").write_text("old")
    (tmp_path / "ck" / "only").write_text("old")
    return tmp_path / "ck"


def test_a_new_directory_appears_whole_with_its_parents(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "ck"
    with atomic_directory(target) as temporary:
        write(temporary)
        assert not target.exists()
    assert contents(tmp_path / "deep" / "er") == NEW
    assert target.stat().st_mode & 0o777 == 0o755


def test_an_existing_directory_is_replaced(old: Path, way: str) -> None:
    with atomic_directory(str(old)) as temporary:
        write(temporary)
        assert contents(old.parent).items() >= OLD.items()
    assert contents(old.parent) == NEW
    assert os.listdir(old.parent) == ["ck"]


@pytest.mark.parametrize("error", [ValueError("in the body"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failing_body_changes_nothing(old: Path, way: str, error: BaseException) -> None:
    with pytest.raises(type(error)), atomic_directory(old) as temporary:
        write(temporary)
        raise error
    assert contents(old.parent) == OLD and os.listdir(old.parent) == ["ck"]


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("precious")
    with pytest.raises(NotADirectoryError, match="notes is a file"), atomic_directory(tmp_path / "notes"):
        pass
    assert (tmp_path / "notes").read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


def test_a_link_stays_one_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "large disk" / "run").mkdir(parents=True)
    (tmp_path / "large disk" / "run" / "weights").write_text("old")
    (tmp_path / "run").symlink_to(tmp_path / "large disk" / "run")
    with atomic_directory(tmp_path / "run") as temporary:
        (temporary / "weights").write_text("new")
    assert (tmp_path / "run").is_symlink()
    assert [path.name for path in (tmp_path / "large disk").iterdir()] == ["run"]
    assert (tmp_path / "large disk" / "run" / "weights").read_text() == "new"


def test_a_failing_body_leaves_no_new_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError), atomic_directory(tmp_path / "ck") as temporary:
        write(temporary)
        raise ValueError
    assert os.listdir(tmp_path) == []


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_at_the_flush_changes_nothing(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise FULL

    monkeypatch.setattr(checkpoint.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"), atomic_directory(old) as temporary:
        write(temporary)
    assert contents(old.parent) == OLD and os.listdir(old.parent) == ["ck"]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
def test_whichever_rename_fails_the_old_checkpoint_is_at_its_place(
    old: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException
) -> None:
    original, calls = os.rename, iter(range(9))

    def rename(source: Any, target: Any) -> None:
        if next(calls) == number:
            raise error
        original(source, target)

    monkeypatch.setattr(exchange, "exchange", lambda one, other: False)
    monkeypatch.setattr(exchange.os, "rename", rename)
    with pytest.raises(type(error)), atomic_directory(old) as temporary:
        write(temporary)
    assert contents(old.parent) == OLD and os.listdir(old.parent) == ["ck"]


def test_an_interruption_while_the_old_one_is_removed_leaves_the_new_one(
    old: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rmtree(path: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", rmtree)
        with pytest.raises(KeyboardInterrupt), atomic_directory(old) as temporary:
            write(temporary)
    assert {f"ck/{name}": text for name, text in contents(old).items()} == NEW
    with atomic_directory(old) as temporary:
        (temporary / "weights").write_text("newer")
    assert contents(old.parent) == {"ck/weights": "newer"}, "and the next save removes what is left of the old one"


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o2770, 0o777])
def test_access_stays_as_it_is(old: Path, way: str, mode: int) -> None:
    old.chmod(mode)
    with atomic_directory(old) as temporary:
        assert temporary.stat().st_mode & 0o777 == mode & 0o777, "nobody else looks at what is being written"
        (temporary / "sub").mkdir()
    assert old.stat().st_mode & 0o7777 == mode
    assert (old / "sub").stat().st_mode & 0o2000 == mode & 0o2000


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to groups that it is not in")
@pytest.mark.parametrize("may", [True, False])
def test_a_group_stays_or_gets_nothing(old: Path, monkeypatch: pytest.MonkeyPatch, may: bool) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    os.chown(old, -1, 12345)
    old.chmod(0o2770)
    if not may:
        monkeypatch.setattr("os.chown", refuse)
    with atomic_directory(old) as temporary:
        write(temporary)
    found = old.stat()
    assert (found.st_gid, found.st_mode & 0o7777) == ((12345, 0o2770) if may else (os.getegid(), 0o700))


def test_a_new_directory_has_the_access_of_any_other(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_directory(tmp_path / "ck") as temporary:
            write(temporary)
    finally:
        os.umask(before)
    assert (tmp_path / "ck").stat().st_mode & 0o777 == 0o750
