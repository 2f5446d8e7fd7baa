"""The compiled module is the model: names, state, modes, shapes; what it cannot honour it refuses."""

import copy
import inspect
import json
import math
import operator
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import geminifx
import pytest
import torch
import torch.nn.functional as F
from geminifx import Plan, graph_pass
from geminifx.passes.pipeline import PIPELINE
from geminifx.passes.program.manager import Pass
from geminifx.passes.program.program import Program, annotate, note
from geminifx.passes.program.types import TensorType
from geminifx.passes.program.verify import released
from geminifx.runtime.isa.errors import ArgumentError, CaptureError, StateError, VerificationError
from geminifx.runtime.isa.units import format_seconds
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from zoo import BLOCKS, CNN, GPT2, LLAMA, MLP, OPT, Blocks, Case, cnn, compiled, mlp, next_token, tokens, train


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -- a drop-in ---------------------------------------------------------------------------------------------


def test_names_parameters_and_signature_are_the_models_own() -> None:
    source = GPT2.seeded()
    parameters = dict(source.named_parameters())
    model = geminifx.compile(source)
    assert {name: id(p) for name, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert list(model.state_dict()) == list(GPT2.seeded().state_dict())
    assert inspect.signature(model) == inspect.signature(source.forward)
    assert model.config is source.config and callable(model.generate)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing
    assert isinstance(model, nn.Module) and model.training


def test_a_state_dict_goes_back_and_forth_with_the_plain_model() -> None:
    plain, model = OPT.seeded(), compiled(OPT, placement="cpu")
    assert same(plain, model)
    train(OPT, plain, steps=1)
    assert model.load_state_dict(plain.state_dict()).missing_keys == []
    assert same(plain, model)
    train(OPT, model, steps=1)
    plain.load_state_dict(model.state_dict())
    assert same(plain, model)
    with pytest.raises(ValueError, match="assign=True"):
        model.load_state_dict(plain.state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="nosuch"):
        model.load_state_dict({"nosuch": torch.ones(1)})


@pytest.mark.parametrize("case", [OPT, GPT2], ids=lambda case: case.name)
def test_save_pretrained_loads_with_transformers(case: Case, tmp_path: Path) -> None:
    model = compiled(case, placement="cpu")
    train(case, model, steps=1)
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path / "ck")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ck")
    assert same(loaded, model)
    assert (tmp_path / "ck" / "tokenizer.json").exists(), "what was there besides the weights stays"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("case", [OPT, GPT2], ids=lambda case: case.name)
def test_save_pretrained_with_no_state_saves_its_own(case: Case, tmp_path: Path) -> None:
    """As training loops call it, and with the optimizer that keeps masters elsewhere."""
    model = compiled(case, placement="cpu")
    optimizer = model.optimizer(torch.optim.AdamW)
    case.loss(model, case.batch()).backward()
    optimizer.step()
    model.save_pretrained(tmp_path, state_dict=None)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_other_models_save_as_safetensors(tmp_path: Path) -> None:
    model, other = compiled(BLOCKS), Blocks()
    train(BLOCKS, model, steps=1)
    model.save_pretrained(tmp_path / "ck")
    file = tmp_path / "ck" / "model.safetensors"
    assert "head.weight" not in load_file(file), "tied weights are saved once, and load under every name"
    load_model(other, file)
    assert same(other, model)


@pytest.mark.parametrize("case", [OPT, GPT2], ids=lambda case: case.name)
def test_options_of_transformers_are_honoured_or_refused(case: Case, tmp_path: Path) -> None:
    model = compiled(case, placement="cpu")
    given = {name: value + 1 for name, value in model.source.state_dict().items()}
    asks_for_nothing = {"is_main_process": True, "safe_serialization": True, "push_to_hub": False}
    for name, options in (("own", asks_for_nothing), ("given", {"state_dict": given}), ("variant", {"variant": "v"})):
        model.save_pretrained(tmp_path / name, dtype=torch.bfloat16, **options)
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == "bfloat16"
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, variant=options.get("variant"))
        expected = given if name == "given" else model.state_dict()
        found = loaded.state_dict()
        assert all(torch.equal(found[each], expected[each].to(found[each].dtype)) for each in found)
        assert next(loaded.parameters()).dtype == torch.bfloat16
    for refused in ("is_main_process", "safe_serialization"):
        with pytest.raises(ArgumentError, match=f"{refused}=False; expected True"):
            model.save_pretrained(tmp_path / "refused", **{refused: False})
    assert not (tmp_path / "refused").exists()


