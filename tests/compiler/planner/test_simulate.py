"""The modelled time of a step: by hand for chunks of 100 parameters, and what nobody can be faster than."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from geminifx.compiler.planner import simulate as cost
from geminifx.compiler.planner.simulate import WHOLE_MASTERS_SHARE, StepTime
from geminifx.compiler.planner.timeline import Carrier, Stretch, Timed, Timeline, Transfer
from geminifx.compiler.rates.presets import preset
from geminifx.compiler.rates.rates import ARENA, STREAM_LAUNCH_S, Products, Rates, Updates
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.request import Request
from geminifx.runtime.isa.formats import OwnFormat, StateFormat, TorchFormat
from geminifx.runtime.isa.homes import Homes
from geminifx.runtime.isa.instructions import (
    ACCUMULATE_GRAD,
    ARRIVE,
    AVERAGE,
    DEPART,
    FETCH,
    FINISH_COLLECTIVE,
    OFFLOAD,
    REDUCE,
    RELOAD,
    START_ALL_GATHER,
    START_ALL_REDUCE,
    WAIT,
)
from geminifx.runtime.isa.layout import ChunkLayout, Layout
from geminifx.runtime.isa.mesh import Axis, Mesh
from homes import homes
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizing import NET
from zoo import compiled

# Seconds of a chunk: copied 2, updated on the host 4, by a torch optimizer 10, on the device 1. A state takes 10 on its
# way where its weights stay.
RATES = Rates("a machine of few bytes", *(3 * [Products.of_any_size(1.0)]), memory_bytes_per_s=float("inf"),
              kernel_s=0.0, launch_s=0.0, up_bytes_per_s=100, down_bytes_per_s=100, both_bytes_per_s=100,
              host_params_per_s=25, passing_bytes_per_s=float("inf"), torch_params_per_s=10, device_params_per_s=100,
              network_bytes_per_s=100, network_latency_s=0.0, overlaps=True)  # fmt: skip
ADDED_S = 100 / RATES.host_sums_per_s
BY_SUM = 28 / 26
"""What an update by a float32 sum takes of one by a bfloat16 gradient."""
TWO: list[Timed] = [
    (0, FETCH, 0), (0, WAIT, 0), (1, FETCH, 1), (1, WAIT, 1),
    (2, FETCH, 1), (2, WAIT, 1), (4, REDUCE, 1), (4, FETCH, 0), (4, WAIT, 0), (6, ACCUMULATE_GRAD, 1), (6, REDUCE, 0),
    (6, ACCUMULATE_GRAD, 0),
]  # fmt: skip
"""Two chunks, each of which computes one second in the forward and two in the backward."""
BOTH = frozenset({0, 1})
AT_ONCE = OwnFormat(in_backward=True)


def plan_of(chunks: int, format: StateFormat) -> Plan:
    layout = (ChunkLayout(i, 100, torch.bfloat16, torch.float32, True, ()) for i in range(chunks))
    return replace(Plan(layout=Layout(tuple(layout))), format=format)


def with_bus(rates: Rates, bytes_per_s: float) -> Rates:
    return replace(rates, up_bytes_per_s=bytes_per_s, down_bytes_per_s=bytes_per_s, both_bytes_per_s=bytes_per_s)


def step(instructions: Sequence[Timed], compute_s: float, rates: Rates = RATES) -> StepTime:
    return StepTime(Timeline.at(instructions, compute_s), rates)


def two(format: StateFormat, placed: Homes, rates: Rates = RATES) -> float:
    return step(TWO, 6, rates).seconds(plan_of(2, format), placed)


@pytest.mark.parametrize("format", [TorchFormat(), OwnFormat(), AT_ONCE], ids=["torch's", "ours", "in the backward"])
def test_everything_on_the_device(format: StateFormat) -> None:
    assert two(format, homes(2, BOTH)) == 6 + 2


@pytest.mark.parametrize(
    "format, share",
    [(OwnFormat(), 1), (OwnFormat(moments=1), 18 / 26), (OwnFormat(moments=0), 10 / 26), (OwnFormat(stored="bf16"), 1),
     (OwnFormat(moments=1, stored="bf16"), 14 / 18)],
    ids=str,
)  # fmt: skip
def test_updates_go_by_bytes_and_by_how_moments_are_stored(format: OwnFormat, share: float) -> None:
    rates = replace(RATES, bf16_moments=Updates(50, 200))
    on_device_s = {"exact": 1, "bf16": 0.5}[format.stored] * share
    assert two(format, homes(2, BOTH), rates) == pytest.approx(6 + 2 * on_device_s)
    timing = step(TWO, 6, rates).timing(plan_of(2, format), homes(2, resident=BOTH))
    assert dict(timing.busy_s)["host updates"] == pytest.approx(2 * 4 * on_device_s)


def test_masters_that_are_kept_whole_take_the_host_longer_than_their_bytes_and_have_no_spares_under_float16() -> None:
    split, placed = plan_of(2, AT_ONCE), homes(2, resident=BOTH)

    def of(dtype: torch.dtype, format: OwnFormat = AT_ONCE) -> Plan:
        layout = tuple(replace(chunk, dtype=dtype) for chunk in split.layout.chunks)
        return replace(split, layout=Layout(layout), format=format)

    def host_s(plan: Plan) -> float:
        return dict(step(TWO, 6).timing(plan, placed).busy_s)["host updates"]

    assert host_s(of(torch.float16)) == pytest.approx(host_s(split) * 30 / 26 / WHOLE_MASTERS_SHARE)
    assert host_s(of(torch.float32)) == pytest.approx(host_s(split) * 28 / 26 / WHOLE_MASTERS_SHARE)
    spared = tuple(replace(home, spare=True) for home in placed)
    for dtype, has_spare in ((torch.bfloat16, True), (torch.float32, True), (torch.float16, False)):
        plan = of(dtype, OwnFormat())
        found = [plan.format.has_spare(chunk, home) for chunk, home in plan.placed(spared)]
        assert found == [has_spare] * 2


def test_gradients_that_are_added_up_are_updated_with_once() -> None:
    assert two(OwnFormat(accumulate=2), homes(2, BOTH)) == pytest.approx(2 * 6 + 2 * BY_SUM)


def test_sums_take_time_where_they_are_made() -> None:
    rates = replace(RATES, memory_bytes_per_s=2000)
    twice = OwnFormat(accumulate=2)
    on_device_s = two(twice, homes(2, BOTH), rates)
    assert on_device_s == pytest.approx(2 * (6 + 2 * 0.5) + 2 * BY_SUM), "of each chunk half a second"
    # The second chunk's gradient lands at 14, in the second run, the first one's at 16: the worker adds and updates one
    # after the other, and the first chunk's weights, which come up last, are read first.
    late = replace(twice, in_backward=True)
    assert two(late, homes(2, resident=BOTH), rates) == pytest.approx(14 + 2 * (ADDED_S + 4 * BY_SUM) + 2)


def test_with_spares_the_host_begins_in_the_backward_and_weights_come_after_the_step() -> None:
    spared = tuple(replace(home, spare=True) for home in homes(2, resident=BOTH))
    # The second chunk's is made at 10 and comes up from then on, the first one's at 14 and at 16.
    assert two(OwnFormat(), spared) == 8 + 8
    quick = replace(RATES, host_params_per_s=100)
    # Made at 7 and 9: what was made before step(), at 8, comes up from there on, the second chunk's behind the first.
    assert two(OwnFormat(), spared, quick) == 8 + 3 + 1


@pytest.mark.parametrize(
    "format, seconds",
    [
        # The last gradient lands at 8, is the worker's at 10, new at 14, on the device at 16: eight seconds late.
        (AT_ONCE, 8 + 8),
        # Landed at 8, the first chunk's is new at 12 and on the device at 14, the second's at 18 instead of at 15.
        (OwnFormat(), 8 + 6 + 3),
        # Twice as much compute and as many gradients, and one update of each.
        (OwnFormat(accumulate=2), 16 + 2 * 4 * BY_SUM + 2 - 1 + ADDED_S),
        # Both weights come before they are read, both gradients are waited for, then both updates.
        (TorchFormat(), 8 + 2 * 2 + 2 * 10),
    ],
    ids=["in the backward", "ours", "accumulated", "torch's"],
)
def test_the_next_forward_waits_for_the_host(format: StateFormat, seconds: float) -> None:
    assert two(format, homes(2, resident=BOTH)) == pytest.approx(seconds)


def test_the_first_chunk_on_the_device_hides_the_other_s_update() -> None:
    assert two(AT_ONCE, homes(2, frozenset({0}), BOTH)) == 6 + 1 + 4, "the second's is new at 10, here at 12, read at 8"


def test_the_worker_takes_what_the_next_forward_reads_first() -> None:
    """All gradients come at once; the chunks are new at 10, 14 and 18, when they are read one second after another."""
    rates, chunks = with_bus(RATES, float("inf")), (0, 1, 2)
    program = [(i, what, i) for i in chunks for what in (FETCH, WAIT)] + [(6, REDUCE, i) for i in (2, 1, 0)]
    for format in (AT_ONCE, OwnFormat()):
        found = step(program, 6, rates).seconds(plan_of(3, format), homes(3, resident=frozenset(chunks)))
        assert found == 3 * 4 + 1 + 3


@pytest.mark.parametrize(
    "format, seconds",
    [
        (AT_ONCE, 4 + 2 * 10),  # from the first gradient on the bus is busy, and then compute, up to it again
        (replace(AT_ONCE, accumulate=2), 6 + 6 + 2 + 2 * 14 + 2),  # from the second run's on, with sums of 4 bytes, and
        # beside the other gradient's copy
        (OwnFormat(), 2 * 12 + 1 + 2 + 2 + 2),  # after step(), with gradients; the second chunk waits for both
    ],
    ids=["in the backward", "accumulated", "ours"],
)
def test_states_travel(format: StateFormat, seconds: float) -> None:
    found = two(format, homes(2, resident=BOTH, streamed=BOTH))
    assert found == pytest.approx(seconds, abs=5 * STREAM_LAUNCH_S)


def test_a_state_that_travels_costs_its_launches() -> None:
    launched = Stretch(device_s=1, launching_s=3, done_s=3)
    program = Timeline([(launched, REDUCE, 1), (launched, REDUCE, 0)], Stretch())
    time = StepTime(program, with_bus(RATES, float("inf")))
    placed = homes(2, resident=BOTH, streamed=BOTH)
    assert time.seconds(plan_of(2, AT_ONCE), placed) == pytest.approx(6 + 2 * STREAM_LAUNCH_S)


def test_two_gradients_wait_on_the_device_for_their_states_and_a_third_one_does_not() -> None:
    chunks = range(4)
    program = [(4, what, i) for i in reversed(chunks) for what in (REDUCE, ACCUMULATE_GRAD)]
    placed = homes(4, resident=chunks, streamed=chunks)
    found = step(program, 104, RATES).seconds(plan_of(4, AT_ONCE), placed)
    assert found == pytest.approx(24 + 100, abs=5 * STREAM_LAUNCH_S)


@pytest.mark.parametrize("passing, seconds", [(2200, 8 + 8 + 1), (220, 8 + 12)])
def test_what_travels_slows_the_worker_and_is_slowed_by_gradients_and_weights(passing: float, seconds: float) -> None:
    """The second chunk's state travels from 4 to 14 and passes through the host's memory, to where the first one's
    gradient goes at 6, for two seconds, and from where its weights come at 12, so that the second is four seconds late
    where they do not come after that."""
    rates = replace(RATES, passing_bytes_per_s=passing)
    found = two(AT_ONCE, homes(2, resident=BOTH, streamed=frozenset({1})), rates)
    assert found == pytest.approx(seconds, abs=5 * STREAM_LAUNCH_S)


def test_weights_that_do_not_stay_come_one_behind_the_other_from_their_fetches_on() -> None:
    nowhere = homes(2)
    late = step([(0, FETCH, 0), (0, WAIT, 0), (0, FETCH, 1), (1, WAIT, 1)], 2, RATES)
    assert late.seconds(plan_of(2, AT_ONCE), nowhere) == 2 + 2 + 1
    early = step([(0, FETCH, 0), (0, FETCH, 1), (0, WAIT, 0), (0, WAIT, 1)], 2, RATES)
    assert early.seconds(plan_of(2, AT_ONCE), nowhere) == 2 + 2 + 2


def test_new_weights_are_fetched_when_the_host_has_them() -> None:
    once = step([(0, FETCH, 0), (0, WAIT, 0), (3, REDUCE, 0)], 3, RATES)
    assert (
        once.seconds(
            plan_of(1, AT_ONCE),
            homes(
                1,
            ),
        )
        == 3 + 2 + 4 + 2
    )


def test_where_nothing_overlaps_every_copy_is_waited_for() -> None:
    rates = with_bus(ARENA, 100)
    assert two(AT_ONCE, homes(2, resident=BOTH), rates) == 6 + 2 * 2 + 2 * 2
    assert two(TorchFormat(), homes(2, resident=BOTH), rates) == 6 + 2 * 2 + 2 * 2


def test_copies_slow_each_other_where_both_directions_are_busy() -> None:
    """The second chunk's gradient goes down from 4 to 5; the first one's weights, which come from 4 on, are half there
    by then, and take half a second more."""
    alone = with_bus(replace(RATES, host_params_per_s=float("inf")), 200)
    placed = homes(2, resident=frozenset({1}))
    slower_s = two(AT_ONCE, placed, replace(alone, both_bytes_per_s=100)) - two(AT_ONCE, placed, alone)
    assert slower_s == 0.5


def test_a_chain_by_hand_and_who_is_busy_in_it() -> None:
    """Two chunks, both copied for each use and updated on the host.

    Chunk 1's gradient is complete at 0 and on the host at 2. Chunk 0 is copied until 2, its backward ends at 4, its
    gradient lands at 6, which ends the step. The host updates chunk 1 from 2 to 6 and chunk 0 until 10. Then chunk 0 is
    copied until 12 and computes until 13, chunk 1 is copied until 15, computes until 16, is copied again until 18, and
    has its gradient at 20.
    """
    timing = step(TWO, 6).timing(plan_of(2, AT_ONCE), homes(2))
    assert timing.step_s == 20
    assert dict(timing.busy_s) == {"device": 6, "host updates": 8, "bus up": 8, "bus down": 4}
    assert [seconds for _, seconds in timing.busy_s] == [8, 8, 6, 4]
    on_device = step(TWO, 6).timing(plan_of(2, AT_ONCE), homes(2, BOTH))
    assert dict(on_device.busy_s) == {"device": 6 + 2} and on_device.step_s == 8
    torchs = step(TWO, 6).timing(plan_of(2, TorchFormat()), homes(2, resident=BOTH))
    assert dict(torchs.busy_s)["host updates"] == 2 * 10
    streamed = step(TWO, 6).timing(plan_of(2, AT_ONCE), homes(2, resident=BOTH, streamed=BOTH))
    assert dict(streamed.busy_s)["bus up"] == dict(streamed.busy_s)["bus down"] == 2 * 10


def test_launches_are_busy_too() -> None:
    program = replace(Timeline.at(TWO, 6), rest=Stretch(device_s=0, launching_s=5.5, done_s=5.5))
    timing = StepTime(program, RATES).timing(plan_of(2, OwnFormat(accumulate=2)), homes(2, BOTH))
    assert dict(timing.busy_s) == pytest.approx({"device": 2 * 6 + 2 * BY_SUM, "launches": 2 * 5.5})


def test_what_the_device_does_beside_the_program_hides_behind_launches() -> None:
    """Of a chunk's 3 seconds the device computes for one and waits for launches in the others; updates take one."""
    launched = Stretch(device_s=1, launching_s=3, done_s=3)
    program = Timeline([(launched, REDUCE, 1), (launched, REDUCE, 0)], Stretch())
    assert StepTime(program, RATES).seconds(plan_of(2, AT_ONCE), homes(2, BOTH)) == 6
    slow = replace(RATES, device_params_per_s=25)
    assert StepTime(program, slow).seconds(plan_of(2, AT_ONCE), homes(2, BOTH)) == 2 * (1 + 4)


