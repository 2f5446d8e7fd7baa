"""Session: what stands behind a compiled module. It makes programs when they are needed and runs the machine."""

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..models.adapters import blocks
from ..passes.canonicalize import canonicalize
from ..passes.program.manager import Record
from ..passes.program.plan import Plan
from ..passes.program.program import Program
from ..passes.program.text import print_program
from ..passes.sharding.parameters import whole_parameters
from ..runtime.distributed.local_shards import Parts
from ..runtime.distributed.ranks import Ranks
from ..runtime.distributed.zero import Zero
from ..runtime.executor import Executor
from ..runtime.isa.errors import StateError
from ..runtime.isa.formats import OwnFormat, TorchFormat
from ..runtime.isa.homes import Homes
from ..runtime.isa.instructions import AVERAGE, REDUCE
from ..runtime.isa.precision import cast_dtype, parameter_dtypes
from ..runtime.machine import Machine
from ..runtime.memory.chunks import ChunkStore
from ..runtime.memory.hardware import Hardware
from ..runtime.memory.state_store import StateStore
from ..runtime.memory.stats import Stats
from ..runtime.memory.tiers import MemoryMeter, Tier
from ..runtime.memory.torch_store import TorchStore
from ..runtime.optimizer.own_store import OwnStore
from .capture.arguments import check_shared, leaf_key
from .capture.results import absent_outputs
from .capture.trace import Captured, Request, capture
from .device import Device
from .lowering import Lowering, generate
from .options import DTYPES, Options
from .planner.problem import Planning

PATIENCE_S = 1.0


@dataclass(frozen=True)
class Compiled:
    """One program: for one mode, one set of input shapes."""

    captured: Captured
    plan: Plan
    flat: Program
    program: Program
    records: tuple[Record, ...]
    executor: Executor
    absent: frozenset[int]


