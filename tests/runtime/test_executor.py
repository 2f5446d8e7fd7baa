"""A hand-written program runs on a small machine: values, states, bytes moved, failures half way."""

import math
import traceback
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from geminifx.runtime.distributed.ranks import Ranks
from geminifx.runtime.executor import Code, Executor, NoGradient, Outlets, ProgramRun, Step, TrainingRun
from geminifx.runtime.isa.errors import BudgetError, GeminiError, IllegalTransition, StateError
from geminifx.runtime.isa.formats import TorchFormat
from geminifx.runtime.isa.instructions import INSTRUCTIONS
from geminifx.runtime.isa.layout import ChunkLayout, Layout, Slot
from geminifx.runtime.isa.mesh import Axis, Mesh
from geminifx.runtime.isa.operators import OPERATORS
from geminifx.runtime.machine import Machine
from geminifx.runtime.memory.chunks import LEGAL, Chunk, ChunkStore, State
from geminifx.runtime.memory.hardware import Hardware
from geminifx.runtime.memory.state_store import Run
from geminifx.runtime.memory.stats import Stats
from geminifx.runtime.memory.tiers import MemoryMeter, Tier
from geminifx.runtime.memory.torch_store import TorchStore
from homes import NONE, homes
from torch import nn

# y = relu(x @ w) @ v, a loss in the caller; both weights in chunks of their own.
SOURCE = """
def training(x):
    c0 = geminifx.fetch(0, 64, {dtype})
    w0 = geminifx.wait(c0, 0)
    w = geminifx.view(w0, 0, [4, 8])
    h = aten.relu.default(aten.mm.default(x, w))
    del w
    geminifx.release(w0, 0)
    del c0, w0
    c1 = geminifx.fetch(1, 64, {dtype})
    w1 = geminifx.wait(c1, 1)
    v = geminifx.view(w1, 0, [8, 2])
    y = aten.mm.default(h, v)
    del v
    geminifx.release(w1, 1)
    del c1, w1
    turn = yield [y], [0]
    dy = turn[0]
    c1 = geminifx.fetch(1, 64, {dtype})
    w1 = geminifx.wait(c1, 1)
    v = geminifx.view(w1, 0, [8, 2])
    dh = aten.mm.default(dy, aten.t.default(v))
    del v
    geminifx.release(w1, 1)
    del c1, w1
    g1 = geminifx.gradients(64, {dtype})
    geminifx.put(g1, 0, aten.mm.default(aten.t.default(h), dy))
    geminifx.reduce(g1, 1, [0])
    geminifx.accumulate_grad(g1, 1, [0])
    del g1
    dh = aten.threshold_backward.default(dh, h, 0)
    g0 = geminifx.gradients(64, {dtype})
    geminifx.put(g0, 0, aten.mm.default(aten.t.default(x), dh))
    geminifx.reduce(g0, 0, [0])
    geminifx.accumulate_grad(g0, 0, [0])
    return {{}}
"""
BOTH = frozenset({0, 1})


class Toy:
    """The machine of a two-layer model, and the same two weights outside of it."""

    def __init__(self, dtype: torch.dtype = torch.float32, limit: int | None = None, source: str = "",
                 masters: frozenset[int] = NONE, weights: frozenset[int] = NONE) -> None:  # fmt: skip
        seed = torch.Generator().manual_seed(0)
        self.w, self.v = (nn.Parameter(torch.randn(shape, generator=seed)) for shape in ((4, 8), (8, 2)))
        self.plain = [nn.Parameter(p.detach().clone()) for p in (self.w, self.v)]
        chunks = tuple(
            ChunkLayout(i, 64, dtype, torch.float32, True, (Slot(name, 0, tuple(p.shape)),))
            for i, (name, p) in enumerate([("w", self.w), ("v", self.v)])
        )
        self.tiers = Tier("device", limit), Tier("host")
        store = ChunkStore(Layout(chunks), {"w": self.w, "v": self.v})
        hardware = Hardware(torch.device("cpu"), *self.tiers)
        self.store = TorchStore(store, hardware, TorchFormat(8), Stats())
        self.store.place(homes(2, masters, weights))
        self.machine = Machine(self.store)
        text = (source or SOURCE).format(dtype=dtype)
        code = Code("training", text, ("input:0",), frozenset({"aten"}), reduces=BOTH, turns=(((4, 1),),))
        self.executor = Executor(code, self.machine, MemoryMeter(self.tiers[0]))
        self.x = torch.randn(16, 4, generator=seed).to(dtype)

    def step(self) -> torch.Tensor:
        """One training step with the loss sum(y^2); returns y."""
        anchor = torch.zeros((), requires_grad=True)
        (y,) = Step.apply(TrainingRun(self.executor, [self.x], Outlets((0,))), anchor)
        y.square().sum().backward()
        return y.detach()

    def plain_step(self) -> torch.Tensor:
        w, v = (p.to(self.x.dtype) for p in self.plain)
        y = torch.relu(self.x @ w) @ v
        y.square().sum().backward()
        return y.detach()

    def states(self) -> list[State]:
        return [chunk.state for chunk in self.machine.chunks]


