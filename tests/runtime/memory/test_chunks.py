"""Chunks: the state machine, gradient accumulation beside the master, and parameters as views of it."""

import pytest
import torch
from geminifx.runtime.isa.errors import IllegalTransition, StateError
from geminifx.runtime.isa.layout import ChunkLayout, Layout, Slot
from geminifx.runtime.memory.chunks import LEGAL, Chunk, ChunkStore, State
from geminifx.runtime.memory.lazy_parameter import hooked
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import Tensor, nn

SHAPES = {"a": (2, 3), "b": (5,), "empty": (0, 4)}


def layout(trainable: bool = True) -> Layout:
    slots = (Slot("a", 0, (2, 3)), Slot("b", 64, (5,)), Slot("empty", 128, (0, 4)))
    return Layout((ChunkLayout(0, 128, torch.float32, torch.float32, trainable, slots),))


def placed() -> tuple[ChunkStore, dict[str, nn.Parameter]]:
    """A store of one chunk with master and gradient memory, and its parameters by name."""
    torch.manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    store = ChunkStore(layout(), parameters)
    store.place(store.chunks[0], torch.zeros(128))
    store.chunks[0].gradient = torch.zeros(128)
    return store, parameters


class ChunkStates(RuleBasedStateMachine):
    """Whatever is asked of a chunk, it is where the last legal move left it.

    The edges are written out here once more, from the design: a slip in the table would show.
    """

    EDGES = frozenset(
        f"{start}>{end}"
        for start, ends in {
            "FREE": ("HOLD", "COMPUTE"),
            "HOLD": ("FREE", "COMPUTE"),
            "COMPUTE": ("HOLD", "HOLD_AFTER_BACKWARD"),
            "HOLD_AFTER_BACKWARD": ("COMPUTE", "READY_FOR_REDUCE"),
            "READY_FOR_REDUCE": ("HOLD",),
        }.items()
        for end in ends
    )

    def __init__(self) -> None:
        super().__init__()
        self.chunk = Chunk(layout().chunks[0])
        self.expected = "FREE"

    @rule(state=st.sampled_from(State))
    def move(self, state: State) -> None:
        if f"{self.expected}>{state.name}" in self.EDGES:
            self.chunk.move(state)
            self.expected = state.name
        else:
            with pytest.raises(IllegalTransition, match=f"from {self.expected} to {state.name}"):
                self.chunk.move(state)

    @rule()
    def rest(self) -> None:
        self.chunk.rest()
        self.expected = "FREE"

    @invariant()
    def is_where_the_last_legal_move_left_it(self) -> None:
        assert self.chunk.state.name == self.expected


TestChunkStates = ChunkStates.TestCase


def test_the_table_has_the_designs_edges_and_no_others() -> None:
    edges = {f"{a.name}>{b.name}" for a, targets in LEGAL.items() for b in targets}
    assert edges == ChunkStates.EDGES


def test_an_illegal_move_names_chunk_states_and_what_was_legal() -> None:
    with pytest.raises(IllegalTransition, match=r"chunk 0 \(a, b.*expected COMPUTE, HOLD\b"):
        Chunk(layout().chunks[0]).move(State.READY_FOR_REDUCE)


# -- parameters --------------------------------------------------------------------------------------------


def test_parameters_keep_identity_values_and_gradients() -> None:
    torch.manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    values = {name: p.detach().clone() for name, p in parameters.items()}
    parameters["b"].grad = torch.ones(5)
    store = ChunkStore(layout(), parameters)
    master = torch.zeros(128)
    store.place(store.chunks[0], master)
    for name, parameter in parameters.items():
        assert any(parameter is held for held in store.chunks[0].parameters)
        assert torch.equal(parameter, values[name])
    assert torch.equal(master[:6], values["a"].flatten()) and torch.equal(master[64:69], values["b"])
    assert torch.equal(parameters["b"].grad, torch.ones(5)) and parameters["a"].grad is None
    with torch.no_grad():
        parameters["a"].add_(1)
    assert torch.equal(master[:6], values["a"].flatten() + 1)


def test_adopt_takes_over_replaced_data() -> None:
    store, parameters = placed()
    replacement = torch.full((2, 3), 7.0, dtype=torch.float64)
    parameters["a"].data = replacement
    store.adopt()
    master = store.chunks[0].master
    assert master is not None and torch.equal(master[:6], torch.full((6,), 7.0))
    replacement.zero_()
    assert torch.equal(parameters["a"], torch.full((2, 3), 7.0)), "the parameter is a view of its chunk again"
    assert parameters["a"].data_ptr() == master.data_ptr()