def test_other_models_refuse_options_that_would_be_dropped(tmp_path: Path) -> None:
    model = compiled(BLOCKS)
    for refused in ({"state_dict": {"head.weight": torch.zeros(1)}}, {"push_to_hub": True}, {"nosuch": 1}):
        with pytest.raises(ArgumentError, match=f"{next(iter(refused))}= is for models that define save_pretrained"):
            model.save_pretrained(tmp_path / "ck", **refused)
    assert not (tmp_path / "ck").exists()
    model.save_pretrained(tmp_path / "ck", safe_serialization=True, state_dict=None)
    assert (tmp_path / "ck" / "model.safetensors").exists()


def test_modes_reach_the_models_own_forward() -> None:
    model = geminifx.compile(Blocks(dropout=0.5))
    ids = tokens()["input_ids"]
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert not model.training and not model.source.training
    assert torch.equal(model(ids), model(ids))
    model.source.train()
    assert model.training and not torch.equal(model(ids), model(ids))


def test_arguments_that_are_no_tensors_are_part_of_the_program() -> None:
    class Power(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, power: int = 1, *, flags: dict[str, Any] | None = None) -> Any:
            y = self.layer(x) ** power
            return {"y": y, "power": power, "flags": flags, "none": None}

    plain = Power()
    model, x = geminifx.compile(copy.deepcopy(plain)), torch.randn(2, 4)
    for call in ({}, {"power": 2}, {"power": 3, "flags": {"a": 1.5, "b": "text"}}, {"power": True}):
        found, expected = model(x, **call), plain(x, **call)
        assert torch.equal(found.pop("y"), expected.pop("y")) and found == expected


def test_batches_in_other_dtypes_strides_and_sizes() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    model = geminifx.compile(copy.deepcopy(plain), precision="fp32")
    x = torch.randn(2, 3, 4)
    strided = torch.randn(4, 3, 2).permute(2, 1, 0)
    for batch in (x, strided, x[:1], x.expand(2, 3, 4), torch.randn(4, 3, 4)[::2]):
        assert torch.equal(model(batch), plain(batch))
    # Inputs compute in the precision of the weights, wherever they come from.
    for other in (x.bfloat16(), x.half()):
        assert torch.equal(model(other), plain(other.float()))


def test_a_batch_that_is_nowhere_is_refused() -> None:
    model = compiled(MLP)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        model(torch.ones(4, 48, device="meta"))
    train(MLP, model, steps=1)


def test_buffers_under_two_names() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("x", torch.ones(4))
            self.register_buffer("y", self.x)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.x + self.y

    plain, x = Shared(), torch.ones(2, 4)
    assert torch.equal(geminifx.compile(copy.deepcopy(plain))(x), plain(x))


WRITES = {
    "self.n.add_(1)": lambda model, x: model.n.add_(1),
    "self.n[0] = ...": lambda model, x: model.n[:1].copy_(model.n[:1] + 1),
    "self.n += 1": lambda model, x: model.__setattr__("n", operator.iadd(model.n, 1)),
    "self.n = self.n + 1": lambda model, x: model.__setattr__("n", model.n + 1),
    "self.n = mean": lambda model, x: model.__setattr__("n", 0.9 * model.n + 0.1 * x.detach().mean(0)),
    "self.n.data = ...": lambda model, x: model.n.__setattr__("data", model.n + 1),
    "self._buffers[...] = ...": lambda model, x: model._buffers.__setitem__("n", model.n + 1),
}
"""Ways to write to a buffer, of which the last four replace it."""


@pytest.mark.parametrize("write", WRITES)
def test_buffers_that_the_forward_writes_to_keep_their_values(write: str) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("n", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            WRITES[write](self, x)
            return self.layer(x) + self.n

    plain, x = Counts(), torch.ones(2, 4)
    model = geminifx.compile(copy.deepcopy(plain))
    for _ in range(3):
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model.n, plain.n)


# -- programs ----------------------------------------------------------------------------------------------


