"""The pass manager: contracts, users' passes, records, dump files, and whom it blames."""

import pytest
import torch
from geminifx.passes.pipeline import PIPELINE
from geminifx.passes.program.manager import Pass, assemble, graph_pass, run_passes
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.program import annotate
from geminifx.passes.program.text import parse_program, print_program
from geminifx.passes.program.types import parse_type
from geminifx.passes.program.verify import Violation, canonical, chunked, fact, turned
from geminifx.runtime.isa.errors import ArgumentError, VerificationError

aten = torch.ops.aten

TEXT = """
def evaluation(x: "f32[4] | input:0"):
    # forward: act
    a: "f32[4]" = aten.relu.default(x)
    b: "f32[4]" = aten.detach.default(a)
    y: "f32[4]" = aten.sin.default(b)
    return {"output:0": y}
"""


@pytest.fixture
def program():
    return parse_program(TEXT)


@graph_pass(after="canonicalize")
def soften(program, plan):
    for node in program.calls(aten.relu.default):
        program.replace(node, program.emit(aten.sigmoid.default, node.args, before=node))


@graph_pass(after="canonicalize")
def other(program, plan):
    return None


def names(passes):
    return [p.name for p in passes]


def test_a_missing_requirement_is_named(program):
    chunk = next(p for p in PIPELINE if p.name == "chunk")
    with pytest.raises(VerificationError, match=r"'chunk' requires turned.*known here: canonical"):
        run_passes(program, Plan(), [PIPELINE[0], chunk])
    with pytest.raises(VerificationError, match="known here: none"):
        run_passes(program, Plan(), [chunk])


def test_a_fact_is_lost_where_a_pass_breaks_it(program):
    breaker = Pass("breaker", lambda program, plan: None, breaks=(canonical,))
    needs = Pass("needs", lambda program, plan: None, requires=(canonical,))
    run_passes(program.copy(), Plan(), [PIPELINE[0], needs])
    with pytest.raises(VerificationError, match="'needs' requires canonical"):
        run_passes(program, Plan(), [PIPELINE[0], breaker, needs])


def test_a_decorated_function_is_a_pass_of_its_name():
    assert soften == Pass("soften", soften.rewrite, after="canonicalize")

    @graph_pass(requires=(canonical,), gives=(turned,), breaks=(chunked,))
    def mine(program, plan):
        return None

    assert (mine.name, mine.requires, mine.gives, mine.breaks) == ("mine", (canonical,), (turned,), (chunked,))


def test_users_passes_are_placed_by_name_in_the_order_given():
    assert names(assemble(PIPELINE)) == names(PIPELINE)
    expected = [PIPELINE[0].name, "soften", "other", *names(PIPELINE[1:])]
    assert names(assemble(PIPELINE, [soften, other])) == expected
    last = Pass("last", lambda program, plan: None, after="soften")
    expected.insert(2, "last")
    assert names(assemble(PIPELINE, [soften, other, last])) == expected


def test_an_unknown_place_gets_the_nearest_name():
    lost = Pass("lost", lambda program, plan: None, after="canonicalise")
    with pytest.raises(ValueError, match=r"'lost'.*'canonicalise' names no pass; did you mean 'canonicalize'"):
        assemble(PIPELINE, [lost])


def test_what_is_no_pass_is_refused():
    with pytest.raises(ArgumentError, match="after=3; expected the name of the pass that it runs after"):
        graph_pass(after=3)
    with pytest.raises(ArgumentError, match="graph_pass=3; expected a function of a program and its plan"):
        graph_pass(after="chunk")(3)


def test_records_tell_the_difference_in_operators(program):
    first, second, third = run_passes(program, Plan(), [PIPELINE[0], soften, other])
    assert first.delta == (("aten.detach.default", -1),)
    assert second.delta == (("aten.relu.default", -1), ("aten.sigmoid.default", 1))
    assert third.delta == ()
    assert "aten.sigmoid.default +1" in str(second) and "unchanged" in str(third)
    assert all(record.rewrite_s >= 0 and record.verify_s > 0 for record in (first, second, third))


def test_dump_is_one_readable_program_per_pass(program, tmp_path, same):
    before = program.copy()
    run_passes(program, Plan(), [PIPELINE[0], soften], tmp_path / "new" / "folder")
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert [f.name for f in files] == ["00_capture.py", "01_canonicalize.py", "02_soften.py"]
    same(parse_program(files[0].read_text()), before)
    assert files[2].read_text() == print_program(program)


def test_the_pass_that_breaks_a_fact_is_blamed_not_the_one_that_gave_it(program):
    def relapse(program, plan):
        program.emit(aten.detach.default, (program.placeholders[0],), before=program.output)

    with pytest.raises(VerificationError) as raised:
        run_passes(program, Plan(), [PIPELINE[0], graph_pass()(relapse)])
    assert "after pass 'relapse'" in str(raised.value) and "'canonical'" in str(raised.value)


def _retyped(program):
    annotate(program.placeholders[0], type=parse_type("f32[8]"))


def _other_arguments(program):
    x, y = program.placeholders[0], program.results["output:0"]
    y.args = (program.emit(aten.view.default, (x, [2, 2]), before=y),)


def _other_operator(program):
    program.results["output:0"].target = aten.sum.default


@pytest.mark.parametrize("mistake", [_retyped, _other_arguments, _other_operator])
def test_what_a_pass_changes_is_inferred_again(program, mistake):
    """Though an earlier pass has left it as it was found to be right."""
    careless = Pass("careless", lambda program, plan: mistake(program))
    passes = [PIPELINE[0], other, other]
    run_passes(program, Plan(), passes)
    with pytest.raises(VerificationError, match=r"after pass 'careless'.*breaks 'well_typed'"):
        run_passes(program, Plan(), [*passes, careless, other])


def test_without_verification_requirements_are_checked_all_the_same(program):
    needs = Pass("needs", lambda program, plan: None, requires=(canonical,))
    run_passes(program, Plan(), [needs], after=PIPELINE[:1], verified=False)
    with pytest.raises(VerificationError, match="requires canonical"):
        run_passes(program, Plan(), [needs], verified=False)


def test_an_exception_inside_a_pass_names_it(program):
    def clumsy(program, plan):
        x = program.placeholders[0]
        program.emit(aten.mm.default, (x, x), before=program.output)

    with pytest.raises(RuntimeError) as raised:
        run_passes(program, Plan(), [graph_pass()(clumsy)])
    assert raised.value.__notes__ == ["raised inside the pass 'clumsy'"]


def test_users_facts_are_checked_like_ours(program):
    @fact
    def no_sine(program, plan):
        found = program.calls(aten.sin.default)
        return Violation(found[0], "a sine", "none") if found else None

    with pytest.raises(VerificationError, match=r"after pass 'claims'.*breaks 'no_sine' at 'y'"):
        run_passes(program, Plan(), [Pass("claims", lambda program, plan: None, gives=(no_sine,))])
