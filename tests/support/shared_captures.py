"""One capture for all tests that compile the same model alike: it takes longest of all, and does not see weights. Its
divisions into microbatches and its shards are shared, too, and what planners lower it to for the same decisions."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any
from unittest import mock

import torch
from geminifx.compiler import session
from geminifx.compiler.capture.arguments import leaf_key
from geminifx.compiler.capture.guards import Guard
from geminifx.compiler.capture.known import PLAIN
from geminifx.compiler.capture.microbatches import Microbatches
from geminifx.compiler.capture.trace import Captured, CaptureRequest, capture
from geminifx.compiler.planner.problem import Planning
from geminifx.compiler.planner.weighed import Weighed
from geminifx.compiler.planner.world import model as world
from geminifx.compiler.programs import captures
from geminifx.compiler.programs.captures import Captures
from geminifx.compiler.programs.programs import Call, Recent
from geminifx.passes import offload
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.program import Program
from geminifx.runtime.distributed.ranks import Ranks
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree
from transformers import GenerationConfig, PreTrainedConfig

_CAPTURED: dict[Hashable, tuple[Captured, tuple[tuple[str, str], ...]]] = {}
"""Without guards, which hold the model that was captured: instead of these the owner's and the attribute's names."""

_DIVIDED: dict[Hashable, Program] = {}
"""By the ids of the shared programs of the whole batch and of a part, and the number of parts."""

_SHARDED: dict[Hashable, Captured] = {}
"""By the id of the shared program, and what shards are made by."""

_PROGRAMS: set[int] = set()
"""The ids of all programs of these, which stay."""

_LOWERED: Recent[tuple[Program, Weighed]] = Recent()
"""With the captured program, whose id is then nobody else's."""


@contextmanager
def shared_captures() -> Iterator[None]:
    """Models that are compiled within, and are built alike from modules of the same classes, are captured once for each
    kind of call, whatever their weights, now and later. Numbers, switches and functions of their modules and
    configurations may be changed, and lists of such; what forwards read besides may not. Those with hooks, or another
    forward than their class has, are captured each."""

    class Shared(Captures):
        def _trace(self, call: Call, arguments: Any) -> Captured:
            with mock.patch.object(captures, "capture", partial(_once, captures.capture)):
                return super()._trace(call, arguments)

        def _divisible(self, call: Call, captured: Captured, finish: Any) -> Captured:
            with mock.patch.object(captures, "Microbatches", _SharedMicrobatches):
                return super()._divisible(call, captured, finish)

        def _shard(self, captured: Captured, microbatches: int) -> Captured:
            if not _is_shared(captured.program):
                return super()._shard(captured, microbatches)
            asked = replace(self.shared.request, budget_bytes=None), self.shared.mesh, self.schedule, microbatches
            key = id(captured.program), self.lowering, asked, captured.notes
            if key not in _SHARDED:
                _SHARDED[key] = super()._shard(captured, microbatches)
                _PROGRAMS.add(id(_SHARDED[key].program))
            found = _SHARDED[key]
            return replace(captured, program=found.program, notes=found.notes, records=found.records)

    with (
        mock.patch.object(session, "Captures", Shared),
        mock.patch.object(session, "Planning", _SharedPlanning),
        mock.patch.object(world, "capture", partial(_once, capture)),
    ):
        yield


@contextmanager
def alone_for(ranks: int) -> Iterator[None]:
    """Models that are compiled within are captured and planned, as on the first of so many ranks, which are not there:
    they find that shared when they are forked from this process. Random numbers go on from where they were."""

    def of(mesh_of: Any, device: torch.device, reduce_dtype: Any = "fp32", *_: Any) -> Ranks:
        return Ranks(mesh_of(ranks), launched=False, on_this_host=ranks, reduce_dtype=reduce_dtype)

    most = mock.patch.object(_LOWERED, "most", 10_000)  # all is planned first, and looked for from the beginning
    with most, mock.patch.object(Ranks, "of", of), torch.random.fork_rng(devices=[]):
        yield


