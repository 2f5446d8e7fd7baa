"""Builds what a model runs by: a setup for a new plan, and the programs over it."""

from dataclasses import dataclass, replace

from torch import nn

from ...passes.program.plan import Plan
from ...runtime.distributed.local_shards import LocalShards
from ...runtime.distributed.zero import Zero
from ...runtime.executor import Executor, Outlets
from ...runtime.isa.errors import BudgetError
from ...runtime.isa.formats import OwnFormat, TorchFormat
from ...runtime.isa.homes import Home, Where
from ...runtime.machine import Machine
from ...runtime.memory.chunks import ChunkStore
from ...runtime.memory.hardware import Hardware
from ...runtime.memory.stats import Stats
from ...runtime.memory.tiers import MemoryMeter
from ...runtime.memory.torch_store import TorchStore
from ...runtime.optimizer.own_store import OwnStore
from ..capture.results import absent_outputs, saved
from ..capture.trace import Captured
from ..lowering import Lowering, generate
from ..planner.problem import Planning
from ..planner.solution import Solution
from ..setup import Setup
from .programs import Compiled, exchanged


@dataclass(frozen=True)
class Builder:
    """Builds setups and programs of one model. Nothing that exists is changed, so that whoever asked may discard them.

    `stats` counts what the stores copy, and `meter` the memory that programs take in the arena.
    """

    planning: Planning
    lowering: Lowering
    parameters: dict[str, nn.Parameter]
    local_shards: LocalShards
    hardware: Hardware
    stats: Stats
    meter: MemoryMeter | None

    def first(self, captured: Captured, before: Setup | None, format: OwnFormat | None) -> tuple[Setup, Compiled]:
        """A setup for a new plan, by which states may move, and the program it was planned for. Chunks keep their
        parameters, and a machine whose store is of the same kind is kept."""
        plan, trained = self._with_trained(before, format)
        solution, refusal = self.planning.decide(captured, plan, False, format)
        if before is not None and (before.own is not None) == (format is not None):
            setup = replace(before, plan=solution.plan, refusal=refusal, trained=trained)
        else:
            machine, own = self._machine(solution, format)
            setup = Setup(solution.plan, machine, own, refusal, trained)
        return setup, self._program(captured, solution, setup.machine)

    def thawed(self, captured: Captured, before: Setup, format: OwnFormat | None) -> tuple[Setup, Compiled]:
        """A setup in which more parameters are trained than in the one `before`, during training. Masters that a torch
        optimizer updates stay where they are; those of thawed chunks move to the host where they do not fit otherwise.
        Raises BudgetError if nothing fits."""
        plan, trained = self._with_trained(before, format)
        assert plan is not None
        try:
            solution, refusal = self.planning.decide(captured, plan, format is None, format)
        except BudgetError:
            pairs = zip(before.plan.layout.chunks, plan.placed(plan.homes), strict=True)
            homes = tuple(home if chunk == old else Home(Where.HOST) for old, (chunk, home) in pairs)
            if format is not None or homes == plan.homes or plan.request.policy == "cuda":
                raise
            solution, refusal = self.planning.decide(captured, replace(plan, homes=homes), True, format)
        if refusal is not None:
            raise refusal
        setup = replace(before, plan=solution.plan, trained=trained)
        return setup, self._program(captured, solution, setup.machine)

    def _with_trained(self, before: Setup | None, format: OwnFormat | None) -> tuple[Plan | None, frozenset[str]]:
        """The plan of the setup `before`, with all chunks trained that hold a parameter which is trained now, and the
        names of the parameters trained then or now."""
        now = frozenset(name for name, parameter in self.parameters.items() if parameter.requires_grad)
        if before is None:
            return None, now
        return self.planning.thawed(before.plan, now - before.trained, format), before.trained | now

    def further(self, captured: Captured, setup: Setup, format: OwnFormat | None) -> Compiled:
        """One more program over a setup, planned so that states stay where they are."""
        solution, _ = self.planning.decide(captured, setup.plan, True, format)
        return self._program(captured, solution, setup.machine)

    def moving(self, captured: Captured, setup: Setup, format: OwnFormat | None) -> Compiled:
        """One more program over a setup, planned as if it were the first: it may run once states have moved to where
        its plan wants them. Raises BudgetError if it does not fit even so."""
        solution, refusal = self.planning.decide(captured, setup.plan, False, format)
        if refusal is not None:
            raise refusal
        return self._program(captured, solution, setup.machine)

    def _machine(self, solution: Solution, format: OwnFormat | None) -> tuple[Machine, OwnStore | None]:
        """A machine over new chunks, and its store if that keeps states of our own."""
        plan, ranks = solution.plan, self.local_shards.ranks
        chunks = ChunkStore(plan.layout, self.parameters, self.local_shards)
        if format is None:
            torchs = TorchFormat(self.planning.options.optimizer_state_bytes)
            return Machine(TorchStore(chunks, self.hardware, torchs, self.stats, ranks), ranks), None
        own = OwnStore(chunks, self.hardware, format, self.stats, Zero(ranks, plan.request.zero))
        return Machine(own, ranks), own

    def _program(self, captured: Captured, solution: Solution, machine: Machine) -> Compiled:
        plan, flat = solution.plan, solution.program
        step = captured.by(plan.microbatches)
        program, records = self.lowering.finish(step.program, solution.flat, plan)
        if captured.divide is not None:
            captured.divide.keep_only(plan.microbatches)
        executor = Executor(generate(program), machine, self.meter, exchanged(program, plan))
        outlets = Outlets(captured.differentiable, *saved(flat), captured.sources)
        history = (*step.records, *records)
        return Compiled(captured, plan, flat, program, history, executor, absent_outputs(flat), outlets)