def test_while_the_thread_waits_for_the_host_it_launches_nothing() -> None:
    """A gradient takes 2 seconds to land, and the host's update of it 4; then come 5 seconds of launches, in which the
    new weights arrive."""
    launched = Stretch(device_s=1, launching_s=5, done_s=5)
    program = Timeline([(Stretch(), FETCH, 0), (Stretch(), WAIT, 0), (launched, REDUCE, 0)], Stretch())
    assert StepTime(program, RATES).seconds(plan_of(1, AT_ONCE), homes(1)) == pytest.approx(2 + 4 + 5)


@pytest.mark.parametrize("overlaps, seconds", [(True, 5), (False, 6)], ids=["beside", "in turn"])
def test_an_exchange_runs_beside_compute_until_it_is_waited_for(overlaps: bool, seconds: float) -> None:
    """Two of two seconds each, one behind the other from 0 on; a second of compute in front of each end."""
    rates = replace(RATES, network_bytes_per_s=100, overlaps=overlaps)
    start, end = START_ALL_REDUCE, FINISH_COLLECTIVE
    first, second = (Transfer(number, Carrier.NETWORK, 200) for number in (0, 1))
    program: list[Timed] = [(0, start, first), (0, start, second), (1, end, 0), (1, end, 1)]
    timing = step(program, 2, rates).timing(plan_of(1, AT_ONCE), homes(1))
    assert timing.step_s == seconds and dict(timing.busy_s)["network"] == 4


