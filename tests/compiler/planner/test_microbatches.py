"""How many microbatches are chosen where the user does not say, by what each number needs and how fast it is."""

from collections.abc import Callable

import pytest
from geminifx.compiler.lowering import Flat
from geminifx.compiler.planner.microbatches import Decision, fewest, in_rounds
from geminifx.compiler.planner.solution import Solution
from geminifx.passes.program.estimate import Estimate
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.program import Program
from geminifx.runtime.isa.errors import BudgetError, SplitError


def finding(needs: dict[int, int], budget: int, seconds: dict[int, float] | None = None) -> Callable[[int], Decision]:
    """Decides for a number of microbatches that need so many bytes, in steps of so many seconds."""

    def find(count: int) -> Decision:
        if count not in needs:
            raise SplitError(f"not by {count}")
        if needs[count] > budget:
            raise BudgetError(f"{count} need {needs[count]}", smallest_bytes=needs[count])
        estimate = Estimate(step_s=(seconds or {}).get(count, 1.0))
        return Solution(Plan(microbatches=count, estimate=estimate), Flat(Program("training"))), None

    return find


def chosen(find: Callable[[int], Decision], examples: int) -> int:
    return fewest(find, examples)[0].plan.microbatches


def test_the_whole_batch_where_it_fits() -> None:
    assert chosen(finding({1: 90}, 90), 8) == 1


def test_the_number_that_was_not_taken_is_told() -> None:
    needs = {1: 90, 2: 95, 4: 60, 8: 40}
    for seconds, what in (({4: 1.0, 8: 0.96}, "4 microbatches"), ({4: 1.0, 8: 0.98}, "8 microbatches")):
        (told,) = fewest(finding(needs, 60, seconds), 8)[0].plan.alternatives
        assert told.what == what and told.step_s == seconds[int(what[0])]
    assert fewest(finding(needs, 100), 8)[0].plan.alternatives == (), "of the whole batch no other was weighed"


def test_as_few_as_fit_or_twice_as_many_where_those_are_faster() -> None:
    needs = {1: 90, 2: 95, 4: 60, 8: 40}
    assert chosen(finding(needs, 60), 8) == 4
    assert chosen(finding(needs, 60, {4: 1.0, 8: 0.96}), 8) == 8
    assert chosen(finding(needs, 60, {4: 1.0, 8: 0.98}), 8) == 4
    assert chosen(finding(needs, 60, {4: 1.0, 8: 0.5}), 12) == 4  # 12 examples do not divide by 8


def test_parts_that_cannot_fit_are_not_planned_for() -> None:
    tried, find = [], finding({1: 90, 2: 50, 4: 29, 8: 20}, 30)
    decide = lambda count: tried.append(count) or find(count)  # noqa: E731
    assert fewest(decide, 8, 30)[0].plan.microbatches == 4 and tried == [1, 4, 8]
    tried.clear()
    with pytest.raises(BudgetError, match="8 need 20") as refused:  # none may fit: the least is still told
        fewest(lambda count: tried.append(count) or finding({1: 90, 2: 50, 4: 29, 8: 20}, 10)(count), 8, 10)
    assert refused.value.smallest_bytes == 20 and tried == [1, 2, 4, 8]


def rounds_of(
    seconds: dict[int, float | Exception], recomputed: int = 4, copied_s: float = 0.0
) -> tuple[Decision, list[int]]:
    """The decision among numbers of rounds that take so many seconds, of 8 microbatches, and those that were tried."""
    tried = list[int]()

    def find(rounds: int) -> Decision:
        tried.append(rounds)
        step_s = seconds[rounds]
        if isinstance(step_s, Exception):
            raise step_s
        blocks = tuple(map(str, range(4)))
        estimate = Estimate(step_s=step_s, busy_s=(("device", step_s),))
        plan = Plan(microbatches=8, rounds=rounds, blocks=blocks, recompute=blocks[:recomputed], estimate=estimate)
        return Solution(plan, Flat(Program("training"))), None

    return in_rounds(find, find(1), copied_s), tried


def test_rounds_are_taken_where_they_are_faster() -> None:
    (solution, _), tried = rounds_of({1: 1.0, 8: 0.9, 4: 0.8})
    assert solution.plan.rounds == 4 and tried == [1, 8, 4]
    assert [told.what for told in solution.plan.alternatives] == ["8 round(s)"]
    (solution, _), tried = rounds_of({1: 1.0, 8: 0.99})
    assert solution.plan.rounds == 1 and tried == [1, 8]
    assert [(told.what, told.step_s) for told in solution.plan.alternatives] == [("8 round(s)", 0.99)]
    (solution, _), tried = rounds_of({1: 1.0, 8: BudgetError("no room"), 4: 0.9})
    assert solution.plan.rounds == 4 and tried == [1, 8, 4]
    (solution, _), tried = rounds_of({1: 1.0, 8: SplitError("the loss is outside")})
    assert solution.plan.rounds == 1 and tried == [1, 8]


def test_rounds_that_cannot_gain_are_not_planned_for() -> None:
    (solution, _), tried = rounds_of({1: 1.0}, recomputed=0)
    assert solution.plan.rounds == 1 and tried == [1], "nothing is recomputed"
    (solution, _), tried = rounds_of({1: 1.0, 2: 0.9}, copied_s=0.5)
    assert solution.plan.rounds == 2 and tried == [1, 2], "the sums of 4 rounds alone take longer"


def test_where_nothing_fits_the_least_of_all_is_told() -> None:
    with pytest.raises(BudgetError, match="8 need 40") as refused:
        chosen(finding({1: 90, 2: 95, 4: 60, 8: 40}, 10), 8)
    assert refused.value.smallest_bytes == 40
    with pytest.raises(BudgetError, match=r"1 need 90. The batch is not run as microbatches: not by 2"):
        chosen(finding({1: 90}, 10), 8)
    with pytest.raises(BudgetError, match="4 need 59"):  # 8 are not tried: what is left are no activations
        chosen(finding({1: 90, 2: 60, 4: 59, 8: 1}, 10), 8)


def test_more_parts_of_a_batch_are_no_help_to_the_host() -> None:
    def find(count: int) -> Decision:
        assert count == 1
        raise BudgetError("the host is full", tier="host")

    with pytest.raises(BudgetError, match="the host is full"):
        fewest(find, 8)