def test_adopt_leaves_untouched_parameters_alone() -> None:
    store, parameters = placed()
    before = {name: (p.data_ptr(), p._version) for name, p in parameters.items()}
    store.adopt()
    assert {name: (p.data_ptr(), p._version) for name, p in parameters.items()} == before


def test_adopt_refuses_another_shape() -> None:
    store, parameters = placed()
    parameters["b"].data = torch.zeros(6)
    with pytest.raises(StateError, match=r"parameter b .*\(6,\), expected \(5,\)"):
        store.adopt()


def test_hooks_are_found() -> None:
    _, parameters = placed()
    assert list(hooked(parameters)) == []
    parameters["a"].register_hook(lambda grad: grad)
    parameters["b"].register_post_accumulate_grad_hook(lambda p: None)
    assert list(hooked(parameters)) == ["a", "b"]


def test_versions_count_writes_in_place() -> None:
    store, parameters = placed()
    before = store.versions()
    with torch.no_grad():
        parameters["b"].mul_(2)
    after = store.versions()
    assert [name for name in before if before[name] != after[name]] == ["b"]


# -- accumulation ------------------------------------------------------------------------------------------

ALL = [0, 1, 2]


def source(seed: int) -> Tensor:
    return torch.randn(128, generator=torch.Generator().manual_seed(seed))


def slices(flat: Tensor) -> dict[str, Tensor]:
    return {"a": flat[:6].view(2, 3), "b": flat[64:69], "empty": flat[128:].view(0, 4)}


def test_the_first_gradient_is_a_copy_and_further_ones_add() -> None:
    store, parameters = placed()
    chunk = store.chunks[0]
    assert chunk.gradient is not None
    chunk.gradient.fill_(99)  # what is left of an earlier step does not count
    first, second = source(1), source(2)
    chunk.accumulate(first, ALL)
    for name, parameter in parameters.items():
        assert parameter.grad is not None and torch.equal(parameter.grad, slices(first)[name])
    first_grads = {name: p.grad for name, p in parameters.items()}
    chunk.accumulate(second, ALL)
    for name, parameter in parameters.items():
        assert parameter.numel() == 0 or parameter.grad is first_grads[name], "no new tensors"
        assert torch.equal(parameter.grad, slices(first)[name] + slices(second)[name])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_starts_anew(set_to_none: bool) -> None:
    store, parameters = placed()
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    store.chunks[0].accumulate(source(1), ALL)
    optimizer.zero_grad(set_to_none=set_to_none)
    store.chunks[0].accumulate(source(2), ALL)
    for name, parameter in parameters.items():
        assert parameter.grad is not None and torch.equal(parameter.grad, slices(source(2))[name])


def test_a_gradient_put_there_from_outside_counts() -> None:
    store, parameters = placed()
    parameters["a"].grad = torch.full((2, 3), 2.0)
    store.chunks[0].accumulate(source(1), ALL)
    assert torch.equal(parameters["a"].grad, 2.0 + slices(source(1))["a"])
    assert torch.equal(parameters["b"].grad, slices(source(1))["b"])  # type: ignore[arg-type]
    parameters["b"].grad = None
    store.chunks[0].accumulate(source(2), ALL)
    assert torch.equal(parameters["a"].grad, 2.0 + slices(source(1))["a"] + slices(source(2))["a"])
    assert torch.equal(parameters["b"].grad, slices(source(2))["b"])


def test_slots_without_a_gradient_keep_none() -> None:
    store, parameters = placed()
    for step in (1, 2):
        store.chunks[0].accumulate(source(step), [1])
    assert parameters["a"].grad is None
    assert torch.equal(parameters["b"].grad, slices(source(1))["b"] + slices(source(2))["b"])  # type: ignore[arg-type]


def test_low_precision_sources_accumulate_in_the_masters_precision() -> None:
    store, parameters = placed()
    tiny, one = torch.full((128,), 2.0**-12).bfloat16(), torch.ones(128).bfloat16()
    store.chunks[0].accumulate(one, ALL)
    store.chunks[0].accumulate(tiny, ALL)
    # In bfloat16 the sum would be 1 again.
    assert torch.equal(parameters["b"].grad, torch.full((5,), 1 + 2.0**-12))  # type: ignore[arg-type]
