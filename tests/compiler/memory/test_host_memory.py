"""Limits of containers: control groups as the kernel shows them, in directories of the test's own."""

from pathlib import Path

import psutil
import pytest
from geminifx.compiler.memory.host_memory import host_memory

GIB = 2**30


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 64 GiB, of which 40 are free."""
    memory = psutil.virtual_memory()._replace(total=64 * GIB, available=40 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def found(root: Path, membership: str) -> tuple[int, int]:
    (root / "membership").write_text(membership)
    return host_memory(root / "groups", root / "membership")


def test_without_groups_it_is_the_machines(tmp_path: Path) -> None:
    assert host_memory(tmp_path / "none", tmp_path / "none") == (64 * GIB, 40 * GIB)
    assert found(tmp_path, "0::/\n") == (64 * GIB, 40 * GIB)


def test_a_container_sees_its_own_group_at_the_root(tmp_path: Path) -> None:
    group(
        tmp_path / "groups", memory__max=16 * GIB, memory__current=5 * GIB, memory__stat=f"anon 1\ninactive_file {GIB}"
    )
    assert found(tmp_path, "0::/\n") == (16 * GIB, 12 * GIB), "pages of files make room"


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    group(tmp_path / "groups" / "jobs", memory__max=8 * GIB, memory__current=6 * GIB)
    group(tmp_path / "groups" / "jobs" / "one", memory__max="max", memory__current=GIB)
    assert found(tmp_path, "0::/jobs/one\n") == (8 * GIB, 2 * GIB)


def test_the_first_version_of_groups(tmp_path: Path) -> None:
    group(tmp_path / "groups" / "memory" / "a", memory__limit_in_bytes=4 * GIB, memory__usage_in_bytes=3 * GIB)
    assert found(tmp_path, "5:cpu,cpuacct:/b\n4:memory:/a\n") == (4 * GIB, GIB)


def test_no_limit_is_none(tmp_path: Path) -> None:
    group(tmp_path / "groups" / "memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=GIB)
    assert found(tmp_path, "4:memory:/\n") == (64 * GIB, 40 * GIB)
