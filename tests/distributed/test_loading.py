"""Two real processes read, draw and save a model: each has its part, and together they have the whole."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from geminifx.models.presets import load_model
from launching import launched
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from loading_worker import IDS, MODES, SEED  # noqa: E402

CONFIG = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    vocab_size=100, tie_word_embeddings=False,
)  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("loading")
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).save_pretrained(made / "model", max_shard_size="20kB")
    CONFIG.to_json_file(made / "config.json")
    return made


def expected(folder: Path, how: str) -> Any:
    return load_model(str(folder / "model")) if how == "read" else load_model(str(folder / "config.json"), seed=SEED)


@pytest.mark.parametrize("how", ["read", "drawn"])
@pytest.mark.parametrize("mode", MODES)
def test_the_whole_is_what_plain_pytorch_has(folder: Path, mode: str, how: str) -> None:
    found = launched(HERE / "loading_worker.py", folder / "found.pt", ranks=2)[f"{mode}, {how}"]
    plain = expected(folder, how)
    assert same(found["state"], plain.state_dict())
    assert_close(found["loss"], plain(input_ids=IDS, labels=IDS).loss.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_files_are_read_anew_where_weights_have_places(folder: Path, mode: str) -> None:
    found = launched(HERE / "loading_worker.py", folder / "found.pt", ranks=2)[f"{mode}, read anew"]
    assert same(found["state"], expected(folder, "read").state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_what_is_saved_is_the_whole(folder: Path, mode: str) -> None:
    launched(HERE / "loading_worker.py", folder / "found.pt", ranks=2)
    saved = AutoModelForCausalLM.from_pretrained(folder / mode)
    assert len(list((folder / mode).glob("*.safetensors"))) > 1
    assert same(saved.state_dict(), expected(folder, "read").bfloat16().state_dict())


def same(found: dict[str, Tensor], plain: dict[str, Tensor]) -> bool:
    return found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)
