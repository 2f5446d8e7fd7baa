"""`geminifx.from_pretrained`: a language model compiled before it has weights, which are read into its chunks."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ..models.presets import brings_tokenizer, empty_model, is_checkpoint, load_errors
from ..runtime.isa.errors import check_path
from .api import compile
from .module import CompiledModule
from .options import Options

PATTERNS = ("config.json", "generation_config.json", "model.safetensors.index.json", "model*.safetensors")
"""What is fetched of the Hub: neither tokenizers nor weights in other formats, such as consolidated.safetensors."""


@Options.shown_by
def from_pretrained(name: str | Path, device_budget: int | str | None = None, *, seed: int = 0, strict: bool = True,
                    **options: Any) -> CompiledModule:  # fmt: skip
    """A causal language model of Hugging Face's, compiled, whose weights go from the disk right into its chunks: the
    host holds what the plan says and one file at a time, never a second copy.

    Args:
        name: a directory that save_pretrained wrote, or a name on the Hugging Face Hub; of a preset, such as
            "opt-1.3b", or a config file (.json) the weights are random, drawn from `seed` by the modules' own
            initialisers.
        device_budget: as `geminifx.compile` has it, and so are the other `options`.
        strict: whether files must have all of the model's weights; else a warning tells which are drawn from `seed`.

    Returns:
        The model, in training mode with float32 parameters. Its weights are read when it is known where they go, by the
        first call, or as `CompiledModule.load_pretrained` says. Models of other classes are made inside of
        `geminifx.init_empty()`, compiled, and filled by `load_pretrained(directory)`.

    Raises:
        ModelLoadError: `name` is none of these.
        CheckpointError: its files are damaged, or lack weights.
        And what `geminifx.compile` raises.
    """
    check_path("name", name, "a directory, a preset, a config file or a name on the Hugging Face Hub")
    directory = _directory(str(name)) if brings_tokenizer(str(name)) else None
    model = compile(empty_model(directory or str(name)), device_budget, **options)
    if directory is None:
        model.initialize(seed)
    else:
        model.load_pretrained(directory, strict=strict, seed=seed)
    return model


def _directory(name: str) -> str:
    """Where the files are: those of the Hub are fetched."""
    if is_checkpoint(name) or Path(name).exists():
        return name
    with load_errors(name):
        return snapshot_download(name, allow_patterns=list(PATTERNS))
