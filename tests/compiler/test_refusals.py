"""Models that cannot be compiled as they are get an error with the way that works; what looks like them, works."""

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import geminifx
import pytest
import torch
from geminifx.compiler.capture import refusals
from geminifx.runtime.isa.errors import CaptureError, StateError
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint


def batch(rows: int = 2, width: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def same(model: nn.Module, other: nn.Module) -> bool:
    first, second = model.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def trains_like_torchs(build: Callable[[], nn.Module], loss: Callable[[nn.Module, int], Tensor],
                       example: tuple[Any, ...], **declared: Any) -> geminifx.CompiledModule:  # fmt: skip
    """Some steps of `model.optimizer(AdamW)` have the bits of torch's; returns the model."""
    torch.manual_seed(0)
    plain = build()
    model = geminifx.compile(copy.deepcopy(plain), example_inputs=example)
    optimizer = model.optimizer(AdamW, lr=0.1, **declared)
    expected = AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.1, fused=True)
    for step in range(3):
        losses = []
        for each, optim in ((model, optimizer), (plain, expected)):
            optim.zero_grad()
            losses.append(loss(each, step))
            losses[-1].backward()
            optim.step()
        assert torch.equal(*losses)
    assert same(model, plain)
    return model


# -- two tensors over one memory ---------------------------------------------------------------------------


def pair() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def cut(model: nn.Sequential) -> None:
    """Out of one tensor, without a gap."""
    whole = torch.randn(40)
    for layer, start in zip(model, (0, 20), strict=True):
        layer.weight = nn.Parameter(whole[start : start + 16].view(4, 4))
        layer.bias = nn.Parameter(whole[start + 16 : start + 20])


def frozen(model: nn.Sequential) -> None:
    model[1].weight.data = model[0].weight.data
    model.requires_grad_(False)
    model[1].bias.requires_grad_(True)


def within(model: nn.Sequential, trained: bool) -> None:
    """Two vectors out of a matrix that is frozen, the first of them too."""
    whole = torch.randn(4, 4)
    model[0].weight = nn.Parameter(whole, requires_grad=False)
    model[0].bias = nn.Parameter(whole[1], requires_grad=False)
    model[1].bias = nn.Parameter(whole[2], requires_grad=trained)


SHARED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "data": (lambda m: setattr(m[1].weight, "data", m[0].weight.data), "0.weight and 1.weight"),
    "transposed": (lambda m: setattr(m[1], "weight", nn.Parameter(m[0].weight.detach().t())), "0.weight and 1.weight"),
    "a part": (lambda m: setattr(m[1], "bias", nn.Parameter(m[0].weight.detach()[2])), "0.weight and 1.bias"),
    "a buffer": (lambda m: m[1].register_buffer("row", m[0].weight.detach()[1]), "0.weight and 1.row"),
    "one of them frozen": (
        lambda m: (setattr(m[1].weight, "data", m[0].weight.data), m[1].requires_grad_(False)),
        "0.weight and 1.weight",
    ),
    "two in a frozen one": (lambda m: within(m, True), "0.weight and 1.bias"),
}


@pytest.mark.parametrize("how", SHARED)
def test_weights_that_are_tied_by_their_memory_are_refused(how: str) -> None:
    tie, names = SHARED[how]
    model = pair()
    tie(model)
    with pytest.raises(ValueError, match=rf"{names} are two tensors that share memory.*tie them as one parameter"):
        geminifx.compile(model)


HELD: dict[str, tuple[Callable[[Any], Any], str]] = {
    ".data": (lambda m: setattr(m, "old", m[0].weight.data), "old"),
    "a view with a gradient": (lambda m: setattr(m[1], "t", m[0].weight.t()), "1.t"),
    "a row, in a dict of lists": (lambda m: setattr(m, "rows", {"a": [1, m[0].weight.detach()[1]]}), "rows['a'][1]"),
    "the same bytes of another dtype": (lambda m: setattr(m, "bits", m[0].weight.data.view(torch.int32)), "bits"),
}


@pytest.mark.parametrize("how", HELD)
def test_attributes_over_the_memory_of_a_trained_parameter_are_refused(how: str) -> None:
    hold, name = HELD[how]
    model = pair()
    hold(model)
    with pytest.raises(ValueError, match=re.escape(f"{name} shares the memory of parameter 0.weight")):
        geminifx.compile(model)


