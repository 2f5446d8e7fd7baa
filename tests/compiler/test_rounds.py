"""A batch that runs as microbatches in rounds trains as it does in one round, which is as plain PyTorch does.

Sums of gradients have the same terms in the same order: each bit is the same, but for weights with several readers,
whose terms come round by round. What comes in at the turn multiplies the sums: by a power of two exactly.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import geminifx
import pytest
import torch
from geminifx.passes import offload as offload_pass
from geminifx.passes.program.plan import Plan
from geminifx.passes.program.program import note
from geminifx.runtime.isa.errors import ArgumentError, SplitError
from geminifx.runtime.isa.instructions import FETCH, OFFLOAD, RELOAD
from microbatches import (
    CASES,
    STEPS,
    T5,
    UNTIED,
    Loss,
    assert_draws_of_calls_with_the_parts,
    assert_near,
    assert_near_state,
    both,
    close,
    parts,
    sgd,
    train,
    whole,
)
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import LLAMA, OPT, Case, Trace, compiled, llama

pytestmark = pytest.mark.usefixtures("shared")

SLOW = pytest.mark.slow
LLAMA_LOSS = whole(LLAMA)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> bool:
    pairs = [(found[name], expected[name]) for name in expected]
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def stepped(case: Case, scale: float = 1.0, **options: Any) -> tuple[nn.Module, Tensor]:
    """A model behind one backward, and its loss."""
    model = compiled(case, **options)
    loss = case.loss(model, case.batch())
    (loss * scale).backward()
    return model, loss.detach()


# -- the same training -------------------------------------------------------------------------------------

PLACES: dict[str, dict[str, Any]] = {
    "kept": {"recompute": "none", "placement": "cuda"},
    "recomputed": {"recompute": "all", "placement": "cpu"},
    "offloaded": {"recompute": "all", "offload": "all", "placement": "cpu"},
}


@pytest.mark.parametrize("place", ["kept", pytest.param("recomputed", marks=SLOW), "offloaded"])
def test_every_bit_is_that_of_one_round(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload_pass, "SMALLEST_BYTES", 64)
    expected, loss = stepped(LLAMA_LOSS, microbatches=4, rounds=1, **PLACES[place])
    for rounds in (2, 4):
        found, other = stepped(LLAMA_LOSS, microbatches=4, rounds=rounds, **PLACES[place])
        assert found.plan.rounds == rounds and torch.equal(other, loss)
        assert same(gradients(found), gradients(expected)), rounds
        assert found.stats.device_peak_bytes <= found.plan.peak_bytes


@pytest.mark.parametrize(("rounds", "fuse_loss"), [(2, False), (4, False), pytest.param(4, True, marks=SLOW)])
def test_every_bit_is_that_of_plain_calls_with_the_parts(rounds: int, fuse_loss: bool) -> None:
    case, count = UNTIED, 4
    model, _ = stepped(case, microbatches=count, rounds=rounds, fuse_loss=fuse_loss, recompute="all")
    plain = case.seeded()
    for part in parts(case.batch(), count):
        (case.loss(plain, part) / count).backward()
    for name, parameter in model.named_parameters():
        expected = plain.get_parameter(name).grad
        assert close(parameter.grad, expected, 1.0) if fuse_loss else torch.equal(parameter.grad, expected), name


@pytest.mark.parametrize(("name", "rounds"), [("opt, padded", 2), ("gpt2, tied, padded", 4), ("llama", 2)])
def test_training_is_plain_pytorchs_with_the_whole_batch(name: str, rounds: int) -> None:
    case = CASES[name]
    plain, model = case.seeded(), compiled(case, microbatches=4, rounds=rounds)
    assert_near(train(case, model, sgd(model)), train(case, plain, sgd(plain)))
    assert_near_state(model, plain)


@SLOW
@pytest.mark.parametrize("rounds", [2, 4])
def test_two_stacks_of_blocks_are_plain_pytorchs(rounds: int) -> None:
    plain, model = T5.seeded(), compiled(T5, microbatches=4, rounds=rounds, recompute="all", placement="cpu")
    assert_near(train(T5, model, sgd(model)), train(T5, plain, sgd(plain)))
    assert_near_state(model, plain)


@pytest.mark.parametrize("recompute", ["none", pytest.param("all", marks=SLOW)])
def test_random_numbers_are_those_of_calls_with_the_parts(recompute: str) -> None:
    assert_draws_of_calls_with_the_parts(recompute=recompute, rounds=2)


ROUTES = ("torch", "clipped by torch", "own", "own, clipped", "in backward")


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("route", [each if each in ("own, clipped", "in backward") else pytest.param(each, marks=SLOW)
                                   for each in ROUTES])  # fmt: skip
def test_with_all_that_training_has(route: str, accumulate: int) -> None:
    """The loop adds up gradients of its own on top, each of a loss over `accumulate`."""
    case = CASES["opt, padded"]
    plain, model = case.seeded(), compiled(case, microbatches=4, rounds=2, recompute="all", placement="cpu")
    clips = "clipped" in route
    clipping: Callable[[nn.Module], Any] = lambda each: nn.utils.clip_grad_norm_(each.parameters(), 0.05)  # noqa: E731
    expected = train(case, plain, sgd(plain), accumulate, (lambda: clipping(plain)) if clips else None)
    if "torch" in route or route == "torch":
        found = train(case, model, sgd(model), accumulate, (lambda: clipping(model)) if clips else None)
    else:
        further = {"in_backward": True} if route == "in backward" else {"max_grad_norm": 0.05 if clips else None}
        optimizer = model.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, accumulate=accumulate, **further)
        found = Trace()
        for step in range(STEPS):
            for part in range(accumulate):
                loss = case.loss(model, case.batch(seed=10 * step + part)) / accumulate
                loss.backward()
            found.losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        expected.gradients = []
    assert_near(found, expected)
    assert_near_state(model, plain)


def test_low_precision_sums_are_rounded_once() -> None:
    case = replace(UNTIED, exact=False)
    options = {"microbatches": 4, "precision": "bf16", "recompute": "none", "fuse_loss": False}
    expected, loss = stepped(case, rounds=1, **options)
    found, other = stepped(case, rounds=4, **options)
    assert torch.equal(loss, other) and same(gradients(found), gradients(expected))


# -- the turn ----------------------------------------------------------------------------------------------


def test_what_comes_in_multiplies_sums_of_rounds_before() -> None:
    plain, _ = stepped(LLAMA_LOSS, microbatches=4, rounds=1)
    for scale, exact in ((0.25, True), (1 / 3, False), (0.0, True), (-2.0, True)):
        expected = {name: None if g is None else g * scale for name, g in gradients(plain).items()}
        found, _ = stepped(LLAMA_LOSS, scale, microbatches=4, rounds=2)
        if exact:
            assert same(gradients(found), expected), scale
        for name, parameter in found.named_parameters():
            assert close(parameter.grad, expected[name], 1.0), name


@pytest.mark.slow
def test_a_loss_scale_is_expected() -> None:
    """Gradients of float16 would vanish that were computed without their scale."""
    case = replace(UNTIED, exact=False)
    found = {}
    for rounds in (1, 4):
        model = compiled(case, microbatches=4, rounds=rounds, precision="fp16", recompute="none", fuse_loss=False)
        optimizer = model.optimizer(torch.optim.SGD, lr=0.1)
        for step in range(STEPS):
            case.loss(model, case.batch(seed=step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found[rounds] = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(torch.equal(found[4][name], value) for name, value in found[1].items())


def test_a_call_without_a_backward_leaves_no_gradients() -> None:
    expected, _ = stepped(LLAMA_LOSS, microbatches=4, rounds=2)
    model = compiled(LLAMA_LOSS, microbatches=4, rounds=2)
    first = LLAMA_LOSS.loss(model, LLAMA_LOSS.batch(seed=5))
    assert all(gradient is None for gradient in gradients(model).values())
    del first
    LLAMA_LOSS.loss(model, LLAMA_LOSS.batch()).backward()
    assert same(gradients(model), gradients(expected))


def test_two_calls_may_come_before_their_backwards() -> None:
    case = LLAMA_LOSS
    plain, model = case.seeded(), compiled(case, microbatches=4, rounds=2)
    for each in (plain, model):
        chosen, rejected = case.loss(each, case.batch()), case.loss(each, case.batch(seed=1))
        (2 * rejected - chosen / 4).backward()
    for name, parameter in model.named_parameters():
        assert close(parameter.grad, plain.get_parameter(name).grad, 4.0), name


# -- memory ------------------------------------------------------------------------------------------------

DEEP = replace(LLAMA_LOSS, build=lambda: llama(layers=6))
LONG = replace(UNTIED, batch=lambda batch=16, seed=0: OPT.batch(batch=batch, length=32, seed=seed))


def test_what_rests_is_of_one_round() -> None:
    """Without the sums, which the first of several rounds has more than one round."""
    taken = {}
    for rounds in (1, 8):
        model = compiled(LONG, microbatches=8, rounds=rounds, recompute="none", fuse_loss=True, placement="cpu")
        LONG.loss(model, LONG.batch()).backward()
        assert model.stats.device_peak_bytes <= model.plan.peak_bytes
        sums_bytes = 4 * sum(parameter.numel() for parameter in model.parameters()) * (rounds > 1)
        taken[rounds] = model.stats.device_peak_bytes - sums_bytes
    assert taken[8] < 0.5 * taken[1]


def test_sums_wait_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are planned to; meanwhile they take nothing of the device, and each bit stays as it is."""
    monkeypatch.setattr(offload_pass, "SMALLEST_BYTES", 64)
    expected, _ = stepped(DEEP, microbatches=2, rounds=2, fuse_loss=False, **PLACES["recomputed"])
    plan = replace(expected.plan, offload_sums=("", *expected.plan.blocks))
    found, _ = stepped(DEEP, plan=plan)
    assert same(gradients(found), gradients(expected))
    assert found.stats.device_peak_bytes <= found.plan.peak_bytes < expected.plan.peak_bytes
    assert found.plan.estimate.offloaded_bytes > 0.9 * 4 * sum(p.numel() for p in found.parameters())
    assert f"sums of {len(plan.offload_sums)} wait on the host" in str(found.plan)


