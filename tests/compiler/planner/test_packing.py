"""Packing: every parameter has exactly one place, aligned and alone, in chunks of one kind."""

import torch
from geminifx.compiler.planner.packing import SMALLEST_CHUNK_BYTES, Spread, pack, uses
from geminifx.passes.program.program import Program, annotate
from geminifx.passes.program.types import TensorType
from geminifx.runtime.isa.layout import ALIGNMENT_BYTES, ChunkLayout, Layout
from geminifx.runtime.isa.mesh import Axis, Mesh
from geminifx.runtime.isa.precision import cast_dtype
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

KB = 1024
PIPELINE = Mesh((Axis("pipeline", 3, "pipeline"),))


def program(parameters: dict[str, nn.Parameter], tied: dict[str, str] | None = None) -> Program:
    """A program that reads the parameters in the order given."""
    made = Program("training")
    made.set_results({})
    for name, parameter in parameters.items():
        owner = (tied or {}).get(name, "")
        node = made.add_input(name.replace(".", "_"), TensorType.of(parameter), f"parameter:{name}", owner)
        made.emit(torch.ops.aten.exp.default, (node,), before=made.output)
    return made


def dtypes(parameters: dict[str, nn.Parameter], low: torch.dtype | None = None) -> dict[str, torch.dtype]:
    return {name: cast_dtype(parameter, low) for name, parameter in parameters.items()}


def floats(kilobytes: float, **options: object) -> nn.Parameter:
    return nn.Parameter(torch.empty(int(kilobytes * 256)), **options)  # type: ignore[arg-type]


def names(layout: Layout) -> list[list[str]]:
    return [[slot.name for slot in chunk.slots] for chunk in layout.chunks]


def test_chunks_follow_the_order_of_use_and_the_blocks() -> None:
    blocks = tuple(f"b{i}" for i in range(3))
    parameters = {"embed": floats(8)} | {f"{b}.{n}": floats(20) for b in blocks for n in "wv"} | {"head": floats(4)}
    layout = pack(uses(program(parameters)), parameters, blocks, dtypes(parameters))
    # A chunk is as large as a block, 40 KiB. The embedding is less than half of that and takes company; where
    # a block begins and the chunk is half full, a new one does.
    assert names(layout) == [
        ["embed", "b0.w"],
        ["b0.v"],
        ["b1.w", "b1.v"],
        ["b2.w", "b2.v"],
        ["head"],
    ]
    assert [chunk.index for chunk in layout.chunks] == list(range(len(layout.chunks)))
    assert layout.chunks[2].compute_bytes == layout.chunks[3].compute_bytes == 40 * KB


def test_small_models_have_one_chunk_and_large_parameters_their_own() -> None:
    small = {name: floats(2) for name in "abcd"}
    assert names(pack(uses(program(small)), small, (), dtypes(small))) == [["a", "b", "c", "d"]]
    # The largest block is 40 KiB, so is a chunk; what is larger stands alone.
    mixed = {"x.a": floats(40), "huge": floats(100), "y.a": floats(40)}
    assert names(pack(uses(program(mixed)), mixed, ("x", "y"), dtypes(mixed))) == [["x.a"], ["huge"], ["y.a"]]


def test_frozen_and_trained_and_dtypes_do_not_mix() -> None:
    parameters = {
        "a": floats(1),
        "frozen": floats(1, requires_grad=False),
        "double": nn.Parameter(torch.empty(8, dtype=torch.float64)),
        "half": nn.Parameter(torch.empty(8, dtype=torch.float16)),
        "b": floats(1),
    }
    layout = pack(uses(program(parameters)), parameters, (), dtypes(parameters))
    kinds = {
        tuple(ns): (c.dtype, c.master_dtype, c.trainable) for ns, c in zip(names(layout), layout.chunks, strict=True)
    }
    assert kinds == {
        ("a", "b"): (torch.float32, torch.float32, True),
        ("frozen",): (torch.float32, torch.float32, False),
        ("double",): (torch.float64, torch.float64, True),
        ("half",): (torch.float16, torch.float32, True),  # small updates must not be rounded away
    }
    low = pack(uses(program(parameters)), parameters, (), dtypes(parameters, torch.bfloat16))
    computes = {slot.name: chunk.dtype for chunk in low.chunks for slot in chunk.slots}
    assert computes == dict.fromkeys(("a", "frozen", "half", "b"), torch.bfloat16) | {"double": torch.float64}


