"""Lowers a captured program and a plan to the code that runs: runs the passes, and generates code from the result."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..passes.canonicalize import canonicalize
from ..passes.pipeline import PIPELINE
from ..passes.program.manager import Pass, Record, assemble, facts_of, run_passes
from ..passes.program.plan import Plan
from ..passes.program.program import Program, note, type_of
from ..passes.program.text import print_program
from ..passes.program.types import TensorType
from ..passes.program.verify import verify
from ..runtime.executor import Code
from ..runtime.isa.instructions import REDUCE, TURN

SHARD, CLUSTER = "shard", "cluster"


@dataclass(frozen=True)
class Flat:
    """A program whose instructions are all in their final places, before its compute is clustered into functions, and
    what each pass did to it."""

    program: Program
    records: tuple[Record, ...] = ()


@dataclass(frozen=True)
class Lowering:
    """The pass pipeline, the user's passes included. `flat` stops once instructions are in their final places, which is
    what memory is planned for; `finish` goes on to the code that runs.

    If tensors are sharded, the passes after `shard` work on one process's shards: the method `shard` makes that program
    once, and `flat` and `finish` start from it.
    """

    passes: tuple[Pass, ...]
    dump: Path | None = None

    @classmethod
    def of(cls, extra: tuple[Pass, ...], dump: str | Path | None) -> "Lowering":
        return cls(assemble(PIPELINE, extra), None if dump is None else Path(dump))

    def shard(self, captured: Program, plan: Plan) -> tuple[Program, list[Record]]:
        """The program of one process's shards, and what each pass did."""
        program = captured.copy()
        folder = None if self.dump is None else self.dump / f"{program.name}_whole"
        return program, run_passes(program, plan, self.passes[: self._after(SHARD)], folder)

    def flat(self, captured: Program, plan: Plan) -> Flat:
        """The flat program of a candidate plan. With passes of the user's it is verified at once, else only if it is
        chosen."""
        program, passes = captured.copy(), self._rest(plan, self._before(CLUSTER))
        with _blamed(captured, plan, passes):
            records = run_passes(program, plan, passes, verified=self.passes != PIPELINE)
        return Flat(program, tuple(records))

    def finish(self, captured: Program, flat: Flat, plan: Plan) -> tuple[Program, list[Record]]:
        """The program that runs, verified and written to `dump`, and what each pass did. `flat` must come from the same
        step and the same decisions; anything else in the plan is read only by passes of the user's."""
        if self.dump is not None or self.passes != PIPELINE:
            return self._from_the_beginning(captured, plan)
        program, passes = flat.program.copy(), self._rest(plan, self.passes)
        done, rest = passes[: len(flat.records)], passes[len(flat.records) :]
        with _blamed(captured, plan, passes):
            verify(program, plan, facts_of(done), done[-1].name)
            return program, [*flat.records, *run_passes(program, plan, rest, after=done)]

    def _from_the_beginning(self, captured: Program, plan: Plan) -> tuple[Program, list[Record]]:
        program = captured.copy()
        folder = None if self.dump is None else self.dump / program.name
        records = run_passes(program, plan, self._rest(plan, self.passes), folder)
        if self.dump is not None:
            plan.save(self.dump / "plan.json")
            (self.dump / f"{program.name}.py").write_text(print_program(program, executable=True), encoding="utf-8")
        return program, records

    def _rest(self, plan: Plan, passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
        """The passes that remain to be run; after sharding, `canonicalize` comes first and removes its duplicates."""
        return (canonicalize, *passes[self._after(SHARD) :]) if plan.mesh.tensor_axes else passes

    def _after(self, name: str) -> int:
        return [p.name for p in self.passes].index(name) + 1

    def _before(self, name: str) -> tuple[Pass, ...]:
        return self.passes[: self._after(name) - 1]


@contextmanager
def _blamed(captured: Program, plan: Plan, passes: tuple[Pass, ...]) -> Iterator[None]:
    """If passes fail, runs them again with verification after each, to name the one at fault."""
    try:
        yield
    except Exception:
        run_passes(captured.copy(), plan, passes)
        raise


def generate(program: Program) -> Code:
    """The executable code of a lowered program."""
    parts = [program, *program.functions.values()]
    turns = (type_of(node) for node in program.calls(TURN))
    received = [turn for turn in turns if isinstance(turn, tuple)]
    targets = (str(node.target) for part in parts for node in part.computes if node.op == "call_function")
    return Code(
        name=program.name,
        source=print_program(program, executable=True),
        inputs=tuple(note(node).role for node in program.placeholders),
        namespaces=frozenset(target.split(".")[0] for target in targets if not target.startswith("<")),
        reduces=frozenset(int(node.args[1]) for node in program.calls(REDUCE)),
        turns=tuple(tuple(t.stride for t in turn if isinstance(t, TensorType)) for turn in received),
        input_gradients=tuple(role for role in program.results if role.startswith("gradient:")),
    )
