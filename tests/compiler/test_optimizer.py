"""model.optimizer trains as torch.optim does, wherever the state lies and whenever the updates run."""

from typing import Any

import geminifx
import pytest
import torch
import zoo
from geminifx.runtime.isa import formats
from geminifx.runtime.isa.errors import StateError
from geminifx.runtime.optimizer import state_stream
from homes import homes
from optimizing import (
    ADAMW,
    KINDS,
    NET,
    PLACES,
    Loop,
    held_gradients,
    last,
    placed,
    plain,
    same_moments,
    same_weights,
)
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR
from zoo import BLOCKS, CNN, GPT2, OPT, Case, compiled

MODES = pytest.mark.parametrize("in_backward", [False, True], ids=["default", "in_backward"])
EVERYWHERE = pytest.mark.parametrize("where", PLACES)
MOMENTUM = {"lr": 1e-2, "momentum": 0.9}


def check_equal(case: Case, where: str, kind: str, loop: Loop = Loop(), **declared: Any) -> None:  # noqa: B008
    """Losses, weights and moments after some steps are torch's, bit for bit."""
    torch_kind, hyper = KINDS[kind]
    reference, expected = plain(case, torch_kind, **hyper)
    losses = loop.run(case, reference, expected)
    model = placed(case, where)
    optimizer = model.optimizer(torch_kind, **hyper, **declared)
    found = loop.run(case, model, optimizer)
    assert all(map(torch.equal, found, losses)) and losses[0] != losses[-1]
    assert same_weights(model, reference) and same_moments(optimizer, expected)


# -- equality, float32 -------------------------------------------------------------------------------------


@MODES
@EVERYWHERE
def test_adamw_is_torchs_wherever_its_state_lies(where: str, in_backward: bool) -> None:
    check_equal(NET, where, "adamw", in_backward=in_backward)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "adamw"])
def test_every_kind_is_torchs(kind: str) -> None:
    check_equal(NET, "mixed", kind, in_backward=kind in ("momentum", "plain sgd"))


@pytest.mark.parametrize("case", [OPT, GPT2, CNN, BLOCKS], ids=lambda case: case.name)
def test_models_of_every_sort(case: Case) -> None:
    """Tied weights, frozen running means, a parameter that nothing reads."""
    check_equal(case, "mixed", "adamw", in_backward=case in (OPT, BLOCKS))


