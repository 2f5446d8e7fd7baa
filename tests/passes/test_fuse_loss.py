"""fuse_loss: what a loss over a vocabulary becomes, and which losses stay as they are."""

from pathlib import Path

import pytest
from geminifx.passes.canonicalize import canonicalize
from geminifx.passes.fuse_loss import fuse_loss
from geminifx.passes.patterns.cross_entropy import find_losses
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.text import parse_program
from geminifx.runtime.isa.linear_cross_entropy import BACKWARD, FORWARD

FUSED = Plan(fuse_loss=True)


@pytest.mark.parametrize("case", ["causal", "softcap_in_low_precision", "logits_read_elsewhere", "few_classes"])
def test_before_and_after(golden, case):
    golden(case, fuse_loss, FUSED)


def test_the_plan_decides(captured, same):
    program, plan = captured
    canonicalize.rewrite(program, plan)
    before = program.copy()
    fuse_loss.rewrite(program, plan)
    same(program, before)


def test_language_models_are_fused_and_classifiers_are_not(captured, request):
    program, plan = captured
    canonicalize.rewrite(program, plan)
    language = "opt" in request.node.name or "gpt2" in request.node.name or "llama" in request.node.name
    found = len(list(find_losses(program)))
    # The small classifier has two classes and the others have no loss.
    assert found == language
    fuse_loss.rewrite(program, FUSED)
    assert len(program.calls(FORWARD)) == len(program.calls(BACKWARD)) == found
    assert list(find_losses(program)) == []


def test_evaluation_is_left_alone(evaluation, same):
    program, plan = evaluation
    canonicalize.rewrite(program, plan)
    before = program.copy()
    fuse_loss.rewrite(program, FUSED)
    same(program, before)


_FLAT = 'flat: "f32[4, 8]" = aten.view.default('


@pytest.mark.parametrize(
    "old, new",
    [
        ("None, 1, -100", "class_weight, 1, -100"),
        (_FLAT + "logits", f'double: "f32[2, 2, 8]" = aten.mul.Tensor(logits, 2.0)\n    {_FLAT}double'),
        ("mm.default(d_rows, w)", "mm.default(d_rows, other)"),
        ("aten.mm.default(d_t, rows)", "aten.mm.default(d_t, other_rows)"),
        ('"output:1": logits', '"gradient:z": d_rows'),
        ('"output:1": logits', '"output:1": softmax'),
        ("_log_softmax.default(flat, 1,", "_log_softmax.default(flat, 0,"),
    ],
)
def test_what_is_not_quite_the_pattern_stays(old, new):
    source = (Path(__file__).parent.parent / "golden" / "fuse_loss_causal.py").read_text(encoding="utf-8")
    text = source[source.index("def before") : source.index("def after")]
    inputs = 'class_weight: "f32[8] | buffer:c", other: "f32[8, 4] | buffer:o", other_rows: "f32[4, 4] | buffer:r",'
    assert len(list(find_losses(parse_program(text)))) == 1 and old in text
    changed = text.replace(old, new).replace("def before(", f"def before({inputs}")
    assert list(find_losses(parse_program(changed))) == []
