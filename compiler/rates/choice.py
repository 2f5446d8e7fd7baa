"""Chooses the rates that a model is planned with: those asked for, those measured on this machine, or a preset's."""

import sys
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch

from ...runtime.isa.errors import check_path, did_you_mean, wrong_argument
from .calibrate import AUTOMATIC, BusyError, calibrate
from .identity import Identity
from .kept import MachineRates, keep, kept_for, read
from .presets import CARDS, card_named, preset
from .rates import ARENA, Rates

EXPECTED = f"the name of a card ({', '.join(CARDS)}), the path of a file written by geminifx calibrate, or Rates"

OTHER_CARD = "h100-sxm"
"""The preset used for unknown cards; the plan says so."""

Given = str | PathLike[str] | Rates | None


def given_rates(given: Given) -> Rates | None:
    """The rates that `rates=` names, or None if it is None. Raises ArgumentError for anything that names no rates."""
    if given is None or isinstance(given, Rates):
        return given
    check_path("rates", given, EXPECTED)
    if str(given) in CARDS:
        return preset(str(given))
    if not Path(given).exists() and Path(given).suffix != ".json":
        raise wrong_argument("rates", str(given), EXPECTED, did_you_mean(str(given), CARDS))
    return read(Path(given)).rates


def rates_of(device: torch.device, given: Rates | None, processes: int, room_bytes: int) -> Rates:
    """The rates to plan with on `device`, when each of `processes` processes of this machine has such a device.

    These are the rates kept by `geminifx calibrate`, or the preset of a known card. An unknown card is measured in
    about a second, and the result kept; one line on stderr tells of it. It is not measured if that would take more than
    `room_bytes` of the device, or with several processes, which would measure at the same time.
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
    """The preset for what the driver calls `gpu`; for an unknown card, a stand-in whose name says so."""
    name = card_named(gpu)
    if name is not None:
        return preset(name)
    stand_in = preset(OTHER_CARD)
    return replace(stand_in, name=f"{stand_in.name} ({gpu} is unknown; geminifx calibrate measures it)")


def _measured(device: torch.device, machine: Identity, tell: Callable[[str], None]) -> Rates:
    try:
        rates = calibrate(device, AUTOMATIC)
    except BusyError as busy:
        rates = known_card(machine.gpu)
        tell(f"geminifx: planning with the rates of {rates.name}, because this machine cannot be measured now: {busy}")
        return rates
    when = "for this run: there is no cache to keep it in" if keep(MachineRates(machine, rates)) is None else "once"
    tell(f"geminifx: measured {machine.gpu} and its host, {when}; geminifx calibrate measures more precisely")
    return rates


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
