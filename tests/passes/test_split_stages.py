"""split_stages: the programs of all ranks of a pipeline together compute what one program of all stages does."""

import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from geminifx.compiler.planner.pipeline.round_robin import EVEN, round_robin
from geminifx.compiler.planner.pipeline.schedules import Shape, make_schedule
from geminifx.passes.canonicalize import canonicalize
from geminifx.passes.partition import partition
from geminifx.passes.program.manager import run_passes
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.program import note, tensor_type, type_of
from geminifx.passes.program.text import parse_program
from geminifx.passes.split_stages import split_stages
from geminifx.runtime.isa.errors import ShardingError
from geminifx.runtime.isa.instructions import RECEIVE, SEND, TURN
from geminifx.runtime.isa.layout import contiguous_stride
from geminifx.runtime.isa.schedule import Action, Schedule

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from all_ranks import Values
from more_models import T5
from pipelines import Step, run, step_of
from zoo import GPT2, LLAMA, OPT, Case, opt

ONE_F_ONE_B = Schedule.parse("""\
1f1b stages=2 microbatches=2
rank 0: F0.0 F0.1 B0.0 B0.1
rank 1: F1.0 B1.0 F1.1 B1.1""")
DIVIDED = Schedule.parse("""\
divided stages=2 microbatches=2
rank 0: F0.0 F0.1 I0.0 W0.0 I0.1 W0.1
rank 1: F1.0 I1.0 F1.1 I1.1 W1.0 W1.1""")
PLAN = Plan(microbatches=2, blocks=("layers.0", "layers.1"), stages=("", "layers.1"))


@pytest.mark.parametrize(
    ("case", "schedule", "line"),
    [("first_of_two", ONE_F_ONE_B, 0), ("second_of_two", ONE_F_ONE_B, 1), ("weights_later", DIVIDED, 1)],
)
def test_before_and_after(golden, case, schedule, line):
    golden(case, split_stages, replace(PLAN, schedule=schedule, line=line))


DROPOUT = Case("opt, dropout", lambda: opt(dropout=0.1, attention_dropout=0.1))
UNTIED = Case("opt, not tied", lambda: opt(tie_word_embeddings=False, num_hidden_layers=4))
DEEP = Case("opt of eight blocks", lambda: opt(num_hidden_layers=8, dropout=0.1))
FROZEN_EMBEDDING = Case("opt, its tied embedding frozen", lambda: _frozen(opt(dropout=0.1)))
TIED = ("gradient:model.decoder.embed_tokens.weight", "gradient:transformer.wte.weight", "gradient:shared.weight")
ROUNDING = 2**-22
"""Of a tied weight's gradient both readers' sums are added up, where one process adds their terms one by one; with both
on one rank these come in another order."""


class DetachedHead(torch.nn.Module):
    """Reads the embedding's weight, and hands it no gradient."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, self.embedding.weight.detach())


def _detached_head():
    model = opt(tie_word_embeddings=False)
    model.lm_head = DetachedHead(model.model.decoder.embed_tokens)
    return model


class Biased(torch.nn.Embedding):
    """Adds two biases of its own, and hands them no gradient."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.one, self.other = (torch.nn.Parameter(torch.randn(sizes[1])) for _ in range(2))

    def forward(self, ids):
        return super().forward(ids) + (self.one + self.other).detach()


class BiasedHead(torch.nn.Linear):
    """Adds the embedding's biases to what it reads, too."""

    def forward(self, hidden):
        return super().forward(hidden + (self.embedding.one + self.embedding.other))


def _two_biases():
    model = opt(tie_word_embeddings=False)
    sizes = model.model.decoder.embed_tokens.weight.shape
    model.model.decoder.embed_tokens = Biased(*sizes)
    model.lm_head = BiasedHead(sizes[1], sizes[0], bias=False)
    model.lm_head.embedding = model.model.decoder.embed_tokens
    return model


def _frozen(model):
    model.model.decoder.embed_tokens.requires_grad_(False)
    return model


@cache
def alone(step: Step, tangent: float, **changes) -> Values:
    """What one process finds, for any number of schedules."""
    torch.manual_seed(0)
    return step.whole(tangent, **changes)


