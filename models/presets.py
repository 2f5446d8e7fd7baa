"""Models by name: the published OPT shapes with random weights, local checkpoints, config files, the Hub."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig, PretrainedConfig, PreTrainedModel

from ..runtime.isa.errors import GeminiError

MINI = "opt-mini"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class ModelLoadError(GeminiError):
    """No model could be made of the name given; says what was tried."""


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
    # Learns from half a megabyte of text in a minute: narrow layers start better from larger weights, and no
    # text comes often enough to need dropout.
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
    """Return whether `name` stands for trained weights, which only their own tokenizer fits."""
    return name not in PRESETS and not name.endswith(".json")


def load_model(name: str, *, seed: int = 0) -> PreTrainedModel:
    """Return a causal language model in float32, in training mode, on the CPU.

    `name` is a preset or a config file (random weights drawn from `seed`), a directory written by
    save_pretrained, or a name on the Hugging Face Hub.

    Raises:
        ModelLoadError: `name` is none of these, or what it names cannot be loaded.
    """
    if name in PRESETS:
        return _random_model(PRESETS[name].config(), name, seed)
    if name.endswith(".json"):
        return _random_model(_read_config(Path(name)), name, seed)
    if Path(name).is_dir() and not is_checkpoint(name):
        raise ModelLoadError(f"the directory {name} has no config.json; expected one written by save_pretrained")
    if not Path(name).exists() and _HUB_NAME.fullmatch(name) is None:
        raise ModelLoadError(f"there is nothing at {name}; {_expected()}")
    return _pretrained(name).train()


def _expected() -> str:
    """Return what a model's name may be."""
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
    try:
        return AutoConfig.for_model(kind, **fields)
    except Exception as error:
        raise ModelLoadError(f"transformers does not take the config file {file}: {error}") from error


def _random_model(config: PretrainedConfig, name: str, seed: int) -> PreTrainedModel:
    """Return a model of `config` with weights drawn from `seed`; the global random state stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        except ValueError as error:
            raise ModelLoadError(f"{name} is not a causal language model: {_first_line(error)}") from error
        # Fields are taken as they are: one of another type may fail anywhere.
        except Exception as error:
            raise ModelLoadError(f"no model can be made of {name}: {_first_line(error)}") from error
    return model.train()


def _pretrained(name: str) -> PreTrainedModel:
    """Return the model in a directory or on the Hub, as float32: anything less loses small updates."""
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
    except ValueError as error:
        raise ModelLoadError(f"{name} is not a causal language model: {_first_line(error)}") from error
    # Damaged files make the libraries that read them raise errors of any kind.
    except Exception as error:
        if Path(name).exists():
            raise ModelLoadError(f"cannot load the model in {name}: {_first_line(error)}") from error
        raise ModelLoadError(
            f"{name} is no preset and no directory, and the Hugging Face Hub did not give it "
            f"({_first_line(error)}). Without a connection, download it elsewhere and give its directory; "
            f"{_expected()}"
        ) from error


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message: the rest repeats long lists of classes."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
