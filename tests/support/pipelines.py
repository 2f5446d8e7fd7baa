"""The programs of all ranks of a pipeline, run in one process: node by node, each as far as what it reads has come."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from all_ranks import CALLED as CALLED_BY_ALL
from all_ranks import Values
from geminifx.compiler.capture.trace import CaptureRequest, capture
from geminifx.models.adapters import blocks
from geminifx.passes.average_loss import average_loss
from geminifx.passes.canonicalize import canonicalize
from geminifx.passes.fuse_loss import fuse_loss
from geminifx.passes.partition import partition
from geminifx.passes.post_receives import post_receives
from geminifx.passes.program.manager import run_passes
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.program import Program, note
from geminifx.passes.recompute import recompute
from geminifx.passes.sharding.microbatches import microbatched
from geminifx.passes.split_batch import split_batch
from geminifx.passes.split_stages import split_stages
from geminifx.runtime.isa.instructions import (
    DRAWN,
    FINISH_RECEIVE,
    FINISH_SEND,
    MICROBATCH,
    SEND,
    SHARE,
    START_RECEIVE,
    TURN,
    microbatch,
)
from geminifx.runtime.isa.mesh import Axis, Mesh
from geminifx.runtime.isa.schedule import Schedule
from geminifx.runtime.machine import Machine
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves
from zoo import Batch, Case

PASSES = (canonicalize, fuse_loss, average_loss, recompute, split_batch, split_stages, partition, post_receives)
CALLED = {**CALLED_BY_ALL, MICROBATCH: microbatch, DRAWN: Machine.drawn, SHARE: Machine.share}


@dataclass(frozen=True, eq=False)
class Step:
    """A captured step by microbatches, and a value for each of its inputs."""

    program: Program
    values: Values
    blocks: tuple[str, ...]
    microbatches: int

    def plan(self, **changes: Any) -> Plan:
        return Plan(microbatches=self.microbatches, blocks=self.blocks, **changes)

    def plans(self, schedule: Schedule, **changes: Any) -> list[Plan]:
        """Those of all ranks, for stages of equally many blocks."""
        ranks, each = len(schedule.ranks), len(self.blocks) / schedule.stages
        stages = ("", *(self.blocks[int(stage * each)] for stage in range(1, schedule.stages)))
        mesh = Mesh((Axis("pipeline", ranks, "pipeline"),))
        plan = self.plan(mesh=mesh, stages=stages, schedule=schedule, **changes)
        return [replace(plan, line=rank) for rank in range(ranks)]

    def lowered(self, plan: Plan) -> Program:
        program = self.program.copy()
        run_passes(program, plan, PASSES)
        return program

    def whole(self, tangent: float = 1.0, **changes: Any) -> Values:
        """What one process finds that has all stages."""
        (found,) = run([self.lowered(self.plan(**changes))], self.values, tangent)
        return found

    def staged(self, schedule: Schedule, tangent: float = 1.0, **changes: Any) -> list[Values]:
        """What each rank finds."""
        return run([self.lowered(plan) for plan in self.plans(schedule, **changes)], self.values, tangent)


@cache
def step_of(case: Case, microbatches: int, rows: int = 8, training: bool = True) -> Step:
    """A case's step with uneven labels, so that microbatches weigh differently."""
    model, batch, program = case.seeded(), _batch(case, rows), _captured(case, rows, rows, training)
    divided = program
    if microbatches > 1:
        divided = microbatched(program, _captured(case, rows, rows // microbatches, training), microbatches)
    values = {f"parameter:{name}": p.detach() for name, p in model.named_parameters()}
    values |= {f"buffer:{name}": buffer for name, buffer in model.named_buffers()}
    values |= {f"constant:{name}": value for name, value in program.constants.items()}
    values |= {f"input:{i}": value for i, value in enumerate(tree_leaves(((), batch)))}
    return Step(divided, values, blocks(model), microbatches)


def _batch(case: Case, rows: int) -> Batch:
    batch = case.batch(batch=rows, seed=0)
    labels = batch["labels"].clone()
    labels[0, 3:] = labels[1, 1:] = -100
    return {**batch, "labels": labels}


@cache
def _captured(case: Case, rows: int, first: int, training: bool) -> Program:
    """The program of the first rows of a batch, which is not to be changed."""
    model, batch = case.seeded().train(training), _batch(case, rows)
    part = {name: value[:first] for name, value in batch.items()}
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    program = capture(model, (), part, CaptureRequest(None, "loss", training, dtypes)).program
    run_passes(program, Plan(), (canonicalize,))
    return program


def run(programs: list[Program], values: Values, tangent: float = 1.0) -> list[Values]:
    """Each rank's results by role, all of which draw from generators in one state. Fails where all of them wait."""
    mail = Mail()
    runs = [_run(rank, program, values, torch.tensor(tangent), mail) for rank, program in enumerate(programs)]
    generators, found = [torch.get_rng_state()] * len(runs), [Values()] * len(runs)
    waiting = dict(enumerate(runs))
    while waiting:
        before = mail.moves, len(waiting)
        for rank, program_run in list(waiting.items()):
            torch.set_rng_state(generators[rank])
            try:
                next(program_run)
            except StopIteration as stop:
                found[rank] = stop.value
                del waiting[rank]
            generators[rank] = torch.get_rng_state()
        assert (mail.moves, len(waiting)) != before, "all ranks wait for each other"
    assert mail.is_empty, "something was sent that nobody received"
    assert all(torch.equal(state, generators[0]) for state in generators), "ranks would draw apart from here on"
    return found


@dataclass(eq=False)
class Letter:
    """What is sent, and has a place of its own in the mail."""

    value: Tensor
    has_come: bool = False


class Mail:
    """What was sent and has not come, by from where and where to. `moves` counts what was sent and what has come."""

    def __init__(self) -> None:
        self.moves = 0
        self._letters = defaultdict[tuple[int, int], deque[Letter]](deque)

    @property
    def is_empty(self) -> bool:
        return not any(self._letters.values())

    def send(self, source: int, to: int, value: Tensor) -> Letter:
        letter = Letter(value)
        self._letters[source, to].append(letter)
        self.moves += 1
        return letter

    def receive(self, source: int, to: int) -> Tensor | None:
        """The next value; None if there is none yet."""
        if not self._letters[source, to]:
            return None
        letter = self._letters[source, to].popleft()
        letter.has_come = True
        self.moves += 1
        return letter.value


def _run(rank: int, program: Program, values: Values, tangent: Tensor, mail: Mail) -> Iterator[None]:
    """Sleeps where what it reads has not come yet, and where what it sent has not been received."""
    found: dict[fx.Node, Any] = {}
    leaving, coming = defaultdict[int, deque[Letter]](deque), defaultdict[int, deque[fx.Node]](deque)
    outputs: Values = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            role = note(node).role
            found[node] = torch.tensor(1.0) if role.startswith("expected:") else values[role].clone()
        elif node.target is TURN:
            outputs = {f"output:{i}": found[value].clone() for i, value in enumerate(node.args[0])}
            found[node] = [tangent]
        elif node.target is SEND:
            leaving[node.args[1]].append(mail.send(rank, node.args[1], found[node.args[0]].clone()))
        elif node.target is FINISH_SEND:
            letter = leaving[node.args[1]].popleft()
            assert torch.equal(letter.value, found[node.args[0]]), "another value was sent, or it was overwritten"
            while not letter.has_come:
                yield
        elif node.target is START_RECEIVE:
            coming[node.args[3]].append(node)
        elif node.target is FINISH_RECEIVE:
            shape, stride, dtype, source = node.args[0].args
            assert coming[source].popleft() is node.args[0], "what was sent first comes first"
            while (come := mail.receive(source, rank)) is None:
                yield
            assert (list(come.shape), come.dtype) == (shape, dtype)
            found[node] = torch.empty_strided(shape, stride, dtype=dtype).copy_(come)
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), found.__getitem__)
            found[node] = CALLED.get(node.target, node.target)(*args, **kwargs)
    return outputs | {role: found[node] for role, node in program.results.items()}
