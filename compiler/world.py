"""How processes share the work where nobody has said: chosen before anything is made, and alike on all of them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import distributed as dist
from torch import nn

from ..models.adapters import blocks, example_inputs
from ..runtime.distributed.ranks import ALONE, Ranks
from ..runtime.isa.errors import ArgumentError, BudgetError, CaptureError
from ..runtime.isa.mesh import Axis, Mesh
from ..runtime.isa.units import parse_bytes
from .capture.microbatches import Arguments, examples
from .capture.trace import CaptureRequest
from .memory.device import HOST_SHARE, Device, gpu_limits, with_allocator
from .memory.host_memory import host_memory
from .options import DTYPES, Options
from .planner.memory import Limits
from .planner.world.model import Model, resized
from .planner.world.search import WorldPlan, choose
from .planner.world.ways import Home, Space
from .planner.world.world import SHARES, World
from .programs.forward import computing_loss
from .rates.choice import rates_of
from .rates.clusters import one_node

UNKNOWN_INPUTS = (
    "each process has its part of the batch: nothing is known of the model's inputs to choose another way by"
)
FROZEN = "each process has its part of the batch: another way is chosen only where frozen= keeps no weights as codes"
HOMES: dict[str, tuple[Home, ...]] = {"auto": ("device", "host"), "cuda": ("device",), "cpu": ("host",)}


@dataclass(frozen=True)
class Settled:
    """Options in which nothing is left open, the plan for the world where one was made, what plans tell of it, one
    process's batch by which it was made, and the processes that go by it, as far as they are known before."""

    options: Options
    world: WorldPlan | None = None
    notes: tuple[str, ...] = ()
    arguments: Arguments = ((), {})
    ranks: Ranks = ALONE

    @classmethod
    def by(cls, world: WorldPlan, options: Options, arguments: Arguments, ranks: Ranks) -> "Settled":
        return cls(_with(options, world, arguments), world, world.lines(), arguments, ranks)

    @property
    def guess(self) -> Mapping[str, Any] | None:
        """A group's batch, made from the model's configuration, where nothing else told how to share the work."""
        if self.world is None or self.options.example_inputs is not None:
            return None
        return resized(self.arguments, self.world.examples_per_group)[1]


def settle(model: nn.Module, options: Options) -> Settled:
    """Choose how processes share the work where `options` leave that open. All ranks call it, and choose the same.

    Raises:
        ArgumentError: the cluster is another than the one that was launched, or nothing is known of the model's inputs.
        BudgetError: there is no way that fits the memory.
    """
    launched = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    _check_cluster(options, launched)
    size = options.world or launched
    if not options.leaves_the_world_open or size == 1 or launched not in (1, size):
        return Settled(replace(options, parallel=None) if options.parallel == "auto" else options)
    if options.frozen is not None:
        if options.parallel == "auto":
            raise ArgumentError(
                f"parallel='auto' does not know what weights take that are kept as {options.frozen} codes; say how the "
                "processes share the work, such as parallel={'data': 8}"
            )
        return Settled(options, notes=(FROZEN,))
    arguments = _arguments(model, options)
    if arguments is None or not examples(arguments):
        if options.parallel == "auto":
            raise ArgumentError(
                "parallel='auto' chooses by a training step; pass one process's batch as example_inputs="
            )
        return Settled(options, notes=(UNKNOWN_INPUTS,))
    try:
        ranks = _ranks(Device.choose(options), options, launched)
        return Settled.by(choose_world(model, options, arguments, size, ranks), options, arguments, ranks)
    except CaptureError as error:  # there may be no training step at all
        if options.parallel == "auto":
            raise
        return Settled(options, notes=(f"each process has its part of the batch, no other way was weighed: {error}",))


def settle_otherwise(settled: Settled, asked: Options, refusal: Exception) -> Settled:
    """The next best way in place of one whose whole program is `refusal`ed, the same for all processes. Raises that
    where there is no other."""
    if settled.world is None:
        raise refusal
    of_memory = isinstance(refusal, BudgetError) and refusal.tier != "host"
    needed_bytes = getattr(refusal, "smallest_bytes", None) if of_memory else None
    world = settled.world.without_chosen(
        str(refusal).partition(";")[0], *max(settled.ranks.gather((of_memory, needed_bytes or 0)))
    )
    if world is None:
        raise refusal
    return Settled.by(world, asked, settled.arguments, settled.ranks)


