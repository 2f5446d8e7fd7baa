"""Calibration: derives rates from several measurements, using what the majority of them agree on.

That discards a disturbed measurement, and a first one taken on a cold machine whose libraries are not loaded yet. If no
majority agrees and others are using the machine, calibration fails; if nobody else is seen, the rates name what was
unsteady.
"""

import gc
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from ...runtime.distributed.ranks import ALONE, Ranks
from ...runtime.isa.errors import GeminiError
from ...runtime.isa.moments import Moments, update_bytes
from .measure import Bench, Effort, Measurements
from .others import HostWatch, used_by_others
from .presets import NETWORK_LATENCY_S, card_named, preset
from .rates import Products, Rates, Updates, slowest

SPREAD = 1.15
"""Largest ratio between measurements of the same thing that count as agreeing."""

SPREADS: Mapping[str, float] = {
    "launch_s": 1.5, "kernel_s": 1.3, "network_latency_s": 1.5, "both_bytes_per_s": 1.3, "host_params_per_s": 1.3,
    "host_beside_params_per_s": 1.3, "host_bf16_params_per_s": 1.3, "host_int8_params_per_s": 1.3,
    "torch_params_per_s": 1.5,
}  # fmt: skip
"""The same for what is less steady: times of single microseconds, and host memory, which is placed anew each time."""

ATTEMPTS = 5

THOROUGH = Effort(
    needed_bytes=3 * 2**30, sizes=(512, 1024, 2048, 4096, 8192), sustained_s=2.0, each_s=0.2, copied_bytes=2**30,
    operator_bytes=128 * 2**20, host_params=64 * 10**6, device_params=32 * 10**6, updates_on_device=True,
)  # fmt: skip
AUTOMATIC = Effort(
    needed_bytes=2**30, sizes=(512, 1024, 2048, 4096), sustained_s=0.08, each_s=0.02, copied_bytes=256 * 2**20,
    operator_bytes=128 * 2**20, host_params=48 * 10**6, device_params=0, updates_on_device=False,
)  # fmt: skip

Measure = Callable[[torch.device, Effort, Ranks], Measurements]


class BusyError(GeminiError):
    """The machine cannot be measured now; the message says what else it is doing."""


def calibrate(device: torch.device, effort: Effort, ranks: Ranks = ALONE, measure: Measure | None = None) -> Rates:
    """Measure a GPU and its host, at least twice and until most measurements agree.

    All `ranks` measure at the same time and return the slowest one's rates. Raises BusyError if others use the machine.
    """
    others = used_by_others(device, effort.needed_bytes)
    ranks.raise_alike(None if others is None else BusyError(others))
    watch, found, unsteady = HostWatch(), list[Measurements](), list[str]()
    while len(found) < 2 or (unsteady and len(found) < ATTEMPTS):
        found.append((measure or measured)(device, effort, ranks))
        unsteady = sorted({name for names in ranks.gather(differences(found)) for name in names})
    others = (used_by_others(device, 0) or watch.others(ranks.on_this_host)) if unsteady else None
    ranks.raise_alike(None if others is None else BusyError(_refusal(unsteady, others)))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    note = f" ({', '.join(unsteady)} unsteady)" if unsteady else ""
    rates = rates_from(settled(found), effort, name)
    return slowest(ranks.gather(replace(rates, name=rates.name + note)))


def _refusal(unsteady: list[str], others: str) -> str:
    return (
        f"measured {ATTEMPTS} times, {', '.join(unsteady)} came out differently every time, and {others}; stop the "
        "other processes on this machine"
    )


def measured(device: torch.device, effort: Effort, ranks: Ranks) -> Measurements:
    """Takes one measurement and leaves nothing on the device. Raises BusyError if memory is too short for it."""
    try:
        return Bench(device, effort, ranks).measure()
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise BusyError(f"there is not enough free memory to measure: {error}") from error
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def differences(found: list[Measurements]) -> list[str]:
    """The fields of Measurements on which most measurements disagree."""

    def apart(name: str) -> bool:
        rows = zip(*(_numbers(getattr(one, name)) for one in found), strict=True)
        return any(group[-1] > SPREADS.get(name, SPREAD) * group[0] for group in map(_majority, rows))

    return [field.name for field in fields(Measurements) if apart(field.name)]


