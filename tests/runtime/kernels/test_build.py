"""Building the host kernel's library: the cache, builds at once, compilers that are missing or bad."""

import multiprocessing
import os
from pathlib import Path

import pytest
from geminifx.runtime.kernels import build as host_build
from geminifx.runtime.kernels.build import KernelBuildError, compilers, load

pytestmark = pytest.mark.skipif(not compilers(), reason="no C++ compiler here")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / "geminifx"


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "small.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_builds_once(cache, source, monkeypatch):
    assert load(source).answer() == 42
    (library,) = cache.iterdir()
    built = []
    monkeypatch.setattr(host_build, "_build", lambda *arguments: built.append(arguments))
    assert load(source).answer() == 42
    assert built == [] and list(cache.iterdir()) == [library]


def test_another_source_compiler_flag_or_cpu_is_another_library(cache, source, tmp_path, monkeypatch):
    load(source)
    source.write_text(source.read_text() + "// changed\n")
    load(source)
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(host_build, "FLAGS", (*host_build.FLAGS, "-DCHANGED"))
    load(source)
    monkeypatch.setattr(host_build, "_cpu", lambda: "another")
    load(source)
    compiler = compilers()[0][0]
    monkeypatch.setenv("CXX", script(tmp_path / "wrapped", f'exec {compiler} "$@"'))
    load(source)
    assert len(list(cache.iterdir())) == 5


def _load_in_child(source: Path) -> int:
    return load(source).answer()


def test_processes_may_build_at_once(cache, source):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_load_in_child, [source] * 8, chunksize=1) == [42] * 8
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_a_damaged_library_is_built_again(cache, source):
    load(source)
    (library,) = cache.iterdir()
    replacement = library.with_suffix(".damaged")
    replacement.write_bytes(b"not a library")
    os.replace(replacement, library)
    assert load(source).answer() == 42


def test_without_a_cache_the_library_is_private(tmp_path, source, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert load(source).answer() == 42


def count_builds(monkeypatch) -> list[Path]:
    """The places of libraries that are built from here on."""
    built, build = [], host_build._build

    def counted(command, source, target):
        built.append(target)
        return build(command, source, target)

    monkeypatch.setattr(host_build, "_build", counted)
    return built


def spoil(cache: Path) -> None:
    """Put another library in the place of the one that is cached."""
    (library,) = cache.glob("*.so")
    library.unlink()
    library.write_bytes(b"not what was built")


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_cache_that_others_can_write_to_is_not_used(cache, source, monkeypatch, mode):
    load(source)
    cache.chmod(mode)
    spoil(cache)
    built = count_builds(monkeypatch)
    assert load(source).answer() == 42
    assert len(built) == 1 and cache not in built[0].parents


def test_nor_is_one_in_a_directory_whose_names_others_can_change(cache, source, monkeypatch):
    load(source)
    built = count_builds(monkeypatch)
    for mode, builds in ((0o775, 0), (0o1777, 0), (0o777, 1)):
        cache.parent.chmod(mode)
        assert load(source).answer() == 42
        assert len(built) == builds, f"{mode:o}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("part", ["the directory", "the library"])
def test_what_another_user_owns_is_not_loaded(cache, source, monkeypatch, part):
    load(source)
    spoil(cache)
    os.chown(cache if part == "the directory" else next(cache.glob("*.so")), 12345, -1)
    built = count_builds(monkeypatch)
    assert load(source).answer() == 42
    assert len(built) == 1 and (cache in built[0].parents) == (part == "the library")


def test_a_library_that_others_can_write_to_is_built_anew(cache, source, monkeypatch):
    before = os.umask(0o002)
    try:
        load(source)
        built = count_builds(monkeypatch)
        load(source)
        assert built == [], "not even those that this umask would let write"
        next(cache.glob("*.so")).chmod(0o770)
        assert load(source).answer() == 42 and len(built) == 1
    finally:
        os.umask(before)


def test_one_process_builds_while_others_wait(cache, source, tmp_path, monkeypatch):
    compiler = compilers()[0][0]
    count = f'[ "$1" = --version ] || echo built >> {tmp_path}/count; exec {compiler} "$@"'
    monkeypatch.setenv("CXX", script(tmp_path / "counted", count))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_load_in_child, [source] * 4, chunksize=1) == [42] * 4
    assert (tmp_path / "count").read_text().split() == ["built"]


def test_no_compiler(cache, source, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(KernelBuildError, match=r"none found.*install g\+\+ or clang\+\+.*CXX"):
        load(source)


def test_a_bad_compiler_is_quoted_and_leaves_nothing(cache, source, tmp_path, monkeypatch):
    bad = script(tmp_path / "bad", 'case "$1" in --version) echo bad 1.0;; *) echo "cannot do that" >&2; exit 1;; esac')
    monkeypatch.setenv("CXX", bad)
    assert load(source).answer() == 42, "the next compiler is tried"
    for library in cache.iterdir():
        library.unlink()
    monkeypatch.setattr(host_build.shutil, "which", lambda name: None)
    with pytest.raises(KernelBuildError, match="bad: cannot do that"):
        load(source)
    monkeypatch.setenv("CXX", str(tmp_path / "nowhere"))
    with pytest.raises(KernelBuildError, match="nowhere"):
        load(source)
    assert list(cache.iterdir()) == []


def test_a_compiler_that_builds_rubbish(cache, source, tmp_path, monkeypatch):
    out = 'while [ "$1" != "-o" ]; do shift; done; echo rubbish > "$2"'
    monkeypatch.setenv("CXX", script(tmp_path / "odd", f'case "$1" in --version) echo 1;; *) {out};; esac'))
    monkeypatch.setattr(host_build.shutil, "which", lambda name: None)
    with pytest.raises(KernelBuildError, match="odd"):
        load(source)


def test_cxx_may_hold_arguments_and_comes_first(monkeypatch):
    monkeypatch.setenv("CXX", "ccache g++")
    assert compilers()[0] == ["ccache", "g++"]


def test_a_source_with_an_error_is_quoted(cache, source):
    source.write_text("int answer( { }\n")
    with pytest.raises(KernelBuildError, match="error"):
        load(source)
