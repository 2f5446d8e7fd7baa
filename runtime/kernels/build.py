"""Builds a C++ source of this package on first use and keeps the library in the user's cache.

The file's name contains a hash of everything the library depends on: source, flags, compiler and CPU. The library is
written under a temporary name beside its place and renamed, so that processes that build at once each end with a whole
one; if the file system has locks, one builds and the others wait. A loaded library runs with the user's privileges, so
a cache that somebody else could write to is not used.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..isa.errors import GeminiError
from .user_cache import appearing, is_private, usable_cache

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-w")
"""No -march: each function names its own instruction set. No contraction: bits must not depend on the compiler."""

_BUILD_TIMEOUT_S = 300


class KernelBuildError(GeminiError):
    """No compiler could build or load the source; says what each one answered and how to go on."""


def load(source: Path) -> ctypes.CDLL:
    """Returns the library built from `source`, from the cache if it is there.

    Tries the compilers in turn: CXX, g++, clang++. If the cache cannot be written, or others can write to it, the
    library is built for this process alone.

    Raises:
        KernelBuildError: no compiler was found, or none built a library that loads.
    """
    commands, answers = compilers(), []
    for command in commands:
        try:
            return _load_with(command, source)
        except subprocess.CalledProcessError as error:
            answers.append(f"{shlex.join(command)}: {_complaint(error.stderr) or error}")
        except (OSError, subprocess.TimeoutExpired) as error:
            answers.append(f"{shlex.join(command)}: {error}")
    told = "; ".join(answers) or "none found"
    raise KernelBuildError(
        f"no C++ compiler could build {source.name} ({told}); install g++ or clang++ with OpenMP, or name one in CXX"
    )


def compilers() -> list[list[str]]:
    """Returns the commands to try: CXX, which may include arguments, then g++ and clang++ if they are found."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = [[name] for name in ("g++", "clang++") if shutil.which(name)]
    return [named, *(command for command in found if command != named)] if named else found


def _load_with(command: list[str], source: Path) -> ctypes.CDLL:
    """Returns the library as this compiler builds it, from the cache if it is there."""
    version = _run([*command, "--version"])
    name = f"{source.stem}-{_key(command, source, version)}.so"
    directory = usable_cache()
    if directory is None:
        with tempfile.TemporaryDirectory() as private:  # a loaded library no longer needs its file
            return ctypes.CDLL(str(_build(command, source, Path(private) / name)))
    target = directory / name
    library = _cached(target)
    if library is not None:
        return library
    with _building(directory):
        return _cached(target) or ctypes.CDLL(str(_build(command, source, target)))


def _cached(target: Path) -> ctypes.CDLL | None:
    """Returns the library at `target` if it loads and nobody else can have written it, else None."""
    try:
        return ctypes.CDLL(str(target)) if is_private(target) else None
    except OSError:  # missing, or damaged, for example by a full disk: build it again
        return None


@contextmanager
def _building(directory: Path) -> Iterator[None]:
    """Holds an exclusive lock on the cache, if the file system has locks, so that only one process builds."""
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _build(command: list[str], source: Path, target: Path) -> Path:
    """Compiles `source` into `target`, which appears whole or not at all."""
    with appearing(target, mode=0o700) as unfinished:
        _run([*command, *FLAGS, str(source), "-o", str(unfinished)])
    return target


def _key(command: list[str], source: Path, version: str) -> str:
    """Returns a hash of everything the library depends on."""
    parts = [source.read_bytes(), *(text.encode() for text in (*FLAGS, *command, version, _cpu()))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _cpu() -> str:
    """Returns the CPU's architecture and, if the system tells, its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
    return f"{platform.machine()} {flags}"


def _run(command: list[str]) -> str:
    """Runs a command and returns what it printed."""
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S)
    return done.stdout


def _complaint(text: str | None) -> str:
    """Returns the first line of a compiler's output that mentions an error, else the last line."""
    lines = (text or "").strip().splitlines()
    return next((line for line in lines if "error" in line), lines[-1] if lines else "")