def settled(found: list[Measurements]) -> Measurements:
    """The median of the majority of measurements that are closest to one another, for each field."""
    return Measurements(
        **{field.name: _settled([getattr(one, field.name) for one in found]) for field in fields(Measurements)}
    )


def _settled(values: list[Any]) -> Any:
    if isinstance(values[0], tuple):
        return tuple(_settled(list(each)) for each in zip(*values, strict=True))
    return None if values[0] is None else statistics.median(_majority(values))


def _majority(values: Iterable[float]) -> list[float]:
    """The smallest majority of the values that are closest together, in ascending order."""
    ordered = sorted(values)
    size = len(ordered) // 2 + 1
    groups = (ordered[i : i + size] for i in range(len(ordered) - size + 1))
    return min(groups, key=lambda group: group[-1] / group[0])


def _numbers(value: object) -> list[float]:
    if isinstance(value, tuple):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, float) else []


def rates_from(found: Measurements, effort: Effort, gpu: str) -> Rates:
    """Rates from a measurement; what was not measured is taken from the card's preset or derived from the rest."""
    known = card_named(gpu)
    card = preset(known) if known else None
    network = card.network_bytes_per_s if card else found.both_bytes_per_s / 2  # copies through the host
    bf16, fp16, fp32 = (_products(effort, seconds, found.kernel_s) for seconds in found.products_s)
    return Rates(
        name=f"{gpu}, measured",
        bf16=bf16,
        fp16=fp16,
        fp32=fp32,
        memory_bytes_per_s=found.memory_bytes_per_s,
        kernel_s=found.kernel_s,
        launch_s=found.launch_s,
        up_bytes_per_s=found.up_bytes_per_s,
        down_bytes_per_s=found.down_bytes_per_s,
        both_bytes_per_s=found.both_bytes_per_s,
        host_params_per_s=found.host_params_per_s,
        passing_bytes_per_s=_passing(found),
        torch_params_per_s=found.torch_params_per_s,
        device_params_per_s=found.device_params_per_s or found.memory_bytes_per_s / update_bytes("exact"),
        network_bytes_per_s=found.network_bytes_per_s or network,
        network_latency_s=found.network_latency_s or NETWORK_LATENCY_S,
        overlaps=True,
        bf16_moments=_updates(found, "bf16", found.host_bf16_params_per_s, found.device_bf16_params_per_s),
        int8_moments=_updates(found, "int8", found.host_int8_params_per_s, found.device_int8_params_per_s),
    )


def _updates(found: Measurements, moments: Moments, host: float | None, device: float | None) -> Updates | None:
    """Update rates with moments in this format; None if the host has no kernel for it."""
    by_bytes = found.memory_bytes_per_s / update_bytes(moments)
    return None if host is None else Updates(host, device or by_bytes)


def _products(effort: Effort, seconds: tuple[float, ...], kernel_s: float) -> Products:
    """Rates of matmuls by size, without `kernel_s`, the fixed cost of every operator, which is counted separately."""
    flop = [2.0 * size**3 for size in effort.sizes]
    alone_s = [max(each_s - kernel_s, each_s / 2) for each_s in seconds]
    return Products(tuple(flop), tuple(each / each_s for each, each_s in zip(flop, alone_s, strict=True)))


def _passing(found: Measurements) -> float:
    """Bytes per second of the host's updates that copies cost: beside copies in both directions a share (`lost`) of
    their time."""
    lost = max(1 - found.host_beside_params_per_s / found.host_params_per_s, 0.01)
    return 2 * found.both_bytes_per_s / lost
