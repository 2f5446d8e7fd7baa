"""Models by name: presets of the published OPT shapes with random weights, local checkpoints, config files, the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import GENERATION_CONFIG_NAME

from ..runtime.isa.errors import GeminiError

MINI = "opt-mini"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class ModelLoadError(GeminiError):
    """No model could be made from the given name; the message says what was tried."""


@dataclass(frozen=True)
class Shape:
    """The sizes of an OPT model; the feed-forward layer is four times as wide as `hidden`."""

    layers: int
    hidden: int
    heads: int
    vocab_size: int = 50272
    positions: int = 2048
    embedding: int | None = None
    norm_first: bool = True
    dropout: float = 0.1
    init_std: float = 0.02

    def config(self) -> OPTConfig:
        """Return the Hugging Face configuration of this shape."""
        return OPTConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            ffn_dim=4 * self.hidden,
            word_embed_proj_dim=self.embedding or self.hidden,
            do_layer_norm_before=self.norm_first,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.positions,
            dropout=self.dropout,
            init_std=self.init_std,
        )


PRESETS = {
    # Learns half a megabyte of text in a minute: narrow layers train better from larger initial weights,
    # and no text is repeated often enough to need dropout.
    MINI: Shape(4, hidden=256, heads=4, vocab_size=2048, positions=256, dropout=0.0, init_std=0.05),
    "opt-125m": Shape(layers=12, hidden=768, heads=12),
    "opt-350m": Shape(layers=24, hidden=1024, heads=16, embedding=512, norm_first=False),
    "opt-1.3b": Shape(layers=24, hidden=2048, heads=32),
    "opt-2.7b": Shape(layers=32, hidden=2560, heads=32),
    "opt-6.7b": Shape(layers=32, hidden=4096, heads=32),
    "opt-13b": Shape(layers=40, hidden=5120, heads=40),
    "opt-30b": Shape(layers=48, hidden=7168, heads=56),
    "opt-66b": Shape(layers=64, hidden=9216, heads=72),
}


def is_checkpoint(name: str) -> bool:
    """Return whether `name` is a directory that holds a Hugging Face model."""
    return (Path(name) / "config.json").is_file()


def brings_tokenizer(name: str) -> bool:
    """Return whether `name` stands for trained weights, which only fit their own tokenizer."""
    return name not in PRESETS and not name.endswith(".json")


def load_model(name: str, *, seed: int = 0) -> PreTrainedModel:
    """Return a causal language model in float32, in training mode, on the CPU.

    `name` is a preset or a config file (random weights drawn from `seed`), a directory written by save_pretrained, or a
    name on the Hugging Face Hub.

    Raises:
        ModelLoadError: `name` is none of these, or what it names cannot be loaded.
    """
    config = _written_config(name)
    if config is not None:
        return _random_model(config, name, seed)
    with load_errors(name):
        # float32: lower precision loses small updates.
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelLoadError(
            f"{name} lacks {missing[0]}, the first of {len(missing)} missing parameter(s) of the model in its "
            "config.json; expected all parameters, as save_pretrained writes them"
        )
    return model.train()


def empty_model(name: str) -> PreTrainedModel:
    """Return the same model on `meta`: no weight is read or made.

    Raises:
        ModelLoadError: as for `load_model`.
    """
    config = _written_config(name)
    with load_errors(name), torch.device("meta"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False) if config is None else config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).train()
        if (Path(name) / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(name)
        return model


def _written_config(name: str) -> PretrainedConfig | None:
    """Return the configuration of a preset or a config file; None for a directory or a name on the Hub."""
    if name in PRESETS:
        return PRESETS[name].config()
    if name.endswith(".json"):
        return _read_config(Path(name))
    if Path(name).is_dir() and not is_checkpoint(name):
        raise ModelLoadError(f"the directory {name} has no config.json; expected one written by save_pretrained")
    if not Path(name).exists() and _HUB_NAME.fullmatch(name) is None:
        raise ModelLoadError(f"there is nothing at {name}; {_expected()}")
    if Path(name).is_file():
        raise ModelLoadError(f"{name} is a file; {_expected()}")
    return None


def _expected() -> str:
    """Return a description of the names that are accepted."""
    return (
        f"expected a preset ({', '.join(PRESETS)}), a directory written by save_pretrained, a config file "
        "(.json) or a model's name on the Hugging Face Hub"
    )


def _read_config(file: Path) -> PretrainedConfig:
    """Return the configuration in `file`."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"there is no config file {file}; {_expected()}") from None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read the config file {file}: {error}") from error
    kind = fields.pop("model_type", None) if isinstance(fields, dict) else None
    if kind is None:
        raise ModelLoadError(f"the config file {file} has no 'model_type', such as \"opt\"")
    with load_errors(f"the config file {file}"):
        return AutoConfig.for_model(kind, **fields)


def _random_model(config: PretrainedConfig, name: str, seed: int) -> PreTrainedModel:
    """Return a model of `config` with weights drawn from `seed`; the global random state is left unchanged."""
    with torch.random.fork_rng(), load_errors(name):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).train()


@contextmanager
def load_errors(name: str) -> Iterator[None]:
    """Turns any error that transformers raises for files into a ModelLoadError that names `name`."""
    try:
        yield
    except OSError as error:
        if Path(name).exists():
            raise ModelLoadError(f"cannot load the model in {name}: {_first_line(error)}") from error
        raise ModelLoadError(
            f"{name} is not a preset or a directory, and it could not be loaded from the Hugging Face Hub "
            f"({_first_line(error)}). Without a connection, download it elsewhere and pass its directory; "
            f"{_expected()}"
        ) from error
    except Exception as error:
        raise ModelLoadError(
            f"transformers could not build a causal language model from {name}: {type(error).__name__}: "
            f"{_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message: the rest repeats long lists of classes."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
