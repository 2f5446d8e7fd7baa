"""Building a C++ source of this package on first use and keeping the library in the user's cache.

The file's name holds a hash of everything the library depends on: source, flags, compiler and CPU. It is written
beside its place and renamed, so processes that build at once each end with a whole library; where the file system has
locks, one of them builds and the others wait. What is loaded runs with all that this user may do: a cache that somebody
else could write to is not used.
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
    """Return the library built from `source`, from the cache where it is there already.

    Compilers are tried in turn: CXX, g++, clang++. Where the cache cannot be written, or others can write to it, the
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
    """Return the commands to try: CXX, which may hold arguments, then g++ and clang++ where they are found."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = [[name] for name in ("g++", "clang++") if shutil.which(name)]
    return [named, *(command for command in found if command != named)] if named else found


def _load_with(command: list[str], source: Path) -> ctypes.CDLL:
    """Return the library as one compiler builds it."""
    version = _run([*command, "--version"])
    name = f"{source.stem}-{_key(command, source, version)}.so"
    directory = usable_cache()
    if directory is None:
        with tempfile.TemporaryDirectory() as private:  # once loaded, the library needs its file no more
            return ctypes.CDLL(str(_build(command, source, Path(private) / name)))
    target = directory / name
    library = _cached(target)
    if library is not None:
        return library
    with _building(directory):
        return _cached(target) or ctypes.CDLL(str(_build(command, source, target)))


def _cached(target: Path) -> ctypes.CDLL | None:
    """Return the library at `target`, if there is one that loads and that nobody else can have written."""
    try:
        return ctypes.CDLL(str(target)) if is_private(target) else None
    except OSError:  # not there, or damaged, for example by a full disk: build it again
        return None


@contextmanager
def _building(directory: Path) -> Iterator[None]:
    """Let others wait while this is open, where there are locks."""
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _build(command: list[str], source: Path, target: Path) -> Path:
    """Compile `source` into `target`, which appears whole or not at all."""
    with appearing(target, mode=0o700) as unfinished:
        _run([*command, *FLAGS, str(source), "-o", str(unfinished)])
    return target


def _key(command: list[str], source: Path, version: str) -> str:
    """Return a hash of all that the library depends on."""
    parts = [source.read_bytes(), *(text.encode() for text in (*FLAGS, *command, version, _cpu()))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _cpu() -> str:
    """Return the CPU's architecture and, where the system tells, the instruction sets that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
    return f"{platform.machine()} {flags}"


def _run(command: list[str]) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S)
    return done.stdout


def _complaint(text: str | None) -> str:
    """Return the first line of a compiler's output that names an error, else the last line."""
    lines = (text or "").strip().splitlines()
    return next((line for line in lines if "error" in line), lines[-1] if lines else "")
