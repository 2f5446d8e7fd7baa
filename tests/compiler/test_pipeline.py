"""`parallel={"pipeline": ...}` on one process: all stages on one device, plans for others, and what is refused."""

import geminifx
import pytest
import torch
import torch.nn.functional as F
from geminifx.compiler.planner.pipeline.round_robin import EVEN, round_robin
from geminifx.compiler.planner.pipeline.schedules import Shape, make_schedule
from geminifx.runtime.isa.errors import GeminiError
from geminifx.runtime.isa.instructions import SEND, START_RECEIVE
from geminifx.runtime.isa.mesh import Mesh
from geminifx.runtime.isa.schedule import Action, Schedule
from schedules import in_turns
from torch import nn
from zoo import OPT, Case, opt

pytestmark = pytest.mark.usefixtures("shared")

ONE_DEVICE = {"pipeline": {"ranks": 1, "stages": 2}}
DEEP = Case("opt, four blocks", lambda: opt(num_hidden_layers=4))
UNTIED = Case("opt, not tied", lambda: opt(tie_word_embeddings=False))


def train(case, *, in_backward=False, precision="fp32", steps=3, **options):
    """Losses and parameters, with the model's own optimizer."""
    batch = case.batch(batch=8)
    model = geminifx.compile(case.seeded(), example_inputs=batch, microbatches=4, precision=precision, **options)
    optimizer = model.optimizer(torch.optim.AdamW, lr=1e-2, in_backward=in_backward)
    losses = []
    for step in range(steps):
        loss = model(**case.batch(batch=8, seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("precision", "in_backward"), [("fp32", False), ("bf16", True), pytest.param("fp16", False, marks=pytest.mark.slow)]
)
def test_stages_on_one_device_train_as_microbatches_do(precision, in_backward):
    losses, state = train(UNTIED, precision=precision)
    staged, staged_state = train(UNTIED, precision=precision, in_backward=in_backward, parallel=ONE_DEVICE)
    assert staged == losses
    assert all(torch.equal(staged_state[name], value) for name, value in state.items())


def test_a_rank_of_a_world_is_planned_for_on_one_process():
    model = geminifx.compile(
        OPT.seeded(), example_inputs=OPT.batch(batch=8), world_size=4, parallel={"pipeline": 2}, microbatches=4
    )
    plan = model.plan
    assert str(plan.mesh) == "pipeline 2 x data 2" and plan.schedule == make_schedule("1f1b", Shape(2, 4))
    assert plan.stages == ("", "model.decoder.layers.1")
    assert geminifx.Plan.from_json(plan.to_json()) == plan
    flat = model.session.last["training"].flat
    assert len(flat.calls(SEND)) == 4 + 1, "a forward's of each microbatch, and a part of the tied embedding's gradient"
    assert len(flat.calls(START_RECEIVE)) == 4 + 1 + 1, "a backward's, the other part, and the loss"
    names = {slot.name for chunk in plan.layout.chunks for slot in chunk.slots}
    assert not any("layers.1." in name or "decoder.final_layer_norm" in name for name in names)
    received = {traffic.axis: traffic for traffic in plan.estimate.collectives}["pipeline"]
    assert received.count == len(flat.calls(START_RECEIVE)) and received.received_bytes > 0


def test_ranks_of_a_round_robin_have_what_they_run():
    """A parameter is with who runs its stage's forwards or backwards."""
    schedule = in_turns(4, 2, 4)
    options = {"example_inputs": DEEP.batch(batch=8), "world_size": 2, "microbatches": 4, "schedule": schedule}
    plan = geminifx.compile(DEEP.seeded(), parallel={"pipeline": {"ranks": 2, "stages": 4}}, **options).plan
    every = [Action(stage, microbatch, kind) for stage in range(4) for microbatch in range(4) for kind in "FB"]
    runners = {i: {plan.schedule.runner(action) for action in every if action.stage == i} for i in range(4)}
    owners = {i: plan.layout.owners[f"model.decoder.layers.{i}.fc1.weight"] for i in range(4)}
    assert owners == {i: tuple(sorted(ranks)) for i, ranks in runners.items()}
    assert {1, 2} == set(map(len, owners.values()))
    assert plan.recompute == plan.blocks[:-1], (
        "what a forward keeps would go to the backward's rank, but the last one's"
    )
    assert geminifx.Plan.from_json(plan.to_json()) == plan


def test_a_round_robin_recomputes_the_last_block_too_where_it_would_not_fit_otherwise():
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "vocab_size": 2048}
    case = Case("opt", lambda: opt(num_hidden_layers=4, tie_word_embeddings=False, **sizes))
    options = {"world_size": 2, "microbatches": 4, "schedule": "roundrobin", "placement": "cpu"}

    def planned(budget):
        degrees, batch = {"pipeline": {"ranks": 2, "stages": 4}}, case.batch(batch=8)
        return geminifx.compile(
            case.seeded(), device_budget=budget, example_inputs=batch, parallel=degrees, **options
        ).plan

    with pytest.raises(geminifx.BudgetError, match="needs less, and recompute='all' may, too") as refused:
        planned(1000)
    smallest = planned(refused.value.smallest_bytes + 500)
    assert smallest.recompute == smallest.blocks
    larger = planned(2 * refused.value.smallest_bytes)
    assert larger.recompute == larger.blocks[:-1] and larger.peak_bytes > smallest.peak_bytes
    assert larger.schedule == smallest.schedule, "which other ranks share"