def check(step: Step, schedule: Schedule, *, tangent: float = 1.0, **changes):
    """Every rank's results are those of one process: all bits, but for weights that several stages read, and those of a
    stage whose microbatches several ranks share."""
    last = [Action(schedule.stages - 1, microbatch, "F") for microbatch in range(schedule.microbatches)]
    shared = len(set(map(schedule.runner, last))) > 1
    expected = alone(step, tangent, **changes)
    torch.manual_seed(0)
    found = step.staged(schedule, tangent, **changes)
    holders = {role: [results[role] for results in found if role in results] for role in expected}
    for role, whole in expected.items():
        assert holders[role], f"nobody has {role}"
        for value in holders[role]:
            if value.numel() == 0 != whole.numel():  # logits, elsewhere
                continue
            if role.endswith(TIED) or (shared and role.startswith("gradient:")):
                assert torch.equal(value, holders[role][0])
                assert (value - whole).abs().max() <= ROUNDING * whole.abs().max(), role
            else:
                assert torch.equal(value, whole), role


LARGE = pytest.param(T5, marks=pytest.mark.slow)
QUICK = (("zb1p", "nothing"), ("1f1b", "all"))
"""Of these every case; a case's other pairs go through the same code."""
WAYS = [
    pytest.param(name, recompute, marks=[] if (name, recompute) in QUICK else pytest.mark.slow)
    for name in ("gpipe", "1f1b", "zb1p")
    for recompute in ("nothing", "all")
]


@pytest.mark.parametrize("case", [OPT, GPT2, LLAMA, LARGE, DROPOUT, FROZEN_EMBEDDING], ids=lambda case: case.name)
@pytest.mark.parametrize(("name", "recompute"), WAYS)
def test_two_ranks_find_what_one_process_does(case, name, recompute):
    step = step_of(case, 4)
    check(step, make_schedule(name, Shape(2, 4)), recompute=step.blocks if recompute == "all" else ())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param("1f1b", Shape(4, 4), marks=pytest.mark.slow),
        pytest.param("zb1p", Shape(4, 8), marks=pytest.mark.slow),
        ("interleaved", Shape(2, 4, 2)),
        pytest.param("interleaved", Shape(4, 4, 2), marks=pytest.mark.slow),
        ("zbv", Shape(2, 4, 2)),
        pytest.param("zbv", Shape(4, 8, 2), marks=pytest.mark.slow),
        ("gpipe", Shape(1, 4, 4)),
    ],
)
def test_every_schedule_gives_the_same_bits(name, shape):
    step = step_of(DEEP, shape.microbatches)
    check(step, make_schedule(name, shape), recompute=step.blocks[::2])