def test_hugging_face_models_are_planned_at_once_and_others_at_their_first_call() -> None:
    assert list(geminifx.compile(OPT.seeded()).graph) == ["training"]
    model = geminifx.compile(MLP.seeded())
    with pytest.raises(StateError, match=r"there is no plan yet.*example_inputs"):
        _ = model.plan
    assert model.graph == {}
    model(MLP.batch()["input"])
    assert model.plan.layout.chunks and list(model.graph) == ["training"]


@pytest.mark.parametrize("examples", [(torch.ones(4, 48),), {"input": torch.ones(4, 48)}])
def test_example_inputs_positional_and_by_name(examples: Any) -> None:
    model = geminifx.compile(MLP.seeded(), example_inputs=examples)
    assert list(model.graph) == ["training"] and model.plan.peak_bytes > 0


def test_shapes_and_modes_compile_once_each_and_share_the_parameters() -> None:
    model = geminifx.compile(MLP.seeded(), placement="cpu")
    calls = [(4, True), (2, True), (4, True), (4, False), (4, False), (2, False)]
    for _ in range(2):
        for batch, grad in calls:
            with torch.set_grad_enabled(grad):
                model(torch.ones(batch, 48))
    assert len(model.session._programs) == 4
    assert set(model.graph) == set(model.history) == {"training", "evaluation"}
    assert "yield" not in model.graph["evaluation"] and "yield" in model.graph["training"]
    assert [record.name for record in model.history["training"]] == [p.name for p in PIPELINE]


def test_parameters_stay_themselves_when_a_larger_batch_comes_first() -> None:
    """Until the first step masters may still move: the optimizer made before keeps holding them."""
    plain, model = MLP.seeded(), compiled(MLP, device_budget="1MB")
    optimizers = [torch.optim.AdamW(m.parameters()) for m in (model, plain)]
    for batch in (32, 4, 64):
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            m(torch.ones(batch, 48)).square().mean().backward()
            optimizer.step()
        assert same(model, plain)


def test_a_plan_saved_and_fed_back_gives_the_same_program(tmp_path: Path) -> None:
    model = compiled(OPT, device_budget="300kB", recompute="all")
    model.plan.save(tmp_path / "plan.json")
    again = compiled(OPT, plan=tmp_path / "plan.json", device_budget="300kB")
    assert model.plan == Plan.load(tmp_path / "plan.json")
    assert again.plan == replace(model.plan, alternatives=()), "none are weighed beside a plan that is given"
    assert again.graph == model.graph
    assert "planned device peak" in str(again.plan)


def test_a_plan_tells_the_modelled_seconds_of_a_step() -> None:
    kept, recomputed = (compiled(OPT, placement="cpu", recompute=blocks).plan for blocks in ("none", "all"))
    assert 0 < kept.estimate.step_s < recomputed.estimate.step_s
    assert re.search(rf"^modelled step +{format_seconds(kept.estimate.step_s)}, at", str(kept), re.MULTILINE)
    assert compiled(OPT, placement="cpu", recompute="none").plan == kept, "the same each time"


def test_what_is_asked_of_a_plan_that_is_fed_back_is_what_compile_is_told_now() -> None:
    planned = compiled(OPT, device_budget="1MB", placement="cpu").plan
    again = compiled(OPT, plan=planned, device_budget="2MB", outputs="all").plan
    assert again.request == replace(planned.request, budget_bytes=2_000_000, outputs="all")


def test_a_plan_edited_by_hand_is_followed() -> None:
    planned = compiled(OPT, placement="cpu", recompute="none").plan
    block = "model.decoder.layers.1"
    edited = compiled(OPT, plan=replace(planned, recompute=(block,), prefetch=0))
    assert f"# recompute: {block}" in edited.graph["training"]
    assert "# recompute: model.decoder.layers.0" not in edited.graph["training"]
    trained, plain = compiled(OPT, recompute=(block,)), OPT.seeded()
    train(OPT, trained, steps=2), train(OPT, plain, steps=2), train(OPT, edited, steps=2)
    assert same(trained, plain) and same(edited, plain)


def test_a_plan_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="the plan does not fit this model"):
        compiled(OPT, plan=compiled(GPT2).plan)