def test_a_last_stage_whose_backward_is_another_ranks_is_recomputed():
    schedule = Schedule.parse("""mine stages=2 microbatches=2 weights=host
        rank 0: F0.0 F0.1 B1.0 B1.1
        rank 1: F1.0 F1.1 B0.0 B0.1""")
    options = {"example_inputs": UNTIED.batch(batch=8), "world_size": 2, "parallel": {"pipeline": 2}}
    plan = geminifx.compile(UNTIED.seeded(), schedule=schedule, **options).plan
    assert plan.recompute == plan.blocks
    returns = Schedule.parse("""mine stages=2 microbatches=2 weights=host
        rank 0: F0.0 F0.1 F1.1 B1.1
        rank 1: F1.0 B1.0 B0.0 B0.1""")
    plan = geminifx.compile(UNTIED.seeded(), schedule=returns, **options).plan
    assert plan.recompute == plan.blocks[:-1]


@pytest.mark.slow
def test_ranks_of_a_round_robin_hold_gradients_of_a_few_stages_however_many_there_are():
    """Twice as many blocks are twice as many parameters that two ranks exchange gradients of."""
    sizes = {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 512}
    found = []
    for count in (8, 16):
        case = Case("opt", lambda count=count: opt(num_hidden_layers=count, tie_word_embeddings=False, **sizes))
        options = {"world_size": 4, "parallel": {"pipeline": {"ranks": 4, "stages": count}}, "microbatches": 4}
        plan = geminifx.compile(
            case.seeded(), example_inputs=case.batch(batch=8), schedule=round_robin([EVEN] * count, 4, 4),
            placement="cpu", **options,
        ).plan  # fmt: skip
        found.append((4 * sum(chunk.numel for chunk in plan.layout.chunks), plan.peak_bytes))
    (fewer_bytes, least), (more_bytes, most) = found
    assert most - least < (more_bytes - fewer_bytes) / 2


@pytest.mark.parametrize("evaluates_first", [False, True])
def test_a_round_robin_suits_what_its_own_stages_take(evaluates_first):
    """Where the head takes as long as three blocks, several ranks run it; also if only the evaluation's forward was
    there to tell."""
    head = Case("opt, a large vocabulary", lambda: opt(num_hidden_layers=4, vocab_size=4096, tie_word_embeddings=False))
    options = {"world_size": 4, "parallel": {"pipeline": {"ranks": 4, "stages": 4}}, "microbatches": 4}
    runners = []
    for case in (DEEP, head):
        batch = case.batch(batch=8)
        model = geminifx.compile(case.seeded(), schedule="roundrobin", **options)
        if evaluates_first:
            with torch.no_grad():
                model.eval().session.program((), batch)
        plan = model.train().session.program((), batch).plan
        runners.append({plan.schedule.runner(Action(3, microbatch, "F")) for microbatch in range(4)})
    assert len(runners[0]) < len(runners[1])


@pytest.mark.parametrize("rank", [0, 1])
def test_an_evaluation_may_come_before_a_round_robin_trains(monkeypatch, rank):
    """It leaves each rank with what its backwards are to read, too."""
    monkeypatch.setattr(Mesh, "pipeline_rank", lambda mesh, of: rank)
    batch, degrees = DEEP.batch(batch=8), {"pipeline": {"ranks": 2, "stages": 4}}
    model = geminifx.compile(DEEP.seeded(), parallel=degrees, world_size=2, microbatches=4, schedule="roundrobin")
    with torch.no_grad():
        evaluated = model.eval().session.program((), batch).plan
    trained = model.train().session.program((), batch).plan
    assert evaluated.layout == trained.layout and trained.schedule.trains


@pytest.mark.parametrize(("budget", "in_pieces"), [("3MB", True), ("6.8MB", True), ("100MB", False), (None, False)])
def test_ranks_of_a_round_robin_choose_alike_how_to_compute_the_loss(monkeypatch, budget, in_pieces):
    """In pieces where the logits, of the whole batch, take more than a tenth of the budget."""
    sizes = {"num_hidden_layers": 4, "vocab_size": 2048, "tie_word_embeddings": False}
    case = Case("opt, a large vocabulary", lambda: opt(**sizes))
    options = {"world_size": 2, "microbatches": 8, "schedule": "roundrobin", "recompute": "all", "placement": "cpu"}
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(Mesh, "pipeline_rank", lambda mesh, of, rank=rank: rank)
        model = geminifx.compile(
            case.seeded(), device_budget=budget, example_inputs=case.batch(batch=32),
            parallel={"pipeline": {"ranks": 2, "stages": 4}}, **options,
        )  # fmt: skip
        found.append(model.plan.fuse_loss)
    assert found == [in_pieces] * 2


