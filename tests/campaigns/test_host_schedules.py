"""Weights on the hosts: whichever rank runs which action, and in whatever order, all ranks find what one process does,
none waits for ever, and nothing is overwritten that is still being sent."""

import random
from collections.abc import Iterator

import pytest
import torch
from geminifx.compiler.planner.pipeline.check import check as violation
from geminifx.runtime.isa.schedule import Action, Schedule
from pipelines import step_of
from zoo import Case, opt

SIZE = 400
MICROBATCHES = 4
UNTIED = Case("opt, not tied", lambda: opt(tie_word_embeddings=False, num_hidden_layers=4))
ROUNDING = 2**-18
"""Of a gradient, since the parts of several ranks are added up in another order."""


def drawn(chance: random.Random) -> Schedule:
    """A schedule that can run: actions in an order in which each can, on ranks by stage or one by one."""
    stages, ranks = chance.choice([2, 4]), chance.choice([2, 3, 4])
    by_stage, forwards_first = chance.random(), chance.choice([0.0, 0.6, 1.0])
    todo = [Action(stage, m, kind) for stage in range(stages) for m in range(MICROBATCHES) for kind in "FB"]
    needs = Schedule("any", stages, MICROBATCHES, (tuple(todo),), "host").needs
    runner: dict[tuple[object, ...], int] = {}
    lines: list[list[Action]] = [[] for _ in range(ranks)]
    while todo:
        ready = [action for action in todo if not set(needs(action)) & set(todo)]
        forwards = [action for action in ready if action.kind == "F"]
        action = chance.choice(forwards if forwards and chance.random() < forwards_first else ready)
        todo.remove(action)
        alike = (action.stage, action.kind, None if chance.random() < by_stage else action.microbatch)
        lines[runner.setdefault(alike, chance.randrange(ranks))].append(action)
    return Schedule("random", stages, MICROBATCHES, tuple(map(tuple, lines)), "host")


def check(number: int) -> None:
    chance = random.Random(number)
    schedule = drawn(chance)
    while violation(schedule) is not None:
        schedule = drawn(chance)
    step = step_of(UNTIED, MICROBATCHES)
    recompute = chance.choice([(), step.blocks])
    expected, found = step.whole(0.5), step.staged(schedule, 0.5, recompute=recompute)
    for role, whole in expected.items():
        held = [results[role] for results in found if role in results]
        held = [value for value in held if value.numel() or not whole.numel()]  # elsewhere logits are empty
        assert held, f"case {number}: nobody has {role}\n{schedule}"
        for value in held:
            same = torch.equal(value, held[0]) and (value - whole).abs().max() <= ROUNDING * whole.abs().max()
            assert same, f"case {number}: {role} differs\n{schedule}"


@pytest.mark.campaign
def test_whichever_rank_runs_an_action_all_find_what_one_process_does(cases: Iterator[int]) -> None:
    for number in cases:
        check(number)
