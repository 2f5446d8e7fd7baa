"""Calibration: rates from several measurements, by what most of them agree on.

One that something disturbs, or the first one, of a machine that is cold and whose libraries are not loaded yet, is not
heard then. Where no majority agrees and others are seen to use the machine, nothing is measured; where nobody is seen,
the rates say of what they are unsteady.
"""

import gc
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from ...runtime.distributed.ranks import ALONE, Ranks
from ...runtime.isa.errors import GeminiError
from ...runtime.isa.formats import OwnFormat
from ...runtime.isa.homes import Home, Where
from ...runtime.isa.layout import ChunkLayout
from ...runtime.isa.moments import Moments, update_bytes
from .measure import Bench, Effort, Measured
from .others import HostWatch, used_by_others
from .presets import NETWORK_LATENCY_S, card_named, preset
from .rates import Products, Rates, Updates, slowest

SPREAD = 1.15
"""How far measurements of one thing that agree may be apart."""

SPREADS: Mapping[str, float] = {
    "launch_s": 1.5, "kernel_s": 1.3, "network_latency_s": 1.5, "host_alone_params_per_s": 1.3,
    "host_params_per_s": 1.3, "host_bf16_params_per_s": 1.3, "host_int8_params_per_s": 1.3, "torch_params_per_s": 1.5,
}  # fmt: skip
"""The same of what is never as steady: single microseconds, and memory of the host that lies elsewhere each time."""

ATTEMPTS = 5

THOROUGH = Effort(
    needed_bytes=3 * 2**30, sizes=(512, 1024, 2048, 4096, 8192), sustained_s=2.0, each_s=0.2, copied_bytes=256 * 2**20,
    operator_bytes=128 * 2**20, host_params=64 * 10**6, device_params=32 * 10**6, updates_on_device=True,
)  # fmt: skip
AUTOMATIC = Effort(
    needed_bytes=2**30, sizes=(512, 1024, 2048, 4096), sustained_s=0.08, each_s=0.02, copied_bytes=64 * 2**20,
    operator_bytes=128 * 2**20, host_params=16 * 10**6, device_params=0, updates_on_device=False,
)  # fmt: skip

Measure = Callable[[torch.device, Effort, Ranks], Measured]


class BusyError(GeminiError):
    """A machine cannot be measured now: says what else is going on."""


def calibrate(device: torch.device, effort: Effort, ranks: Ranks = ALONE, measure: Measure | None = None) -> Rates:
    """Measure a GPU and its host, twice or until most measurements agree; of several processes all do so at once, and
    the slowest one's rates are everybody's. Raises BusyError where others use the machine."""
    others = used_by_others(device, effort.needed_bytes)
    ranks.raise_alike(None if others is None else BusyError(others))
    watch, found, unsteady = HostWatch(), list[Measured](), list[str]()
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
        f"measured {ATTEMPTS} times, {', '.join(unsteady)} never came out alike, and {others}; end what else runs here"
    )


def measured(device: torch.device, effort: Effort, ranks: Ranks) -> Measured:
    """One measurement, of which nothing is left on the device. Raises BusyError where there is no room for it."""
    try:
        return Bench(device, effort, ranks).measure()
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise BusyError(f"there is no room to measure in: {error}") from error
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def differences(found: list[Measured]) -> list[str]:
    """What most measurements do not agree on."""

    def apart(name: str) -> bool:
        rows = zip(*(_numbers(getattr(one, name)) for one in found), strict=True)
        return any(group[-1] > SPREADS.get(name, SPREAD) * group[0] for group in map(_majority, rows))

    return [field.name for field in fields(Measured) if apart(field.name)]


def settled(found: list[Measured]) -> Measured:
    """What most measurements agree on, or come closest to that."""
    return Measured(**{field.name: _settled([getattr(one, field.name) for one in found]) for field in fields(Measured)})


def _settled(values: list[Any]) -> Any:
    if isinstance(values[0], tuple):
        return tuple(_settled(list(each)) for each in zip(*values, strict=True))
    return None if values[0] is None else statistics.median(_majority(values))


def _majority(values: Iterable[float]) -> list[float]:
    """The more than half of the values that are closest together, smallest first."""
    ordered = sorted(values)
    size = len(ordered) // 2 + 1
    groups = (ordered[i : i + size] for i in range(len(ordered) - size + 1))
    return min(groups, key=lambda group: group[-1] / group[0])


def _numbers(value: object) -> list[float]:
    if isinstance(value, tuple):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, float) else []


def rates_from(found: Measured, effort: Effort, gpu: str) -> Rates:
    """Rates by a measurement; what was not measured is taken from the card's preset, or follows from the rest."""
    known = card_named(gpu)
    card = preset(known) if known else None
    network = card.network_bytes_per_s if card else found.both_bytes_per_s / 2  # through the host
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
        passing_params_per_s=_passing(found),
        torch_params_per_s=found.torch_params_per_s,
        device_params_per_s=found.device_params_per_s or found.memory_bytes_per_s / update_bytes("exact"),
        network_bytes_per_s=found.network_bytes_per_s or network,
        network_latency_s=found.network_latency_s or NETWORK_LATENCY_S,
        overlaps=True,
        bf16_moments=_updates(found, "bf16", found.host_bf16_params_per_s, found.device_bf16_params_per_s),
        int8_moments=_updates(found, "int8", found.host_int8_params_per_s, found.device_int8_params_per_s),
    )


def _updates(found: Measured, moments: Moments, host: float | None, device: float | None) -> Updates | None:
    """With moments that are stored so; None where the host has no kernel for them."""
    by_bytes = found.memory_bytes_per_s / update_bytes(moments)
    return None if host is None else Updates(host, device or by_bytes)


def _products(effort: Effort, seconds: tuple[float, ...], kernel_s: float) -> Products:
    """What begins and ends every operator is counted apart."""
    flop = [2.0 * size**3 for size in effort.sizes]
    alone_s = [max(each_s - kernel_s, each_s / 2) for each_s in seconds]
    return Products(tuple(flop), tuple(each / each_s for each, each_s in zip(flop, alone_s, strict=True)))


def _passing(found: Measured) -> float:
    """What passes costs the worker the share of its time that copies cost its updates."""
    lost = max(1 - found.host_params_per_s / found.host_alone_params_per_s, 0.01)
    state = ChunkLayout(0, 1, torch.bfloat16, torch.float32, trainable=True, slots=())
    travelling_bytes = sum(OwnFormat().travelling_bytes(state, Home(Where.STREAMED, resident=True)))
    return 2 * found.both_bytes_per_s / (lost * travelling_bytes)
