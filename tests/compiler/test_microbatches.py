"""A batch that runs as microbatches trains as plain PyTorch does with all of it, and as calls with its parts do.

Sums over examples are taken in another order than by plain PyTorch: part by part, and the parts one after the other.
The bound of `close` holds for any order. Where plain PyTorch takes the parts one after the other as well, and every
part has as many tokens, each bit is the same, but for tied weights: the gradients of each of their readers are added up
by themselves.
"""

import itertools
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import geminifx
import pytest
import torch
import torch.nn.functional as F
from geminifx.passes.program.plan import Plan
from geminifx.runtime.isa.errors import ArgumentError, BudgetError, SplitError
from microbatches import (
    CASES,
    STEPS,
    UNTIED,
    Loss,
    assert_draws_of_calls_with_the_parts,
    assert_near,
    assert_near_state,
    both,
    close,
    parts,
    pixels,
    sgd,
    train,
    whole,
)
from torch import Tensor, nn
from zoo import BLOCKS, OPT, Trace, cnn, compiled, next_token, opt

pytestmark = pytest.mark.usefixtures("shared")

SLOW, WHOLE = pytest.mark.slow, pytest.mark.campaign(whole=True)
QUICK = ("opt, padded", "gpt2, tied, padded", "convolutions", "no gradient for some")


def slow_but(quick: tuple[str, ...], names: Any) -> list[Any]:
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
def test_training_is_plain_pytorchs_with_the_whole_batch(name: str, count: int) -> None:
    case = CASES[name]
    plain, model = case.seeded(), compiled(case, microbatches=count)
    assert model.plan.microbatches == count
    assert_near(train(case, model, sgd(model)), train(case, plain, sgd(plain)))
    assert_near_state(model, plain)


@pytest.mark.parametrize("options", [{"recompute": "none"}, {"recompute": "all", "placement": "cpu"}], ids=str)
def test_every_bit_is_that_of_calls_with_the_parts(options: dict[str, str]) -> None:
    case, count = UNTIED, 4
    plain, model = case.seeded(), compiled(case, microbatches=count, fuse_loss=False, **options)
    for part in parts(case.batch(), count):
        (case.loss(plain, part) / count).backward()
    case.loss(model, case.batch()).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, plain.get_parameter(name).grad), name


@pytest.mark.parametrize("ignored", [slice(0, 2), slice(None)], ids=["of one part", "of all"])
def test_a_mean_of_no_labels_is_none(ignored: slice) -> None:
    """Where some part has labels, those that have none add nothing; without any label the loss is NaN, as in torch."""
    case = CASES["opt, padded"]
    batch = case.batch()
    batch["labels"][ignored] = -100
    plain, model = case.seeded(), compiled(case, microbatches=2)
    losses = [each(**batch).loss for each in (plain, model)]
    torch.testing.assert_close(*losses, equal_nan=True)
    assert losses[0].isnan() == (ignored == slice(None))
    for loss in losses:
        loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad)