def test_what_is_averaged_is_waited_for_at_once() -> None:
    rates = replace(RATES, network_latency_s=3.0)
    program: list[Timed] = [(1, AVERAGE, Transfer(0, Carrier.NETWORK, 100))]
    assert step(program, 2, rates).seconds(plan_of(1, AT_ONCE), homes(1)) == 2 + 3 + 1


@pytest.mark.parametrize("carrier, name", [(Carrier.UP, "bus up"), (Carrier.DOWN, "bus down")])
def test_whatever_an_instruction_copies_is_on_the_bus(carrier: Carrier, name: str) -> None:
    program: list[Timed] = [(0, START_ALL_GATHER, Transfer(0, carrier, 300)), (1, FINISH_COLLECTIVE, 0)]
    timing = step(program, 2).timing(plan_of(1, AT_ONCE), homes(1))
    assert timing.step_s == 3 + 1 and dict(timing.busy_s)[name] == 3


def divided(zero: int, format: StateFormat = AT_ONCE) -> Plan:
    """Two chunks of 100 parameters among four processes: 150 bytes received to gather one, 300 to add up and scatter
    its gradient in float32, 600 to add it up everywhere."""
    mesh = Mesh((Axis("data", 4, "data"),))
    shards = 4 if zero else 1
    layout = (
        ChunkLayout(i, 100, torch.bfloat16, torch.float32, True, (), reduced_over=("data",), shards=shards)
        for i in range(2)
    )
    return replace(Plan(Request(zero=zero), Layout(tuple(layout)), mesh), format=format)