class _SharedMicrobatches(Microbatches):
    """Divides shared programs once for all models."""

    def _divided(self, part: Captured, count: int) -> Program:
        if not (_is_shared(self.whole.program) and _is_shared(part.program)):
            return super()._divided(part, count)
        key = id(self.whole.program), id(part.program), count
        if key not in _DIVIDED:
            _DIVIDED[key] = super()._divided(part, count)
            _PROGRAMS.add(id(_DIVIDED[key]))
        return _DIVIDED[key]


def _is_shared(program: Program) -> bool:
    return id(program) in _PROGRAMS


class _SharedPlanning(Planning):
    """Lowers a shared program once for all models, and for each of the constants that tests set."""

    def _lower(self, captured: Captured, plan: Plan) -> Weighed:
        program = captured.by(plan.microbatches).program
        if self.lengthened is not None or not _is_shared(program):
            return super()._lower(captured, plan)
        key = (
            id(program), self.lowering, self.limits.rates, replace(plan.request, budget_bytes=None), plan.mesh,
            plan.microbatches, plan.rounds, plan.blocks, plan.stages, plan.schedule, plan.line, plan.layout,
            plan.recompute, plan.offload, plan.offload_sums, offload.SMALLEST_BYTES, plan.prefetch, plan.fuse_loss,
        )  # fmt: skip
        if key not in _LOWERED:
            _LOWERED[key] = program, super()._lower(captured, plan)
        return _LOWERED[key][1]


def _once(capture: Any, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
          request: CaptureRequest) -> Captured:  # fmt: skip
    if any(map(_is_patched, model.modules())):
        return capture(model, args, kwargs, request)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    key = _surroundings(), repr(request), _made_of(model), spec, _the_same(leaves), *map(leaf_key, leaves)
    if key not in _CAPTURED:
        found = capture(model, args, kwargs, request)
        if found.program.constants:  # tensors of this model
            return found
        guarded = tuple((g.label.removesuffix(g.name).rstrip("."), g.name) for g in found.guards)
        _CAPTURED[key] = replace(found, guards=()), guarded
        _PROGRAMS.add(id(found.program))
    found, guarded = _CAPTURED[key]
    guards = (Guard.of(attrgetter(path)(model) if path else model, name, path) for path, name in guarded)
    return replace(found, guards=tuple(guards))


def _is_patched(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def _surroundings() -> Hashable:
    return torch.cuda.is_available(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")


def _the_same(leaves: list[Any]) -> Hashable:
    """Which arguments are one tensor: inputs are named after where that stands."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(leaf), i) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal for one object alone, which it keeps alive."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _made_of(model: nn.Module) -> Hashable:
    """What a model consists of, but for the values of its tensors: modules, attributes, and what of them is shared."""
    first: dict[int, int] = {}
    made: list[Hashable] = []
    for path, module in model.named_modules(remove_duplicate=False):
        made.append((path, _class_of(module), first.setdefault(id(module), len(first))))
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                for key, tensor in value.items():
                    made.append((key, None if tensor is None else _kind(tensor, first)))
            elif name not in ("_modules", "name_or_path") and value != {}:
                made.append((name, _value(value)))
    return tuple(made)


def _class_of(module: nn.Module) -> Hashable:
    """torch makes a class for each module that has parametrizations, which are modules of it."""
    return ("parametrized", type(module).__base__) if is_parametrized(module) else type(module)


def _kind(tensor: Tensor, first: dict[int, int]) -> Hashable:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"
    shared = [id(tensor), tensor.untyped_storage()._cdata] if plain else [id(tensor)]
    return (
        type(tensor), tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device,
        tensor.requires_grad, *(first.setdefault(each, len(first)) for each in shared),
    )  # fmt: skip


def _value(value: Any) -> Hashable:
    if isinstance(value, GenerationConfig):
        return repr(value)
    if isinstance(value, PreTrainedConfig):
        return repr(value), value._attn_implementation
    if isinstance(value, set):
        value = sorted(value)
    if all(isinstance(leaf, PLAIN) for leaf in pytree.tree_leaves(value)):
        return repr(value)
    return _Same(value)