PLACES = {
    "streamed": (NONE, NONE),
    "resident weights": (NONE, BOTH),
    "state on the device": (BOTH, NONE),
    "state and weights on the device": (BOTH, BOTH),
    "some of each": (frozenset({0}), frozenset({1})),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", PLACES)
def test_values_and_gradients_are_plain_pytorchs_wherever_the_chunks_are(place: str, dtype: torch.dtype) -> None:
    masters, weights = PLACES[place]
    toy = Toy(dtype, masters=masters, weights=weights)
    ours, plain = (torch.optim.SGD(ps, lr=1e-3) for ps in ((toy.w, toy.v), toy.plain))
    for _ in range(3):
        ours.zero_grad()
        plain.zero_grad()
        assert torch.equal(toy.step(), toy.plain_step())
        for p, q in zip((toy.w, toy.v), toy.plain, strict=True):
            assert p.grad is not None and torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
        ours.step()
        plain.step()
    assert torch.equal(toy.w, toy.plain[0]) and torch.equal(toy.v, toy.plain[1])


# Bytes per step: chunk 0 is fetched once, chunk 1 in the forward and in the backward.
TRAFFIC = {
    "streamed": (3 * 256, 2 * 256),
    "resident weights": (2 * 256, 2 * 256),
    "state on the device": (0, 0),
    "state and weights on the device": (0, 0),
    "some of each": (256, 256),
}


@pytest.mark.parametrize("place", PLACES)
def test_bytes_moved_are_counted_and_chunks_end_where_they_stay(place: str) -> None:
    masters, weights = PLACES[place]
    toy = Toy(masters=masters, weights=weights)
    toy.step()
    stats = toy.store.stats
    assert (stats.to_device_bytes, stats.to_host_bytes) == TRAFFIC[place]
    stays = masters | weights
    assert toy.states() == [State.HOLD if i in stays else State.FREE for i in (0, 1)]


def test_states_pass_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    toy, seen = Toy(), {0: ["FREE"], 1: ["FREE"]}
    original = Chunk.move

    def move(chunk: Chunk, state: State) -> None:
        original(chunk, state)
        seen[chunk.layout.index].append(state.value)

    monkeypatch.setattr(Chunk, "move", move)
    toy.step()
    gradient = ["HOLD_AFTER_BACKWARD", "READY_FOR_REDUCE", "HOLD", "FREE"]
    assert seen[1] == ["FREE", "HOLD", "COMPUTE", "HOLD", "FREE", "HOLD", "COMPUTE", *gradient]
    assert seen[0] == ["FREE", "HOLD", "COMPUTE", "HOLD", "FREE", "COMPUTE", *gradient]
    assert all(State(b) in LEGAL[State(a)] for states in seen.values() for a, b in pairwise(states))


def test_a_program_with_instructions_out_of_order_is_stopped() -> None:
    doubled = SOURCE.replace("    geminifx.release(w0, 0)\n", "    geminifx.release(w0, 0)\n" * 2)
    toy = Toy(source=doubled, masters=BOTH)
    with pytest.raises(IllegalTransition, match=r"chunk 0 \(w"):
        toy.step()


def test_device_bytes_return_to_what_is_there_for_good() -> None:
    toy = Toy(weights=frozenset({0}))
    static = toy.tiers[0].used_bytes
    toy.step()
    assert toy.tiers[0].used_bytes == static == 256
    # At most the input, y, and in the forward h beside the product it comes from.
    assert toy.tiers[0].peak_bytes > static + toy.x.nbytes + 2 * 16 * 8 * 4


# -- failures ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["forward", "backward"])
def failing(request: pytest.FixtureRequest) -> Iterator[Toy]:
    """A toy whose program raises ZeroDivisionError once, in the middle of a phase."""
    line = {"forward": "    y = aten.mm", "backward": "    dh = aten.threshold_backward"}[request.param]
    toy = Toy(source=SOURCE.replace(line, f"    1 / geminifx.fuse.pop()\n{line}"), weights=frozenset({1}))
    toy.executor.called.fuse = [0]
    yield toy


def test_after_a_failure_masters_are_untouched_and_the_next_step_is_right(failing: Toy) -> None:
    before = [failing.w.detach().clone(), failing.v.detach().clone()]
    used = failing.tiers[0].used_bytes
    with pytest.raises(ZeroDivisionError):
        failing.step()
    assert torch.equal(failing.w, before[0]) and torch.equal(failing.v, before[1])
    assert failing.states() == [State.FREE, State.FREE]
    assert failing.tiers[0].used_bytes == used
    failing.executor.called.fuse.extend([1] * 9)
    failing.w.grad = failing.v.grad = None
    assert torch.equal(failing.step(), failing.plain_step())
    assert torch.equal(failing.w.grad, failing.plain[0].grad)  # type: ignore[arg-type]
    assert torch.equal(failing.v.grad, failing.plain[1].grad)  # type: ignore[arg-type]


def test_tracebacks_show_the_programs_lines(failing: Toy) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        failing.step()
    text = "".join(traceback.format_exception(caught.value))
    assert "<geminifx training" in text and "1 / geminifx.fuse.pop()" in text


def test_a_device_without_room_stops_the_step_and_nothing_is_lost() -> None:
    toy = Toy(limit=16 * 4 * 4 + 256 + 100)
    before = toy.w.detach().clone()
    with pytest.raises(BudgetError, match="device tier is full"):
        toy.step()
    assert torch.equal(toy.w, before) and toy.tiers[0].used_bytes == 0
    toy.tiers[0].limit_bytes = None
    assert torch.equal(toy.step(), toy.plain_step())


def test_an_abandoned_forward_frees_its_activations() -> None:
    toy = Toy()
    run = TrainingRun(toy.executor, [toy.x], Outlets((0,)))
    outputs = run.forward()
    assert toy.tiers[0].used_bytes == (16 * 8 + 16 * 2) * 4  # h and y
    del run, outputs
    assert toy.tiers[0].used_bytes == 0
    assert torch.equal(toy.step(), toy.plain_step())


def test_two_forwards_before_two_backwards() -> None:
    toy = Toy(torch.bfloat16, weights=frozenset({1}))
    first, second = (
        TrainingRun(toy.executor, [toy.x], Outlets((0,))),
        TrainingRun(toy.executor, [2 * toy.x], Outlets((0,))),
    )
    y1, y2 = first.forward()[0], second.forward()[0]
    first.backward([torch.ones_like(y1)])
    second.backward([torch.ones_like(y2)])
    w, v = (p.detach().bfloat16().requires_grad_() for p in toy.plain)
    total = torch.zeros(4, 8)
    for x in (toy.x, 2 * toy.x):
        (torch.relu(x @ w) @ v).backward(torch.ones(16, 2, dtype=torch.bfloat16))
        total += w.grad.float()  # type: ignore[union-attr]
        w.grad = None
    assert torch.equal(toy.w.grad, total)  # type: ignore[arg-type]


TWO_TURNS = """
def training(x):
    c0 = geminifx.fetch(0, 64, torch.float32)
    w0 = geminifx.wait(c0, 0)
    h = aten.mm.default(x, geminifx.view(w0, 0, [4, 8]))
    geminifx.release(w0, 0)
    del c0, w0
    turn = yield [h], [0]
    h = aten.add.Tensor(h, turn[0])
    c1 = geminifx.fetch(1, 64, torch.float32)
    w1 = geminifx.wait(c1, 1)
    y = aten.mm.default(h, geminifx.view(w1, 0, [8, 2]))
{release}
    del c1, w1
    turn_1 = yield [y], [0]
    return {{{{"last": aten.mul.Tensor(y, turn_1[0])}}}}
"""


def two_turns(release: str = "    geminifx.release(w1, 1)") -> Toy:
    toy = Toy(source=TWO_TURNS.format(release=release), weights=frozenset({1}))
    code = replace(toy.executor.code, turns=(((8, 1),), ((2, 1),)))
    toy.executor = Executor(code, toy.machine, MemoryMeter(toy.tiers[0]))
    return toy


def test_a_program_turns_as_often_as_it_likes_and_several_runs_are_under_way() -> None:
    """As of microbatches: each run's values are its own, and the chunks are all theirs."""
    toy, inputs = two_turns(), [torch.randn(16, 4) for _ in range(3)]
    runs = [ProgramRun(toy.executor, [x]) for x in inputs]
    more, factors = [torch.randn(16, 8) for _ in runs], [torch.randn(16, 2) for _ in runs]
    first = [run.advance()[0] for run in runs]
    second = [run.advance([value])[0] for run, value in zip(reversed(runs), reversed(more), strict=True)][::-1]
    assert toy.states() == [State.FREE, State.HOLD]
    ends = [run.advance([factor]) for run, factor in zip(runs, factors, strict=True)]
    w, v = (p.detach() for p in toy.plain)
    for i, (x, run) in enumerate(zip(inputs, runs, strict=True)):
        assert torch.equal(first[i], x @ w) and torch.equal(second[i], (x @ w + more[i]) @ v)
        assert ends[i] == [] and torch.equal(run.results["last"], second[i] * factors[i])
    assert toy.tiers[0].used_bytes > 256
    del runs, run, first, second
    assert toy.tiers[0].used_bytes == 256, "of the weights that stay"


def test_a_program_that_turns_while_it_reads_a_chunk_is_refused() -> None:
    toy = two_turns(release="    pass")
    run = ProgramRun(toy.executor, [toy.x])
    run.advance()
    with pytest.raises(
        GeminiError, match="reached a turn while it still reads chunk 1; a program must release all chunks"
    ):
        run.advance([torch.zeros(16, 8)])
    assert toy.states() == [State.FREE, State.FREE]


def test_a_second_backward_and_a_changed_parameter_are_refused() -> None:
    toy = Toy()
    run = TrainingRun(toy.executor, [toy.x], Outlets((0,)))
    tangent = torch.ones_like(run.forward()[0])
    run.backward([tangent])
    with pytest.raises(StateError, match="a second time"):
        run.backward([tangent])
    run = TrainingRun(toy.executor, [toy.x], Outlets((0,)))
    run.forward()
    with torch.no_grad():
        toy.v.mul_(2)
    with pytest.raises(StateError, match="parameter v was changed in place"):
        run.backward([tangent])


def test_a_gradient_into_an_output_compiled_without_one_is_an_error() -> None:
    anchor = torch.zeros((), requires_grad=True)
    logits = NoGradient.apply(anchor, torch.ones(3))
    assert torch.equal(logits.detach(), torch.ones(3))
    with pytest.raises(StateError, match="outputs='all'"):
        (2 * logits).sum().backward()


# -- evaluation, random numbers, names ---------------------------------------------------------------------


def run_text(text: str, *inputs: torch.Tensor, rank: int = 0) -> dict[str, torch.Tensor]:
    toy = Toy()
    toy.machine.ranks = Ranks(Mesh((Axis("row", 2, "tensor"), Axis("col", 2, "tensor"))), rank)
    roles = tuple(f"input:{i}" for i in range(len(inputs)))
    code = replace(toy.executor.code, name="evaluation", source=text, inputs=roles, reduces=NONE)
    return Executor(code, toy.machine, MemoryMeter()).evaluate(list(inputs))


def test_evaluation_returns_results_by_role_without_autograd() -> None:
    text = 'def evaluation(x):\n    y = aten.exp.default(x)\n    return {"output:0": y}\n'
    x = torch.randn(3, requires_grad=True)
    results = run_text(text, x)
    assert list(results) == ["output:0"] and not results["output:0"].requires_grad
    assert torch.equal(results["output:0"], x.detach().exp())


def test_programs_know_infinity_nan_and_the_device() -> None:
    text = (
        "def evaluation(x):\n"
        "    y = aten.full.default([2], -inf, dtype=torch.float32, device=DEVICE)\n"
        "    z = aten.full_like.default(x, nan)\n"
        '    return {"output:0": y, "output:1": z}\n'
    )
    results = run_text(text, torch.zeros(2))
    assert results["output:0"].tolist() == [-math.inf] * 2 and results["output:1"].isnan().all()


def test_swapping_the_random_state_replays_and_then_goes_on() -> None:
    text = (
        "def evaluation(x):\n"
        "    state = geminifx.save_rng(x)\n"
        "    first = aten.rand_like.default(x)\n"
        "    second = aten.rand_like.default(x)\n"
        "    geminifx.swap_rng(state)\n"
        "    again = aten.rand_like.default(x)\n"
        "    geminifx.swap_rng(state)\n"
        "    third = aten.rand_like.default(x)\n"
        '    return {"first": first, "second": second, "again": again, "third": third}\n'
    )
    torch.manual_seed(3)
    expected = [torch.rand(5) for _ in range(3)]
    torch.manual_seed(3)
    results = run_text(text, torch.empty(5))
    assert torch.equal(results["again"], results["first"])
    drawn = [results[name] for name in ("first", "second", "third")]
    assert all(map(torch.equal, drawn, expected))


APART = (
    "def evaluation(x):\n"
    '    rng = geminifx.fork_rng(x, ["col"])\n'
    "    geminifx.swap_rng(rng)\n"
    "    own = {random}\n"
    "    geminifx.swap_rng(rng)\n"
    "    shared = aten.rand_like.default(x)\n"
    '    return {{"own": own, "shared": shared}}\n'
)


def test_between_two_swaps_ranks_draw_apart_and_behind_them_alike() -> None:
    found = []
    for rank in range(4):
        torch.manual_seed(3)
        found.append(run_text(APART.format(random="aten.rand_like.default(x)"), torch.empty(5), rank=rank))
    own, shared = ([results[name].tolist() for results in found] for name in ("own", "shared"))
    assert own[0] == own[2] != own[1] == own[3], "by the column alone"
    assert shared[0] == shared[1] == shared[2] == shared[3] != own[0]


def test_ranks_that_fail_between_two_swaps_draw_alike_from_then_on() -> None:
    drawn = []
    for rank in range(2):
        torch.manual_seed(3)
        with pytest.raises(RuntimeError, match="must be a matrix"):
            run_text(APART.format(random="aten.mm.default(aten.rand_like.default(x), x)"), torch.empty(5), rank=rank)
        drawn.append(torch.rand(5).tolist())
    assert drawn[0] == drawn[1]


def test_programs_call_the_machines_instructions_and_torchs_operators() -> None:
    called = Toy().executor.called
    assert called.attention is torch.ops.geminifx.attention.default
    assert vars(called).keys() == INSTRUCTIONS | OPERATORS.keys() | {"fused"}
    defined = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("geminifx::")}
    replaced = {"turn", "receive", "all_gather", "reduce_scatter", "all_reduce"}
    assert vars(called).keys() == (defined - replaced) | {"fused"}, "a machine has all instructions, and torch the rest"


def test_weights_written_between_steps_are_seen_whatever_wrote_them() -> None:
    toy = Toy(torch.bfloat16, weights=BOTH)
    toy.step()
    toy.w.data.numpy().fill(0.5)  # leaves no trace that torch could see
    toy.plain[0].data.fill_(0.5)
    assert torch.equal(toy.step(), toy.plain_step())


def test_one_run_copies_a_resident_chunk_once() -> None:
    toy = Toy(weights=BOTH)
    toy.machine.run = Run()
    first = toy.machine.fetch(0, 64, torch.float32)
    assert toy.machine.fetch(0, 64, torch.float32) is first
    assert toy.store.stats.to_device_bytes == 256