DISJOINT: dict[str, Callable[[Any], Any]] = {
    "cut out of one tensor": cut,
    "frozen": frozen,
    "frozen, within another": lambda m: within(m, False),
    "frozen and a buffer": lambda m: (m[0].requires_grad_(False), m[1].register_buffer("row", m[0].weight.detach()[1])),
    "two buffers": lambda m: (m.register_buffer("one", torch.ones(4)), m.register_buffer("two", m.one[1:])),
    "one parameter": lambda m: setattr(m[1], "weight", m[0].weight),
    "the parameters in a list": lambda m: setattr(m, "all", list(m.parameters())),
    "a copy": lambda m: setattr(m, "old", [m[0].weight.detach().clone()]),
    "a list that holds itself": lambda m: (setattr(m, "loop", []), m.loop.append(m.loop)),
    "nothing in it": lambda m: (setattr(m[0], "none", nn.Parameter(m[0].weight.detach()[:0])),),
}  # fmt: skip


@pytest.mark.parametrize("ours", [False, True], ids=["torch's optimizer", "our own"])
@pytest.mark.parametrize("how", DISJOINT)
def test_what_shares_no_memory_that_is_trained_is_fine(how: str, ours: bool) -> None:
    plain, source = pair(), pair()
    for each in (plain, source):
        torch.manual_seed(1)
        DISJOINT[how](each)
    model = geminifx.compile(source, example_inputs=(batch(),))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = model.optimizer(AdamW, lr=0.1) if ours else AdamW(trained, lr=0.1, fused=True)
    expected = AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.1, fused=True)
    for step in range(2):
        for each, optim in ((model, optimizer), (plain, expected)):
            optim.zero_grad()
            each(batch(seed=step)).square().sum().backward()
            optim.step()
    assert same(model, plain)


# -- parameters that the model does not know ---------------------------------------------------------------


class Container(nn.Module):
    """Layers in a container of Python's."""

    def __init__(self, container: Callable[[nn.Module], Any], read: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.more, self.read = container(nn.Linear(4, 4)), read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.more)(self.first(x))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("container", "read"),
    [
        (lambda m: [m], lambda more: more[0]),
        (lambda m: (m,), lambda more: more[0]),
        (lambda m: {"layer": m}, lambda more: more["layer"]),
        (lambda m: [{"layers": [m]}], lambda more: more[0]["layers"][0]),
    ],
    ids=["list", "tuple", "dict", "nested"],
)
def test_modules_in_a_plain_container_are_refused(container: Any, read: Any, grad: bool) -> None:
    """Their values would be those of the first call, and their gradients nowhere."""
    model = geminifx.compile(Container(container, read))
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(CaptureError, match=r"not among model\.parameters\(\).*nn\.Module"),
    ):
        model(batch())


def test_modules_in_containers_of_torch_are_fine() -> None:
    trains_like_torchs(
        lambda: Container(lambda m: nn.ModuleDict({"layer": m}), lambda more: more["layer"]),
        lambda model, step: model(batch(seed=step)).square().sum(),
        (batch(),),
    )


def test_modules_in_a_list_that_nothing_calls_are_fine() -> None:
    class Noted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.others = [self.first, nn.Linear(4, 4)]

        def forward(self, x: Tensor) -> Tensor:
            return self.others[0](x)

    trains_like_torchs(Noted, lambda model, step: model(batch(seed=step)).square().sum(), (batch(),))


# -- what is refused before anything is done ---------------------------------------------------------------


def pruned() -> nn.Module:
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def called_spectral_norm() -> nn.Module:
    layer = spectral_norm(nn.Linear(4, 4))
    layer(batch())
    return layer