class Interpolated(nn.Module):
    """A number among the arguments is computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: float) -> Tensor:
        return ((1 - t) * self.fc(x)).square().mean()


def test_a_number_that_changes_is_the_same_for_all_parts() -> None:
    torch.manual_seed(0)
    plain = Interpolated()
    model = geminifx.compile(deepcopy(plain), microbatches=2, device="cpu")
    for step in range(4):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        for each in (plain, model):
            each.zero_grad()
        expected, loss = plain(x, 0.1 * step), model(x, 0.1 * step)
        expected.backward()
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=2**-20, atol=0)
        gradient = model.get_parameter("fc.weight").grad
        torch.testing.assert_close(gradient, plain.fc.weight.grad, rtol=2**-18, atol=2**-24)


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_random_numbers_are_those_of_calls_with_the_parts(recompute: str) -> None:
    assert_draws_of_calls_with_the_parts(recompute=recompute)


PLACES: dict[str, dict[str, Any]] = {"device": {"placement": "cuda"}, "host": {"placement": "cpu"}}


def _trainings() -> list[Any]:
    """All that there are; a quarter of them has every two choices together, and the others are of a campaign.

    Clipping needs all gradients before the first update, which is not in the backward then.
    """
    factors = ((1, 3), (False, True), ("none", "all"), PLACES, ("torch", "own", "in backward"))
    found = []
    for chosen in itertools.product(*map(enumerate, factors)):
        (accumulate, clip, recompute, place, route), values = zip(*chosen, strict=True)
        of_quarter = (accumulate + clip + recompute) % 2 == 0 == (recompute + place + route) % 2
        if not (clip and values[-1] == "in backward"):
            found.append(pytest.param(*values, marks=SLOW if of_quarter else WHOLE))
    return found


@pytest.mark.parametrize("accumulate, clip, recompute, place, route", _trainings())
def test_with_all_that_training_has(accumulate: int, clip: bool, recompute: str, place: str, route: str) -> None:
    case = CASES["opt, padded"]
    plain, model = case.seeded(), compiled(case, microbatches=2, recompute=recompute, **PLACES[place])
    limit = 0.05 if clip else None
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    clip_plain = lambda: nn.utils.clip_grad_norm_(plain.parameters(), 0.05)  # noqa: E731
    expected = train(case, plain, reference, accumulate, clip_plain if clip else None)
    if route == "torch":
        optimizer: torch.optim.Optimizer = sgd(model)
        clip_ours = (lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.05)) if clip else None
    else:
        backward = {"in_backward": True} if route == "in backward" else {"max_grad_norm": limit}
        optimizer = model.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, accumulate=accumulate, **backward)
        clip_ours = None
    found = Trace()
    if route == "in backward":
        for step in range(STEPS):
            for part in range(accumulate):
                loss = case.loss(model, case.batch(seed=10 * step + part)) / accumulate
                loss.backward()
            found.losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        expected.gradients = []
    else:
        found = train(case, model, optimizer, accumulate, clip_ours)
    assert_near(found, expected)
    assert_near_state(model, plain)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_low_precision_gradients_are_added_up_in_float32(precision: str) -> None:
    """What calls with the parts add up in `.grad` is rounded here, to half of the last place of the precision."""
    case, count = UNTIED, 4
    places = 2**-8 if precision == "bf16" else 2**-11
    one, model = (compiled(case, microbatches=n, precision=precision, recompute="none") for n in (1, count))
    for part in parts(case.batch(), count):
        (case.loss(one, part) / count).backward()  # `.grad` is the float32 sum of what is rounded once each
    case.loss(model, case.batch()).backward()
    for name, parameter in model.named_parameters():
        expected = one.get_parameter(name).grad
        assert ((parameter.grad - expected).abs() <= places * expected.abs() + 2**-24).all(), name


# -- memory ------------------------------------------------------------------------------------------------


LONG = replace(OPT, batch=lambda batch=16, seed=0: OPT.batch(batch=batch, length=32, seed=seed))


def test_less_memory_is_used_than_by_the_whole_batch() -> None:
    case, peaks = LONG, {}
    for count in (1, 8):
        model = compiled(case, microbatches=count, recompute="all", fuse_loss=True, placement="cpu")
        case.loss(model, case.batch()).backward()
        peaks[count] = model.stats.device_peak_bytes
        assert peaks[count] <= model.plan.peak_bytes
    assert peaks[8] < 0.6 * peaks[1]


def least(**options: Any) -> int:
    with pytest.raises(BudgetError) as refused:
        compiled(LONG, device_budget=1, recompute="all", **options)
    assert refused.value.smallest_bytes is not None
    return refused.value.smallest_bytes


@pytest.mark.slow
def test_what_does_not_fit_is_run_as_microbatches() -> None:
    case, needed = LONG, (least(microbatches=1), least())
    assert needed[1] < 0.8 * needed[0]
    model = compiled(case, device_budget=needed[1], recompute="all")
    assert model.plan.microbatches > 1 and f"{model.plan.microbatches}, through 2 block(s)" in str(model.plan)
    assert compiled(case, device_budget=needed[0], recompute="all").plan.microbatches == 1
    plain = case.seeded()
    assert_near(train(case, model, sgd(model)), train(case, plain, sgd(plain)))
    assert model.stats.device_peak_bytes <= needed[1]
    with pytest.raises(BudgetError):
        compiled(case, device_budget=needed[1] - 1, recompute="all")


def test_a_plan_says_how_many_and_is_fed_back() -> None:
    case = whole(OPT)
    plan = Plan.from_json(compiled(case, microbatches=2).plan.to_json())
    assert plan.microbatches == 2 and plan.blocks == ("model.decoder.layers.0", "model.decoder.layers.1")
    again = compiled(case, plan=plan)
    assert again.plan.microbatches == 2 and "geminifx.microbatch(input_ids, 1, 2)" in again.graph["training"]
    with pytest.raises(ArgumentError, match="microbatches is 0, expected 1 or more"):
        compiled(case, plan=replace(plan, microbatches=0))
    with pytest.raises(ArgumentError, match="blocks is 'h' among others"):
        compiled(case, plan=replace(plan, blocks=("h",)))


@pytest.mark.parametrize(("rows", "count"), [(8, 4), (6, 3), (5, 1)])
def test_a_batch_that_does_not_divide_as_a_plan_says_is_run_as_fewer(rows: int, count: int) -> None:
    case = CASES["loss outside"]
    plan = compiled(case, microbatches=4).plan
    plain, model = case.seeded(), compiled(case, plan=plan)
    case.loss(model, case.batch()).backward()
    model.zero_grad()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for each in (plain, model):
            case.loss(each, case.batch(batch=rows)).backward()
            case.loss(each, case.batch(batch=rows)).backward()
    said = [str(each.message) for each in told if "cannot be divided" in str(each.message)]
    assert len(said) == (count < 4) and all(
        f"a batch of {rows} ex" in one and f"runs as {count};" in one for one in said
    )
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert close(q.grad, p.grad, p.grad.abs().max().item())
    with pytest.raises(SplitError, match="6 examples cannot be divided into 4 equal parts"):
        compiled(case, plan=plan, microbatches=4)(case.batch(batch=6)["input"])


# -- what goes in and out ----------------------------------------------------------------------------------


def test_an_evaluation_takes_any_batch() -> None:
    model, plain = compiled(whole(OPT), microbatches=4), OPT.seeded()
    with torch.no_grad():
        for rows in (4, 3):
            batch = OPT.batch(rows)
            assert torch.equal(model(**batch).logits, plain(**batch).logits)


def test_every_output_and_input_has_its_gradient() -> None:
    torch.manual_seed(0)
    plain = opt()
    model = geminifx.compile(opt(), microbatches=2, outputs="all")
    model.load_state_dict(plain.state_dict())
    gradients = []
    for each in (plain, model):
        inputs = torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        result = each(inputs_embeds=inputs, labels=OPT.batch(4)["labels"])
        (result.loss + result.logits[1:3].square().mean()).backward()
        gradients.append([inputs.grad, *(p.grad for p in each.parameters() if p.grad is not None)])
    for found, expected in zip(*reversed(gradients), strict=True):
        assert close(found, expected, max(1.0, expected.abs().max().item()))


def test_frozen_parameters_have_no_gradient() -> None:
    case = replace(whole(OPT), build=half_frozen)
    plain, model = case.seeded(), compiled(case, microbatches=2)
    assert_near(train(case, model, sgd(model)), train(case, plain, sgd(plain)))


def half_frozen() -> nn.Module:
    model = opt()
    model.model.decoder.layers[0].requires_grad_(False)
    return model


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": F.mse_loss,
    "sum": lambda a, b: (a - b).square().sum(),
    "sum over the number of examples": lambda a, b: (a - b).square().sum() / a.shape[0],
    "two means": lambda a, b: F.mse_loss(a, b) + 0.1 * F.cross_entropy(a, b.argmax(-1)),
    "weighted classes": lambda a, b: F.cross_entropy(a, b.argmax(-1), weight=torch.tensor([1.0, 2.0, 5.0])),
    "a mean and a penalty": lambda a, b: F.mse_loss(a, b) + 0.5,
    "segments": lambda a, b: F.cross_entropy(a.view(-1, 3, 1), b.argmax(-1, keepdim=True), ignore_index=0),
}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_any_loss_is_that_of_all_examples(name: str, count: int) -> None:
    plain = Loss(LOSSES[name])
    model = geminifx.compile(Loss(LOSSES[name]), microbatches=count, example_inputs=both())
    model.load_state_dict(plain.state_dict())
    expected, found = plain(*both())["loss"], model(*both())["loss"]
    (expected * 3).backward()
    (found * 3).backward()
    assert close(found, expected, expected.item())
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert close(parameter.grad, other.grad, other.grad.abs().max().item())


# -- refusals ----------------------------------------------------------------------------------------------


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / gradient.shape[0]


def hooked(a: Tensor, b: Tensor) -> Tensor:
    a.register_hook(lambda gradient: gradient - gradient.mean(0))
    return F.mse_loss(a, b)


MIXING: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "every pair": (lambda a, b: F.cross_entropy(a @ b.t(), torch.arange(len(a))), r"aten\.mm\.default mixes examples"),
    "softmax over examples": (lambda a, b: (a.softmax(0) * b).sum(), r"_softmax\.default mixes examples"),
    "a product of sums": (lambda a, b: a.sum() * b.sum(), r"aten\.mul\.Tensor mixes examples"),
    "a root of a mean": (lambda a, b: F.mse_loss(a, b).sqrt(), r"aten\.sqrt\.default mixes examples"),
    "a scale of its own": (lambda a, b: ((a - b).square() / a.shape[0]).sum(), "another argument for fewer examples"),
    "own numbers": (lambda a, b: (a.sum(1) * torch.arange(len(a))).sum(), "mixes examples|another argument"),
    "a backward of its own": (lambda a, b: F.mse_loss(Halved.apply(a), b), "Halved defines its own backward"),
    "a hook": (hooked, "registers a hook"),
    "another branch": (
        lambda a, b: F.mse_loss(a, b) if len(a) > 3 else F.l1_loss(a, b),
        "in the program of a microbatch",
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_loss_that_mixes_examples_is_refused(name: str) -> None:
    loss, why = MIXING[name]
    with pytest.raises(SplitError, match=f"microbatches=2: .*({why})"):
        geminifx.compile(Loss(loss), microbatches=2, example_inputs=both())


def test_batch_norm_is_refused_where_it_learns_and_runs_where_not() -> None:
    x = pixels()["input"][..., :4, :4]
    with pytest.raises(SplitError, match=r"microbatches=2: 0\.0\.1 \(batchnorm\.py:\d+\): .* mixes examples"):
        geminifx.compile(cnn(), microbatches=2, example_inputs=(x,))
    fixed, plain = cnn().eval(), cnn().eval()
    model = geminifx.compile(fixed, microbatches=2, example_inputs=(x,))
    model.load_state_dict(plain.state_dict())
    assert model.plan.microbatches == 2
    assert close(model(x), plain(x), 1.0)


def test_a_model_that_mixes_examples_is_told_of_where_it_does_not_fit() -> None:
    with pytest.raises(BudgetError, match=r"not run as microbatches: 0\.0\.1 .*batch_norm.* mixes examples"):
        geminifx.compile(cnn(), device_budget=1, example_inputs=(pixels()["input"][..., :4, :4],))


def test_arguments_that_make_no_sense() -> None:
    with pytest.raises(ArgumentError, match="microbatches=0; expected 'auto', or a number"):
        compiled(OPT, microbatches=0)
    with pytest.raises(ArgumentError, match=r"microbatches=2 does not support sharded tensors"):
        compiled(OPT, microbatches=2, world_size=2, parallel={"tensor": {"mode": "1d", "size": 2}})
    with pytest.raises(
        SplitError, match="microbatches=3: 4 examples cannot be divided into 3 equal parts; expected a multiple of 3"
    ):
        compiled(whole(OPT), microbatches=3)
    with pytest.raises(SplitError, match=r"microbatches=2: no argument is a tensor with examples"):
        geminifx.compile(nn.PReLU(), microbatches=2, example_inputs=(torch.tensor(1.0),))


def test_a_batch_that_does_not_divide_leaves_the_model_as_it_was() -> None:
    case = whole(OPT)
    model = compiled(case, microbatches=2)
    with pytest.raises(SplitError, match="3 examples cannot be divided"):
        model(**OPT.batch(3))
    plain = case.seeded()
    assert_near(train(case, model, sgd(model)), train(case, plain, sgd(plain)))


def test_a_half_precision_loss_is_divided_by_powers_of_two_alone() -> None:
    example = {"precision": "bf16", "example_inputs": both()}
    with pytest.raises(SplitError, match=r"microbatches=3: dividing a loss in torch\.bfloat16 by 3"):
        geminifx.compile(Loss(F.mse_loss), microbatches=3, **example)
    assert geminifx.compile(Loss(F.mse_loss), microbatches=2, **example).plan.microbatches == 2


def test_next_tokens_outside() -> None:
    """Nothing is known of a loss that the loop computes, and nothing needs to be: outputs are put together."""
    case = replace(whole(BLOCKS), loss=next_token)
    plain, model = case.seeded(), compiled(case, microbatches=4, recompute="all")
    assert_near(train(case, model, sgd(model)), train(case, plain, sgd(plain)))