def choose_world(
    model: nn.Module, options: Options, arguments: Arguments, size: int, ranks: Ranks = ALONE
) -> WorldPlan:
    """The plan for `size` processes, each of which would pass a batch such as `arguments` if all had their own."""
    device = Device.choose(options)
    limits = _limits(device, options, size, ranks).agreed(ranks)
    cluster = options.cluster or one_node(size, limits.rates)
    precision = options.precision or ("bf16" if device.is_cuda else "")
    with computing_loss(model, options.loss_fn):
        measured = Model.of(model, arguments, CaptureRequest(DTYPES.get(precision), options.outputs))
    names, count = blocks(model), examples(arguments) * size
    heads = 0 if options.fuse_loss is True else measured.heads  # a loss in pieces is for whole tensors
    world = World(
        cluster, limits.rates, count, limits.device_bytes, limits.host_bytes, options.fuse_loss is not False,
        options.reduce_dtype, _shares(options.recompute, len(names)), options.optimizer_state_bytes,
        limits.reserve_bytes,
    )  # fmt: skip
    asked = None if options.microbatches == "auto" else options.microbatches
    stages = len(names) if measured.makes_its_loss else 0
    found = choose(measured, world, Space(size, count, stages, heads, asked, HOMES[options.placement]))
    ranks.check_alike("how processes share the work, as planned,", f"{count} {found.chosen.way}")
    return found


def _check_cluster(options: Options, launched: int) -> None:
    """Raises ArgumentError for a cluster that is not the one that was launched."""
    cluster, on_this_host = options.cluster, os.environ.get("LOCAL_WORLD_SIZE")  # torchrun's; others may tell nothing
    if cluster is None or launched == 1:
        return
    if cluster.size == launched and on_this_host in (None, str(cluster.devices)):
        return
    here = "" if on_this_host is None else f", {on_this_host} on this machine (LOCAL_WORLD_SIZE)"
    raise ArgumentError(
        f"the cluster has {cluster.nodes} x {cluster.devices} devices, but {launched} processes were launched{here}; "
        "expected one for each device: describe the cluster that there is"
    )


def _arguments(model: nn.Module, options: Options) -> Arguments | None:
    """One process's batch: as it was given, or made from the model's configuration."""
    made = example_inputs(model) if options.example_inputs is None else None
    return _given(options) if made is None else ((), dict(made))


def _given(options: Options) -> Arguments | None:
    given = options.example_inputs
    if given is None:
        return None
    return ((), dict(given)) if isinstance(given, Mapping) else (tuple(given), {})


def _ranks(device: Device, options: Options, launched: int) -> Ranks:
    """The processes as far as they are known yet: so many of them."""
    axes = (Axis("data", launched, "data"),) if launched > 1 else ()
    return Ranks.of(lambda count: Mesh(axes), device.torch_device, options.reduce_dtype, options.timeout_s)


def _limits(device: Device, options: Options, size: int, ranks: Ranks) -> Limits:
    """What each process may take: of the cluster's devices and hosts where one is described, else of this one's."""
    host_bytes = _host_bytes(options, size, ranks)
    rates = rates_of(device.torch_device, options.rates, size, 0)
    if not device.is_cuda:
        budget = options.device_budget
        device_bytes = None if budget is None else parse_bytes(budget, of=device.total_bytes())
        return Limits(device_bytes, 0, host_bytes, rates)
    if options.cluster is None or options.cluster.rates is None or ranks.together:
        return with_allocator(_device_bytes(device, options), device.memory.reserve_bytes, host_bytes, rates)
    if options.device_budget is None:
        raise ArgumentError(
            f"the cluster is {options.cluster}, whose devices have a memory that is not known here: say "
            "device_budget=, what may be taken of each"
        )
    return gpu_limits(parse_bytes(options.device_budget, of=device.total_bytes()), host_bytes, rates)


def _device_bytes(device: Device, options: Options) -> int:
    """Of each GPU, which are all such as this one."""
    if options.device_budget is None:
        return device.memory.available_bytes
    return min(parse_bytes(options.device_budget, of=device.total_bytes()), device.total_bytes())


def _host_bytes(options: Options, size: int, ranks: Ranks) -> int:
    cluster, (total, free) = options.cluster, host_memory()
    here = ranks.on_this_host if ranks.together else size
    host_bytes = int(free * HOST_SHARE) if ranks.together else int(free * HOST_SHARE) // here
    if options.host_budget is not None:
        host_bytes = parse_bytes(options.host_budget, of=total)
    elif cluster is not None and cluster.host_bytes is not None:
        host_bytes = int(cluster.host_bytes * HOST_SHARE) // (1 if ranks.together else cluster.devices)
    return host_bytes


def _shares(recompute: str | tuple[str, ...], blocks: int) -> tuple[float, ...]:
    """Of the blocks, that may be computed again: those that were named, or any."""
    if isinstance(recompute, str):
        return {"auto": SHARES, "none": (0.0,), "all": (1.0,)}[recompute]
    return (len(recompute) / max(blocks, 1),)


def _with(options: Options, world: WorldPlan, arguments: Arguments) -> Options:
    """The options as if the chosen way had been asked for."""
    changes = world.chosen.way.options()
    if options.example_inputs is not None and world.examples_per_group != examples(arguments):
        args, kwargs = resized(arguments, world.examples_per_group)
        changes["example_inputs"] = kwargs or args
    return replace(options, **changes)
