"""Calibration: rates from two measurements in a row that agree, of a machine that does nothing else."""

import gc
from collections.abc import Callable
from dataclasses import fields

import torch

from ...runtime.distributed.ranks import ALONE, Ranks
from ...runtime.isa.errors import GeminiError
from ...runtime.isa.formats import OwnFormat
from ...runtime.isa.homes import Home, Where
from ...runtime.isa.layout import ChunkLayout
from ...runtime.isa.units import format_bytes
from .measure import Bench, Effort, Measured
from .presets import NETWORK_LATENCY_S, card_named, preset
from .rates import UPDATE_BYTES, Products, Rates, slowest

SPREAD = 1.15
"""How far two measurements of one thing may be apart."""

ATTEMPTS = 3
"""The first one finds a machine that is cold, whose libraries are not loaded yet."""

OTHERS_BYTES = 2 * 2**30
"""Device memory that nobody of this process holds, and that is more than its driver context."""

BUSY_PERCENT = 20

THOROUGH = Effort(
    needed_bytes=3 * 2**30, sizes=(512, 1024, 2048, 4096, 8192), sustained_s=2.5, each_s=0.3, copied_bytes=256 * 2**20,
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
    """Measure a GPU and its host until two measurements in a row agree; of several processes all do so at once, and the
    slowest one's rates are everybody's. Raises BusyError where others use it, or no two agree."""
    others = used_by_others(device, effort)
    ranks.raise_alike(None if others is None else BusyError(others))
    latest = (measure or measured)(device, effort, ranks)
    for _ in range(ATTEMPTS - 1):
        previous, latest = latest, (measure or measured)(device, effort, ranks)
        apart = sorted({name for names in ranks.gather(differences(previous, latest)) for name in names})
        if not apart:
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
            return slowest(ranks.gather(rates_from(latest, effort, name)))
    far = f"{', '.join(apart)} are still more than {SPREAD - 1:.0%} apart"
    raise BusyError(f"measured {ATTEMPTS} times, {far}; end what else runs here")


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


def used_by_others(device: torch.device, effort: Effort) -> str | None:
    """What others do with a GPU, if they do."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    theirs = total - free - torch.cuda.memory_reserved(device)
    if theirs > OTHERS_BYTES:
        return f"{format_bytes(theirs)} of the GPU's memory are held by others"
    if free < effort.needed_bytes:
        return f"{format_bytes(free)} of the GPU's memory are free, {format_bytes(effort.needed_bytes)} are needed"
    try:
        busy = torch.cuda.utilization(device)
    except Exception:  # the library that tells is not installed, or may not ask, each of which is another error
        return None
    return f"the GPU is {busy} % busy already" if busy > BUSY_PERCENT else None


def differences(first: Measured, second: Measured) -> list[str]:
    """What of two measurements is too far apart."""

    def apart(name: str) -> bool:
        pairs = zip(_numbers(getattr(first, name)), _numbers(getattr(second, name)), strict=True)
        return any(max(pair) > SPREAD * min(pair) for pair in pairs)

    return [field.name for field in fields(Measured) if apart(field.name)]


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
        device_params_per_s=found.device_params_per_s or found.memory_bytes_per_s / UPDATE_BYTES,
        network_bytes_per_s=found.network_bytes_per_s or network,
        network_latency_s=found.network_latency_s or NETWORK_LATENCY_S,
        overlaps=True,
    )


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