class Session:
    """Programs of one model, made once each per mode and input shapes, over one set of chunks."""

    def __init__(self, source: nn.Module, options: Options) -> None:
        self.source = source
        self.options = options
        self.device = Device.choose(options)
        mesh_of = partial(options.degrees.mesh, options.world_size)
        self.ranks = Ranks.of(mesh_of, self.device.torch_device, options.reduce_dtype)
        self.parts = Parts(self.ranks)
        self.limits = self.device.limits(options).agreed(self.ranks)
        self.lowering = Lowering.of(options.passes, options.dump)
        default = "bf16" if self.device.is_cuda else None
        self.dtype = DTYPES.get(options.precision or default or "")
        self.dtypes = parameter_dtypes(source, self.dtype)
        self._parameters = dict(source.named_parameters())
        self.planning = Planning(
            options, self.limits, self.ranks.mesh, self.lowering, self._parameters, self.dtypes, blocks(source)
        )
        device_limit = None if self.device.is_cuda else self.limits.device_bytes
        self.hardware = Hardware(
            self.device.torch_device,
            Tier("device", device_limit, PATIENCE_S * self.ranks.together),
            Tier("host", self.limits.host_bytes),
        )
        self.meter = None if self.device.is_cuda else MemoryMeter(self.hardware.device_tier)
        self.plan: Plan | None = None
        self.machine: Machine | None = None
        self._own: OwnStore | None = None
        self.format: OwnFormat | None = None
        self.refusal: Exception | None = None
        self.is_placed = self.are_shared = False
        self.last: dict[str, Compiled] = {}
        self.trained = False
        self._stats = Stats()
        self._met: WeakSet[Executor] = WeakSet()
        self._programs: dict[Any, Compiled] = {}
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}

    # -- programs ------------------------------------------------------------------------------------------

    def program(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Compiled:
        """The program for a call with these arguments; captured, planned and generated where it is new."""
        self._check_parameters()
        leaves, spec = pytree.tree_flatten((args, kwargs))
        trained = tuple(parameter.requires_grad for parameter in self._parameters.values())
        asked = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)
        backward = torch.is_grad_enabled() and (asked or any(trained))
        modes = tuple(module.training for module in self.source.modules())
        key = (backward, trained, modes, spec, *map(leaf_key, leaves))
        if key not in self._programs:
            with torch.inference_mode(False), torch.set_grad_enabled(backward):
                request = Request(self.dtype, self.options.outputs, backward, self.dtypes, self._shapes)
                self._programs[key] = self._compile(self._shard(capture(self.source, args, kwargs, request)))
        compiled = self._programs[key]
        self.last[compiled.program.name] = compiled
        return compiled

    def _shard(self, captured: Captured) -> Captured:
        """The captured step of this process's parts, where tensors are sharded. Raises ShardingError."""
        plan = self.planning.shared()
        if not plan.mesh.tensor_axes:
            return captured
        program, records = self.lowering.shard(captured.program, plan)
        canonical = captured.program.copy()
        canonicalize.rewrite(canonical, plan)
        notes = (*captured.notes, *whole_parameters(canonical, plan))
        return replace(captured, program=program, notes=notes, records=tuple(records))

    def _compile(self, captured: Captured) -> Compiled:
        backward = captured.program.name == "training"
        if backward and not self.trained:
            # Until the first step masters may still move, so the first real batch is planned for from scratch.
            self._programs.clear()
        solution, refusal = self.planning.decide(captured, self.plan, bool(self._programs), self.format)
        self.refusal = refusal or self.refusal
        plan = solution.plan
        machine = self.machine = self.machine or self._make_machine(plan)
        stale = self.plan is None or self.plan.format.beside != (self.format is not None)
        self.plan = plan if backward or stale else self.plan
        self.is_placed = False
        program, records = self.lowering.finish(captured.program, plan)
        if program.calls(REDUCE) or program.calls(AVERAGE):
            self.ranks.check_alike(f"the {program.name} program", _digest(program, plan))
        self.ranks.join_axes((chunk.reduced_over for chunk in plan.layout.chunks), self.device.torch_device)
        executor = Executor(generate(program), machine, self.meter)
        flat = solution.program
        return Compiled(captured, plan, flat, program, (*captured.records, *records), executor, absent_outputs(flat))

    def names(self) -> dict[int, str]:
        """The parameters' names, by their identity."""
        return {id(parameter): name for name, parameter in self._parameters.items()}

    def use(self, format: OwnFormat) -> OwnStore:
        """Plan anew, for our own optimizer; masters move to where it updates them.

        Raises StateError before there is a plan or after an earlier call, and BudgetError where nothing fits.
        """
        if self.format is not None:
            raise StateError(
                "model.optimizer(...) was called before, and that optimizer holds the training state. Change it "
                "through its param_groups, add_param_group() and load_state_dict(), or compile the model anew"
            )
        if self.plan is None:
            raise StateError(
                "model.optimizer(...) needs a plan: pass example_inputs= to compile, or call the model once"
            )
        previous, before = self._programs, (self.machine, self.format, self.refusal, self.plan)
        self._programs, self.machine, self.format, self.refusal = {}, None, format, None
        try:
            for key, compiled in sorted(previous.items(), key=lambda item: item[1].program.name == "evaluation"):
                self._programs[key] = self._compile(compiled.captured)
        except BaseException:
            self._programs, (self.machine, self.format, self.refusal, self.plan) = previous, before
            raise
        self.last = {compiled.program.name: compiled for compiled in self._programs.values()}
        if before[0] is not None:
            before[0].store.leave()
        store = self._own
        assert store is not None
        try:
            self.place()
        except Exception as error:
            self.refusal = error  # some parameters have moved, others have found no room
            raise
        return store

    # -- memory --------------------------------------------------------------------------------------------

    def _make_machine(self, plan: Plan) -> Machine:
        chunks = ChunkStore(plan.layout, self._parameters, self.parts)
        self._own = None
        store: StateStore
        if self.format is not None:
            store = self._own = OwnStore(
                chunks, self.hardware, self.format, self._stats, Zero(self.ranks, plan.request.zero)
            )
        else:
            torchs = TorchFormat(self.options.optimizer_state_bytes)
            store = TorchStore(chunks, self.hardware, torchs, self._stats, self.ranks)
        return Machine(store, self.ranks)

    def place(self) -> None:
        """Put chunks and buffers where the plan wants them; weights on `meta` wait for values."""
        machine, plan = self.machine, self.plan
        if machine is None or plan is None or self.is_placed or self.refusal is not None:
            return
        if plan.request.zero and not self.ranks.launched:  # nobody is there to have the other shards
            return
        if any(parameter.is_meta for parameter in self._parameters.values()):
            return
        homes = self._shared_homes(plan)
        with torch.inference_mode(False), torch.no_grad():
            self._move_buffers()
            self._share_values()
            machine.store.place(homes)
        self.is_placed = True

    def _shared_homes(self, plan: Plan) -> Homes:
        """Weights stay on the device only where every program made so far has room for them."""
        others = [compiled.plan.homes for compiled in self._programs.values()]
        return tuple(
            replace(home, resident=home.resident and all(other.resident for other in same))
            for home, *same in zip(plan.homes, *others, strict=True)
        )

    def _share_values(self) -> None:
        """Every rank starts from the values of rank 0."""
        if not self.are_shared:
            self.ranks.share_randomness()
            for tensor in (*self._parameters.values(), *self.source.buffers()):
                self.ranks.from_first_(tensor.detach(), self.device.torch_device)
        self.are_shared = True

    def _move_buffers(self) -> None:
        if self.device.is_cuda:
            for module in self.source.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = buffer.to(self.device.torch_device)

    def inputs(self, compiled: Compiled, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """A program's inputs by role: tensors of the call go to the device, in the dtype it computes in."""
        leaves = pytree.tree_leaves((args, kwargs))
        buffers, device = dict(self.source.named_buffers(remove_duplicate=False)), self.device.torch_device
        inputs = []
        for role in compiled.executor.code.inputs:
            kind, _, name = role.partition(":")
            if kind == "buffer":
                inputs.append(buffers[name])
            elif kind == "constant":
                inputs.append(compiled.captured.program.constants[name].to(device))
            else:
                leaf = leaves[int(name)]
                if leaf.is_meta:
                    raise StateError(
                        f"an input of shape {tuple(leaf.shape)} is on 'meta', which has no values; pass a tensor on "
                        f"the CPU or on {device}"
                    )
                inputs.append(leaf.to(device, cast_dtype(leaf, self.dtype), non_blocking=True))
        if self.ranks.mesh.tensor_axes and compiled.executor not in self._met:
            self._met.add(compiled.executor)  # not its id, which another may have next, on some of the ranks
            check_shared(self.ranks, inputs)
        return inputs

    def begin_step(self, training: bool) -> None:
        """From here on `stats.step` counts anew."""
        if training:
            self.trained = True
            self.ranks.clock.step += 1
            self.planning.forget()
        self._note_peaks()
        for tier in self.hardware.tiers:
            tier.begin_step()
        self.device.begin_step()
        self._stats.begin_step()

    @property
    def stats(self) -> Stats:
        self._note_peaks()
        return self._stats

    def _note_peaks(self) -> None:
        device, host = self.hardware.tiers
        device_bytes = self.device.step_peak_bytes() if self.device.is_cuda else device.step_peak_bytes
        self._stats.peaked(device_bytes, host.step_peak_bytes)

    # -- refusals ------------------------------------------------------------------------------------------

    def ready(self, backward: bool) -> None:
        """Raises StateError where a step cannot be run as asked."""
        if self.refusal is not None:
            raise self.refusal
        self.ranks.check_launched()
        self.place()
        assert self.machine is not None
        store = self.machine.store
        if not self.is_placed:
            raise StateError(
                "the model's weights are on 'meta': there are no values to compute with. Load some with "
                "load_state_dict(...), which puts them where the plan wants them, and call again."
            )
        store.adopt()
        hooked = next(iter(store.chunks.hooks()), None) if backward else None
        if hooked is not None:
            raise StateError(
                f"parameter {hooked} has an autograd hook, which a compiled step would not call; remove it, and "
                "work on .grad between backward() and optimizer.step() instead"
            )

    def placed_store(self) -> StateStore:
        """The store of the training state. Raises StateError before there is a plan."""
        if self.machine is None:
            raise StateError("there is no plan yet: pass example_inputs= to compile, or call the module once")
        return self.machine.store

    def _check_parameters(self) -> None:
        """The chunks hold the parameters that the model was compiled with, and no others."""
        now = dict(self.source.named_parameters())
        if now.keys() != self._parameters.keys() or any(now[n] is not p for n, p in self._parameters.items()):
            changed = next((n for n in {**now, **self._parameters} if now.get(n) is not self._parameters.get(n)), "")
            raise StateError(
                f"parameter {changed} was added, removed or replaced after the model was compiled; compile the changed "
                "model anew, or assign values with load_state_dict() or parameter.data.copy_()"
            )
        layout = self.plan.layout if self.plan else None
        for chunk in layout.chunks if layout else ():
            thawed = next((s.name for s in chunk.slots if not chunk.trainable and now[s.name].requires_grad), None)
            if thawed is not None:
                raise StateError(
                    f"parameter {thawed} was frozen when the model was compiled, so that no memory is planned for its "
                    "gradient; compile with it trainable, and freeze it afterwards for as long as you like"
                )


def _digest(program: Program, plan: Plan) -> str:
    """Of all that decides what the ranks exchange."""
    asked = plan.request
    return hashlib.sha256(f"{asked.zero} {asked.reduce_dtype} {print_program(program)}".encode()).hexdigest()
