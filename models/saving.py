"""The files that Hugging Face's `save_pretrained` writes beside the weights; the weights are written elsewhere."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import CONFIG_NAME


def saves_plainly(model: nn.Module) -> bool:
    """Whether the files of a Hugging Face model hold its weights unchanged, under their own names."""
    if not isinstance(model, PreTrainedModel) or type(model).save_pretrained is not PreTrainedModel.save_pretrained:
        return False
    if getattr(model, "_hf_peft_config_loaded", False) or getattr(model, "hf_quantizer", None) is not None:
        return False
    return not get_model_conversion_mapping(model, add_legacy=False)


def saved_names(model: PreTrainedModel, names: list[str]) -> list[str]:
    """The names among `names` that the model's class wants saved."""
    left_out = model._keys_to_ignore_on_save or ()
    return [name for name in names if name not in left_out]


def save_all_but_weights(model: PreTrainedModel, directory: Path) -> None:
    """Write the configurations and everything else that belongs to the model."""
    model.save_pretrained(directory, state_dict={})


def tell_dtype(directory: Path, dtypes: Iterable[torch.dtype]) -> None:
    """Set the dtype in a Hugging Face model's config.json to the first floating-point one of `dtypes`. Does nothing if
    the file has no dtype, as for adapters."""
    file = directory / CONFIG_NAME
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "dtype" not in config:
        return
    dtype = next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)
    file.write_text(
        json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}, indent=2, sort_keys=True) + "\n",
        encoding="utf-8",
    )
