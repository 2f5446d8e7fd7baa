"""What Hugging Face's `save_pretrained` writes beside weights, where these are written by others."""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import CONFIG_NAME


def saves_plainly(model: nn.Module) -> bool:
    """Whether the files of a Hugging Face model hold its weights as they are, under their own names."""
    if not isinstance(model, PreTrainedModel) or type(model).save_pretrained is not PreTrainedModel.save_pretrained:
        return False
    if getattr(model, "_hf_peft_config_loaded", False) or getattr(model, "hf_quantizer", None) is not None:
        return False
    return not get_model_conversion_mapping(model, add_legacy=False)


def saved_names(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Those that its class says are to be saved."""
    left_out = model._keys_to_ignore_on_save or ()
    return [name for name in names if name not in left_out]


def save_all_but_weights(model: PreTrainedModel, directory: Path, dtype: torch.dtype) -> None:
    """Write the configurations and what else belongs to the model; the weights are told to be of `dtype`."""
    model.save_pretrained(directory, state_dict={})
    file = directory / CONFIG_NAME
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(
        json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}, indent=2, sort_keys=True) + "\n",
        encoding="utf-8",
    )