def test_a_pass_of_the_users_own_runs_where_it_asks_to() -> None:
    seen: list[str] = []

    @graph_pass(requires=(released,), after="release")
    def halve_the_learning(program: Program, plan: Plan) -> None:
        seen.append(program.name)
        for node in program.calls(torch.ops.aten.relu.default):
            node.target = torch.ops.aten.sigmoid.default

    source = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.randn(2, 4)
    with torch.no_grad():
        found = geminifx.compile(copy.deepcopy(source), passes=(halve_the_learning,))(x)
        assert torch.equal(found, source[0](x).sigmoid())
    assert set(seen) == {"evaluation"}
    with pytest.raises(ValueError, match="after='relaese' names no pass; did you mean 'release'"):
        geminifx.compile(source, passes=(Pass("p", lambda program, plan: None, after="relaese"),))


def test_a_fault_in_a_plan_that_is_only_weighed_is_told_where_it_is() -> None:
    @graph_pass(after="recompute")
    def careless(program: Program, plan: Plan) -> None:
        again = [node for node in program.computes if note(node).recomputed]
        for node in again[:1]:
            with program.graph.inserting_before(node):
                program.graph.call_function(torch.ops.aten.relu.default, node.args[:1])  # a node without a type

    with pytest.raises(VerificationError, match="after pass 'careless'"):
        compiled(OPT, passes=(careless,))


def test_a_refusal_of_what_a_pass_broke_tells_the_pass() -> None:
    @graph_pass(after="recompute")
    def careless(program: Program, plan: Plan) -> None:
        annotate(program.computes[0], type=TensorType(torch.float32, (10**9,), (1,)))

    with pytest.raises(VerificationError, match="after pass 'careless'"):
        compiled(OPT, passes=(careless,), device_budget="100MB")


def test_dump_writes_the_program_after_every_pass_and_the_plan(tmp_path: Path) -> None:
    model = compiled(OPT, dump=tmp_path, placement="cpu")
    names = sorted(path.name for path in (tmp_path / "training").iterdir())
    assert names[0] == "00_capture.py" and names[1] == "01_canonicalize.py" and len(names) >= 8
    assert Plan.load(tmp_path / "plan.json") == model.plan
    assert "geminifx.fetch(" in (tmp_path / "training.py").read_text()


# -- weights on meta ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [GPT2, CNN, *(pytest.param(c, marks=pytest.mark.slow) for c in (OPT, LLAMA))], ids=lambda case: case.name
)
def test_weights_on_meta_are_planned_refused_and_brought_to_life(case: Case) -> None:
    with geminifx.init_empty():
        empty = case.build()
    assert all(p.is_meta for p in empty.parameters())
    parameters = list(empty.parameters())
    model = geminifx.compile(empty, **case.examples(), placement="cpu")
    assert model.plan.peak_bytes == compiled(case, placement="cpu").plan.peak_bytes
    with pytest.raises(StateError, match=r"weights are on 'meta'.*load_state_dict"):
        case.loss(model, case.batch())
    source = case.seeded()
    some = dict(list(source.state_dict().items())[:-2])
    with pytest.raises(StateError, match="nothing was loaded"):
        model.load_state_dict(some)
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(source.state_dict())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    ordinary = compiled(case, placement="cpu")
    assert torch.equal(train(case, model).losses[-1], train(case, ordinary).losses[-1])
    assert same(model, ordinary)


