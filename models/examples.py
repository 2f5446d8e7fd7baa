"""Small inputs to trace a Hugging Face model with, made from its configuration alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

Inputs = dict[str, Tensor]

_DEFAULT_LENGTH = 512
_DEFAULT_IMAGE = 224


def _longest(model: PreTrainedModel) -> int:
    """The most positions that the model's embedding tables hold; models without tables take any length."""
    config = model.config.get_text_config()
    longest = max(getattr(config, "max_position_embeddings", None) or 0, 0) or _DEFAULT_LENGTH  # XLNet's is -1
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        # RoBERTa counts positions from its padding index onwards.
        if isinstance(table, torch.nn.Embedding) and table.padding_idx is not None:
            longest = min(longest, table.num_embeddings - table.padding_idx - 1)
    return int(longest)


def _tokens(model: PreTrainedModel, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Random token ids [batch, length], none of them padding."""
    config = model.config.get_text_config()
    ids = torch.randint(0, config.vocab_size, (batch, length), generator=generator)
    pad = getattr(config, "pad_token_id", None)
    return ids if pad is None else ids.masked_fill(ids == pad, (pad + 1) % config.vocab_size)


def _classes(model: PreTrainedModel, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Labels: a class index for single-label problems, numbers for regression, a 0/1 vector for multi-label ones."""
    count = model.config.num_labels
    kind = model.config.problem_type or ("regression" if count == 1 else "single_label_classification")
    if kind == "single_label_classification":
        return torch.randint(0, count, shape, generator=generator)
    width = () if kind == "regression" and count == 1 else (count,)
    labels = torch.rand((*shape, *width), generator=generator)
    return labels if kind == "regression" else labels.round()


def _language(model: PreTrainedModel, batch: int, length: int, generator: torch.Generator) -> Inputs:
    ids = _tokens(model, batch, length, generator)
    return {"input_ids": ids, "labels": ids.clone()}


def _translation(model: PreTrainedModel, batch: int, length: int, generator: torch.Generator) -> Inputs:
    return {
        "input_ids": _tokens(model, batch, length, generator),
        "labels": _tokens(model, batch, length, generator),
    }


def _sequences(model: PreTrainedModel, batch: int, length: int, generator: torch.Generator) -> Inputs:
    ids = _tokens(model, batch, length, generator)
    return {"input_ids": ids, "labels": _classes(model, (batch,), generator)}


def _token_classes(model: PreTrainedModel, batch: int, length: int, generator: torch.Generator) -> Inputs:
    ids = _tokens(model, batch, length, generator)
    return {
        "input_ids": ids,
        "labels": torch.randint(0, model.config.num_labels, ids.shape, generator=generator),
    }


def _images(model: PreTrainedModel, batch: int, length: int, generator: torch.Generator) -> Inputs:
    size = getattr(model.config, "image_size", None) or _DEFAULT_IMAGE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    pixels = torch.randn((batch, model.config.num_channels, height, width), generator=generator)
    return {"pixel_values": pixels.to(model.dtype), "labels": _classes(model, (batch,), generator)}


_TASKS: dict[str, tuple[str, Callable[[PreTrainedModel, int, int, torch.Generator], Inputs]]] = {
    # Suffix of the class name -> the model's main input, and the function that makes its inputs.
    "ForCausalLM": ("input_ids", _language),
    "LMHeadModel": ("input_ids", _language),
    "ForMaskedLM": ("input_ids", _language),
    "ForConditionalGeneration": ("input_ids", _translation),
    "ForSequenceClassification": ("input_ids", _sequences),
    "ForTokenClassification": ("input_ids", _token_classes),
    "ForImageClassification": ("pixel_values", _images),
}


def example_inputs(model: torch.nn.Module, batch_size: int = 1, seq_len: int | None = None) -> dict[str, Tensor] | None:
    """Keyword arguments, labels included, for one training step of `model`; the same ones every time.

    Knows causal, masked and sequence-to-sequence language models, and sequence, token and image classification; returns
    None for any other model. Token ids are int64 [batch_size, seq_len], pixels are in the model's dtype. All tensors
    are on the CPU. `seq_len` is min(512, the model's positions) by default.

    Raises:
        ValueError: `batch_size` or `seq_len` is not positive, or `seq_len` exceeds the model's positions.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    suffix = next((suffix for suffix in _TASKS if type(model).__name__.endswith(suffix)), "")
    # A ForConditionalGeneration model that is no encoder-decoder also reads images or sound.
    if not suffix or (suffix == "ForConditionalGeneration" and not model.config.is_encoder_decoder):
        return None
    reads, make = _TASKS[suffix]
    if model.main_input_name != reads or (reads == "pixel_values" and not hasattr(model.config, "num_channels")):
        return None
    longest = _longest(model) if reads == "input_ids" else _DEFAULT_LENGTH
    length = min(_DEFAULT_LENGTH, longest) if seq_len is None else seq_len
    if batch_size < 1 or length < 1:
        raise ValueError(f"example_inputs: expected positive sizes, got batch_size={batch_size}, seq_len={length}")
    if reads == "input_ids" and length > longest:
        raise ValueError(
            f"example_inputs: seq_len={length} exceeds the {longest} positions of {type(model).__name__}; pass a "
            "smaller seq_len, or build the model with more positions"
        )
    return make(model, batch_size, length, torch.Generator().manual_seed(0))
