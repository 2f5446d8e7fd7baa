"""Measured rates in files: one per machine in the user's cache, or wherever the user asks for."""

import hashlib
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

from ...passes.program.strict_json import Text, strict_converter
from ...runtime.isa.errors import ArgumentError
from ...runtime.kernels.user_cache import appearing, cache_directory, is_private, usable_cache
from .identity import Identity
from .rates import Rates

TEXT = Text(
    of="file of rates", version=5, writer="geminifx calibrate",
    remedy="write a new one with geminifx calibrate --output FILE",
)  # fmt: skip


@dataclass(frozen=True)
class MachineRates:
    """Rates, and the machine they were measured on."""

    machine: Identity
    rates: Rates


def write(kept: MachineRates, path: Path) -> None:
    """Writes the file atomically. Raises OSError if it cannot be written."""
    with appearing(path, mode=0o600) as unfinished:
        unfinished.write_text(TEXT.write(kept, strict_converter()) + "\n", encoding="utf-8")


def read(path: Path) -> MachineRates:
    """Raises ArgumentError, saying what is wrong, if the file is not one that `write` wrote."""
    try:
        return TEXT.read(path.read_text(encoding="utf-8"), MachineRates, strict_converter())
    except (OSError, ValueError) as error:
        raise ArgumentError(f"rates={str(path)!r} cannot be read: {error}") from error


def keep(kept: MachineRates) -> Path | None:
    """Keeps rates for later runs of this user. Returns the file, or None if no cache can be used."""
    folder = usable_cache()
    if folder is None:
        return None
    path = folder / _name(kept.machine)
    try:
        write(kept, path)
    except OSError:  # for example a full disk
        return None
    return path


def kept_for(machine: Identity) -> Rates | None:
    """The rates measured on a machine before; None if there are none, the file is damaged or may be another user's."""
    path = cache_directory() / _name(machine)
    with suppress(OSError, ArgumentError):
        if is_private(path) and is_private(path.parent):
            found = read(path)
            return found.rates if found.machine == machine else None
    return None


def _name(machine: Identity) -> str:
    key = hashlib.sha256("\0".join(map(str, astuple(machine))).encode()).hexdigest()[:24]
    return f"rates-{key}.json"
