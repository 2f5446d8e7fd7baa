"""What a forward assigns to its modules is followed, refused or told; what it reads of them is what they hold now."""

import copy
import enum
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import geminifx
import pytest
import torch
import torch.nn.functional as F
from geminifx.runtime.isa.errors import CaptureError
from more_models import DECODER
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM
from zoo import GPT2, LLAMA, MLP, Case, train


def batch(rows: int = 2) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))


class Assigns(nn.Module):
    """A linear layer and a buffer, and what `assign` does with the module in its forward."""

    def __init__(self, assign: Callable[["Assigns", Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.teacher = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("late", None)
        self.seen: Any = None
        self.calls = 0
        self.log: list[int] = []
        self.plain = torch.ones(4)
        self.assign = assign

    def forward(self, x: Tensor) -> Tensor:
        self.assign(self, x)
        return self.layer(x) * self.plain + self.teacher(x).detach() + self.count.sum()


def told_by(assign: Callable[[Assigns, Tensor], Any]) -> list[str]:
    """The warnings of two calls."""
    model = geminifx.compile(Assigns(assign))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model(batch())
        model(batch())
    return [str(w.message) for w in told if w.category is UserWarning]


# -- buffers -----------------------------------------------------------------------------------------------


REPLACED: dict[str, tuple[Callable[[Assigns, Tensor], Any], str]] = {
    "a longer one": (
        lambda m, x: setattr(m, "count", torch.ones(4)),
        r"replaces buffer count of torch.float32 \[\] by",
    ),
    "of another dtype": (lambda m, x: setattr(m, "count", m.count.double()), r"one of torch.float64 \[\]"),
    "data of another shape": (lambda m, x: setattr(m.count, "data", torch.ones(2)), "a tensor's .data"),
    "data of another dtype": (lambda m, x: setattr(m.count, "data", torch.tensor(1)), "one of torch.int64"),
    "it grows": (lambda m, x: setattr(m, "count", torch.cat([m.count.view(-1), x.detach()[:, 0]])), r"float32 \[3\]"),
}


@pytest.mark.parametrize("how", REPLACED)
def test_a_buffer_keeps_its_kind(how: str) -> None:
    assign, message = REPLACED[how]
    model = geminifx.compile(Assigns(assign))
    with pytest.raises(CaptureError, match=message):
        model(batch())
    assert torch.equal(model.count, torch.zeros(())), "the model is as it was"


def test_a_buffer_that_is_removed_is_refused() -> None:
    class Removes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("start", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x) + self.start
            self.start = None
            return y

    model = geminifx.compile(Removes())
    with pytest.raises(CaptureError, match="removes the buffer start"):
        model(batch())
    assert model.start is not None


FOLLOWED: dict[str, Callable[[Assigns, Tensor], Any]] = {
    "an average": lambda m, x: setattr(m, "count", 0.9 * m.count + 0.1 * x.detach().mean()),
    "twice": lambda m, x: (setattr(m, "count", m.count + 1), setattr(m, "count", m.count * 2)),
    "in place, then replaced": lambda m, x: (m.count.add_(1), setattr(m, "count", m.count * 2)),
    "replaced, then in place": lambda m, x: (setattr(m, "count", m.count + 1), m.count.mul_(2)),
    "data": lambda m, x: setattr(m.count, "data", m.count + 1),
    "replaced by a constant": lambda m, x: setattr(m, "count", torch.full((), 3.0)),
}


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("how", FOLLOWED)
def test_a_buffer_that_is_replaced_is_followed_without_a_word(how: str, train: bool) -> None:
    plain = Assigns(FOLLOWED[how]).train(train)
    model = geminifx.compile(Assigns(FOLLOWED[how])).train(train)
    with warnings.catch_warnings(), torch.set_grad_enabled(train):
        warnings.simplefilter("error")
        for _ in range(3):
            assert torch.equal(model(batch()), plain(batch()))
            assert torch.equal(model.count, plain.count)
    assert torch.equal(model.state_dict()["count"], plain.count)


def test_a_buffer_that_is_replaced_by_what_has_a_gradient_only_keeps_its_value() -> None:
    class Carries(nn.Module):
        """The state of one call goes into the next, detached as truncated backpropagation has it."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 4)
            self.register_buffer("state", torch.zeros(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.layer(x + self.state))
            self.state = y.detach()
            return y

    plain, model = Carries(), geminifx.compile(Carries())
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, plain)]
    for _ in range(3):
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            each(batch()).square().sum().backward()
            optimizer.step()
        assert torch.equal(model.state, plain.state) and torch.equal(model.layer.weight, plain.layer.weight)


class Shifts(nn.Module):
    """Two buffers, of which `assign` makes new ones out of the old."""

    def __init__(self, assign: Callable[["Shifts"], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.assign = nn.Linear(4, 4), assign
        self.register_buffer("first", torch.zeros(4))
        self.register_buffer("second", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) + self.first + 2 * self.second
        self.assign(self)
        return y


SHIFTS: dict[str, Callable[[Shifts], Any]] = {
    "swapped": lambda m: (swapped := m.second, setattr(m, "second", m.first), setattr(m, "first", swapped)),
    "the old one is kept": lambda m: (setattr(m, "second", m.first), setattr(m, "first", m.first + 1)),
    "one from the other": lambda m: (setattr(m, "first", m.second + 1), setattr(m, "second", m.first * 2)),
    "a view of the other": lambda m: setattr(m, "first", m.second.flip(0)[:4]),
}


@pytest.mark.parametrize("grad", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("how", SHIFTS)
def test_buffers_that_are_made_of_each_other(how: str, grad: bool) -> None:
    plain, model = Shifts(SHIFTS[how]), geminifx.compile(Shifts(SHIFTS[how]))
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            assert torch.equal(model(batch()), plain(batch()))
            assert torch.equal(model.first, plain.first) and torch.equal(model.second, plain.second)


@pytest.mark.parametrize("how", ["assigned", "queue", "out of the output"])
def test_a_buffer_that_the_backward_reads_may_be_replaced(how: str) -> None:
    """As a queue or a scale of the last step: plain autograd keeps the tensor that was there."""

    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 4)
            self.register_buffer("scale", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.layer(x) * self.scale)
            match how:
                case "assigned":
                    self.scale = self.scale + 1
                case "queue":
                    self.scale = torch.cat([self.scale[1:], y.detach().mean().view(1)])
                case _:
                    self.scale = y.detach()[0]
            return y

    plain, model = Scales(), geminifx.compile(Scales())
    for _ in range(3):
        for each in (plain, model):
            each.zero_grad()
            each(batch()).square().sum().backward()
        assert torch.equal(model.scale, plain.scale)
        assert torch.equal(model.layer.weight.grad, plain.layer.weight.grad)


def test_data_that_the_backward_reads_may_not_be_replaced() -> None:
    """What is written to is the tensor that autograd has saved."""

    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("scale", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x) * self.scale
            self.scale.data = self.scale + 1
            return y

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        geminifx.compile(Scales())(batch())


# -- parameters and tensors --------------------------------------------------------------------------------


@torch.no_grad()
def momentum(model: Assigns, x: Tensor) -> None:
    model.teacher.weight.data = model.teacher.weight * 0.9 + model.layer.weight * 0.1


@torch.no_grad()
def momentum_in_place(model: Assigns, x: Tensor) -> None:
    model.teacher.weight.mul_(0.9).add_(model.layer.weight, alpha=0.1)


PARAMETERS: dict[str, tuple[Callable[[Assigns, Tensor], Any], str]] = {
    "data": (momentum, r"writes to teacher\.weight in its forward"),
    "in place": (momentum_in_place, r"writes to teacher\.weight in its forward"),
    "replaced": (lambda m, x: setattr(m.teacher, "weight", nn.Parameter(torch.ones(4, 4))), r"parameter teacher\.wei"),
    "added": (lambda m, x: setattr(m, "new", nn.Parameter(torch.ones(4))), "assigns the parameter new"),
    "removed": (lambda m, x: setattr(m.teacher, "bias", None), r"assigns the parameter teacher\.bias"),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("how", PARAMETERS)
def test_a_parameter_that_the_forward_assigns_is_refused(how: str, frozen: bool) -> None:
    assign, message = PARAMETERS[how]
    source = Assigns(assign)
    source.teacher.requires_grad_(not frozen)
    model, before = geminifx.compile(source), {name: p.clone() for name, p in source.named_parameters()}
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(CaptureError, match=message):
            model(batch())
    assert all(torch.equal(p, before[name]) for name, p in source.named_parameters())


def test_a_tensor_that_is_no_buffer_may_not_be_assigned() -> None:
    model = geminifx.compile(Assigns(lambda m, x: setattr(m, "plain", m.plain * 2)))
    with pytest.raises(CaptureError, match=r'assigns the tensor plain.*register_buffer\("plain", '):
        model(batch())
    assert torch.equal(model.plain, torch.ones(4))


# -- attributes that are no tensors ------------------------------------------------------------------------


TOLD: dict[str, tuple[Callable[[Assigns, Tensor], Any], str]] = {
    "a number": (lambda m, x: setattr(m, "calls", m.calls + 1), "calls"),
    "a string": (lambda m, x: setattr(m, "seen", "a batch"), "seen"),
    "a list that grows": (lambda m, x: m.log.append(1), "log"),
    "a tensor in the place of None": (lambda m, x: setattr(m, "seen", x), "seen"),
    "a buffer in the place of None": (lambda m, x: setattr(m, "late", x.detach()), "late"),
    "a new attribute": (lambda m, x: setattr(m, "another", 3), "another"),
    "a new tensor": (lambda m, x: setattr(m, "another", x), "another"),
    "two at once": (lambda m, x: (setattr(m, "seen", 1), setattr(m, "calls", 2)), "calls, seen"),
}


@pytest.mark.parametrize("how", TOLD)
def test_an_attribute_that_the_forward_assigns_is_told(how: str) -> None:
    """A step computes tensors alone. It may be a cache that nobody reads, and so it is no error."""
    assign, names = TOLD[how]
    told = told_by(assign)
    assert told and all(
        text.startswith(f"the forward assigns {names}, but compiled steps do not repeat") for text in told
    )


def test_an_attribute_of_a_part_is_told_with_its_path() -> None:
    class Part(nn.Module):
        """Torch's own modules keep what they like."""

        calls = 0

    source = Assigns(lambda m, x: setattr(m.part, "calls", 1))
    source.part = Part()
    with pytest.warns(UserWarning, match=r"the forward assigns part\.calls, but compiled steps do not repeat"):
        geminifx.compile(source)(batch())


def test_what_is_told_is_left_as_it_was() -> None:
    model = geminifx.compile(Assigns(lambda m, x: (setattr(m, "calls", m.calls + 1), m.log.append(1))))
    with pytest.warns(UserWarning, match="calls"):
        model(batch())
    assert model.source.calls == 0 and model.source.log == []


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_modules_of_torch_and_hugging_face_are_not_told_of() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.norm = nn.GRU(4, 4, batch_first=True), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.gru(x)[0].transpose(1, 2))

    geminifx.compile(Recurrent())(torch.randn(2, 3, 4)).sum().backward()
    geminifx.compile(nn.GRU(4, 4))(torch.randn(3, 2, 4))[0].sum().backward()
    train(MLP, geminifx.compile(MLP.seeded()), steps=1)
    train(GPT2, geminifx.compile(GPT2.seeded()), steps=1)


@pytest.mark.filterwarnings("error")
def test_an_attribute_that_is_assigned_the_value_it_has_is_not_told_of() -> None:
    model = geminifx.compile(Assigns(lambda m, x: (setattr(m, "calls", 0), setattr(m, "seen", None))))
    model(batch()).sum().backward()


# -- attributes that are changed between calls -------------------------------------------------------------


class Mode(enum.Enum):
    SUM = 1
    MEAN = 2


class Reads(nn.Module):
    """Its forward reads attributes of every plain sort."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.part = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale, self.switch, self.times, self.mode = 1.0, False, [1, 2], Mode.SUM
        self.options: dict[str, Any] = {"power": 1, "deep": {"shift": 0.0}}
        self.shape: tuple[int, ...] = (4,)
        self.dtype = torch.float32
        self.activation: Any = None
        self.gate = torch.tanh
        self.mask = torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) * self.scale ** self.options["power"] + self.options["deep"]["shift"]
        for times in self.times:
            y = y * times + getattr(self.part, "extra", 0.0)
        if self.switch:
            y = torch.tanh(self.part(y))
        if self.activation is not None:
            y = self.activation(y)
        y = self.gate(y).to(self.dtype).to(torch.float32) * self.mask
        return y.view(-1, *self.shape).sum(0) if self.mode is Mode.SUM else y.mean(0)


CHANGES: dict[str, tuple[Callable[[Reads], Any], Callable[[Reads], Any]]] = {
    "a float": (lambda m: setattr(m, "scale", 0.5), lambda m: setattr(m, "scale", 1.0)),
    "from 1.0 to 1": (lambda m: setattr(m, "scale", 2), lambda m: setattr(m, "scale", 1.0)),
    "a switch": (lambda m: setattr(m, "switch", True), lambda m: setattr(m, "switch", False)),
    "a list in place": (lambda m: m.times.append(3), lambda m: m.times.pop()),
    "an element of a list": (lambda m: m.times.__setitem__(0, 5), lambda m: m.times.__setitem__(0, 1)),
    "a dict in place": (lambda m: m.options.update(power=3), lambda m: m.options.update(power=1)),
    "a dict in a dict": (lambda m: m.options["deep"].update(shift=1.0), lambda m: m.options["deep"].update(shift=0.0)),
    "a tuple": (lambda m: setattr(m, "shape", (2, 2)), lambda m: setattr(m, "shape", (4,))),
    "an enumeration": (lambda m: setattr(m, "mode", Mode.MEAN), lambda m: setattr(m, "mode", Mode.SUM)),
    "a dtype": (lambda m: setattr(m, "dtype", torch.bfloat16), lambda m: setattr(m, "dtype", torch.float32)),
    "a new one of a part": (lambda m: setattr(m.part, "extra", 1.0), lambda m: delattr(m.part, "extra")),
    "a function": (lambda m: setattr(m, "activation", F.relu), lambda m: setattr(m, "activation", None)),
    "another function": (lambda m: setattr(m, "gate", torch.sigmoid), lambda m: setattr(m, "gate", torch.tanh)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_attribute_that_is_changed_is_read_anew(change: str, captures: list[bool]) -> None:
    """By another program, and the one before is found again when the attribute changes back."""
    plain, model = Reads(), geminifx.compile(Reads())
    there, back = CHANGES[change]
    results = []
    for expected, act in ((1, None), (2, there), (2, None), (2, back), (2, there), (2, back)):
        for each in (plain, model.source):
            if act is not None:
                act(each)
        found = model(batch())
        assert torch.equal(found, plain(batch()))
        found.sum().backward()
        results.append(found.detach())
        assert len(captures) == expected, f"programs after {change} was {'set' if act is there else 'set back'}"
    assert torch.equal(results[0], results[3]) and torch.equal(results[1], results[4])


def test_an_attribute_that_is_set_through_the_compiled_model_is_followed() -> None:
    plain, model = Reads(), geminifx.compile(Reads())
    model(batch())
    for each in (plain, model):
        each.scale = 3.0
    assert torch.equal(model(batch()), plain(batch()))


def test_a_probability_of_dropout_that_is_changed_is_followed() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5))
    model = geminifx.compile(copy.deepcopy(plain))
    for rate in (0.5, 0.0, 1.0, 0.25):
        plain[1].p = model.source[1].p = rate
        found, expected = model(batch()), plain(batch())
        if rate in (0.0, 1.0):
            assert torch.equal(found, expected)
        else:
            dropped = (found == 0).float().mean().item()
            assert 0.5 * rate < dropped < 1.5 * rate  # of 128 elements
            assert torch.allclose(found[found != 0], (plain[0](batch()) / (1 - rate))[found != 0])


def test_a_configuration_that_is_changed_is_followed(captures: list[bool]) -> None:
    """Gemma's forward reads from it where the logits are capped."""
    torch.manual_seed(0)
    plain = Gemma2ForCausalLM(Gemma2Config(**DECODER, num_key_value_heads=2, head_dim=8, attention_dropout=0.0))
    model = geminifx.compile(copy.deepcopy(plain), fuse_loss=False)
    call = {"input_ids": GPT2.batch()["input_ids"]}
    for expected, cap in ((1, None), (2, 0.01), (2, None), (2, 0.01)):
        for each in (plain, model):
            each.config.final_logit_softcapping = cap
        found, right = model(**call).logits, plain(**call).logits
        # Its attention is ours: sums are taken in another order.
        assert torch.allclose(found, right, rtol=1e-4, atol=1e-6) and (found.abs().max() <= 0.01) == (cap is not None)
        assert len(captures) == expected


@pytest.mark.parametrize("asked", ["argument", "configuration"])
@pytest.mark.parametrize("case", [GPT2, LLAMA], ids=lambda case: case.name)
def test_hidden_states_are_collected(case: Case, asked: str) -> None:
    """Hugging Face's models collect them by hooks, which are set in the first forward that is asked for them."""
    plain, model = case.seeded(), geminifx.compile(case.seeded())
    call: dict[str, Any] = dict(case.batch())
    if asked == "argument":
        call["output_hidden_states"] = True
    for _ in range(2):
        for each in (plain, model):
            each.config.output_hidden_states = asked == "configuration"
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            found, right = model(**call), plain(**call)
        assert len(found.hidden_states) == len(right.hidden_states) == 3
        assert all(map(torch.allclose, found.hidden_states, right.hidden_states))


def test_an_attribute_between_forward_and_backward_does_not_change_the_backward() -> None:
    plain, model = Reads(), geminifx.compile(Reads())
    for each, owner in ((plain, plain), (model, model.source)):
        y = each(batch())
        owner.scale, owner.switch = 7.0, True
        y.sum().backward()
    assert torch.equal(model.layer.weight.grad, plain.layer.weight.grad)


@pytest.mark.parametrize("ours", [False, True], ids=["torch's optimizer", "our own"])
def test_an_attribute_that_is_changed_while_training(ours: bool) -> None:
    """A schedule of some strength, as in annealing: every step has another."""
    plain, model = Reads(), geminifx.compile(Reads(), example_inputs=(batch(),))
    adamw = torch.optim.AdamW
    optimizer = model.optimizer(adamw, lr=0.1) if ours else adamw(model.parameters(), lr=0.1, fused=True)
    expected = adamw(plain.parameters(), lr=0.1, fused=True)
    for strength in (1.0, 0.5, 0.25, 0.5):
        for each, owner, optim in ((plain, plain, expected), (model, model.source, optimizer)):
            owner.scale = strength
            optim.zero_grad()
            each(batch()).square().sum().backward()
            optim.step()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


class Swaps(nn.Module):
    """What a program depends on besides attributes of the plain sorts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.activation = nn.Linear(4, 4), nn.Tanh()
        self.settings, self.tensors = SimpleNamespace(scale=1.0), [torch.ones(4)]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.layer(x)) * self.settings.scale * self.tensors[0]


EXCHANGES: dict[str, Callable[[Any], Any]] = {
    "a module without parameters": lambda m: setattr(m, "activation", nn.ReLU()),
    "a hook on a part": lambda m: m.layer.register_forward_hook(lambda module, args, y: y * 3),
    "an object of settings": lambda m: setattr(m.settings, "scale", 2.0),
    "a tensor in a list": lambda m: m.tensors.__setitem__(0, torch.zeros(4)),
}


@pytest.mark.parametrize("change", EXCHANGES)
def test_what_is_exchanged_between_calls_is_followed(change: str) -> None:
    plain, model = Swaps(), geminifx.compile(Swaps())
    assert torch.equal(model(batch()), plain(batch()))
    for each in (plain, model.source):
        EXCHANGES[change](each)
    assert torch.equal(model(batch()), plain(batch()))


# -- tensors that are no buffers ---------------------------------------------------------------------------


def test_a_plain_tensor_that_is_changed_in_place_is_seen(captures: list[bool]) -> None:
    plain, model = Reads(), geminifx.compile(Reads())
    for value in (1.0, 2.0, 0.0):
        for each in (plain, model):
            each.mask.fill_(value)
            each.mask[0] = 3.0
        found = model(batch())
        assert torch.equal(found, plain(batch()))
        found.sum().backward()
    assert len(captures) == 1


def test_a_plain_tensor_that_is_replaced_is_seen() -> None:
    plain, model = Reads(), geminifx.compile(Reads())
    for value in (1.0, 2.0, 0.5):
        for each in (plain, model.source):
            each.mask = torch.full((4,), value)
        assert torch.equal(model(batch()), plain(batch()))


# -- buffers of several modules ----------------------------------------------------------------------------


class Twice(nn.Module):
    """A norm under two names, which updates its statistics through both."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.again = self.norm

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.again(torch.tanh(self.layer(self.norm(x))))
        return y, torch.tanh(y), y.detach()


class Lent(nn.Module):
    """A buffer of one module that another holds under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.first.register_buffer("mean", torch.zeros(4))
        self.second.register_buffer("also", self.first.mean)
        self.second.register_buffer("none", None)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.first.mean += 1
        y = self.second(x) * self.second.also.clone()
        self.second.also *= 2
        return self.first(y) + self.first.mean.clone(), torch.tanh(y), self.second.also * x


@pytest.mark.parametrize("ours", [False, True], ids=["torch's optimizer", "our own"])
@pytest.mark.parametrize("kind", [Twice, Lent])
def test_a_buffer_of_two_modules_is_updated_once_for_both(kind: type[nn.Module], ours: bool) -> None:
    torch.manual_seed(0)
    plain, x = kind(), batch(3)
    model = geminifx.compile(copy.deepcopy(plain), example_inputs=(x,))
    optimizers = (
        model.optimizer(torch.optim.SGD, lr=0.1) if ours else torch.optim.SGD(model.parameters(), lr=0.1, fused=True),
        torch.optim.SGD(plain.parameters(), lr=0.1, fused=True),
    )
    for _ in range(3):
        outputs = [each(x) for each in (model, plain)]
        assert all(map(torch.equal, *outputs))
        for (y, z, _), optimizer in zip(outputs, optimizers, strict=True):
            (y.square().sum() + z.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        found, expected = model.state_dict(), plain.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