def test_parameters_whose_gradients_are_summed_over_other_axes_do_not_mix() -> None:
    mesh = Mesh((Axis("data", 2, "data"), Axis("experts", 4, "expert"), Axis("tp", 2, "tensor")))
    parameters = {name: floats(1) for name in ("router", "up", "head", "down")}
    made = program(parameters)
    for name in ("up", "down"):
        annotate(made.inputs("parameter")[name], placement="experts=S0")
    layout = pack(uses(made), parameters, (), dtypes(parameters), Spread(mesh))
    found = {tuple(ns): chunk.reduced_over for ns, chunk in zip(names(layout), layout.chunks, strict=True)}
    assert found == {("router", "head"): ("data", "experts"), ("up", "down"): ("data",)}


def test_each_process_of_a_pipeline_has_a_place_for_what_its_layers_read() -> None:
    parameters = {name: floats(1) for name in ("embed", "first", "shared", "second", "third")}
    owners = {"embed": (0, 2), "first": (0,), "shared": (0, 2), "second": (1,), "third": (2,)}
    made = program(parameters)
    own = [{name: p for name, p in parameters.items() if place in owners[name]} for place in range(3)]
    layouts = [pack(uses(made), each, (), dtypes(parameters), Spread(PIPELINE, owners)) for each in own]
    assert [names(layout) for layout in layouts] == [
        [["embed", "shared"], ["first"]],  # what others have, too, is apart: it is counted once in all
        [["second"]],
        [["embed", "shared"], ["third"]],
    ]
    assert all(layout.owners == owners and list(layout.owners) == list(parameters) for layout in layouts)
    assert [chunk.index for chunk in layouts[2].chunks] == [0, 1]


def test_a_tied_parameter_lives_once_where_it_is_used_first() -> None:
    parameters = {name: floats(1) for name in ("body", "embed")}
    used = {"head": parameters["embed"], **parameters}
    layout = pack(uses(program(used, {"head": "embed"})), parameters, (), dtypes(parameters))
    assert names(layout) == [["embed", "body"]]
    assert layout.tied == (("head", "embed"),)


def test_a_parameter_that_nobody_reads_has_a_place_too() -> None:
    parameters = {"a": floats(1), "unused": floats(1), "b": floats(1)}
    made = program(parameters)
    for node in made.computes:
        if "unused" in node.args[0].name:
            made.graph.erase_node(node)
    assert names(pack(uses(made), parameters, (), dtypes(parameters))) == [["a", "b", "unused"]]


shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)
parameter = st.tuples(shapes, st.sampled_from([torch.float32, torch.float16, torch.float64]), st.booleans())


@settings(max_examples=60)
@given(kinds=st.lists(parameter, min_size=1, max_size=20), low=st.booleans(), in_blocks=st.integers(1, 6))
def test_every_parameter_has_exactly_one_place_aligned_and_alone(
    kinds: list[tuple[tuple[int, ...], torch.dtype, bool]], low: bool, in_blocks: int
) -> None:
    parameters = {
        f"b{i // in_blocks}.p{i}": nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=trained)
        for i, (shape, dtype, trained) in enumerate(kinds)
    }
    blocks = tuple({name.split(".")[0]: None for name in parameters})
    layout = pack(uses(program(parameters)), parameters, blocks, dtypes(parameters, torch.bfloat16 if low else None))
    placed = [slot.name for chunk in layout.chunks for slot in chunk.slots]
    assert sorted(placed) == sorted(parameters)
    assert set(layout.places) == set(parameters)
    for chunk in layout.chunks:
        _check(chunk, parameters)


def _check(chunk: ChunkLayout, parameters: dict[str, nn.Parameter]) -> None:
    end = 0
    for slot in chunk.slots:
        assert slot.shape == tuple(parameters[slot.name].shape)
        assert parameters[slot.name].requires_grad is chunk.trainable
        assert slot.offset >= end and slot.offset * chunk.dtype.itemsize % ALIGNMENT_BYTES == 0
        end = slot.offset + slot.numel
    assert end <= chunk.numel and chunk.compute_bytes % ALIGNMENT_BYTES == 0
    if len(chunk.slots) > 1:
        # No chunk is larger than the largest block, and only in a chunk that has room do several meet.
        whole = sum(p.numel() * p.itemsize + ALIGNMENT_BYTES for p in parameters.values())
        assert chunk.compute_bytes <= max(SMALLEST_CHUNK_BYTES, whole)
