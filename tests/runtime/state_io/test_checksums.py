"""Checksums: whatever is done to a file that was saved is noticed, and told."""

import json
from pathlib import Path

import pytest
from geminifx.runtime.isa.errors import CheckpointError
from geminifx.runtime.state_io.checksums import CHECKSUMS, Checksum, seal, verify


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with one in it that is sealed alone, and one that is not."""
    for name, content in (
        ("weights", b"123456789"),
        ("plain/notes", b""),
        ("state/a", b"x" * 2**21),
        ("state/b", b"y"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    seal(tmp_path / "state")
    seal(tmp_path)
    return tmp_path


def flip(file: Path, at: int = 0, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


def test_a_checksum_is_the_size_and_zips(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"123456789")
    assert Checksum.of(tmp_path / "file") == Checksum(9, 0xCBF43926), "the check value of CRC-32"
    assert Checksum().then(b"1234").then(memoryview(b"56789")) == Checksum(9, 0xCBF43926)


def test_files_are_listed_once(saved: Path) -> None:
    listed = json.loads((saved / CHECKSUMS).read_text())["files"]
    assert list(listed) == ["plain/notes", f"state/{CHECKSUMS}", "weights"]
    assert verify(saved) and verify(saved / "state")


def test_what_is_known_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    seal(tmp_path, {"a": Checksum(1, 7), "gone": Checksum(1, 7)})
    listed = json.loads((tmp_path / CHECKSUMS).read_text())["files"]
    assert listed == {"a": {"size_bytes": 1, "crc32": 7}}


@pytest.mark.parametrize("name", ["weights", "state/a", "state/b"])
def test_damage_names_the_file_and_what_is_intact(saved: Path, name: str) -> None:
    flip(saved / name)
    with pytest.raises(
        CheckpointError, match=f"damaged: {name} differs from the bytes that were saved. Intact: .*notes"
    ):
        verify(saved)
    (saved / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"damaged: {name} has 0 bytes instead of \d+\. "):
        verify(saved)
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"damaged: {name} is missing"):
        verify(saved)


def test_not_deep_is_about_what_is_not_sealed_alone(saved: Path) -> None:
    flip(saved / "state" / "a")
    verify(saved, deep=False)
    flip(saved / "weights")
    with pytest.raises(CheckpointError, match="weights"):
        verify(saved, deep=False)


def test_whatever_happens_to_the_list_is_noticed(saved: Path) -> None:
    file = saved / "state" / CHECKSUMS
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=CHECKSUMS):
            verify(saved / "state")
    for at in range(len(whole)):
        file.write_bytes(whole)
        flip(file, at, bit=at % 8)
        # White space is no part of what it says.
        if at % 3 or whole[at : at + 1] not in b" \n":
            try:
                verify(saved / "state")
            except CheckpointError:
                continue
            assert json.loads(file.read_bytes()) == json.loads(whole)


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "a/../../outside"])
def test_what_is_outside_is_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "ck").mkdir()
    listed = {"version": 1, "files": {name: {"size_bytes": 1, "crc32": 0}}}
    (tmp_path / "ck" / CHECKSUMS).write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match="which is not in the directory"):
        verify(tmp_path / "ck")


def test_another_version_is_told(saved: Path) -> None:
    (saved / CHECKSUMS).write_text('{"version": 2}')
    with pytest.raises(CheckpointError, match="has version 2, but this program reads version 1"):
        verify(saved)


def test_what_was_added_since_is_nobodys_business(saved: Path) -> None:
    (saved / "README.md").write_text("mine")
    verify(saved)


def test_a_directory_of_before_has_none(tmp_path: Path) -> None:
    assert not verify(tmp_path)
