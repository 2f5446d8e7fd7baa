"""Chooses how processes share the work if the user did not say, on all of them alike, before anything is made."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..models.adapters import blocks, example_inputs
from ..runtime.distributed.meeting import launched
from ..runtime.distributed.ranks import ALONE, Ranks
from ..runtime.isa.errors import ArgumentError, BudgetError, CaptureError
from ..runtime.isa.mesh import Axis, Mesh
from .capture.microbatches import Arguments, as_arguments, examples
from .capture.trace import CaptureRequest
from .memory.device import Device, gpu_limits, host_share, plans_elsewhere, with_allocator
from .options import Options
from .planner.memory import Limits
from .planner.world.model import Model, resized
from .planner.world.search import WorldPlan, choose
from .planner.world.ways import Home, Space
from .planner.world.world import SHARES, World
from .programs.forward import computing_loss
from .rates.choice import rates_of
from .rates.clusters import one_node
from .weights.quantized_weights import quantized_weights

UNKNOWN_INPUTS = (
    "each process has its part of the batch: the model's inputs are unknown, so no other way was considered"
)
FROZEN = "each process has its part of the batch: other ways are considered only for models without quantised weights"
HOMES: dict[str, tuple[Home, ...]] = {"auto": ("device", "host"), "cuda": ("device",), "cpu": ("host",)}


@dataclass(frozen=True)
class Settled:
    """Options with nothing left open, and how they came about.

    Fields:
        options: as if the chosen strategy had been asked for.
        world: the plan for all processes, if one was made; None otherwise.
        notes: what plans report about the choice.
        arguments: the batch of one process, as args and kwargs, that the choice was made for.
        ranks: the processes, as far as they are known before the mesh is.
    """

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
        """The batch of one group of processes, to plan by, if it is made from the model's configuration; None
        otherwise."""
        if self.world is None or self.options.example_inputs is not None:
            return None
        return resized(self.arguments, self.world.examples_per_group)[1]


def settle(model: nn.Module, options: Options) -> Settled:
    """Chooses how processes share the work if `options` leave that open. All ranks call it and choose the same.

    Raises:
        ArgumentError: the cluster is not the one that was launched, or nothing is known of the model's inputs.
        BudgetError: no strategy fits the memory.
    """
    count = launched()
    _check_cluster(options, count)
    size = options.world or count
    if not options.leaves_the_world_open or size == 1 or count not in (1, size):
        return Settled(replace(options, parallel=None) if options.parallel == "auto" else options)
    if options.frozen is not None or quantized_weights(model):
        if options.parallel == "auto":
            raise ArgumentError(
                "parallel='auto' does not know the memory of quantised weights; choose how the processes share the "
                "work, such as parallel={'data': 8}"
            )
        return Settled(options, notes=(FROZEN,))
    arguments = _arguments(model, options)
    if arguments is None or not examples(arguments):
        if options.parallel == "auto":
            raise ArgumentError(
                "parallel='auto' needs a training step to choose by; pass the batch of one process as example_inputs="
            )
        return Settled(options, notes=(UNKNOWN_INPUTS,))
    try:
        ranks = _ranks(Device.choose(options), options, size)
        return Settled.by(choose_world(model, options, arguments, ranks), options, arguments, ranks)
    except CaptureError as error:  # the model may have no training step at all
        if options.parallel == "auto":
            raise
        return Settled(
            options, notes=(f"each process has its part of the batch; no other way was considered: {error}",)
        )


def settle_otherwise(settled: Settled, asked: Options, refusal: Exception) -> Settled:
    """The next best strategy after one whose program met this `refusal`, the same on all processes. Raises the refusal
    if there is no other."""
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


def choose_world(model: nn.Module, options: Options, arguments: Arguments, ranks: Ranks) -> WorldPlan:
    """The plan for these processes, for a global batch of `ranks.size` times the examples of `arguments`."""
    device, size = Device.choose(options), ranks.size
    limits = _limits(device, options, ranks).agreed(ranks)
    cluster = options.cluster or one_node(size, limits.rates)
    with computing_loss(model, options.loss_fn):
        measured = Model.of(model, arguments, CaptureRequest(device.dtype(options), options.outputs))
    names, count = blocks(model), examples(arguments) * size
    heads = 0 if options.fuse_loss is True else measured.heads  # a loss in pieces needs whole tensors
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


def _check_cluster(options: Options, count: int) -> None:
    """Raises ArgumentError if the cluster described is not the one that was launched."""
    cluster, on_this_host = options.cluster, os.environ.get("LOCAL_WORLD_SIZE")  # set by torchrun, not by all launchers
    if cluster is None or count == 1:
        return
    if cluster.size == count and on_this_host in (None, str(cluster.devices)):
        return
    here = "" if on_this_host is None else f", {on_this_host} on this machine (LOCAL_WORLD_SIZE)"
    raise ArgumentError(
        f"the cluster has {cluster.nodes} x {cluster.devices} devices, but {count} processes were launched{here}; "
        "expected one process per device: describe the cluster that was launched"
    )


def _arguments(model: nn.Module, options: Options) -> Arguments | None:
    """One process's batch, as given or made from the model's configuration; None if neither is known."""
    given = example_inputs(model) if options.example_inputs is None else options.example_inputs
    return None if given is None else as_arguments(given)


def _ranks(device: Device, options: Options, size: int) -> Ranks:
    """`size` processes, data parallel for now: all that is known of them before a strategy is chosen."""
    mesh = Mesh((Axis("data", size, "data"),))
    return Ranks.of(lambda launched: mesh, device.torch_device, *options.of_ranks)


def _limits(device: Device, options: Options, ranks: Ranks) -> Limits:
    """The limits of each process: on the cluster's devices and hosts if one is described, otherwise on this machine."""
    host_bytes, budget_bytes = host_share(options, ranks), device.budget_bytes(options, ranks)
    rates = rates_of(device.torch_device, options.rates, ranks.on_this_host, 0)
    if not device.is_cuda:
        return Limits(budget_bytes, 0, host_bytes, rates)
    if plans_elsewhere(options, ranks):
        return gpu_limits(budget_bytes, host_bytes, rates)
    device_bytes = device.memory.available_bytes if budget_bytes is None else budget_bytes
    return with_allocator(device_bytes, device.memory.reserve_bytes, host_bytes, rates)


def _shares(recompute: str | tuple[str, ...], blocks: int) -> tuple[float, ...]:
    """The shares of the blocks that may be recomputed: one fixed share if `recompute` says which, otherwise several."""
    if isinstance(recompute, str):
        return {"auto": SHARES, "none": (0.0,), "all": (1.0,)}[recompute]
    return (len(recompute) / max(blocks, 1),)


def _with(options: Options, world: WorldPlan, arguments: Arguments) -> Options:
    """The options, as if the chosen strategy had been asked for."""
    changes = world.chosen.way.options()
    if options.example_inputs is not None and world.examples_per_group != examples(arguments):
        args, kwargs = resized(arguments, world.examples_per_group)
        changes["example_inputs"] = kwargs or args
    return replace(options, **changes)
