"""TRL's trainers log of a compiled model what they do of a plain one.

They put a forward of their own in the model's place, and compute the loss from the log-probabilities that it returns.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo import GPT2, LLAMA, VOCAB, Case

trl = pytest.importorskip("trl", reason="trl comes with the extra `loops`: make test-loops")

import geminifx  # noqa: E402
import peft  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from trainers import BOTH, difference, logged, losses  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]

LENGTHS = [8, 5, 7, 6] * 4
SPECIAL = ["<pad>", "<eos>", "<unk>"]
WORDS = [f"w{i}" for i in range(VOCAB - len(SPECIAL))]


def tokenizer() -> PreTrainedTokenizerFast:
    """A word, a token."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def text(length: int, seed: int) -> str:
    chosen = torch.randint(0, len(WORDS), (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in chosen)


def rows(**made: Callable[[int, int], Any]) -> Dataset:
    """A column for each function of a row's length and number."""
    return Dataset.from_list([{name: make(n, i) for name, make in made.items()} for i, n in enumerate(LENGTHS)])


PROMPT = {"prompt": lambda n, i: text(3, 100 + i)}
ANSWERS = {"chosen": lambda n, i: " " + text(n - 2, i), "rejected": lambda n, i: " " + text(4, 200 + i)}
TEXTS = rows(text=text)
COMPLETIONS = rows(**PROMPT, completion=ANSWERS["chosen"])
PREFERENCES = rows(**PROMPT, **ANSWERS)
RANKED = rows(chosen=text, rejected=ANSWERS["rejected"])
JUDGED = rows(**PROMPT, completion=ANSWERS["chosen"], label=lambda n, i: i % 2 == 0)
PROMPTS = rows(**PROMPT)


def trainer(kind: type[Trainer], config: type, model: nn.Module, directory: Path, data: Dataset,
            given: dict[str, Any] | None = None, **changes: Any) -> Trainer:  # fmt: skip
    """Its arguments are as small as they go; `given` is the trainer's own."""
    arguments = {
        "output_dir": str(directory), "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True,
        "max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "no", "logging_steps": 1,
        "learning_rate": 1e-2, "seed": 1, "gradient_checkpointing": False,
    }  # fmt: skip
    chosen = config(**{**arguments, **changes})
    return kind(model=model, args=chosen, train_dataset=data, processing_class=tokenizer(), **(given or {}))


def saved(case: Case, directory: Path, kind: Any = AutoModelForCausalLM, **changes: Any) -> nn.Module:
    """As trainers get it that make a second one, a reference, from where the first was loaded from."""
    case.seeded().save_pretrained(directory / "start")
    torch.manual_seed(0)
    return kind.from_pretrained(directory / "start", **changes)


def check_near(found: Trainer, plain: Trainer) -> None:
    assert len(losses(plain)) == plain.args.max_steps
    assert [entry.keys() for entry in logged(found)] == [entry.keys() for entry in logged(plain)]
    for entry, right in zip(logged(found), logged(plain), strict=True):
        clocks = {name for name in entry if "time" in name}
        assert {n: v for n, v in entry.items() if n not in clocks} == pytest.approx(
            {n: v for n, v in right.items() if n not in clocks}, rel=1e-4, abs=1e-6
        )
    assert 0 <= difference(found.model, plain.model) <= 1e-3
    assert isinstance(found.model, geminifx.CompiledModule)


def check_equal(kind: type[Trainer], config: type, data: Dataset, directory: Path, case: Case = LLAMA,
                start: Callable[..., nn.Module] = saved, made: Callable[[], dict[str, Any]] = dict,
                acts: tuple[Callable[[nn.Module], nn.Module], ...] = BOTH, **changes: Any) -> Trainer:  # fmt: skip
    plain, found = (
        trainer(kind, config, act(start(case, directory)), directory, data, made(), **changes) for act in acts
    )
    start_of = {name: value.clone() for name, value in plain.model.state_dict().items()}
    for each in (plain, found):
        torch.manual_seed(1)  # for what is sampled
        each.train()
    check_near(found, plain)
    assert any(not torch.equal(value, start_of[name]) for name, value in plain.model.state_dict().items())
    assert found.model.stats.steps >= plain.args.max_steps, "steps ran compiled"
    return found


# -- supervised fine-tuning --------------------------------------------------------------------------------

sft = partial(check_equal, trl.SFTTrainer, trl.SFTConfig)


@pytest.mark.parametrize("case", [GPT2, LLAMA], ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("data", "changes"),
    [
        (TEXTS, {}),
        (COMPLETIONS, {}),
        (TEXTS, {"packing": True, "max_length": 16}),
        (TEXTS, {"packing": True, "max_length": 16, "packing_strategy": "wrapped"}),
        (TEXTS, {"padding_free": True, "max_length": None}),
        (TEXTS, {"loss_type": "dft"}),
        (TEXTS, {"gradient_checkpointing": True}),
        (TEXTS, {"gradient_accumulation_steps": 2}),
    ],
    ids=["plain", "completions alone", "packed", "packed, cut", "no padding", "dft", "checkpointing", "accumulation"],
)
def test_supervised_fine_tuning(case: Case, data: Dataset, changes: dict[str, Any], tmp_path: Path) -> None:
    sft(data, tmp_path, case, **changes)


def test_evaluation_between(tmp_path: Path) -> None:
    found = sft(TEXTS, tmp_path, made=lambda: {"eval_dataset": TEXTS}, eval_strategy="steps", eval_steps=2)
    assert sum("eval_loss" in entry for entry in logged(found)) == 2


def test_dropout_is_disabled_in_the_source(tmp_path: Path) -> None:
    """TRL sets each dropout's rate to 0."""
    model = geminifx.compile(GPT2.build(dropout=0.5))
    trl.trainer.utils.disable_dropout_in_model(model)
    assert torch.equal(model(**GPT2.batch()).loss, model(**GPT2.batch()).loss)


def test_adapters(tmp_path: Path) -> None:
    def adapted(case: Case, directory: Path) -> Any:
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return peft.get_peft_model(saved(case, directory), config)

    # TRL's forward is put in the place of the inner model's, and calls of the outer one are the adapters' own.
    sft(TEXTS, tmp_path, start=adapted, acts=(BOTH[0], partial(geminifx.compile, outputs="all")))


# -- preferences -------------------------------------------------------------------------------------------

dpo = partial(check_equal, trl.DPOTrainer, trl.DPOConfig, PREFERENCES)


@pytest.mark.parametrize("changes", [{}, {"precompute_ref_log_probs": True}, {"gradient_checkpointing": True}], ids=str)
def test_direct_preference_optimization(changes: dict[str, Any], tmp_path: Path) -> None:
    """The trainer loads the reference model itself."""
    dpo(tmp_path, **changes)


@pytest.mark.parametrize("act", BOTH, ids=["plain", "compiled"])
def test_a_reference_model_that_is_given(act: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    dpo(tmp_path, made=lambda: {"ref_model": act(LLAMA.seeded())})


def test_kahneman_tversky_optimization(tmp_path: Path) -> None:
    check_equal(trl.KTOTrainer, trl.KTOConfig, JUDGED, tmp_path)


@pytest.mark.parametrize("case", [GPT2, LLAMA], ids=lambda case: case.name)
def test_a_model_of_rewards(case: Case, tmp_path: Path) -> None:
    start = partial(saved, kind=AutoModelForSequenceClassification, num_labels=1, pad_token_id=0)
    check_equal(trl.RewardTrainer, trl.RewardConfig, RANKED, tmp_path, case, start)


# -- reinforcement -----------------------------------------------------------------------------------------


def variety(completions: list[str], **_: Any) -> list[float]:
    """A reward for different words, of which longer completions have more."""
    return [float(len(set(words.split()))) for words in completions]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_group_relative_policy_optimization(beta: float, tmp_path: Path) -> None:
    """Completions are sampled by generate(), between steps, from the weights as they are then."""
    found = check_equal(
        trl.GRPOTrainer, trl.GRPOConfig, PROMPTS, tmp_path, made=lambda: {"reward_funcs": variety},
        num_generations=2, max_completion_length=6, beta=beta, num_iterations=2,
    )  # fmt: skip
    assert any(entry.get("reward_std", 0.0) > 0 for entry in logged(found))