def test_weights_come_once_for_each_sweep_of_a_round() -> None:
    model, _ = stepped(LLAMA_LOSS, microbatches=4, rounds=2, recompute="all")
    program = model.session.last["training"].flat
    for chunk in model.plan.layout.chunks:
        sweeps = [note(node).sweep for node in program.calls(FETCH) if node.args[0] == chunk.index]
        assert len(sweeps) == len(set(sweeps)) and set(sweeps) <= {"F.0", "B.0", "F.1", "B.1"}


def test_activations_of_each_round_are_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload_pass, "SMALLEST_BYTES", 64)
    model, _ = stepped(DEEP, microbatches=2, rounds=2, **PLACES["offloaded"])
    program = model.session.last["training"].flat
    for target, sweeps in ((OFFLOAD, {"F.0", "F.1"}), (RELOAD, {"B.0", "B.1"})):
        assert {note(node).sweep for node in program.calls(target)} == sweeps


# -- plans and refusals ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_smallest_budget_is_that_of_the_best_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one round's activations, offloading them may leave less on the device than recomputing them."""
    monkeypatch.setattr(offload_pass, "SMALLEST_BYTES", 64)
    deep = replace(
        whole(LLAMA), build=lambda: llama(layers=4), batch=lambda batch=4, seed=0: LLAMA.batch(batch, 32, seed)
    )
    smallest = {}
    for recompute in ("none", "all", "auto"):
        with pytest.raises(geminifx.BudgetError) as refused:
            compiled(deep, device_budget=1000, microbatches=4, rounds=4, recompute=recompute)
        smallest[recompute] = refused.value.smallest_bytes
    assert smallest["auto"] == min(smallest.values()) and smallest["none"] < smallest["all"]