def test_meta_weights_of_another_shape_and_buffers_nobody_knows_are_refused() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("table", torch.arange(2.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.table

    with geminifx.init_empty():
        table, layer = Table(), nn.Linear(2, 2)
    with pytest.raises(StateError, match="buffer table is on 'meta' and is not part of the state_dict"):
        geminifx.compile(table).load_state_dict(Table().state_dict())
    with pytest.raises(StateError, match=r"weight has shape \(2, 2\), but the state_dict has shape \(3, 2\)"):
        geminifx.compile(layer).load_state_dict(nn.Linear(2, 3).state_dict())


def test_a_value_too_many_is_told_and_the_others_are_there() -> None:
    full = OPT.seeded().state_dict()
    with geminifx.init_empty():
        model = geminifx.compile(OPT.build())
    with pytest.raises(StateError, match=r"the model has no another; all others are loaded"):
        model.load_state_dict({**full, "another": torch.ones(1)})
    assert torch.equal(OPT.loss(model, OPT.batch()), OPT.loss(OPT.seeded(), OPT.batch()))
    assert model.load_state_dict({**full, "another": torch.ones(1)}, strict=False).unexpected_keys == ["another"]


def test_before_the_first_call_weights_on_meta_load_too() -> None:
    with geminifx.init_empty():
        model = geminifx.compile(cnn())
    model.load_state_dict(CNN.seeded().state_dict())
    assert torch.equal(train(CNN, model).losses[-1], train(CNN, CNN.seeded()).losses[-1])


# -- refusals ----------------------------------------------------------------------------------------------


MOVES = {
    "cpu()": lambda model: model.cpu(),
    "to(cpu)": lambda model: model.to("cpu"),
    "to(cpu, float32)": lambda model: model.to("cpu", torch.float32),
    "float()": lambda model: model.float(),
    "within another module": lambda model: nn.ModuleList([model]).to("cpu"),
}
CASTS = {
    "half()": lambda model: model.half(),
    "double()": lambda model: model.double(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "meta": lambda model: model.to("meta"),
    "within another module": lambda model: nn.ModuleList([model]).half(),
    "share_memory()": lambda model: model.share_memory(),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("ours", [False, True], ids=["torch's optimizer", "our own"])
def test_moving_to_where_a_model_is_changes_nothing(move: str, ours: bool, recwarn: pytest.WarningsRecorder) -> None:
    """Training loops move models as a matter of course."""
    model, plain = compiled(MLP, placement="cpu"), MLP.seeded()
    optimizer = model.optimizer(torch.optim.AdamW) if ours else torch.optim.AdamW(model.parameters(), fused=True)
    expected = torch.optim.AdamW(plain.parameters(), fused=True)
    parameters, plan = list(model.parameters()), model.plan
    for _ in range(2):
        MOVES[move](model)
        assert [id(p) for p in model.parameters()] == [id(p) for p in parameters] and model.plan == plan
        for each, optim in ((model, optimizer), (plain, expected)):
            MLP.loss(each, MLP.batch()).backward()
            optim.step()
            optim.zero_grad()
    assert same(model, plain)
    assert [str(told.message) for told in recwarn] == []


@pytest.mark.parametrize("cast", CASTS)
def test_casting_is_refused(cast: str) -> None:
    model = compiled(MLP)
    with pytest.raises(StateError, match="out of their chunks"):
        CASTS[cast](model)
    assert not any(p.is_meta or p.dtype != torch.float32 for p in model.parameters())
    train(MLP, model, steps=1)


def test_a_compiled_model_passes_for_its_source() -> None:
    """Loops go by a model's class, its name and its signature."""
    source = GPT2.seeded()
    model = geminifx.compile(source)
    assert isinstance(model, type(source)) and isinstance(model, geminifx.CompiledModule)
    assert isinstance(model, nn.Module) and not isinstance(model, nn.Linear)
    assert model.__class__ is type(source) and model.__class__.__name__ == "GPT2LMHeadModel"
    assert inspect.signature(model.__class__.forward) == inspect.signature(type(source).forward)
    assert inspect.signature(model.forward) == inspect.signature(source.forward)
    assert type(model) is geminifx.CompiledModule
    assert not isinstance(source, geminifx.CompiledModule)


def test_a_compiled_sequence_is_one() -> None:
    """It passes for an nn.Sequential, and who asks that goes on to iterate."""
    source = MLP.seeded()
    model = geminifx.compile(source)
    assert isinstance(model, nn.Sequential)
    assert len(model) == len(source) and [part._facade_source for part in model] == list(source)
    assert model[-1]._facade_source is source[-1]


def test_copying_and_compiling_twice_are_refused() -> None:
    model = compiled(MLP)
    with pytest.raises(StateError, match="cannot be copied"):
        copy.deepcopy(model)
    with pytest.raises(ValueError, match="already compiled"):
        geminifx.compile(model)


def test_parameter_hooks_are_refused_until_they_are_gone() -> None:
    model = compiled(MLP)
    handle = model.get_parameter("0.0.weight").register_hook(lambda grad: grad * 2)
    with pytest.raises(StateError, match=r"parameter 0\.0\.weight has an autograd hook"):
        train(MLP, model, steps=1)
    with torch.no_grad():
        model(MLP.batch()["input"])
    handle.remove()
    train(MLP, model, steps=1)


@pytest.mark.parametrize("retain", [False, True])
def test_backward_twice_is_refused(retain: bool) -> None:
    model = compiled(OPT)
    loss = OPT.loss(model, OPT.batch())
    loss.backward(retain_graph=retain)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    with pytest.raises(StateError, match="a second time"):
        loss.backward()
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())


def test_an_optimizer_step_between_forward_and_backward_is_refused() -> None:
    model = compiled(MLP)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.ones(4, 48)
    model(x).sum().backward()
    loss = model(x).sum()
    optimizer.step()
    with pytest.raises(StateError, match="changed in place between"):
        loss.backward()
    model(x).sum().backward()


def test_a_gradient_into_the_logits_beside_a_loss_is_refused_with_advice() -> None:
    model = compiled(OPT)
    out = model(**tokens())
    assert out.logits.requires_grad
    with pytest.raises(StateError, match="outputs='all'"):
        (out.loss + out.logits.mean()).backward()
    assert all(p.grad is None for p in model.parameters())
    train(OPT, model, steps=1)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if y.sum() > 0:  # the line
            y = y * 2
        return y


def test_python_that_depends_on_data_is_refused_with_its_own_line() -> None:
    line = inspect.getsourcelines(Branches.forward)[1] + 2
    with pytest.raises(CaptureError, match=rf"test_module\.py:{line} \(if y\.sum\(\) > 0:.*torch\.where"):
        geminifx.compile(Branches(), example_inputs=(torch.ones(2, 4),))
    model = geminifx.compile(Branches())
    with pytest.raises(CaptureError):
        model(torch.ones(2, 4))


# -- where values stop being finite ------------------------------------------------------------------------


class Explodes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(2))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = F.dropout(block(x), 0.1)
        return self.head(x)


class Masked(Explodes):
    """Infinities that are meant, in front of those that are not."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x.masked_fill(x > x.mean(), -math.inf).softmax(-1)
        return self.head(self.blocks[0](x) / 0.0)


def test_masks_of_infinities_are_passed_over() -> None:
    found = geminifx.compile(Masked()).first_nonfinite(torch.randn(8, 4))
    assert found is not None and "div" in found


@pytest.mark.parametrize("placement", ["cpu", "cuda"])
def test_first_nonfinite_names_the_module_and_leaves_no_trace(placement: str) -> None:
    model = geminifx.compile(Explodes(), placement=placement)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    assert model.first_nonfinite(x) is None
    model(x).sum().backward()
    with torch.no_grad():
        model.blocks[1][0].weight.fill_(3e38)
    buffers, state = {name: b.clone() for name, b in model.named_buffers()}, torch.get_rng_state()
    found = model.first_nonfinite(x)
    assert found is not None and found.startswith("blocks.1.0 (")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert model.first_nonfinite(x * float("nan")) == "input x"
    with torch.no_grad():
        model.blocks[1][0].weight[2, 3] = float("nan")
    assert model.first_nonfinite(x) == "parameter blocks.1.0.weight"
    with torch.no_grad():
        model.blocks[1][0].weight.fill_(0.1)
    model.zero_grad()
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("case", [OPT, CNN, MLP], ids=lambda case: case.name)
def test_first_nonfinite_needs_no_more_than_the_forward_of_a_step(case: Case) -> None:
    model = compiled(case, placement="cpu", recompute="none")
    train(case, model, steps=1)
    device, batch = model.session.hardware.tiers[0], case.batch()
    call = batch if case.loss.__name__ == "own_loss" else {"input": batch["input"]}
    model.session.begin_step(training=True)
    model(**call)
    forward = device.step_peak_bytes
    model.session.begin_step(training=True)
    assert model.first_nonfinite(**call) is None
    # The largest magnitude of a value, and buffers that the search must not write to.
    assert device.step_peak_bytes <= forward + 4 + sum(b.nbytes for b in model.buffers())


def test_clip_grad_norm_is_torchs_in_one_process() -> None:
    model, plain = compiled(MLP), MLP.seeded()
    for each in (model, plain):
        each(MLP.batch()["input"]).square().sum().backward()
    assert torch.equal(model.clip_grad_norm_(0.5), nn.utils.clip_grad_norm_(plain.parameters(), 0.5))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_next_token_of_the_zoo_is_what_it_says() -> None:
    """The helper that other tests stand on: logits of every position against its label."""
    model, batch = BLOCKS.seeded(), tokens()
    logits = model(batch["input_ids"])
    rows = [F.cross_entropy(logits[i, j], batch["labels"][i, j]) for i in range(2) for j in range(8)]
    assert torch.allclose(next_token(model, batch), torch.stack(rows).mean())
    assert len(mlp()) == 5
