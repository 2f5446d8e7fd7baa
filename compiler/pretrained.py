"""`geminifx.from_pretrained`: compiles a language model without weights, and reads these into its chunks."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ..models.presets import brings_tokenizer, empty_model, is_checkpoint, load_errors
from ..runtime.isa.errors import check_path
from .api import compile
from .module import CompiledModule
from .options import Options

PATTERNS = ("config.json", "generation_config.json", "model.safetensors.index.json", "model*.safetensors")
"""The files to fetch from the Hub: no tokenizers, and no weights in other formats, such as consolidated.safetensors."""


@Options.shown_by
def from_pretrained(name: str | Path, device_budget: int | str | None = None, *, seed: int = 0, strict: bool = True,
                    **options: Any) -> CompiledModule:  # fmt: skip
    """A compiled Hugging Face causal language model whose weights go from disk directly into its chunks: beside what
    the plan says, the host holds one file at a time, never a second copy.

    Args:
        name: a directory that save_pretrained wrote, or a name on the Hugging Face Hub. With a preset, such as
            "opt-1.3b", or a config file (.json), the weights are random, drawn from `seed` by the modules' own
            initialisers.
        device_budget: as for `geminifx.compile`, like the other `options`.
        seed: for random weights.
        strict: whether the files must hold all of the model's weights. If not, a warning names those drawn from `seed`.

    Returns:
        The model, in training mode with float32 parameters. Its weights are read once their places are known: by the
        first call, or as `CompiledModule.load_pretrained` says. For models of other classes, build them in
        `geminifx.init_empty()`, compile them, and call `load_pretrained(directory)`.

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
    """The directory of the files; fetches them if they are on the Hub."""
    if is_checkpoint(name) or Path(name).exists():
        return name
    with load_errors(name):
        return snapshot_download(name, allow_patterns=list(PATTERNS))