@pytest.mark.parametrize(
    ("case", "stages", "ranks"),
    [
        (OPT, 2, 2),
        (DROPOUT, 2, 3),
        (UNTIED, 4, 2),
        pytest.param(T5, 4, 2, marks=pytest.mark.slow),
        pytest.param(DEEP, 8, 4, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("recompute", ["nothing", "all"])
def test_stages_without_ranks_of_their_own_find_what_one_process_does(case, stages, ranks, recompute):
    step = step_of(case, 4)
    schedule = round_robin([EVEN] * stages, ranks, 4)
    check(step, schedule, tangent=0.5, recompute=step.blocks if recompute == "all" else ())


@pytest.mark.parametrize("case", [DROPOUT, UNTIED], ids=lambda case: case.name)
def test_ranks_may_differ_in_whether_they_recompute_a_last_stage_that_returns(case):
    """What others send and receive, and the state of their generators, does not depend on it."""
    step = step_of(case, 4)
    schedule = round_robin([EVEN] * len(step.blocks), 2, 4)
    assert schedule.returns(schedule.stages - 1)
    plans = step.plans(schedule, recompute=step.blocks[:-1])
    for fuller in range(2):
        mixed = [replace(plan, recompute=step.blocks) if plan.line == fuller else plan for plan in plans]
        expected, found = (_seeded(step, each) for each in (plans, mixed))
        for one, other in zip(found, expected, strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[role], other[role]) for role in one)


def _seeded(step: Step, plans: list[Plan]):
    torch.manual_seed(0)
    return run([step.lowered(plan) for plan in plans], step.values)


@pytest.mark.parametrize("weights", ["host", "rank"])
def test_where_weights_live_on_the_hosts_gradients_of_inputs_are_sent_before_those_of_weights_exist(weights):
    """A backward's product with the weight comes first, and what it makes goes; then that for the weight's gradient."""
    schedule = replace(ONE_F_ONE_B, weights=weights)
    program = parse_program(_chain(2, 2))
    run_passes(program, replace(PLAN, schedule=schedule, line=1), (canonicalize, split_stages))
    backward = [node for node in program.computes if note(node).action == "B1.0"]
    mm = torch.ops.aten.mm.default
    products = [
        tensor_type(node).shape if node.target is mm else "sent" for node in backward if node.target in (mm, SEND)
    ]
    of_input, of_weight = (2, 4), (4, 4)
    assert products == ([of_input, "sent", of_weight] if weights == "host" else [of_weight, of_input, "sent"])


def test_a_gradient_of_no_example_has_no_rank_in_a_round_robin():
    text = _chain(2, 2).replace('weight": d0', 'weight": twice')
    text = text.replace("    return", '    twice: "f32[4, 4]" = aten.mul.Tensor(w0, 2)\n    return')
    plan, program = replace(PLAN, schedule=round_robin([EVEN] * 2, 2, 2)), parse_program(text)
    with pytest.raises(ShardingError, match=r"the gradient of layers\.0\.weight does not depend on the batch"):
        run_passes(program, plan, (canonicalize, split_stages, partition))


def test_parameters_that_share_a_gradient_all_have_it_everywhere():
    """One node is the gradient of both, made in the last stage, and the first one's copies are to be updated by it."""
    step = step_of(Case("opt, two biases", _two_biases), 4)
    check(step, make_schedule("1f1b", Shape(2, 4)))
    for results in step.staged(make_schedule("1f1b", Shape(2, 4))):
        found = [results[f"gradient:model.decoder.embed_tokens.{name}"] for name in ("one", "other")]
        assert torch.equal(*found) and found[0].abs().sum() > 0


def test_whoever_reads_a_weight_has_its_gradient():
    """That of the embedding is made in the first stage alone; the last one's copy is to be updated by it, too."""
    step = step_of(Case("opt, its head detached", _detached_head), 4)
    for tangent in (1.0, 0.5):
        check(step, make_schedule("1f1b", Shape(2, 4)), tangent=tangent)
    _, last = step.staged(make_schedule("1f1b", Shape(2, 4)))
    assert "gradient:model.decoder.embed_tokens.weight" in last


def test_one_microbatch_is_the_batch():
    check(step_of(UNTIED, 1), make_schedule("gpipe", Shape(2, 1)))


@pytest.mark.parametrize("tangent", [0.25, -8.0, 0.0])
def test_what_comes_in_at_the_turn_counts(tangent):
    """Powers of two move no bit, wherever they are multiplied in."""
    check(step_of(UNTIED, 4), make_schedule("1f1b", Shape(2, 4)), tangent=tangent)


def test_a_fused_loss_goes_through_the_stages():
    check(step_of(UNTIED, 4), make_schedule("1f1b", Shape(4, 4)), fuse_loss=True)


def test_evaluation_hands_the_loss_to_all_and_logits_to_the_last():
    step = step_of(OPT, 4, training=False)
    schedule = make_schedule("1f1b", Shape(2, 4)).forward_alone(4)
    expected, (first, last) = step.whole(), step.staged(schedule)
    assert torch.equal(first["output:0"], expected["output:0"]) and torch.equal(last["output:0"], expected["output:0"])
    assert first["output:1"].numel() == 0 and torch.equal(last["output:1"], expected["output:1"])


@pytest.mark.parametrize("microbatches", [1, 2])
def test_an_evaluation_by_weights_on_the_hosts_runs_each_stage_once(microbatches):
    """Also where the batch is one microbatch, so that nothing in the program tells what depends on examples."""
    step, schedule = step_of(UNTIED, microbatches, training=False), round_robin([EVEN] * 4, 2, 4)
    expected, found = step.whole(), step.staged(schedule.forward_alone(microbatches))
    assert all(torch.equal(results["output:0"], expected["output:0"]) for results in found)
    assert sorted(results["output:1"].numel() for results in found) == [0, expected["output:1"].numel()]


@pytest.mark.parametrize(
    ("name", "shape"), [("1f1b", Shape(3, 6)), ("zbv", Shape(3, 6, 2)), ("interleaved", Shape(2, 4, 2))]
)
def test_a_step_without_backward_leaves_no_message_behind(name, shape):
    """The next one would take it for its own."""
    plan = replace(PLAN, microbatches=shape.microbatches, schedule=make_schedule(name, shape))
    blocks = tuple(f"layers.{i}" for i in range(shape.stages))
    plan = replace(plan, blocks=blocks, stages=("", *blocks[1:]))
    sent, received = Counter(), Counter()
    for rank in range(shape.ranks):
        program = parse_program(_chain(shape.stages, shape.microbatches))
        run_passes(program, replace(plan, line=rank), (canonicalize, split_stages, partition))
        for node in takewhile(lambda node: node.target is not TURN, program.computes):
            if node.target is SEND:
                sent[rank, node.args[1]] += 1
            elif node.target is RECEIVE:
                received[node.args[3], rank] += 1
    assert sent == received and sent


def _chain(stages, microbatches):
    """A step of so many products."""
    rows = 2 * microbatches
    weights = [f'    w{i}: "f32[4, 4] | parameter:layers.{i}.weight",' for i in range(stages)]
    forward = [
        line
        for i in range(stages)
        for line in (f"    # forward: layers.{i}", f'    h{i + 1}: "f32[2, 4]" = aten.mm.default(h{i}, w{i})')
    ]
    backward = [
        line
        for i in reversed(range(stages))
        for line in (
            f"    # backward: layers.{i}",
            f'    t{i}: "f32[4, 2]{{1, 4}}" = aten.t.default(h{i})',
            f'    d{i}: "f32[4, 4]" = aten.mm.default(t{i}, g{i + 1})',
            f'    v{i}: "f32[4, 4]{{1, 4}}" = aten.t.default(w{i})',
            f'    g{i}: "f32[2, 4]" = aten.mm.default(g{i + 1}, v{i})',
        )
    ]
    results = ", ".join(f'"gradient:layers.{i}.weight": d{i}' for i in range(stages))
    last = stages
    return "\n".join([
        "def training(", f'    batch: "f32[{rows}, 4] | input:0",', *weights, '    tangent: "f32[] | tangent:0",', "):",
        "    # forward", f'    h0: "f32[2, 4]" = geminifx.microbatch(batch, 0, {microbatches})', *forward,
        f"    # forward: layers.{last - 1}",
        f'    square: "f32[2, 4]" = aten.mul.Tensor(h{last}, h{last})', '    loss: "f32[]" = aten.sum.default(square)',
        '    mean: "f32[]" = geminifx.average(loss)', "    # backward",
        f'    share: "f32[]" = aten.div.Tensor(tangent, {microbatches})',
        f'    g{last}: "f32[2, 4]" = aten.mul.Tensor(h{last}, share)', *backward,
        f'    return {{"output:0": mean, {results}}}',
    ])  # fmt: skip


def test_every_parameter_is_with_who_reads_it():
    step = step_of(OPT, 4)
    first, last = (step.lowered(plan) for plan in step.plans(make_schedule("1f1b", Shape(2, 4))))
    names = [set(program.inputs("parameter")) for program in (first, last)]
    assert names[0] & names[1] == {"model.decoder.embed_tokens.weight"}
    assert names[0] | names[1] == set(step.program.inputs("parameter"))
    assert {name.split(".")[3] for name in names[1] if ".layers." in name} == {"1"}


@pytest.mark.parametrize("stages", [("", "layers.3"), ("", "layers.0"), ("layers.0", "layers.1"), ("", "")])
def test_stages_that_do_not_begin_with_blocks_are_refused(stages):
    step, schedule = step_of(OPT, 4), make_schedule("gpipe", Shape(1, 4, 2))
    plan = replace(step.plans(schedule)[0], stages=stages)
    with pytest.raises(ShardingError, match=r"stages of a pipeline begin with .*; expected '' \(the beginning"):
        step.lowered(plan)


def test_a_schedule_that_reads_what_is_made_later_is_refused():
    step = step_of(OPT, 2)
    wrong = Schedule.parse("wrong stages=2 microbatches=2\nrank 0: F0.0 F1.0 B0.0 B1.0 F0.1 F1.1 B1.1 B0.1")
    with pytest.raises(
        ShardingError, match=r"rank 0 of the schedule wrong reads .*, which rank 0 produces later or never"
    ):
        step.staged(wrong)


def test_backwards_some_of_which_are_whole_are_refused():
    mixed = Schedule.parse("""\
mixed stages=2 microbatches=2
rank 0: F0.0 F0.1 I0.0 W0.0 I0.1 W0.1
rank 1: F1.0 B1.0 F1.1 B1.1""")
    with pytest.raises(ShardingError, match=r"mixed runs some backwards in one action \(B\) and others in two"):
        step_of(OPT, 2).staged(mixed)


class Transposing(torch.nn.Module):
    """Hands on activations whose memory is not in the order of their dimensions."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, input_ids, labels):
        x = input_ids[:, None, :].expand(-1, 8, -1) / 99 + torch.arange(8.0)[:, None]
        for layer in self.layers:
            x = layer(x.transpose(1, 2)).relu().transpose(1, 2)
        return {"loss": (x.mean(1) - labels).square().mean()}


def test_messages_travel_in_the_order_of_their_memory():
    """A copy of what is sent, or of what has come, would be in no plan."""
    torch.manual_seed(0)
    step = step_of(Case("transposing", Transposing), 4)
    schedule = make_schedule("1f1b", Shape(2, 4))
    check(step, schedule)
    for program in map(step.lowered, step.plans(schedule)):
        sent = [type_of(node.args[0]) for node in program.calls(SEND)]
        assert sent and all(type.stride == contiguous_stride(type.shape) for type in sent)