def test_gradients_are_added_up_over_processes_on_their_way() -> None:
    """Chunk 1's from 4 to 10, where it is waited for, then chunk 0's until 16."""
    timing = step(TWO, 6).timing(divided(0), homes(2, BOTH))
    assert dict(timing.busy_s)["network"] == 2 * 6
    assert timing.step_s == 16


def test_weights_in_shards_are_gathered_for_each_use_or_once_where_they_stay() -> None:
    passing = step(TWO, 6).timing(divided(3), homes(2, BOTH))
    assert dict(passing.busy_s)["network"] == pytest.approx(4 * 1.5 + 2 * 3)
    stays = step(TWO, 6).timing(divided(2), homes(2, BOTH, BOTH))
    assert dict(stays.busy_s)["network"] == pytest.approx(2 * 1.5 + 2 * 3)


# -- any residency -----------------------------------------------------------------------------------------

MANY = range(8)


def one_ahead() -> list[Timed]:
    """Eight chunks, each of which computes one second in the forward and two in the backward."""
    order, begins = [*MANY, *reversed(MANY)], [*range(8), *range(8, 24, 2)]
    found: list[Timed] = [(0, FETCH, 0)]
    for at, chunk, following in zip(begins, order, [*order[1:], None], strict=True):
        found.append((at, WAIT, chunk))
        if following is not None:
            found.append((at, FETCH, following))
        if at >= 8:
            found += [(at + 2, ACCUMULATE_GRAD, chunk + 1)] if chunk < 7 else []
            found.append((at + 2, REDUCE, chunk))
    return [*found, (24, ACCUMULATE_GRAD, 0)]


