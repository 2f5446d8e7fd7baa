"""The store of our own optimizer under a hand-written program: whom it waits for, and what it keeps."""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from geminifx.runtime.isa.errors import BudgetError, StateError
from geminifx.runtime.isa.formats import OwnFormat
from geminifx.runtime.isa.homes import Home, Where
from geminifx.runtime.isa.layout import ChunkLayout, Layout, Slot
from geminifx.runtime.kernels.update_rules import SgdHyper
from geminifx.runtime.machine import Machine
from geminifx.runtime.memory.chunks import ChunkStore, State
from geminifx.runtime.memory.hardware import Hardware
from geminifx.runtime.memory.stats import Stats
from geminifx.runtime.memory.tiers import Tier
from geminifx.runtime.optimizer.own_store import OwnStore
from late_copies import ENGINES
from torch import Tensor, nn

pytestmark = [pytest.mark.usefixtures("copies"), pytest.mark.parametrize("copies", ENGINES, indirect=True)]

PLACES = {
    "device": 2 * (Home(Where.DEVICE),),
    "host": 2 * (Home(),),
    "host, resident": 2 * (Home(resident=True),),
    "host, spare": (Home(spare=True), Home(resident=True, spare=True)),
    "streamed": 2 * (Home(Where.STREAMED),),
    "streamed, resident": 2 * (Home(Where.STREAMED, resident=True),),
}
EVERYWHERE = pytest.mark.parametrize("where", PLACES)


class Two:
    """Two chunks of two parameters each, trained by plain SGD of rate 1: weights minus gradients."""

    def __init__(self, where: str, limits: tuple[int | None, int | None] = (None, None), **declared: Any) -> None:
        self.names = ["a", "b", "c", "d"]
        values = [torch.arange(4.0) + 10 * i for i in range(4)]
        self.parameters = {name: nn.Parameter(v.clone()) for name, v in zip(self.names, values, strict=True)}
        slots = (Slot("a", 0, (4,)), Slot("b", 64, (4,))), (Slot("c", 0, (4,)), Slot("d", 64, (4,)))
        chunks = tuple(ChunkLayout(i, 128, torch.float32, torch.float32, True, s) for i, s in enumerate(slots))
        self.tiers = Tier("device", limits[0]), Tier("host", limits[1])
        store = ChunkStore(Layout(chunks), self.parameters)
        hardware = Hardware(torch.device("cpu"), *self.tiers)
        self.store = OwnStore(store, hardware, OwnFormat(moments=0, **declared), Stats())
        self.machine = Machine(self.store)
        self.store.updater.schedule = lambda asked: [SgdHyper(lr=1.0) for _ in asked]
        self.store.check_groups = lambda: None
        self.store.place(PLACES[where])

    def backward(self, value: float, slots: tuple[int, ...] = (0, 1), chunks: tuple[int, ...] = (1, 0)) -> None:
        """What a program does with gradients that are all `value`."""
        self.store.begin_backward()
        for index in chunks:
            gradients = self.machine.gradients(128, torch.float32)
            for slot in slots:
                self.machine.put(gradients, 64 * slot, torch.full((4,), value))
            self.machine.reduce(gradients, index, list(slots))
            self.machine.accumulate_grad(gradients, index, list(slots))
        self.store.end_backward()

    def step(self, scale: float | Tensor = 1.0) -> None:
        """What the optimizer does."""
        self.store.update_all(scale)

    def weights(self, index: int) -> Tensor:
        """The chunk as a program sees it."""
        weights = self.machine.wait(self.machine.fetch(index, 128, torch.float32), index).clone()
        self.machine.release(weights, index)
        return weights


