"""Types: their text, and the type rule of operators with its memory."""

import copy
import operator

import pytest
import torch
from geminifx.passes.program.types import (
    DTYPE_TEXT,
    TensorType,
    freeze,
    infer,
    parse_type,
    type_of_value,
    type_text,
)
from geminifx.runtime.isa.layout import contiguous_stride
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

aten = torch.ops.aten


@st.composite
def tensor_types(draw):
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    strides = st.tuples(*[st.integers(0, 99)] * len(shape))
    stride = draw(st.just(contiguous_stride(shape)) | strides)
    return TensorType(draw(st.sampled_from(list(DTYPE_TEXT))), shape, stride)


types = st.recursive(st.none() | tensor_types(), lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=5)


@given(types)
def test_text_parses_back(value):
    assert parse_type(type_text(value)) == value


def test_text_is_short_where_it_can_be():
    f32 = torch.float32
    assert type_text(TensorType(f32, (8, 64), (64, 1))) == "f32[8, 64]"
    assert type_text(TensorType(f32, (8, 64), (1, 8))) == "f32[8, 64]{1, 8}"
    assert type_text((TensorType(torch.int64, (), ()), None)) == "(i64[], none)"
    assert type_text(()) == "()"


@pytest.mark.parametrize(
    "text", ["", "f32", "f33[2]", "f32[2", "f32[x]", "f32[2]{1, 1}", "[2]", "(f32[2]", "f32[2]) (", "None"]
)
def test_other_text_is_refused(text):
    with pytest.raises(ValueError):
        parse_type(text)


@given(st.lists(st.integers(0, 5), max_size=4))
def test_contiguous_is_what_torch_calls_contiguous(shape):
    assert contiguous_stride(tuple(shape)) == torch.empty(shape).stride()


@pytest.mark.parametrize(
    "tensor, num_bytes",
    [
        (torch.empty(3, 5), 60),
        (torch.empty(3, 5).t(), 60),
        (torch.empty(5, dtype=torch.bfloat16).expand(3, 5), 10),
        (torch.empty(4, 4)[:, :2], 56),
        (torch.empty(0, 7), 0),
        (torch.empty((), dtype=torch.float64), 8),
    ],
)
def test_bytes_are_those_of_the_storage_spanned(tensor, num_bytes):
    assert TensorType.of(tensor).num_bytes == num_bytes


def test_only_tensors_numbers_tuples_and_none_have_types():
    assert type_of_value([torch.empty(2), None]) == (TensorType(torch.float32, (2,), (1,)), None)
    assert (type_of_value(3), type_of_value(0.5)) == (parse_type("int"), parse_type("float"))
    with pytest.raises(ValueError, match="not True"):
        type_of_value(True)


# -- the type rule -----------------------------------------------------------------------------------------


def _infer(target, *args, **kwargs):
    """The result's type as text; text arguments that are types stand for program values."""
    graph, known = fx.Graph(), {}

    def value(item):
        if isinstance(item, list):
            return [value(element) for element in item]
        if not isinstance(item, str):
            return item
        node = graph.placeholder("value")
        known[node] = parse_type(item)
        return node

    arguments = tuple(value(item) for item in args)
    return type_text(infer(target, arguments, kwargs, known.__getitem__))


@pytest.mark.parametrize(
    "expected, target, args",
    [
        ("f32[2, 4]", aten.mm.default, ("f32[2, 3]", "f32[3, 4]{1, 3}")),
        ("f32[3, 2]{1, 3}", aten.t.default, ("f32[2, 3]",)),
        ("bf16[2, 3]", aten._to_copy.default, ("f32[2, 3]", {"dtype": torch.bfloat16})),
        ("(f32[2, 2]{3, 1}, f32[2, 1]{3, 1})", aten.split.Tensor, ("f32[2, 3]", 2, 1)),
        ("(f32[4], i64[4])", aten.max.dim, ("f32[4, 5]", 1)),
        ("f32[6, 2]", aten.cat.default, (["f32[2, 2]", "f32[4, 2]"],)),
        ("b8[2, 3]", aten.gt.Scalar, ("f32[2, 3]", 0)),
        ("i64[3]", operator.getitem, ("(f32[2], i64[3])", 1)),
        ("(i64[3], none)", operator.getitem, ("(f32[2], i64[3], none)", slice(1, 3))),
        ("none", torch.ops.geminifx.release.default, ("f32[8]", 0)),
        ("f32[2, 2]", torch.ops.geminifx.view.default, ("f32[8]", 4, [2, 2])),
        ("(f32[3])", torch.ops.geminifx.turn.default, (["f32[2]", "f32[3]"], [1])),
    ],
)
def test_inferred_types(expected, target, args):
    kwargs = args[-1] if isinstance(args[-1], dict) else {}
    assert _infer(target, *[a for a in args if not isinstance(a, dict)], **kwargs) == expected


def test_ill_typed_arguments_raise_what_the_operator_raises():
    with pytest.raises(RuntimeError):
        _infer(aten.mm.default, "f32[2, 3]", "f32[4, 4]")


@pytest.mark.parametrize("values", [(True, 1, 1.0), (1.0, 1, True), (1, True, 1.0)])
def test_equal_keys_are_not_equal_arguments(values):
    """1, 1.0 and True hash alike; what they add to an integer tensor has different types."""
    for fill in values:
        full = {bool: "b8[3]", int: "i64[3]", float: "f32[3]"}[type(fill)]
        assert _infer(aten.full.default, [3], fill) == full
        added = "f32[3]" if isinstance(fill, float) else "i64[3]"
        assert _infer(aten.add.Tensor, "i64[3]", fill) == added


def test_strides_dtypes_and_containers_are_part_of_what_is_remembered():
    assert _infer(aten.relu.default, "f32[2, 3]") == "f32[2, 3]"
    assert _infer(aten.relu.default, "f32[2, 3]{1, 2}") == "f32[2, 3]{1, 2}"
    assert _infer(aten.relu.default, "f16[2, 3]") == "f16[2, 3]"
    assert _infer(aten.sum.dim_IntList, "f32[2, 3]", [0]) == "f32[3]"
    assert _infer(aten.sum.dim_IntList, "f32[2, 3]", [0], dtype=torch.float64) == "f64[3]"
    assert _infer(aten.sum.dim_IntList, "f32[2, 3]", [0], True) == "f32[1, 3]"


# -- arguments as keys -------------------------------------------------------------------------------------

DISTINCT = (
    0, 0.0, -0.0, False, 0j, -0j, 1, 1.0, True, None, "1", float("nan"), float("inf"), torch.float32, (), [], {}, (1,),
    [1], [1.0], {"a": 1}, {"a": 1.0}, slice(0, 1), slice(0, 1, 1), slice(False, 1), ("list", 1), (list, 1),
)  # fmt: skip


def _no_node(node):
    raise AssertionError


def test_frozen_arguments_are_equal_where_the_arguments_are_the_same():
    keys = {freeze(value, _no_node) for value in DISTINCT}
    assert len(keys) == len(DISTINCT)
    assert keys == {freeze(value, _no_node) for value in copy.deepcopy(DISTINCT)}


def test_frozen_nodes_are_what_the_caller_says():
    node = fx.Graph().placeholder("x")
    assert freeze([node, {"k": node}], lambda found: found) != freeze([node, {"k": node}], lambda found: 0)
    assert freeze((node, slice(node)), lambda found: 7) == freeze((node, slice(node)), lambda found: 7)
    assert freeze(node, lambda found: 7) != freeze(7, _no_node), "a node's number is no number among the arguments"