STEP = one_ahead()
SOME = st.sets(st.sampled_from(MANY)).map(frozenset)
SPEED = st.sampled_from([10.0, 100.0, 1000.0])


@settings(max_examples=500)
@given(st.sampled_from([TorchFormat(), OwnFormat(), AT_ONCE]), SOME, SOME, SOME, SPEED, SPEED, st.booleans())
def test_no_step_is_faster_than_the_busiest_or_slower_than_all_in_turn(
    format: StateFormat, masters: frozenset[int], weights: frozenset[int], streamed: frozenset[int],
    bus: float, host: float, overlaps: bool,
) -> None:  # fmt: skip
    streamed = streamed - masters if format.beside else frozenset()
    rates = replace(RATES, host_params_per_s=host, torch_params_per_s=host, overlaps=overlaps)
    rates = with_bus(rates, bus)
    timing = step(STEP, 24, rates).timing(plan_of(8, format), homes(8, masters, weights, streamed))
    found = timing.step_s
    assert all(seconds <= found * (1 + 1e-9) for _, seconds in timing.busy_s), timing
    compute_s = 24 + len(masters)
    host_s = 100 * len(frozenset(MANY) - masters - streamed) / host
    copies = sum(1 if i in weights else 2 for i in frozenset(MANY) - masters - (streamed & weights))
    travelling = sum(1000 + 200 * (i not in weights) + 200 * (format != AT_ONCE) for i in streamed)
    up_s = (200 * copies + travelling) / bus
    assert max(compute_s, host_s, up_s) <= found * (1 + 1e-9)
    down_s = 200 * 8 / bus
    all_s = compute_s + host_s + (200 * 2 * 8 + travelling) / bus + down_s + (1 + STREAM_LAUNCH_S) * len(streamed)
    assert found <= all_s * (1 + 1e-9)