def test_a_plan_says_how_many_rounds_and_is_fed_back() -> None:
    case = LLAMA_LOSS
    plan = Plan.from_json(compiled(case, microbatches=4, rounds=2).plan.to_json())
    assert plan.rounds == 2 and "2, of 2 microbatch(es) each" in str(plan)
    again = compiled(case, plan=plan)
    assert again.plan.rounds == 2 and "# forward B.0" in again.graph["training"]
    for changes in ({"rounds": 3}, {"rounds": 0}):
        with pytest.raises(ArgumentError, match=r"rounds is [03], expected a divisor of the 4 microbatches"):
            compiled(case, plan=replace(plan, **changes))
    with pytest.raises(ArgumentError, match="rounds=4, but plan= has 2"):
        compiled(case, plan=plan, rounds=4)
    batch = case.batch(batch=2)
    with pytest.warns(UserWarning, match="runs as 2"):
        case.loss(again, batch).backward()
    plain = case.seeded()
    case.loss(plain, batch).backward()
    for name, parameter in again.named_parameters():
        assert close(parameter.grad, plain.get_parameter(name).grad, 1.0), name


def test_an_evaluation_has_no_rounds() -> None:
    model, plain = compiled(LLAMA_LOSS, microbatches=4, rounds=4), LLAMA.seeded()
    with torch.no_grad():
        for rows in (4, 3):
            batch = LLAMA.batch(rows)
            assert torch.equal(model(**batch).logits, plain(**batch).logits)


WEIGHTS = torch.tensor([1.0, 2.0, 5.0])


def test_what_cannot_begin_its_backward_early_is_refused() -> None:
    with pytest.raises(SplitError, match=r"microbatches=4: rounds run backwards before .*loss_fn="):
        compiled(CASES["loss outside"], microbatches=4, rounds=2)
    with pytest.raises(SplitError, match=r"microbatches=4: rounds run backwards .* leave outputs='all' out"):
        compiled(LLAMA_LOSS, microbatches=4, rounds=2, outputs="all")
    weighed = Loss(lambda a, b: F.cross_entropy(a, b.argmax(-1), weight=WEIGHTS))
    with pytest.raises(
        SplitError, match="a step in rounds averages its loss over tokens, and this loss has class weights"
    ):
        geminifx.compile(weighed, microbatches=2, rounds=2, example_inputs=both())
    inputs = (both()[0].requires_grad_(), both()[1])
    with pytest.raises(SplitError, match="rounds accumulate gradients of parameters only"):
        geminifx.compile(Loss(F.mse_loss), microbatches=2, rounds=2, example_inputs=inputs)


@pytest.mark.parametrize("options, message", [
    ({"rounds": 0}, "rounds=0; expected 'auto', or a number of rounds"),
    ({"rounds": 2}, "rounds=2 need the same number of microbatches each, but microbatches='auto'"),
    ({"rounds": 3, "microbatches": 4}, "microbatches=4; expected a multiple of 3"),
    ({"rounds": 2, "microbatches": 4, "world_size": 2, "parallel": {"pipeline": 2}}, "rounds=2 is not for pipelines"),
])  # fmt: skip
def test_arguments_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        compiled(LLAMA_LOSS, **options)
