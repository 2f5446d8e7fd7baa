"""At which rates a model is planned: those that were asked for, those measured of this machine, or a preset's."""

import sys
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch

from ...runtime.isa.errors import check_path, did_you_mean, wrong_argument
from .calibrate import AUTOMATIC, BusyError, calibrate
from .identity import Identity
from .kept import Kept, keep, kept_for, read
from .presets import CARDS, card_named, preset
from .rates import ARENA, Rates

EXPECTED = f"the name of a card ({', '.join(CARDS)}), the path of a file that geminifx calibrate wrote, or Rates"

OTHER_CARD = "h100-sxm"
"""What stands in for a card that nothing is known of, and says so."""

Given = str | PathLike[str] | Rates | None


def given_rates(given: Given) -> Rates | None:
    """The rates that `rates=` names, None where it names none. Raises ArgumentError where it is something else."""
    if given is None or isinstance(given, Rates):
        return given
    check_path("rates", given, EXPECTED)
    if str(given) in CARDS:
        return preset(str(given))
    if not Path(given).exists() and Path(given).suffix != ".json":
        raise wrong_argument("rates", str(given), EXPECTED, did_you_mean(str(given), CARDS))
    return read(Path(given)).rates


def rates_of(device: torch.device, given: Rates | None, processes: int, room_bytes: int) -> Rates:
    """The rates to plan with on `device`, which is one for each of so many `processes` of this machine.

    Those that `geminifx calibrate` kept, or the preset of a known card. Of another card they are measured, in about a
    second, and kept; one line tells of it. They are not where that would take more than `room_bytes` of the device, or
    several processes were to do so at once.
    """
    if given is not None:
        return given
    if device.type != "cuda":
        return ARENA
    machine = Identity.of(device, processes)
    known = kept_for(machine)
    if known is not None:
        return known
    if card_named(machine.gpu) or processes > 1 or room_bytes < AUTOMATIC.needed_bytes:
        return known_card(machine.gpu)
    return _measured(device, machine, _tell)


def known_card(gpu: str) -> Rates:
    """A preset for what the driver calls `gpu`; another card's says so in its name."""
    name = card_named(gpu)
    if name is not None:
        return preset(name)
    stand_in = preset(OTHER_CARD)
    return replace(stand_in, name=f"{stand_in.name}, since {gpu} is not known; geminifx calibrate measures it")


def _measured(device: torch.device, machine: Identity, tell: Callable[[str], None]) -> Rates:
    try:
        rates = calibrate(device, AUTOMATIC)
    except BusyError as busy:
        rates = known_card(machine.gpu)
        tell(f"geminifx: planning at the rates of {rates.name}, for this machine cannot be measured now: {busy}")
        return rates
    when = "for this run: there is no cache to keep it in" if keep(Kept(machine, rates)) is None else "once"
    tell(f"geminifx: measured {machine.gpu} and its host, {when}; geminifx calibrate does it more exactly")
    return rates


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