@EVERYWHERE
def test_a_program_sees_weights_after_their_update_and_padding_stays_zero(where: str) -> None:
    two = Two(where)
    for step in range(1, 4):
        two.backward(1.0)
        two.store.update_all(1.0)
        for index in (0, 1):
            weights = two.weights(index)
            assert torch.equal(weights[:4], torch.arange(4.0) + 20 * index - step)
            assert not weights[4:64].any() and not weights[68:].any()
    assert torch.equal(two.parameters["d"], torch.arange(4.0) + 30 - 3)
    resting = [State.HOLD if home.resident or home.on_device else State.FREE for home in PLACES[where]]
    assert [chunk.state for chunk in two.machine.chunks] == resting


def test_a_fetch_during_an_update_brings_what_the_update_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is issued by the worker, when the weights are new; the launching thread waits only in `wait`."""
    two = Two("host")
    waiting: list[Callable[[], Any]] = []
    submit = two.store.worker.submit

    def delayed(priority: int, name: str, work: Callable[[], Any], *after: Any) -> Any:
        ticket = submit(priority, name, lambda: None, *after)
        two.store.worker.wait(ticket, name)
        ticket._done.clear()
        waiting.append(lambda: ticket.complete(work()))
        return ticket

    monkeypatch.setattr(two.store.worker, "submit", delayed)
    two.backward(1.0)
    two.store.update_all(1.0)
    fetched = two.machine.fetch(0, 128, torch.float32)
    fetched.fill_(-1)
    assert len(waiting) == 2
    waiting[0]()
    weights = two.machine.wait(fetched, 0)
    assert weights is fetched and torch.equal(weights[:4], torch.arange(4.0) - 1)
    waiting[1]()


def updates_of(two: Two, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Filled with one value per update of a chunk, as they are made: whether it was made in the spare."""
    made: list[bool] = []
    update = two.store.updater.kernels.update

    def noted(layout: Any, part: Any, gradient: Any, elements: Any, into: Any = None) -> None:
        made.append(into is not None)
        update(layout, part, gradient, elements, into)

    monkeypatch.setattr(two.store.updater.kernels, "update", noted)
    return made


def chunks_are(two: Two, values: list[float]) -> None:
    assert [two.weights(index)[0].item() for index in (0, 1)] == values


def test_a_fetch_that_was_given_up_during_an_update_is_not_copied_any_more() -> None:
    """Its memory may be the next step's by then."""
    two, opened = Two("host"), threading.Event()
    two.backward(1.0)
    two.store.worker.submit(-1, "the gate", lambda: None if opened.wait(10) else pytest.fail("never opened"))
    two.step()
    fetched = two.machine.fetch(0, 128, torch.float32)
    two.machine.abort()
    fetched.fill_(7)
    opened.set()
    two.store.finish()
    two.store.copies.join()
    assert fetched.eq(7).all()
    assert torch.equal(two.weights(0)[:4], torch.arange(4.0) - 1)


def test_an_update_on_the_host_waits_for_whoever_still_reads_the_old_weights() -> None:
    """They are read after the backward, so that gradients that have landed tell nothing of it. `copies` fails where
    what is read was overwritten."""
    two = Two("host")
    for step in range(1, 4):
        two.backward(1.0)
        assert two.weights(0)[0].item() == 1 - step
        two.step()
        two.store.finish()


