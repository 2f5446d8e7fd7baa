"""Programs of whole tensors beside those of one rank's parts, and whether all ranks together compute the same."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from all_ranks import Values, placements_of, run_on_all, run_whole
from geminifx.compiler.capture.trace import CaptureRequest, capture
from geminifx.compiler.parallel import Parallel
from geminifx.passes.canonicalize import canonicalize
from geminifx.passes.program.manager import run_passes
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.program import Program, type_of
from geminifx.passes.program.request import Outputs, Request
from geminifx.passes.shard import shard
from geminifx.runtime.isa.linear_cross_entropy import ABSENT
from geminifx.runtime.isa.mesh import Mesh, local_shard
from torch import Tensor
from torch.utils._pytree import tree_leaves
from zoo import Batch, Case

ROUNDING = 2**-18
"""Ranks add what one process adds in another order: sums of some hundred terms, each rounded by 2^-24 of the largest
there is."""

NOTHING = ("k_proj.bias", "key.bias")
"""A bias of all keys moves every score of a query alike, which softmax does not see: its gradient is rounding alone."""


@dataclass(frozen=True)
class Whole:
    """A captured step without repetitions, and a value for each of its inputs."""

    program: Program
    values: Values

    @cached_property
    def results(self) -> Values:
        """What one process computes, by role."""
        torch.manual_seed(0)
        return run_whole(self.program, self.values)

    def shard(self, plan: Plan) -> Program:
        """One rank's program, checked."""
        program = self.program.copy()
        run_passes(program, plan, (canonicalize, shard))
        return program


@dataclass(frozen=True)
class Sharded:
    """A step and its results, and that of one rank with those of all ranks."""

    mesh: Mesh
    whole: Program
    program: Program
    expected: Values
    found: dict[str, list[Tensor]]

    def part(self, role: str, rank: int) -> Tensor:
        """What a rank should have found: gradients lie as their parameters do."""
        kind, _, name = role.partition(":")
        parameters = self.program.inputs("parameter")
        if kind != "gradient" or name not in parameters:
            return self.expected[role]
        return local_shard(self.expected[role], placements_of(parameters[name], self.mesh), self.mesh, rank)

    def error(self, role: str) -> float:
        """The largest difference on any rank. Parts of another shape are infinitely far."""
        errors = [0.0]
        for rank, found in enumerate(self.found[role]):
            expected = self.part(role, rank)
            errors.append((found - expected).abs().max().item() if found.shape == expected.shape else float("inf"))
        return max(errors)


def declared(mode: str, size: int, **more: Any) -> dict[str, Any]:
    return {"tensor": {"mode": mode, "size": size, **more}}


def plan_for(parallel: dict[str, Any], outputs: Outputs = "loss") -> Plan:
    found = Parallel.of(parallel)
    request = Request(outputs=outputs, mode=found.mode or "", sequence=found.sequence, table=found.table)
    return Plan(request, mesh=found.mesh(None, 1))


def uneven(batch: Batch) -> Batch:
    """The same with fewer counted tokens in some of the rows, so that parts of the batch weigh differently."""
    labels = batch["labels"].clone()
    if labels.ndim > 1:
        labels[0, 3:] = labels[5, 1:] = -100
    return {**batch, "labels": labels}


@cache
def whole_step(case: Case, training: bool = True, rows: int = 8) -> Whole:
    """A case's step with uneven labels. Shared: programs must be copied before they are changed."""
    model, batch = case.seeded().train(training), uneven(case.batch(batch=rows, seed=0))
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    program = capture(model, (), batch, CaptureRequest(None, "loss", training, dtypes)).program
    run_passes(program, Plan(), (canonicalize,))
    values = {f"parameter:{name}": p.detach() for name, p in model.named_parameters()}
    values |= {f"buffer:{name}": buffer for name, buffer in model.named_buffers()}
    values |= {f"constant:{name}": value for name, value in program.constants.items()}
    values |= {f"input:{i}": value for i, value in enumerate(tree_leaves(((), batch)))}
    for position, node in program.inputs("tangent").items():
        values[f"tangent:{position}"] = torch.ones(type_of(node).shape)  # type: ignore[union-attr]
    return Whole(program, values)


def found_by_all(program: Program, mesh: Mesh, values: Values) -> dict[str, list[Tensor]]:
    """Results by role, of all ranks, gradients of parameters once they are summed over the replicas."""
    found, parameters = run_on_all(program, mesh, values), program.inputs("parameter")
    gradients = [role for name in parameters if (role := f"gradient:{name}") in found]
    return found | {role: over_replicas(found[role], mesh) for role in gradients}


def over_replicas(parts: list[Tensor], mesh: Mesh) -> list[Tensor]:
    """The sums that chunks' gradients become: of all ranks with the same weights."""
    places = [tuple(mesh.coordinate(rank, axis.name) for axis in mesh.weight_axes) for rank in range(mesh.size)]
    sums = {place: sum(part for part, at in zip(parts, places, strict=True) if at == place) for place in set(places)}
    return [sums[place] for place in places]  # type: ignore[misc]


def sharded_step(case: Case, parallel: dict[str, Any], training: bool = True, rows: int = 8) -> Sharded:
    return sharded(whole_step(case, training, rows), parallel)


def sharded(whole: Whole, parallel: dict[str, Any], outputs: Outputs = "loss") -> Sharded:
    plan = plan_for(parallel, outputs)
    program = whole.shard(plan)
    torch.manual_seed(0)
    found = found_by_all(program, plan.mesh, whole.values)
    return Sharded(plan.mesh, whole.program, program, whole.results, found)


def check(found: Sharded) -> None:
    """All ranks find the whole program's results, but for rounding and what is left out on purpose."""
    assert found.found.keys() == found.expected.keys()
    for role, expected in found.expected.items():
        if found.program.results[role].target is ABSENT:
            continue
        bound = ROUNDING * expected.abs().max().item()
        if role.endswith(NOTHING):
            bound = ROUNDING * found.expected[role.removesuffix("bias") + "weight"].abs().max().item()
        assert found.error(role) <= bound, role
