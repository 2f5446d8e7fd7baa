"""The instruction set: fake kernels tell what the machine returns, schemas tell what it writes."""

import pytest
import torch
from geminifx.passes.program.program import Program, writes
from geminifx.passes.program.types import TensorType
from geminifx.runtime.distributed.collectives import Collectives
from geminifx.runtime.distributed.point_to_point import Messages
from geminifx.runtime.isa import instructions as ops
from geminifx.runtime.isa.layout import parameter_view
from geminifx.runtime.machine import Machine
from geminifx.runtime.memory.offloads import Offloads
from torch._subclasses.fake_tensor import FakeTensorMode

OPERATORS = {name: getattr(torch.ops.geminifx, name).default for name in ops.SCHEMAS}
F32 = torch.float32
VECTOR = TensorType(F32, (64,), (1,))


def test_the_machine_implements_every_instruction_that_code_has() -> None:
    # At the turn the generated program itself yields; whole collectives and receives are written out in
    # two. The machine has those of the processes' collectives and messages, and of offloaded activations.
    there = {name for part in (Machine, Collectives, Messages, Offloads) for name in vars(part)}
    missing = {name for name in ops.SCHEMAS if name not in there}
    assert missing == {"turn", "all_gather", "reduce_scatter", "all_reduce", "receive"}


@pytest.mark.parametrize("name", OPERATORS)
def test_schemas_admit_every_write(name: str) -> None:
    written = [a.name for a in OPERATORS[name]._schema.arguments if a.alias_info and a.alias_info.is_write]
    expected = {
        "release": ["weights"],
        "put": ["gradients"],
        "put_mm": ["gradients"],
        "put_sum": ["gradients"],
        "reduce": ["gradients"],
        "accumulate_grad": ["gradients"],
        "depart": ["host"],
        "turn": ["outputs"],
        "start_all_reduce": ["partial"],
        "drawn": ["state"],
        "swap_rng": ["state"],
        "send": ["value"],
        "finish_send": ["value"],
    }
    assert written == expected.get(name, [])


@pytest.mark.parametrize("name", ["wait", "view", "arrive", "finish_collective", "finish_receive", "microbatch"])
def test_results_that_share_their_arguments_storage_say_so(name: str) -> None:
    schema = OPERATORS[name]._schema
    assert schema.returns[0].alias_info is not None and not schema.is_mutable


FAKE_RESULTS = {
    "fetch": (lambda: ops.FETCH(3, 64, torch.bfloat16), torch.bfloat16, (64,)),
    "wait": (lambda: ops.WAIT(torch.empty(64), 3), F32, (64,)),
    "view": (lambda: ops.VIEW(torch.empty(64), 8, [2, 3]), F32, (2, 3)),
    "gradients": (lambda: ops.GRADIENTS(64, torch.float64), torch.float64, (64,)),
    "offload": (lambda: ops.OFFLOAD(torch.empty(4, 2).t()), F32, (2, 4)),
    "reload": (lambda: ops.RELOAD(torch.empty(4, 2).t()), F32, (2, 4)),
    "arrive": (lambda: ops.ARRIVE(torch.empty(2, 4), torch.empty(2, 4)), F32, (2, 4)),
    "start_all_gather": (lambda: ops.START_ALL_GATHER(torch.empty(2, 3), "tp", 4), F32, (8, 3)),
    "start_reduce_scatter": (lambda: ops.START_REDUCE_SCATTER(torch.empty(8, 3), "tp", 4), F32, (2, 3)),
    "start_all_reduce": (lambda: ops.START_ALL_REDUCE(torch.empty(2, 3), "tp", "sum"), F32, (2, 3)),
    "finish_collective": (lambda: ops.FINISH_COLLECTIVE(torch.empty(2, 3)), F32, (2, 3)),
    "start_receive": (lambda: ops.START_RECEIVE([2, 3], [1, 2], F32, 0), F32, (2, 3)),
    "finish_receive": (lambda: ops.FINISH_RECEIVE(torch.empty(2, 3)), F32, (2, 3)),
    "microbatch": (lambda: ops.MICROBATCH(torch.empty(6, 2), 2, 3), F32, (2, 2)),
    "save_rng": (lambda: ops.SAVE_RNG(torch.empty(2)), torch.uint8, (torch.get_rng_state().numel(),)),
    "fork_rng": (lambda: ops.FORK_RNG(torch.empty(2), ["a"]), torch.uint8, (torch.get_rng_state().numel(),)),
}


@pytest.mark.parametrize("name", FAKE_RESULTS)
def test_fake_kernels_give_the_machines_types(name: str) -> None:
    call, dtype, shape = FAKE_RESULTS[name]
    with FakeTensorMode():
        result = call()
    assert (result.dtype, tuple(result.shape)) == (dtype, shape)


def test_instructions_without_results_give_none() -> None:
    with FakeTensorMode():
        flat = torch.empty(64)
        assert ops.RELEASE(flat, 0) is None
        assert ops.PUT(flat, 0, torch.empty(2, 3)) is None
        assert ops.PUT_MM(flat, 0, torch.empty(2, 3), torch.empty(3, 4)) is None
        assert ops.REDUCE(flat, 0, [0]) is None and ops.ACCUMULATE_GRAD(flat, 0, [0]) is None
        assert ops.DEPART(flat, torch.empty(64)) is None
        assert ops.SEND(flat, 1) is None and ops.FINISH_SEND(flat, 1) is None
        assert ops.SWAP_RNG(torch.empty(16, dtype=torch.uint8)) is None
        tangents = ops.TURN([torch.empty(2), torch.empty(3), torch.empty(4)], [0, 2])
    assert [tuple(t.shape) for t in tangents] == [(2,), (4,)]


def test_dead_code_elimination_keeps_what_writes_and_drops_what_only_reads() -> None:
    program = Program("p")
    x = program.add_input("x", VECTOR, "input:0")
    program.set_results({"output:0": x})
    for target, args in (
        (ops.FETCH, (0, 64, F32)),
        (ops.VIEW, (x, 0, [8])),
        (ops.PUT, (x, 0, x)),
        (ops.RELEASE, (x, 0)),
        (ops.ACCUMULATE_GRAD, (x, 0, [0])),
        (ops.SAVE_RNG, (x,)),
    ):
        program.emit(target, args, before=program.output)
    program.eliminate_dead_code()
    assert [node.target for node in program.computes] == [ops.PUT, ops.RELEASE, ops.ACCUMULATE_GRAD]
    assert all(map(writes, program.computes))


def test_a_parameters_view_shares_the_chunks_memory() -> None:
    flat = torch.arange(64.0)
    view = parameter_view(flat, 8, [2, 3])
    assert view.tolist() == [[8, 9, 10], [11, 12, 13]]
    assert view.data_ptr() == flat.data_ptr() + 8 * 4
    assert parameter_view(flat, 64, [0, 4]).shape == (0, 4)
    assert parameter_view(flat, 5, []).item() == 5