def test_an_update_that_the_backward_began_is_the_step_s(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Two("host, spare")
    made = updates_of(two, monkeypatch)
    for step in range(1, 4):
        two.backward(1.0)
        chunks_are(two, [1.0 - step, 21.0 - step])  # until step() says so
        two.step(1.0)
        chunks_are(two, [0.0 - step, 20.0 - step])
        assert made == [True, True] * step


@pytest.mark.parametrize("change", ["clipped", "gradient", "rate", "weights", "another backward", "dropped"])
def test_an_update_that_the_backward_began_is_made_anew_where_the_step_is_another(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = Two("host, spare")
    made = updates_of(two, monkeypatch)
    two.backward(1.0)
    scale, expected = torch.tensor(1.0), [-1.0, 19.0]
    if change == "clipped":
        scale, expected = torch.tensor(0.5), [-0.5, 19.5]
    elif change == "gradient":
        for parameter in two.parameters.values():
            parameter.grad *= 2
        expected = [-2.0, 18.0]
    elif change == "rate":
        two.store.updater.schedule = lambda asked: [SgdHyper(lr=3.0) for _ in asked]
        expected = [-3.0, 17.0]
    elif change == "weights":
        with two.store.writable(), torch.no_grad():
            two.parameters["a"].copy_(torch.full((4,), 7.0))
        expected = [6.0, 19.0]
    elif change == "another backward":
        two.backward(1.0)
        expected = [-2.0, 18.0]
    else:
        two.store.zero_grad(set_to_none=True)
        two.backward(3.0)
        expected = [-3.0, 17.0]
    two.step(scale)
    chunks_are(two, expected)
    assert change != "clipped" or sorted(made) == [False, False, True, True]


def test_a_loop_that_always_clips_soon_has_no_updates_begun_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Two("host, spare")
    made, begun = updates_of(two, monkeypatch), []
    for step in range(12):
        del made[:]
        two.backward(1.0)
        two.step(torch.tensor(0.5 if step < 10 else 1.0))
        two.store.finish()
        begun.append(any(made))
    assert [step for step, early in enumerate(begun) if early] == [0, 2, 5, 10, 11]
    chunks_are(two, [-7.0, 13.0])


def test_the_end_of_a_step_does_not_wait_for_updates_that_the_backward_began() -> None:
    two, opened = Two("host", in_backward=True), threading.Event()
    two.store.worker.submit(-1, "the gate", lambda: None if opened.wait(10) else pytest.fail("never opened"))
    two.backward(1.0)
    two.store.update_all(1.0)
    tickets = [two.store.tickets.get(index) for index in (0, 1)]
    assert [ticket is not None and ticket.is_done(0) for ticket in tickets] == [False, False]
    opened.set()
    assert [two.weights(index)[0].item() for index in (0, 1)] == [-1.0, 19.0]


@EVERYWHERE
@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_add_up_over_backwards_that_reach_different_parameters(where: str, accumulate: int) -> None:
    two = Two(where, accumulate=accumulate)
    two.backward(1.0, slots=(0,))
    two.backward(2.0, slots=(0, 1), chunks=(0,))
    two.backward(4.0, slots=(1,))
    found = {name: p.grad for name, p in two.parameters.items()}
    expected = {"a": 3.0, "b": 6.0, "c": 1.0, "d": 4.0}
    assert {name: None if g is None else g[0].item() for name, g in found.items()} == expected
    norm = two.store.held.norm()
    assert norm.item() == pytest.approx(torch.tensor([3.0, 6, 1, 4] * 4).norm().item())
    two.store.update_all(0.5)
    assert [two.parameters[name][0].item() for name in two.names] == [-1.5, 7.0, 19.5, 28.0]
    assert all(p.grad is None for p in two.parameters.values())


@EVERYWHERE
def test_norms_that_are_measured_need_no_sums(where: str) -> None:
    two = Two(where)
    two.store.held.measures = True
    two.backward(3.0)
    assert two.store.held.norm().item() == pytest.approx(3 * 16**0.5)
    assert all(state.total is None for state in two.store.states)
    two.parameters["a"].grad = None
    assert two.store.held.norm().item() == pytest.approx(3 * 12**0.5)


@EVERYWHERE
def test_updates_in_the_backward_are_under_way_when_it_ends(where: str) -> None:
    two = Two(where, in_backward=True, accumulate=2)
    two.backward(1.0)
    assert torch.equal(two.weights(0)[:4], torch.arange(4.0))
    two.backward(2.0)
    assert torch.equal(two.weights(0)[:4], torch.arange(4.0) - 3)
    with pytest.raises(StateError, match="more than accumulate=2"):
        two.backward(1.0)
    assert not any(state.present for state in two.store.states)


@EVERYWHERE
def test_placing_again_where_things_are_moves_nothing(where: str) -> None:
    two = Two(where)
    two.backward(1.0)
    states, versions = list(two.store.states), two.store.versions()
    streams = dict(two.store.updater.streams)
    used = [tier.used_bytes for tier in two.tiers]
    two.store.place(PLACES[where])
    assert all(a is b for a, b in zip(states, two.store.states, strict=True)) and two.store.updater.streams == streams
    assert two.store.versions() == versions and [tier.used_bytes for tier in two.tiers] == used
    two.store.update_all(1.0)
    assert all(torch.equal(p.detach()[:1], torch.tensor([10.0 * i - 1])) for i, p in enumerate(two.parameters.values()))


@pytest.mark.parametrize("to", PLACES)
@EVERYWHERE
def test_states_move_between_any_two_places(where: str, to: str) -> None:
    """In the middle of a step that adds up gradients, and with a gradient of one backward alone."""
    fresh = [tier.used_bytes for tier in Two(to).tiers]
    for backwards in (1, 2):
        two = Two(where)
        for _ in range(backwards):
            two.backward(1.0, slots=(0,))
        two.store.place(PLACES[to])
        two.backward(2.0)
        two.store.update_all(1.0)
        assert torch.equal(two.parameters["a"], torch.arange(4.0) - 2 - backwards)
        assert torch.equal(two.parameters["d"], torch.arange(4.0) + 30 - 2)
        sums = 2 * 128 * 4 * (to != "device")  # there since the second backward, and kept, but on a device
        assert sum(tier.used_bytes for tier in two.tiers) == sum(fresh) + sums


@pytest.mark.parametrize(("where", "full"), [("device", 0), ("host", 1)])
def test_a_move_that_finds_no_room_changes_no_account(where: str, full: int) -> None:
    two = Two("host" if where == "device" else "device")
    two.tiers[full].limit_bytes = two.tiers[full].used_bytes + 700
    used = [tier.used_bytes for tier in two.tiers]
    with pytest.raises(BudgetError, match="tier is full: the training state of chunk"):
        two.store.place(PLACES[where])
    two.tiers[full].limit_bytes = None
    two.backward(1.0)
    two.store.update_all(1.0)
    assert torch.equal(two.parameters["c"], torch.arange(4.0) + 20 - 1)
    two.store.place(PLACES["host" if where == "device" else "device"])
    assert [tier.used_bytes for tier in two.tiers] == used


def test_states_on_their_way_home_are_waited_for_after_their_weights_were_used() -> None:
    """The next forward waits for the weights alone; whoever reads moments on the host needs the rest, too."""
    two, asked = Two("streamed"), []
    (stream,) = two.store.updater.streams.values()
    finish = stream.finish
    stream.finish = lambda index: asked.append(index) or finish(index)  # type: ignore[method-assign, func-returns-value]
    two.backward(1.0)
    two.store.update_all(1.0)
    two.weights(0)
    two.store.finish()
    assert asked == [0, 1]
    _ = two.parameters["c"] + 0
    assert asked == [0, 1, 1]


@EVERYWHERE
def test_a_step_that_fails_half_way_ends_the_run(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first chunk is updated and the second is not: another step would make it worse."""
    two = Two(where)
    two.backward(1.0)
    update = two.store.updater.update

    def fails_at_the_second(state: Any, factor: Any) -> None:
        if state.layout.index == 1:
            raise RuntimeError("out of memory")
        update(state, factor)

    monkeypatch.setattr(two.store.updater, "update", fails_at_the_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        two.store.update_all(1.0)
    monkeypatch.undo()
    for use in (lambda: two.store.begin_backward(), lambda: two.store.check(), lambda: two.weights(0)):
        with pytest.raises(StateError, match="step\\(\\) failed after some parameters were updated"):
            use()


@EVERYWHERE
def test_a_factor_lives_for_as_long_as_updates_may_read_it(where: str) -> None:
    """On a GPU kernels and copies beside the program read it after the step has returned."""
    two = Two(where)
    two.backward(1.0)
    scale = torch.tensor(0.5)
    watched = weakref.ref(scale)
    two.store.update_all(scale)
    del scale
    assert watched() is not None
    assert two.weights(0)[0].item() == -0.5
    two.backward(1.0)
    two.store.update_all(1.0)
    assert watched() is None


@EVERYWHERE
def test_states_go_from_everywhere_to_everywhere_with_their_gradients(where: str) -> None:
    """In front of a step, and behind it, when copies and updates may still be under way."""
    two = Two(where)
    for step, homes in enumerate(PLACES.values(), start=1):
        two.backward(1.0)
        two.store.place(homes if step % 2 else PLACES[where])
        two.store.update_all(1.0)
        two.store.place(PLACES[where] if step % 2 else homes)
        for index in (0, 1):
            assert torch.equal(two.weights(index)[:4], torch.arange(4.0) + 20 * index - step)
    assert torch.equal(two.parameters["d"], torch.arange(4.0) + 30 - len(PLACES))


def test_first_those_states_move_that_make_room() -> None:
    two = Two("host")
    two.store.place((Home(), Home(Where.DEVICE)))
    used = two.tiers[0].used_bytes
    two.tiers[0].limit_bytes = used
    two.backward(1.0)
    two.store.update_all(1.0)
    two.store.place((Home(Where.DEVICE), Home()))
    assert two.tiers[0].used_bytes == used
    assert torch.equal(two.weights(1)[:4], torch.arange(4.0) + 20 - 1)


@pytest.mark.parametrize("to", ["host", "host, resident", "streamed, resident"])
@pytest.mark.parametrize("where", ["device", "host, resident", "streamed, resident"])
def test_weights_that_the_device_has_stay_where_they_are(where: str, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state leaves a device that is full to the last byte, as another process may make it."""
    two, made = Two(where), list[bool]()
    two.backward(1.0)
    two.store.update_all(1.0)
    zeros = Hardware.zeros

    def noted(hardware: Hardware, numel: int, dtype: torch.dtype, on_device: bool, pinned: bool = False) -> Tensor:
        made.append(on_device)
        return zeros(hardware, numel, dtype, on_device, pinned)

    monkeypatch.setattr(Hardware, "zeros", noted)
    two.store.place(PLACES[to])
    assert not any(made) and (made or to == where)
    for index in (0, 1):
        assert torch.equal(two.weights(index)[:4], torch.arange(4.0) + 20 * index - 1)
    two.backward(1.0)
    two.store.update_all(1.0)
    assert torch.equal(two.weights(1)[:4], torch.arange(4.0) + 20 - 2)


@pytest.mark.parametrize("tier", [0, 1])
def test_a_state_that_finds_no_room_stays_and_so_does_its_account(tier: int) -> None:
    two = Two("host" if tier == 0 else "device")
    used = [each.used_bytes for each in two.tiers]
    two.tiers[tier].limit_bytes = used[tier] + 100
    with pytest.raises(BudgetError, match=f"the {two.tiers[tier].name} tier is full"):
        two.store.place(PLACES["device" if tier == 0 else "host"])
    assert [each.used_bytes for each in two.tiers] == used
    two.backward(1.0)
    two.store.update_all(1.0)
    assert torch.equal(two.weights(0)[:4], torch.arange(4.0) - 1)


def test_an_account_is_restored_whatever_the_limit_is_by_now() -> None:
    two = Two("device")
    used = two.tiers[0].used_bytes
    two.tiers[0].limit_bytes, two.tiers[1].limit_bytes = used // 2, 100
    with pytest.raises(BudgetError, match="the host tier is full"):
        two.store.place(PLACES["host"])
    assert two.tiers[0].used_bytes == used