def complex_weight(trained: bool = True) -> nn.Module:
    class Rotates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            turn = torch.polar(torch.ones(4), torch.arange(4.0))
            self.turn = nn.Parameter(turn, requires_grad=trained)

        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(self.layer(x).to(torch.complex64) * self.turn)

    return Rotates()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "torch.compile": (
        lambda: torch.compile(nn.Linear(4, 4), backend="eager"),
        "was made by torch.compile; compile the",
    ),
    "within": (
        lambda: nn.Sequential(nn.Linear(4, 4), torch.compile(nn.Linear(4, 4), backend="eager")),
        "OptimizedModule 1 was made by torch.compile",
    ),
    "scripted": (lambda: torch.jit.script(nn.Linear(4, 4)), "is scripted and cannot be traced further"),
    "traced": (lambda: torch.jit.trace(nn.Linear(4, 4), batch()), "is scripted and cannot be traced further"),
    "data parallel": (
        lambda: DataParallel(nn.Linear(4, 4)),
        "divides the batch by itself; compile its .module instead, with",
    ),
    "sparse": (lambda: nn.Sequential(nn.Embedding(4, 4, sparse=True)), "Embedding 0 produces sparse gradients"),
    "sparse bags": (lambda: nn.EmbeddingBag(4, 4, sparse=True), "EmbeddingBag produces sparse gradients"),
    "max_norm": (lambda: nn.Embedding(4, 4, max_norm=1.0), "writes to its weight in the forward, for max_norm="),
    "old weight_norm": (
        lambda: nn.Sequential(weight_norm(nn.Linear(4, 4))),
        "Linear 0 has a weight that a hook computes",
    ),
    "old spectral_norm, called": (called_spectral_norm, "use torch.nn.utils.parametrizations"),
    "pruned": (pruned, "make pruning permanent by prune.remove()"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4)), "parameter 0.weight has no shape yet; call the lazy module once"),
    "complex": (complex_weight, "parameter turn is complex, but training state consists of real numbers"),
}


@pytest.mark.filterwarnings("ignore")  # of functions that torch has given up
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_captured_is_told_at_once(kind: str) -> None:
    build, message = REFUSED[kind]
    with pytest.raises(ValueError, match=re.escape(message)):
        geminifx.compile(build())


def initialized() -> nn.Module:
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh())
    model(batch())
    return model


def permanently_pruned() -> nn.Module:
    layer = pruned()
    return nn.Sequential(prune.remove(layer, "weight"), nn.Tanh())


INSTEAD: dict[str, Callable[[], nn.Module]] = {
    "the module behind torch.compile": lambda: torch.compile(nn.Linear(4, 4), backend="eager")._orig_mod,
    "the module behind DataParallel": lambda: DataParallel(nn.Linear(4, 4)).module,
    "parametrizations, weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh()),
    "parametrizations, orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="matrix_exp"),
    "prune.remove": permanently_pruned,
    "lazy, called once": initialized,
    "complex, but frozen": lambda: complex_weight(trained=False),
}


@pytest.mark.parametrize("kind", INSTEAD)
def test_what_the_messages_advise_works(kind: str) -> None:
    torch.manual_seed(0)
    plain = INSTEAD[kind]()
    model = geminifx.compile(copy.deepcopy(plain))
    optimizers = [SGD([p for p in each.parameters() if p.requires_grad], lr=0.1) for each in (model, plain)]
    for step in range(3):
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            each(batch(seed=step)).square().sum().backward()
            optimizer.step()
    # Nothing is said of bits: parametrizations compute with their own parameters, in other programs.
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-6) for p, q in pairs)


def test_complex_weights_of_two_real_parameters_train() -> None:
    class Rotates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.real, self.imaginary = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return (x * torch.complex(self.real, self.imaginary)).abs()

    trains_like_torchs(Rotates, lambda model, step: model(batch(seed=step)).square().sum(), (batch(),))


# -- what is refused in capture ----------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.second, self.first(x), use_reentrant=self.use_reentrant)