@settings(max_examples=200)
@given(st.sampled_from([TorchFormat(), OwnFormat(), AT_ONCE]), SOME, SOME, SOME, SPEED, SPEED)
def test_the_last_step_on_the_clock_is_like_all_that_would_follow(
    format: StateFormat, masters: frozenset[int], weights: frozenset[int], streamed: frozenset[int],
    bus: float, host: float,
) -> None:  # fmt: skip
    rates = with_bus(replace(RATES, host_params_per_s=host), bus)
    time = step(STEP, 24, rates)
    placed = homes(8, masters, weights, streamed if format.beside else frozenset())
    found = time.seconds(plan_of(8, format), placed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cost, "STEPS", 9)
        assert time.seconds(plan_of(8, format), placed) == pytest.approx(found)


def test_a_program_s_instructions_are_found_between_its_compute() -> None:
    model = compiled(NET, precision="bf16")
    time = StepTime.of(model.session.last["training"].flat, model.plan, preset("h100-sxm"))
    reduced = [chunk for _, what, chunk in time.program.instructions if what is REDUCE]
    assert sorted(reduced) == list(range(len(model.plan.layout.chunks)))
    at = [at_s for at_s, _, _ in time.program.timed]
    assert at == sorted(at) and 0 < at[0] < at[-1] <= time.program.compute_s


# -- activations that go to the host and back -------------------------------------------------------------


def gone(number: int, num_bytes: int = 200) -> Transfer:
    return Transfer(number, Carrier.DOWN, num_bytes)


def back(number: int, num_bytes: int = 200) -> Transfer:
    return Transfer(number, Carrier.UP, num_bytes)


def offloading(instructions: list[Timed], rates: Rates = RATES) -> float:
    """Seconds of six seconds of compute, of which a copy of 100 bytes has one."""
    return StepTime(Timeline.at(instructions, 6), rates).seconds(plan_of(2, OwnFormat()), homes(2, BOTH))


def test_copies_of_activations_are_waited_for_where_they_end_late() -> None:
    early: list[Timed] = [(0, OFFLOAD, gone(0)), (2, DEPART, 0), (3, RELOAD, back(1)), (5, ARRIVE, 1)]
    late: list[Timed] = [(0, OFFLOAD, gone(0)), (1, DEPART, 0), (3, RELOAD, back(1)), (4, ARRIVE, 1)]
    assert offloading(early) == 6
    assert offloading(late) == 6 + 1 + 1
    assert offloading(early, rates=replace(RATES, overlaps=False)) == 6 + 2 + 2


def test_copies_of_one_direction_come_one_after_the_other() -> None:
    both: list[Timed] = [(0, OFFLOAD, gone(0)), (0, OFFLOAD, gone(1)), (2, DEPART, 0), (3, DEPART, 1)]
    assert offloading(both) == 6 + 1, "the second has left at 4"
    there_and_back: list[Timed] = [
        (0, OFFLOAD, gone(0)), (2, DEPART, 0), (2, OFFLOAD, gone(1)), (2, RELOAD, back(2)), (4, ARRIVE, 2),
        (4, DEPART, 1),
    ]  # fmt: skip
    assert offloading(there_and_back) == 6, "both directions at once"


def test_activations_share_the_bus_with_weights() -> None:
    there_and_back = [(0, OFFLOAD, gone(0)), (2, DEPART, 0), (2, RELOAD, back(1)), (6, ARRIVE, 1)]
    program: list[Timed] = sorted([*there_and_back, (2.5, FETCH, 0), (4, WAIT, 0)], key=lambda item: item[0])
    time = StepTime(Timeline.at(program, 6), RATES).seconds(plan_of(2, AT_ONCE), homes(2, frozenset({1})))
    assert time == 6 + 2, "the weights come behind the activation"