@pytest.mark.parametrize("kind", ["adamw", "plain sgd"])
@pytest.mark.parametrize("where", ["streamed", "streamed, resident"])
def test_states_longer_than_a_piece_are_streamed_piece_by_piece(
    where: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (formats, state_stream):
        monkeypatch.setattr(module, "STREAM_PIECE", 1000)
    check_equal(NET, where, kind, Loop(micro=2))
    check_equal(NET, where, kind, in_backward=True)


# -- equality, low precision -------------------------------------------------------------------------------


def test_bf16_masters_follow_float32_ones_that_are_given_the_same_gradients() -> None:
    """Moments are equal bit for bit. Our square root is correctly rounded where torch's may be a unit in the last
    place off: that changes an update by two units of itself and the sum by one unit of the weight, in each step."""
    model, reference = placed(NET, "mixed", "bf16"), NET.seeded()
    ours = model.optimizer(ADAMW[0], **ADAMW[1])
    theirs = ADAMW[0](reference.parameters(), **ADAMW[1], foreach=False)
    unit, allowed = 2.0**-23, {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    for step in range(50):
        NET.loss(model, NET.batch(seed=step)).backward()
        gradients = held_gradients(model)
        before = {name: p.detach().clone() for name, p in reference.named_parameters()}
        for name, parameter in reference.named_parameters():
            parameter.grad = gradients[name]
        ours.step()
        theirs.step()
        for name, parameter in reference.named_parameters():
            largest = torch.maximum(before[name].abs(), parameter.detach().abs())
            allowed[name] += unit * (largest + 2 * (parameter.detach() - before[name]).abs())
    assert same_moments(ours, theirs)
    for name, parameter in reference.named_parameters():
        found = model.get_parameter(name)
        assert ((found - parameter).abs() <= allowed[name]).all(), name
        assert (found - NET.seeded().get_parameter(name)).abs().max() > 1e-2, "it trains"


def test_bf16_gives_the_same_bits_wherever_the_state_lies_and_whoever_looks_at_gradients() -> None:
    def trained(where: str, loop: Loop = Loop(), **declared: Any) -> nn.Module:  # noqa: B008
        model = placed(NET, where, "bf16")
        loop.run(NET, model, model.optimizer(ADAMW[0], **ADAMW[1], **declared))
        return model

    expected = trained("device")
    for where in PLACES:
        assert same_weights(trained(where, in_backward=True), expected), where
    assert same_weights(trained("mixed"), expected)
    # A norm that nothing exceeds: the gradients are read, and multiplied by 1.
    looked = Loop(clip=1e9)
    assert all(same_weights(trained(where, looked), expected) for where in ("mixed", "streamed"))
    assert same_weights(trained("streamed", max_grad_norm=1e9), expected)


@MODES
def test_chunks_of_several_dtypes_are_streamed_side_by_side(in_backward: bool) -> None:
    """Batch norms stay in float32 under bf16."""
    models = [placed(CNN, where, "bf16") for where in ("device", "streamed")]
    assert len({chunk.dtype for chunk in models[0].plan.layout.chunks}) == 2
    for model in models:
        Loop().run(CNN, model, model.optimizer(ADAMW[0], **ADAMW[1], in_backward=in_backward))
    assert same_weights(*models)


def test_sums_of_gradients_that_were_not_declared_stay_in_float32_on_their_way() -> None:
    models = [placed(NET, where, "bf16") for where in ("host", "streamed")]
    for model in models:
        Loop(micro=3).run(NET, model, model.optimizer(SGD, **MOMENTUM))
    assert same_weights(*models)


# -- several backwards, clipping ---------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "micro"), [("mixed", 2), ("host, resident", 4)])
def test_accumulation_declared_or_not(where: str, micro: int) -> None:
    for declared in ({}, {"accumulate": micro}, {"accumulate": micro, "in_backward": True}):
        check_equal(NET, where, "momentum", Loop(micro=micro), **declared)


@pytest.mark.parametrize("where", ["device", "host, resident", "streamed"])
def test_the_users_own_clipping(where: str) -> None:
    check_equal(NET, where, "momentum", Loop(clip=0.1))


def test_the_users_own_clipping_of_sums() -> None:
    for accumulate in (1, 2):
        check_equal(NET, "mixed", "momentum", Loop(micro=2, clip=0.1), accumulate=accumulate)


@pytest.mark.parametrize(("micro", "accumulate"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("where", ["mixed", "streamed, resident"])
def test_max_grad_norm_clips(where: str, micro: int, accumulate: int) -> None:
    """The norm is torch's but for the order of its sums; what follows from it is torch's bit for bit."""
    reference, expected = plain(NET, SGD, **MOMENTUM)
    model = placed(NET, where)
    optimizer = model.optimizer(SGD, **MOMENTUM, max_grad_norm=0.2, accumulate=accumulate)
    clipped = []
    for step in range(5):
        for part in range(micro):
            for each in (model, reference):
                NET.loss(each, NET.batch(seed=10 * step + part)).backward()
        optimizer.step()
        norm = nn.utils.get_total_norm([p.grad for p in reference.parameters() if p.grad is not None])
        assert last(optimizer) == pytest.approx(norm.item(), rel=1e-6)
        assert optimizer.grad_norm is not None
        coefficient = (0.2 / (optimizer.grad_norm + 1e-6)).clamp(max=1.0)
        clipped.append(coefficient.item() < 1)
        for parameter in reference.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(coefficient)
        expected.step()
        expected.zero_grad()
        assert same_weights(model, reference)
    assert sum(clipped) > 1


# -- loops -------------------------------------------------------------------------------------------------


@MODES
def test_schedulers_set_the_rate_of_the_next_step(in_backward: bool) -> None:
    reference, expected = plain(NET, ADAMW[0], **ADAMW[1])
    model = placed(NET, "mixed")
    optimizer = model.optimizer(ADAMW[0], **ADAMW[1], in_backward=in_backward)
    for each, optim in ((reference, expected), (model, optimizer)):
        scheduler = LambdaLR(optim, lambda step: 0.5**step)
        for step in range(3):
            Loop(steps=1).run(NET, each, optim, start=step)
            scheduler.step()
        assert optim.param_groups[0]["lr"] == ADAMW[1]["lr"] / 8
    assert same_weights(model, reference)


def test_a_rate_that_comes_after_the_update_is_refused_and_not_a_step_late() -> None:
    model = placed(NET, "mixed")
    optimizer = model.optimizer(ADAMW[0], **ADAMW[1], in_backward=True)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    Loop(steps=1).run(NET, model, optimizer)
    scheduler.step()
    NET.loss(model, NET.batch()).backward()
    scheduler.step()
    with pytest.raises(StateError, match=r"between backward\(\) and optimizer\.step\(\)"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = ADAMW[1]["lr"] / 2  # as the backward found it
    optimizer.step()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights and biases lie beside each other in the same chunks."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": weights, "weight_decay": 0.3}, {"params": biases, "weight_decay": 0.0, "lr": 1e-3}]


@MODES
def test_groups_of_parameters(in_backward: bool) -> None:
    reference, model = NET.seeded(), placed(NET, "mixed")
    expected = AdamW(groups(reference), lr=1e-2, fused=True)
    optimizer = model.optimizer(AdamW, groups(model), lr=1e-2, in_backward=in_backward)
    for each, optim in ((reference, expected), (model, optimizer)):
        Loop().run(NET, each, optim)
    assert same_weights(model, reference) and same_moments(optimizer, expected)


def test_groups_with_and_without_momentum() -> None:
    reference, model = NET.seeded(), placed(NET, "mixed", "fp32")
    optims = []
    for each in (reference, model):
        two = [{**group, "momentum": momentum} for group, momentum in zip(groups(each), (0.9, 0.0), strict=True)]
        make = model.optimizer if each is model else lambda kind, *args, **kw: kind(*args, **kw, fused=True)
        optims.append(make(SGD, two, lr=1e-2))
        Loop().run(NET, each, optims[-1])
    assert same_weights(model, reference)
    low = placed(NET, "mixed", "bf16")
    Loop().run(NET, low, low.optimizer(SGD, [{**g, "momentum": m} for g, m in zip(groups(low), (0.9, 0), strict=True)]))


def test_a_group_that_is_added_later_is_trained_from_then_on() -> None:
    first, rest = (lambda m: list(m.parameters())[:2]), (lambda m: list(m.parameters())[2:])
    reference, model = NET.seeded(), placed(NET, "mixed")
    expected, optimizer = AdamW(first(reference), lr=1e-2, fused=True), model.optimizer(AdamW, first(model), lr=1e-2)
    for each, optim in ((reference, expected), (model, optimizer)):
        Loop(steps=2).run(NET, each, optim)
        each.zero_grad()  # torch would keep the gradients of parameters that are nobody's
        optim.add_param_group({"params": rest(each), "lr": 1e-3})
        Loop(steps=2).run(NET, each, optim, start=2)
    assert same_weights(model, reference) and same_moments(optimizer, expected)
    with pytest.raises(ValueError, match="does not belong to the compiled model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 2


@MODES
def test_parameters_frozen_and_thawed_between_steps(in_backward: bool) -> None:
    reference, expected = plain(NET, ADAMW[0], **ADAMW[1])
    model = placed(NET, "mixed")
    optimizer = model.optimizer(ADAMW[0], **ADAMW[1], in_backward=in_backward)
    for each, optim in ((reference, expected), (model, optimizer)):
        for step, trained in enumerate((True, False, True)):
            each.get_parameter("1.0.weight").requires_grad_(trained)
            Loop(steps=1).run(NET, each, optim, start=step)
    assert same_weights(model, reference) and same_moments(optimizer, expected)


def test_two_forwards_before_their_backwards() -> None:
    reference, expected = plain(NET, ADAMW[0], **ADAMW[1])
    model = placed(NET, "mixed")
    optimizer = model.optimizer(ADAMW[0], **ADAMW[1])
    for each, optim in ((reference, expected), (model, optimizer)):
        for step in range(2):
            first, second = (NET.loss(each, NET.batch(seed=seed)) for seed in (step, 9 + step))
            first.backward()
            second.backward()
            optim.step()
            optim.zero_grad()
    assert same_weights(model, reference)


@pytest.mark.parametrize("where", ["host", "device", "streamed, resident"])
def test_new_programs_between_backward_and_step_lose_no_gradient(where: str) -> None:
    """Evaluation and another batch size, each compiled when the gradients of a step are waiting."""
    reference, expected = plain(NET, ADAMW[0], **ADAMW[1])
    model = placed(NET, where)
    optimizer = model.optimizer(ADAMW[0], **ADAMW[1])
    seen = []
    for each, optim in ((reference, expected), (model, optimizer)):
        for _ in range(2):
            NET.loss(each, NET.batch()).backward()
            with torch.no_grad():
                seen.append(each.eval()(NET.batch(seed=3)["input"]))
            NET.loss(each.train(), zoo.vectors(batch=7)).backward()
            optim.step()
            seen.append(NET.loss(each.eval(), zoo.vectors(batch=5)).detach())
            each.train()
            optim.zero_grad()
    assert same_weights(model, reference)
    assert all(map(torch.equal, seen[: len(seen) // 2], seen[len(seen) // 2 :]))


@pytest.mark.parametrize("streamed", [False, True])
def test_states_move_with_masters_moments_and_gradients(streamed: bool) -> None:
    """From tier to tier, with gradients at hand and with updates under way; accounts follow."""
    reference, expected = plain(NET, ADAMW[0], **ADAMW[1])
    model = compiled(NET, recompute="none")
    optimizer = model.optimizer(ADAMW[0], **ADAMW[1])
    store = model.session.machine.store
    first = homes(3, {0}, {0, 1, 2}, {1, 2} if streamed else ())
    places = [homes(3, (), {1}, {2}), homes(3, {1, 2}, (), {0})]
    store.place(first)
    used = [tier.used_bytes for tier in model.session.hardware.tiers]
    for place in places:
        for each in (reference, model):
            NET.loss(each, NET.batch()).backward()
        store.place(place)
        for optim in (expected, optimizer):
            optim.step()
            optim.zero_grad()
        store.place(homes(3, {2}, (), {1}))
    assert same_weights(model, reference) and same_moments(optimizer, expected)
    store.place(first)
    assert [tier.used_bytes for tier in model.session.hardware.tiers] == used


def test_a_gradient_set_to_none_stays_away_from_later_ones() -> None:
    """As in a loop that throws one gradient away between two backwards."""
    for micro in (1, 2):
        reference, model = NET.seeded(), placed(NET, "mixed")
        expected = AdamW(reference.parameters(), lr=1e-2, fused=True)
        optimizer = model.optimizer(AdamW, lr=1e-2, accumulate=micro)
        for each, optim in ((reference, expected), (model, optimizer)):
            for seed in range(2):
                NET.loss(each, NET.batch(seed=seed)).backward()
                each.get_parameter("2.0.weight").grad = None
            NET.loss(each, NET.batch(seed=2)).backward()
            each.get_parameter("1.0.bias").grad = None
            each.get_parameter("0.0.bias").grad = torch.ones(48)
            optim.step()
        assert same_weights(model, reference)


def test_gradients_are_read_and_changed_as_torchs() -> None:
    reference, expected = plain(BLOCKS, ADAMW[0], **ADAMW[1])
    model = placed(BLOCKS, "mixed")
    optimizer = model.optimizer(ADAMW[0], **ADAMW[1])
    for each, optim in ((reference, expected), (model, optimizer)):
        BLOCKS.loss(each, BLOCKS.batch()).backward()
        each.embed.weight.grad.mul_(0.5)
        each.blocks[0][0].bias.grad.data[3:] = 1.0
        assert each.unused.grad is None
        optim.step()
    assert same_weights(model, reference)
    assert all(p.grad is None for p in model.parameters()), "step() uses gradients up"


@MODES
def test_dropout_draws_the_same_numbers(in_backward: bool) -> None:
    case = Case("dropout", lambda: zoo.Blocks(0.2), BLOCKS.batch, BLOCKS.loss)
    check_equal(case, "mixed", "adamw", in_backward=in_backward)


def test_a_chunk_that_the_last_backward_has_no_part_in_is_updated_by_step() -> None:
    """What an earlier backward of an accumulated step left is not forgotten."""
    reference, expected = plain(NET, SGD, **MOMENTUM)
    model = placed(NET, "host")
    optimizer = model.optimizer(SGD, **MOMENTUM, in_backward=True, accumulate=2)
    frozen = [s.name for s in model.plan.layout.chunks[0].slots]
    for each, optim in ((reference, expected), (model, optimizer)):
        for trained in (True, False):
            for name in frozen:
                each.get_parameter(name).requires_grad_(trained)
            NET.loss(each, NET.batch()).backward()
        optim.step()
    assert same_weights(model, reference)


def test_gradients_of_float32_chunks_beside_float16_are_read_without_the_loss_scale() -> None:
    """Batch norms keep their dtype."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))

    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    expected = model()
    expected(x).square().mean().backward()
    found = geminifx.compile(model(), precision="fp16", placement="cuda", example_inputs=(x,))
    optimizer = found.optimizer(SGD, lr=0.1)
    for count in (1, 2):
        found(x).square().mean().backward()
        # 2^-11 a rounding to float16, of some tens of terms.
        torch.testing.assert_close(found[1].weight.grad, count * expected[1].weight.grad, rtol=2e-2, atol=1e-3)
    optimizer.step()
    moved = found.state_dict()["1.weight"] - 1
    torch.testing.assert_close(moved, -0.2 * expected[1].weight.grad, rtol=2e-2, atol=1e-3)
