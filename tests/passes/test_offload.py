"""offload: activations of chosen blocks leave for the host behind their last reader and come back ahead of the next."""

import pytest
from geminifx.passes.offload import offload
from geminifx.passes.pipeline import PIPELINE
from geminifx.passes.program.manager import run_passes
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.text import parse_program
from geminifx.runtime.isa.instructions import DEPART, OFFLOAD, RELOAD


@pytest.fixture(autouse=True)
def _small_values_too(monkeypatch):
    monkeypatch.setattr("geminifx.passes.offload.SMALLEST_BYTES", 64)


@pytest.mark.parametrize("case, depth", [("one_ahead", 1), ("on_demand", 0)])
def test_before_and_after(golden, case, depth):
    golden(case, offload, Plan(offload=("0", "1", "2"), prefetch=depth))


def _chunk(index, number):
    return f"""
    fetch_{number}: "f32[64] | chunk={index}" = geminifx.fetch({index}, 64, torch.float32)
    wait_{number}: "f32[64] | chunk={index}" = geminifx.wait(fetch_{number}, {index})"""


def _program(forward, backward, between="", outputs="out"):
    """Three chunks that nothing reads, behind the lines of a block in the forward, and in front of those in the
    backward; `between` stands at the end of the forward."""
    return parse_program(f"""
def training(
    x: "f32[4, 4] | input:0",
):
    # forward{_chunk(0, 0)}
    # forward: block
{forward}{_chunk(1, 1)}{_chunk(2, 2)}{_chunk(3, 3)}
    # forward: other
{between}
    out: "f32[4, 4]" = aten.cos.default(x)
    turn: "(f32[4, 4])" = yield [{outputs}], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]{_chunk(3, 4)}{_chunk(2, 5)}{_chunk(1, 6)}{_chunk(0, 7)}
    # backward: block
{backward}
    return {{}}
""")  # fmt: skip


Y = '    y: "f32[4, 4]" = aten.exp.default(x)\n'
READ = '    d: "f32[4, 4]" = aten.mul.Tensor(tangent, y)\n'
LARGE_OF_TWO = """
    two: "(f32[4, 4], i64[4, 4])" = aten.sort.default(x)
    y: "f32[4, 4]" = two[0]
    z: "i64[4, 4]" = two[1]
"""


def _offloaded(program, **plan):
    offload.rewrite(program, Plan(**{"offload": ("block",), **plan}))
    return [node.args[0].name for node in program.calls(OFFLOAD)]


def test_what_the_backward_of_the_block_reads_goes():
    assert _offloaded(_program(Y, READ)) == ["y"]
    assert _offloaded(_program(Y, READ), offload=("other",)) == []
    assert _offloaded(_program(Y, READ), offload=()) == []
    assert _offloaded(_program(Y, "")) == [], "nothing reads it behind the turn"
    assert _offloaded(_program(Y, READ.replace("y)", "x)"))) == [], "an input"


def test_results_of_an_operator_go_one_by_one():
    assert _offloaded(_program(LARGE_OF_TWO, READ)) == ["y"]
    both = READ + '    e: "i64[4, 4]" = aten.add.Tensor(z, z)\n'
    assert sorted(_offloaded(_program(LARGE_OF_TWO, both))) == ["y", "z"]


@pytest.mark.parametrize(
    "forward, backward, options",
    [
        (Y, READ, {"outputs": "y"}),
        (Y + '    v: "f32[4, 4]" = aten.view.default(y, [4, 4])\n', READ, {"outputs": "v"}),
        (Y, READ, {"between": '    z: "f32[4, 4]" = aten.sin.default(y)\n'}),
        (Y, READ, {"between": '    p: "f32[4, 4]" = aten.copy_.default(y, x)\n'}),
        (Y + '    v: "f32[16]" = aten.view.default(y, [16])\n    p: "f32[16]" = aten.exp_.default(v)\n', READ, {}),
        ('    y: "f32[4, 4]" = aten.view.default(x, [4, 4])\n', READ, {}),
        ('    y: "f32[1, 4]" = aten.sum.dim_IntList(x, [0], True)\n', READ, {}),
        ('    w: "f32[4, 4] | chunk=0" = geminifx.view(wait_0, 0, [4, 4])\n',
         '    d: "f32[4, 4]" = aten.cos.default(w)\n', {}),
        (Y, '    p: "f32[4, 4]" = aten.exp_.default(y)\n', {}),
    ],
    ids=["output", "view of an output", "read as the forward ends", "overwritten", "overwritten through a view",
         "view of an input", "small", "weights", "overwritten in the backward"],
)  # fmt: skip
def test_what_stays_on_the_device(forward, backward, options):
    assert _offloaded(_program(forward, backward, **options)) == []


def test_a_copy_of_more_bytes_has_the_time_of_more_chunks():
    """Values of two chunks' bytes leave, and come back, one chunk earlier than those of one chunk's."""
    one = '    y: "f32[64]" = aten.empty.memory_format([64], device=DEVICE)\n'
    read = '    d: "f32[64]" = aten.cos.default(y)\n'
    for bytes_in_chunks, there, back in ((1, 2, 6), (2, 3, 5)):
        lines = [text.replace("64", str(64 * bytes_in_chunks)) for text in (one, read)]
        program = _program(*lines)
        assert _offloaded(program) == ["y"]
        (depart,), (reload,) = program.calls(DEPART), program.calls(RELOAD)
        assert (depart.next.name, reload.next.name) == (f"wait_{there}", f"wait_{back}")
    assert _offloaded(_program(*(text.replace("64", "192") for text in (one, read)))) == [], (
        "it would leave at the turn"
    )


def test_even_the_longest_copies_are_waited_for(monkeypatch):
    made = '    y: "f32[6400]" = aten.empty.memory_format([6400], device=DEVICE)\n'
    read = '    d: "f32[6400]" = aten.cos.default(y)\n'
    assert _offloaded(_program(made, read)) == []
    monkeypatch.setattr("geminifx.passes.offload.MOST_CHUNKS", 1)
    assert _offloaded(_program(made, read)) == ["y"]


def test_evaluation_and_programs_without_such_blocks_are_left_alone(evaluation):
    program, plan = evaluation
    run_passes(program, Plan(layout=plan.layout, offload=plan.recompute), PIPELINE)
    assert not program.calls(OFFLOAD)
