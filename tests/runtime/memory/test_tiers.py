"""Tiers and the meter: every byte is counted once, for as long as it lives, and the limit is hard."""

import threading
from collections.abc import Callable

import pytest
import torch
from geminifx.runtime.isa.errors import BudgetError
from geminifx.runtime.isa.torch_private import dispatch_modes
from geminifx.runtime.memory import tiers
from geminifx.runtime.memory.tiers import MemoryMeter, Tier, metering
from hypothesis import given
from hypothesis import strategies as st
from interrupts import Failure, in_lines


def test_what_is_booked_is_exchanged_and_counts_at_the_peak() -> None:
    tier = Tier("device", 100)
    tier.book("a", 60)
    tier.book("b", 40)
    tier.book("a", 0)
    tier.book("b", 30)
    tier.book("c", 10)
    assert (tier.used_bytes, tier.peak_bytes) == (40, 100) and tier.booked("b") == 30


def test_more_than_the_limit_changes_nothing_and_says_why() -> None:
    tier = Tier("host", 100)
    tier.book("a", 60)
    with pytest.raises(BudgetError, match="host tier is full: the cake needs 41 bytes, 60 of 100") as caught:
        tier.book("b", 41, "the cake")
    assert caught.value.smallest_bytes == 101
    with pytest.raises(BudgetError, match="host tier is full: a needs 41 bytes, 60 of 100"):
        tier.book("a", 101)
    assert (tier.used_bytes, tier.peak_bytes) == (60, 60)
    tier.book("what just fits", 40)


def test_a_patient_tier_waits_for_what_another_thread_lets_go() -> None:
    tier = Tier("device", 100, patience_s=60.0)
    tier.book("a", 60)
    looked = threading.Event()
    fits = tier._fits

    def look(num_bytes: int) -> bool:
        found = fits(num_bytes)
        looked.set()
        return found

    tier._fits = look  # type: ignore[method-assign]
    thread = threading.Thread(target=lambda: looked.wait(10) and tier.book("a", 0))
    thread.start()
    tier.book("b", 60)
    thread.join()
    assert (tier.used_bytes, tier.peak_bytes) == (60, 60)


def test_no_limit_is_no_limit() -> None:
    tier = Tier("host")
    tier.book("everything", 10**18)
    assert tier.peak_bytes == 10**18


@given(st.lists(st.integers(1, 50), max_size=30))
def test_a_tier_never_holds_more_than_its_limit(amounts: list[int]) -> None:
    tier, held = Tier("device", 100), 0
    for i, amount in enumerate(amounts):
        try:
            tier.book(str(i), amount)
            held += amount
        except BudgetError:
            assert held + amount > 100
        assert tier.used_bytes == held <= 100


# -- the meter ---------------------------------------------------------------------------------------------

KILO = 1000  # floats, of four bytes each


def test_a_tensor_counts_while_it_lives() -> None:
    with MemoryMeter() as meter:
        a = torch.ones(KILO)
        b = a + 1
        assert meter.used_bytes == 8 * KILO
        del a
        assert meter.used_bytes == 4 * KILO
        b = b * 2  # both exist while it is computed
        assert (meter.used_bytes, meter.peak_bytes) == (4 * KILO, 8 * KILO)
    del b
    assert meter.used_bytes == 0, "what dies after the meter closed is given back, too"


def test_views_and_writes_in_place_are_free() -> None:
    with MemoryMeter() as meter:
        a = torch.zeros(KILO)
        view = a.view(10, 100).t()[2:4]
        pieces = a.split(100)
        a.add_(1)
        torch.add(a, 1, out=a)
        assert meter.used_bytes == meter.peak_bytes == 4 * KILO
        del a, view
        assert meter.used_bytes == 4 * KILO, "a view keeps the whole storage"
        del pieces
        assert meter.used_bytes == 0


def test_what_existed_before_is_not_the_meters() -> None:
    before = torch.ones(KILO)
    with MemoryMeter() as meter:
        before.mul_(2)
        view = before[:10]
        assert meter.used_bytes == 0
        result = view + before[:10]
        assert meter.used_bytes == 40
        del result, view


def test_several_results_of_one_operator_are_all_counted() -> None:
    with MemoryMeter() as meter:
        values, positions = torch.zeros(KILO).max(dim=0, keepdim=True)
        del positions
        assert meter.used_bytes == 4
        del values
        sorted_values = torch.zeros(KILO, dtype=torch.float64).sort()
        assert meter.used_bytes == 2 * 8 * KILO
        del sorted_values


def test_addresses_that_are_used_again_are_counted_again() -> None:
    with MemoryMeter() as meter:
        for _ in range(50):
            a = torch.empty(KILO)
            assert meter.used_bytes == 4 * KILO
            del a
            assert meter.used_bytes == 0


def test_autograds_saved_tensors_count_until_the_backward_frees_them() -> None:
    w = torch.ones(KILO, requires_grad=True)
    with MemoryMeter() as meter:
        loss = (w.exp() * 2).sum()
        held = meter.used_bytes
        loss.backward()
        del loss
        assert held == 4 * KILO + 4, "exp saves its result; the product is gone"
        assert meter.used_bytes == 4 * KILO, "the gradient"


def test_a_storage_beyond_the_limit_raises_out_of_the_operator() -> None:
    tier = Tier("device", 10 * KILO)
    with MemoryMeter(tier) as meter:
        a = torch.ones(KILO)
        b = torch.ones(KILO)
        with pytest.raises(BudgetError, match=r"aten\.add"):
            a + b
        assert meter.used_bytes == 8 * KILO
        del b
        a + 1
    assert tier.peak_bytes == 8 * KILO


@given(st.lists(st.tuples(st.sampled_from(["make", "view", "drop"]), st.integers(0, 9)), max_size=25))
def test_used_bytes_are_those_of_the_living_storages(actions: list[tuple[str, int]]) -> None:
    with MemoryMeter() as meter:
        held: list[torch.Tensor] = []
        for action, number in actions:
            if action == "make":
                held.append(torch.zeros(number + 1))
            elif held and action == "view":
                held.append(held[number % len(held)].view(-1)[:1])
            elif held:
                held.pop(number % len(held))
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
            assert meter.used_bytes == sum(storages.values())
        held.clear()
        assert meter.used_bytes == 0


# -- Ctrl-C ------------------------------------------------------------------------------------------------


def lines_of_tiers(work: Callable[[], object], interrupted: int | None = None) -> int:
    """How many lines of the module `work` runs; Ctrl-C falls into the one with this number, as it falls into any."""
    failure = Failure()
    with failure.armed(interrupted), in_lines({tiers.__file__}, failure.pass_by):
        work()
    return failure.count


def test_ctrl_c_is_heard_and_no_bytes_stay_booked() -> None:
    """Python swallows what is raised in a weak reference's callback."""

    def work() -> None:
        with metering(meter):
            a = torch.ones(KILO)
            b = a + 1
            del a
            torch.ones(KILO)
            del b

    meter = MemoryMeter()
    number = lines_of_tiers(work)
    assert number > 20
    for line in range(number):
        with pytest.raises(KeyboardInterrupt):
            lines_of_tiers(work, line)
        assert meter.used_bytes == 0 and not dispatch_modes(), f"after line {line}"
    with meter:
        kept = torch.ones(KILO)
        assert meter.used_bytes == kept.nbytes
