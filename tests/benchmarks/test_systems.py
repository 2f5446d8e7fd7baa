"""The systems train alike: same weights, batches and losses, however many backwards make a step."""

import sys

import pytest
import torch
from random_models import config_of
from systems import SYSTEMS
from systems.deepspeed import config_of as deepspeed_config
from systems.fsdp2 import sample
from systems.ours import Ours, OursDefault, OursTorch
from systems.torch_alone import EagerBf16, Plain
from task import Declared, Task

CPU = torch.device("cpu")
ALONE = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the same would run in bfloat16")


def task(model="llama-mini", batch=2, seq=16, **options):
    return Task(model, batch, seq, **options)


def reference_loss(of):
    """The loss of one batch of all the step's sequences, in float32 by Hugging Face alone."""
    with torch.no_grad():
        return of.random_model(CPU, torch.float32)(**of.inputs()).loss.item()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The file of a configuration with two blocks, which is compiled in a second."""
    config = config_of("llama-mini")
    config.update({"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 256})
    config.update({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
    folder = tmp_path_factory.mktemp("tiny")
    config.save_pretrained(folder)
    return str(folder / "config.json")


@pytest.fixture(scope="module")
def large(tiny):
    """The losses of three steps of one large batch."""
    contestant = Ours(task(tiny, batch=4, pad=True))
    return [contestant.step().item() for _ in range(3)]


@pytest.mark.slow
@ALONE
@pytest.mark.parametrize("system", [Ours, OursDefault, OursTorch])
def test_ours_adds_up_to_one_large_batch(system, tiny, large):
    few = task(tiny, accumulate=2, pad=True)
    several = system(few)
    losses = [several.step().item() for _ in range(3)]
    assert losses[0] == pytest.approx(reference_loss(few), abs=2e-6)
    assert losses == pytest.approx(large, abs=2e-6)
    assert losses[2] < losses[0] - 1e-4  # it trains
    assert several.facts["planned_peak_bytes"] > 0


@ALONE
@pytest.mark.parametrize("system", [Plain, EagerBf16])
@pytest.mark.parametrize("pad", [False, True])
def test_plain_pytorch_adds_up_to_one_large_batch(system, pad):
    few, one = task(accumulate=2, pad=pad), task(batch=4, pad=pad)
    first = system(few).step().item()
    assert first == pytest.approx(system(one).step().item(), abs=1e-2)
    assert first == pytest.approx(reference_loss(few), abs=1e-2)


@ALONE
def test_plain_updates_by_the_gradient_of_all_backwards():
    several, large = Plain(task(accumulate=2)), Plain(task(batch=4))
    before = {name: weight.detach().clone() for name, weight in several.model.named_parameters()}
    several.step(), large.step()
    moved = [(weight - before[name], dict(large.model.named_parameters())[name] - before[name])
             for name, weight in several.model.named_parameters()]  # fmt: skip
    a, b = (torch.cat([pair[i].detach().flatten() for pair in moved]) for i in range(2))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.95


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_says_what_it_cannot(name, monkeypatch):
    kind = SYSTEMS[name]
    monkeypatch.setattr("systems.base.find_spec", lambda package: None)
    if kind.package:
        assert kind.refusal(task()) == f"{kind.package} is not installed: pip install {kind.package}"
        return
    assert kind.refusal(task()) is None
    why = kind.refusal(task(microbatches=2))
    assert issubclass(kind, Ours) == (why is None)
    assert why is None or "--accumulate" in why


def test_roundpipe_divides_batches_but_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("systems.base.find_spec", lambda package: object())
    why = SYSTEMS["roundpipe"].refusal(task(microbatches=2))
    assert why is None if torch.cuda.is_available() else why == "RoundPipe needs a GPU"
    assert "roundpipe" not in sys.modules


def test_deepspeed_is_told_of_the_backwards():
    config = deepspeed_config(task(batch=8, accumulate=4), stage=2)
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (8, 4)


def test_a_sample_is_one_short_row():
    inputs = task(batch=4, seq=32, pad=True).inputs()
    assert {name: tuple(tensor.shape) for name, tensor in sample(inputs).items()} == {
        "input_ids": (1, 8), "labels": (1, 8), "attention_mask": (1, 8)}  # fmt: skip


def test_a_plan_alone_needs_no_weights(tiny, capsys):
    facts = Ours.planned(task(tiny, accumulate=2, budget="1GB", declared=Declared(recompute="1")))
    assert facts.keys() == {"compile_s", "planned_peak_bytes", "planned_host_bytes", "planned_step_s"}
    assert 0 < facts["planned_peak_bytes"] <= 10**9
    said = capsys.readouterr().out
    for option in ("recompute", "offload"):
        with pytest.raises(ValueError, match=f"--{option} 3, but the model has 2 blocks"):
            Ours.planned(task(tiny, declared=Declared(**{option: "3"})))
    assert "1 block(s)" in said and "2 backwards each" in said
