"""Building a C++ source of this package on first use and keeping the library in the user's cache.

The file's name holds a hash of everything the library depends on: source, flags, compiler and CPU. It is written
beside its place and renamed, so processes that build at once each end with a whole library.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..isa.errors import GeminiError

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-w")
"""No -march: each function names its own instruction set. No contraction: bits must not depend on the compiler."""

_BUILD_TIMEOUT_S = 300


class KernelBuildError(GeminiError):
    """No compiler could build or load the source; says what each one answered and how to go on."""


def load(source: Path) -> ctypes.CDLL:
    """Return the library built from `source`, from the cache where it is there already.

    Compilers are tried in turn: CXX, g++, clang++. Where the cache cannot be written, the library is built for
    this process alone.

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


def cache_directory() -> Path:
    """Return the folder for built libraries: `geminifx` in XDG_CACHE_HOME or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "geminifx"


def _load_with(command: list[str], source: Path) -> ctypes.CDLL:
    """Return the library as one compiler builds it."""
    version = _run([*command, "--version"])
    name = f"{source.stem}-{_key(command, source, version)}.so"
    directory = cache_directory()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(directory, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        with tempfile.TemporaryDirectory() as private:  # once loaded, the library needs its file no more
            return ctypes.CDLL(str(_build(command, source, Path(private) / name)))
    target = directory / name
    if target.exists():
        try:
            return ctypes.CDLL(str(target))
        except OSError:  # damaged, for example by a full disk: build it again
            target.unlink(missing_ok=True)
    return ctypes.CDLL(str(_build(command, source, target)))


def _build(command: list[str], source: Path, target: Path) -> Path:
    """Compile `source` into `target`, which appears whole or not at all."""
    handle, unfinished = tempfile.mkstemp(prefix=target.stem, suffix=".tmp", dir=target.parent)
    os.close(handle)
    try:
        _run([*command, *FLAGS, str(source), "-o", unfinished])
        os.replace(unfinished, target)
    finally:
        Path(unfinished).unlink(missing_ok=True)
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
