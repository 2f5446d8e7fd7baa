"""Runs passes: checks the facts each requires and gives, verifies, times and counts, and writes the program's text.

A pass is a function `(program, plan) -> None` that rewrites the program in place:

    @graph_pass(requires=(chunked,), gives=(released,))
    def release(program: Program, plan: Plan) -> None: ...

A pass itself does none of this checking. Users declare their own passes the same way, and place them by name.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from ...runtime.isa.errors import ArgumentError, VerificationError, did_you_mean, wrong_argument
from ...runtime.isa.torch_private import calls_by_target
from .plan import Plan
from .program import Program
from .text import print_program, target_text
from .verify import Fact, Known, verify

Rewrite = Callable[[Program, Plan], None]


@dataclass(frozen=True)
class Pass:
    """A named rewrite with its contract. `after` names the pipeline pass after which a user's own pass runs."""

    name: str
    rewrite: Rewrite
    requires: tuple[Fact, ...] = ()
    gives: tuple[Fact, ...] = ()
    breaks: tuple[Fact, ...] = ()
    after: str = ""


def graph_pass(*, requires: tuple[Fact, ...] = (), gives: tuple[Fact, ...] = (), breaks: tuple[Fact, ...] = (),
               after: str = "") -> Callable[[Rewrite], Pass]:  # fmt: skip
    """Declare a pass, named after the function. Raises ArgumentError if `after` is not a string or the decorated object
    is not a named function."""
    if not isinstance(after, str):
        raise wrong_argument("after", after, "the name of the pass that it runs after, such as 'chunk'")

    def declare(rewrite: Rewrite) -> Pass:
        if not callable(rewrite) or not hasattr(rewrite, "__name__"):
            raise wrong_argument("graph_pass", rewrite, "a function of a program and its plan")
        return Pass(rewrite.__name__, rewrite, requires, gives, breaks, after)

    return declare


@dataclass(frozen=True)
class Record:
    """What one pass did: seconds spent rewriting and verifying, and the change in operator counts."""

    name: str
    rewrite_s: float
    verify_s: float
    delta: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        changes = ", ".join(f"{name} {count:+d}" for name, count in self.delta) or "unchanged"
        return f"{self.name:<14} {self.rewrite_s:6.2f} s + {self.verify_s:.2f} s  {changes}"


def assemble(pipeline: Iterable[Pass], extra: Iterable[Pass] = ()) -> tuple[Pass, ...]:
    """The pipeline with each of the user's passes inserted after the pass it names.

    Raises ArgumentError if a pass in `extra` names one that does not exist.
    """
    passes, placed = list(pipeline), list[Pass]()
    for added in extra:
        names = [p.name for p in passes]
        if added.after not in names:
            hint = did_you_mean(added.after, names, f"expected one of {', '.join(names)}")
            raise ArgumentError(f"passes: pass {added.name!r}: after={added.after!r} names no pass; {hint}")
        place = names.index(added.after) + 1
        while place < len(passes) and passes[place] in placed and passes[place].after == added.after:
            place += 1  # after the user's earlier passes for the same place
        passes.insert(place, added)
        placed.append(added)
    return tuple(passes)


def run_passes(program: Program, plan: Plan, passes: Iterable[Pass], dump: Path | None = None, *,
               after: Iterable[Pass] = (), verified: bool = True) -> list[Record]:  # fmt: skip
    """Run `passes` over `program` in place; the passes in `after` have already run.

    With `dump`, the text before the first pass and after each one is written to `NN_<pass>.py` in that folder. Raises
    VerificationError if a pass lacks a fact that it requires or, if `verified`, leaves a malformed program.
    """
    records: list[Record] = []
    facts, known, counts = facts_of(after), Known(), _count(program)
    _write(dump, 0, "capture", program)
    for number, current in enumerate(passes, start=1):
        missing = [fact.name for fact in current.requires if fact not in facts]
        if missing:
            raise VerificationError(
                f"pass '{current.name}' requires {', '.join(missing)}, which no earlier pass provides; facts known "
                f"here: {', '.join(map(str, facts)) or 'none'}. Place it after the pass that provides that."
            )
        start = time.perf_counter()
        try:
            current.rewrite(program, plan)
        except Exception as error:
            error.add_note(f"raised inside the pass '{current.name}'")
            raise
        rewritten = time.perf_counter()
        facts = _facts_behind(current, facts)
        if verified:
            verify(program, plan, facts, current.name, known)
        verified_s, before, counts = time.perf_counter() - rewritten, counts, _count(program)
        records.append(Record(current.name, rewritten - start, verified_s, _difference(before, counts)))
        _write(dump, number, current.name, program)
    return records


def facts_of(passes: Iterable[Pass]) -> tuple[Fact, ...]:
    """The facts that hold after `passes` have run."""
    return reduce(lambda facts, current: _facts_behind(current, facts), passes, ())


def _facts_behind(current: Pass, facts: tuple[Fact, ...]) -> tuple[Fact, ...]:
    return tuple(fact for fact in (*facts, *current.gives) if fact not in current.breaks)


def _count(program: Program) -> Counter[str]:
    counts = calls_by_target(program.graph)
    return Counter({target if isinstance(target, str) else target_text(target): n for target, n in counts.items()})


def _difference(before: Counter[str], after: Counter[str]) -> tuple[tuple[str, int], ...]:
    changes = {name: after[name] - before[name] for name in sorted({*before, *after})}
    return tuple((name, change) for name, change in changes.items() if change)


def _write(dump: Path | None, number: int, name: str, program: Program) -> None:
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / f"{number:02d}_{name}.py").write_text(print_program(program), encoding="utf-8")