class Applied(nn.Module):
    """A linear layer, and a function of its result."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


DTYPES_INSIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "complex128": lambda h: (h.to(torch.complex64) * 2j).to(torch.complex128).imag.square().float() + h,
    "float8": lambda h: h + h.detach().to(torch.float8_e4m3fn).float() + h.detach().to(torch.float8_e5m2).float(),
    "uint16": lambda h: h * (10 * h.detach().abs()).to(torch.uint16).float(),
}


@pytest.mark.parametrize("inside", DTYPES_INSIDE)
def test_values_of_other_dtypes_between_operators_are_fine(inside: str) -> None:
    trains_like_torchs(lambda: Applied(DTYPES_INSIDE[inside]), lambda m, step: m(batch(seed=step)).sum(), (batch(),))


@pytest.mark.parametrize("name", ["inv", "cholesky"])
def test_an_operator_that_checks_its_result_is_refused_and_its_other_form_is_fine(name: str) -> None:
    function, unchecked = getattr(torch.linalg, name), getattr(torch.linalg, f"{name}_ex")
    square = lambda h: h @ h.mT + torch.eye(4)  # noqa: E731
    with pytest.raises(CaptureError, match=r"such as torch\.linalg\.inv_ex"):
        geminifx.compile(Applied(lambda h: function(square(h))), example_inputs=(batch(4),))
    model = geminifx.compile(Applied(lambda h: unchecked(square(h))[0]), example_inputs=(batch(4),))
    assert model(batch(4)).isfinite().all()


def test_a_generator_of_the_model_s_own_is_refused() -> None:
    def drawn(h: Tensor) -> Tensor:
        return h + torch.randn(4, generator=torch.Generator().manual_seed(1))

    with pytest.raises(CaptureError, match=r"draws from a torch\.Generator of its own.*draw from torch's"):
        geminifx.compile(Applied(drawn), example_inputs=(batch(),))


def test_torchs_own_generator_may_be_named() -> None:
    def drawn(h: Tensor) -> Tensor:
        return h + torch.randn(4, generator=torch.default_generator)

    plain, model = Applied(drawn), geminifx.compile(Applied(drawn), example_inputs=(batch(),))
    model.load_state_dict(plain.state_dict())
    losses = []
    for each in (plain, model):
        torch.manual_seed(1)
        losses.append(each(batch()))
    assert torch.equal(*losses)


def test_a_reentrant_checkpoint_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"use_reentrant=True\) cannot be captured; use use_reentrant=False"):
        geminifx.compile(Checkpointed(True), example_inputs=(batch(),))


def test_another_checkpoint_is_captured() -> None:
    loss = lambda model, step: model(batch(seed=step)).square().sum()  # noqa: E731
    trains_like_torchs(lambda: Checkpointed(False), loss, (batch(),))


# -- outputs without a gradient ----------------------------------------------------------------------------


class Chooses(nn.Module):
    """What a classifier answers: no output takes a gradient."""

    def __init__(self, also: bool = False) -> None:
        super().__init__()
        self.layer, self.also = nn.Linear(4, 3), also

    def forward(self, x: Tensor) -> Any:
        scores = self.layer(x)
        return {"chosen": scores.argmax(-1), "scores": scores.detach()} if self.also else scores.argmax(-1)


@pytest.mark.parametrize("precision", [None, "fp32", "bf16"])
def test_a_model_whose_outputs_take_no_gradient_runs(precision: Any) -> None:
    torch.manual_seed(0)
    plain = Chooses()
    model = geminifx.compile(copy.deepcopy(plain), precision=precision, example_inputs=(batch(),))
    for rows in (2, 5):
        x = batch(rows).bfloat16().float()  # exact in either precision
        found, expected = model(x), plain(x)
        assert found.dtype == expected.dtype and found.shape == expected.shape and not found.requires_grad
        assert precision == "bf16" or torch.equal(found, expected)
    assert list(model.graph) == ["evaluation"]


def test_several_outputs_that_take_no_gradient() -> None:
    torch.manual_seed(0)
    plain = Chooses(also=True)
    model = geminifx.compile(copy.deepcopy(plain))
    found, expected = model(batch()), plain(batch())
    assert torch.equal(found["chosen"], expected["chosen"]) and torch.equal(found["scores"], expected["scores"])
    with pytest.raises(RuntimeError, match="does not require grad"):
        found["scores"].sum().backward()


def test_a_model_that_is_frozen_whole_runs_and_hands_on_gradients() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).requires_grad_(False)
    model = geminifx.compile(copy.deepcopy(plain))
    assert torch.equal(model(batch()), plain(batch()))
    inputs = [batch().requires_grad_() for _ in range(2)]
    for each, x in zip((model, plain), inputs, strict=True):
        each(x).sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)


# -- modules that are easily got wrong ---------------------------------------------------------------------


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "rnn": lambda: nn.RNN(4, 6, batch_first=True),
    "gru of two layers": lambda: nn.GRU(4, 6, num_layers=2, batch_first=True),
    "lstm": lambda: nn.LSTM(4, 6, batch_first=True),
    "lstm both ways": lambda: nn.LSTM(4, 6, batch_first=True, bidirectional=True),
    "lstm, projected": lambda: nn.LSTM(4, 6, batch_first=True, proj_size=3),
}


@pytest.fixture(scope="module", params=RECURRENT)
def recurrent(request: pytest.FixtureRequest) -> Iterator[Callable[[], nn.Module]]:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = RECURRENT[request.param]()
            self.head = nn.LazyLinear(3)
            self(torch.zeros(1, 1, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x)[0])

    yield Tagger


def sequences(step: int = 0) -> Tensor:
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(step))


def recurrent_loss(model: nn.Module, step: int) -> Tensor:
    return model(sequences(step)).square().mean()


@pytest.mark.slow
@pytest.mark.parametrize("in_backward", [False, True], ids=["default", "in_backward"])
def test_recurrent_modules_train_by_our_optimizer(recurrent: Any, in_backward: bool) -> None:
    """Torch's own refer to their parameters weakly, and those become others under the same objects."""
    torch.manual_seed(0)
    plain = recurrent()
    model = geminifx.compile(copy.deepcopy(plain), example_inputs=(sequences(),))
    optimizer = model.optimizer(AdamW, lr=0.01, in_backward=in_backward)
    expected = AdamW(plain.parameters(), lr=0.01, fused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            losses = []
            for each, optim in ((model, optimizer), (plain, expected)):
                optim.zero_grad()
                losses.append(recurrent_loss(each, step))
                losses[-1].backward()
                optim.step()
            # Torch's kernels for whole sequences are taken apart in capture: sums are taken in another order.
            assert torch.allclose(*losses, rtol=1e-5, atol=0)
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    for name, value in model.state_dict().items():
        assert torch.allclose(value, plain.state_dict()[name], rtol=1e-3, atol=1e-4), name


def test_recurrent_modules_go_on_after_their_state_is_loaded() -> None:
    torch.manual_seed(0)
    plain = nn.GRU(4, 4, batch_first=True)
    model = geminifx.compile(copy.deepcopy(plain), example_inputs=(sequences(),))
    model.optimizer(AdamW, lr=0.01)
    torch.manual_seed(5)
    other = nn.GRU(4, 4, batch_first=True)
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.allclose(model(sequences())[0], other(sequences())[0], rtol=1e-5, atol=1e-6)
    assert all(ref() is p for ref, p in zip(model.source._flat_weight_refs, model.source._flat_weights, strict=True))


class Quantized(nn.Module):
    """A frozen matrix of small integers under one that is trained, as adapters on quantized weights have it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        values = torch.arange(16).view(4, 4) % 5 - 2
        self.fixed = nn.Parameter(values.to(dtype), requires_grad=False)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x @ self.fixed.to(x.dtype))


@pytest.mark.parametrize("in_backward", [False, True], ids=["default", "in_backward"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool], ids=str)
def test_frozen_integers_beside_what_our_optimizer_trains(dtype: torch.dtype, in_backward: bool) -> None:
    model = trains_like_torchs(
        lambda: Quantized(dtype),
        lambda model, step: model(batch(seed=step)).square().sum(),
        (batch(),),
        in_backward=in_backward,
    )
    fixed = dict(model.named_parameters())["fixed"]
    assert fixed.dtype == dtype and not fixed.requires_grad and (in_backward or fixed.grad is None)
    assert torch.equal(fixed.detach(), Quantized(dtype).fixed)
    with pytest.raises(StateError, match="parameter fixed cannot be written"), torch.no_grad():
        fixed.zero_()


def test_a_capture_that_takes_long_says_what_of(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(20):
                x = self.cell(x).tanh()
            return x

    monkeypatch.setattr(refusals, "SLOW_S", 0.0)
    with pytest.warns(UserWarning, match=r"its Python ran \d+ operators, \d+ of them in cell \(linear.py:\d+\)"):
        geminifx.compile(Loop())(torch.ones(2, 4))