def test_a_round_robin_that_does_not_fit_names_the_loss_in_pieces_where_the_user_left_that_out():
    case = Case("opt, wide blocks", lambda: opt(vocab_size=1024, ffn_dim=2**15, tie_word_embeddings=False))
    options = {"world_size": 2, "parallel": {"pipeline": 2}, "microbatches": 4, "schedule": "roundrobin"}
    for asked, is_named in (({}, True), ({"fuse_loss": False}, False)):
        with pytest.raises(geminifx.BudgetError) as refused:
            geminifx.compile(
                case.seeded(), device_budget="8MB", example_inputs=case.batch(batch=8), placement="cpu",
                **options, **asked,
            )  # fmt: skip
        assert str(refused.value).endswith("so may fuse_loss=True") == is_named


def test_an_evaluation_keeps_to_the_round_robin_of_training():
    batch = DEEP.batch(batch=8)
    options = {"world_size": 2, "microbatches": 4, "schedule": "roundrobin"}
    model = geminifx.compile(
        DEEP.seeded(), example_inputs=batch, parallel={"pipeline": {"ranks": 2, "stages": 4}}, **options
    )
    schedule = model.plan.schedule
    model.eval()
    with torch.no_grad():
        program = model.session.program((), batch)
    assert program.plan.schedule == schedule.forward_alone(4)


def test_a_plan_with_other_stages_is_taken():
    options = {"example_inputs": OPT.batch(batch=8), "parallel": ONE_DEVICE, "microbatches": 4}
    plan = geminifx.compile(OPT.seeded(), **options).plan
    again = geminifx.compile(OPT.seeded(), plan=plan, **options)
    assert again.plan.schedule == plan.schedule and again.plan.stages == plan.stages


class LossOutside(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        return x


class Normed(LossOutside):
    """A loss inside, behind a norm over the batch."""

    def forward(self, x):
        x = super().forward(x)
        return ((x - x.mean(0)) / x.std(0)).square().sum()


X = torch.ones(8, 4)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (OPT.seeded, {"parallel": {"pipeline": {"ranks": 1, "stages": 3}}},
         r"a pipeline of 3 stages needs at least 3 blocks, but the model has 2: .*choose fewer stages"),
        (OPT.seeded, {"parallel": ONE_DEVICE, "microbatches": 3}, r"8 examples cannot be divided into 3 equal parts"),
        (OPT.seeded, {"parallel": {"pipeline": 2}, "world_size": 3}, "pipeline=2 is 2 processes, but the world has 3"),
        (OPT.seeded, {"parallel": {"pipeline": {"ranks": 2, "stages": 3}}}, "3 stages cannot be divided equally over"),
        (OPT.seeded, {"parallel": {"pipeline": 0}}, "pipeline is 0; expected a whole number of processes"),
        (OPT.seeded, {"parallel": {"pipeline": {"rank": 2}}}, "did you mean 'ranks'"),
        (OPT.seeded, {"parallel": {"pipeline": 2}, "schedule": "zbv"}, "zbv does not fit: it has 2 stages per rank"),
        (OPT.seeded, {"parallel": {"pipeline": 2}, "schedule": "2f2b"}, "there is no schedule '2f2b'; expected one of"),
        (OPT.seeded, {"schedule": "1f1b"}, r"is for a pipeline, but parallel= has none; add one, such as \{'pipe"),
        (OPT.seeded, {"parallel": {**ONE_DEVICE, "tensor": "2.5d:2:2"}, "microbatches": 8},
         r"a microbatch of 1 example\(s\) does not divide evenly over depth 2 ranks; .* a multiple of 16 examples"),
        (OPT.seeded, {"parallel": ONE_DEVICE, "schedule": make_schedule("1f1b", Shape(2, 2))},
         "the schedule has 2 ranks and 2 stages, but parallel= declares 1 and 2"),
        (LossOutside, {"parallel": ONE_DEVICE, "example_inputs": (X,)},
         r"a pipeline computes the loss in its last stage.*let the model compute its loss"),
        (Normed, {"parallel": ONE_DEVICE, "example_inputs": (X,)}, r"mixes examples|depends on the number of"),
    ],
)  # fmt: skip
def test_what_no_pipeline_can_run_is_refused(model, options, message):
    given = {"example_inputs": OPT.batch(batch=8), "microbatches": 2, **options}
    with pytest.raises((GeminiError, ValueError), match=message):
        geminifx.compile(model(), **given)


def test_one_microbatch_draws_and_a_batch_that_the_schedule_does_not_divide_is_refused():
    dropout = Case("opt with dropout", lambda: opt(dropout=0.1))
    model = geminifx.compile(dropout.seeded(), parallel=ONE_DEVICE, microbatches=1, example_inputs=dropout.batch())
    assert torch.isfinite(model(**dropout.batch()).loss)
    model = geminifx.compile(OPT.seeded(), parallel=ONE_DEVICE, schedule="gpipe", example_inputs=OPT.batch())
    with pytest.raises(GeminiError, match="microbatches=2"):
        model(**OPT.batch(batch=3))
