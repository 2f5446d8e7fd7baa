"""Architectures of transformers, each as small as its configuration lets it be, and whether a compiled one computes
what plain PyTorch does in each way to run it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import geminifx
import torch
import transformers
from geminifx.models.examples import example_inputs
from geminifx.runtime.isa import errors
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

BATCH, LENGTH, VOCAB = 2, 8, 64
LARGEST = 3_000_000
"""Parameters, of what the table of sizes could not make small."""

_MAPPINGS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)
_SIZES: tuple[tuple[str, int], ...] = (
    # A configuration's field, by its whole name -> its value where models are small; the first that matches.
    (r"first_k_dense_replace|num_dense_layers|n?_?(num_)?shared_experts?|num_nextn_predict_layers|num_mtp_layers"
     r"|n_groups?|topk_group|num_expert_groups|decoder_sparse_step|encoder_sparse_step|depths?|layer_depths", 1),
    (r".*(experts_per_tok|experts_per_token|top_k|topk|top_k_experts|num_selected_experts)", 2),
    (r".*(num_experts|num_local_experts|n_routed_experts|moe_num_experts)", 4),
    (r".*(vocab_size|n_vocab|vocabulary_size)", VOCAB),
    (r".*(num_key_value_heads|num_kv_heads|n_kv_heads)", 2),
    (r".*(attention_heads|num_heads|n_heads?|mamba_heads)", 4),
    (r".*(head_dim|d_kv|head_size|d_head|kv_channels|rotary_dim)", 8),
    (r".*(hidden_layers|encoder_layers|decoder_layers|num_layers|n_layers?|num_blocks|num_block)", 2),
    (r".*(intermediate_size|ffn_dim|d_ff|d_inner|n_inner|ffn_hidden_size|dff)", 48),
    (r".*(hidden_sizes?|hidden_dim|d_model|n_embd|embed_dims?|embedding_size|proj_dim|emb_dim|dim_model|lru_width"
     r"|out_channels)|dim|width", 32),
    (r".*(max_position_embeddings|n_positions|n_ctx|max_source_positions|max_target_positions|max_seq_len)", 64),
    (r".*lora_rank", 8),
    (r"sliding_window|.*window_size|.*attention_window", 4),
    (r"image_size", 32),
    (r"patch_size", 8),
)  # fmt: skip
_DEPTHS = (r".*(hidden_layers|num_layers|n_layers?)", (2, 4, 8))
"""Hybrid models have an attention layer among every four or eight."""

_OWN: dict[str, dict[str, Any]] = {
    # What a kind of models needs besides.
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Mamba2Config": {"head_dim": 16},
    "ReformerConfig": {"is_decoder": True, "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16)},
    "XmodConfig": {"default_language": "en_XX"},
}
_LONGEST = 160
_ABSENT_BUT_NEEDED = ("num_key_value_heads", "head_dim", "num_experts_per_tok")


def names() -> list[str]:
    """A class of models for each kind of configuration, in alphabetical order: the first in the order above."""
    first: dict[str, str] = {}
    for mapping in _MAPPINGS:
        for kind, name in mapping.items():
            first.setdefault(kind, name if isinstance(name, str) else name[0])
    return sorted(set(first.values()))


# -- small models ------------------------------------------------------------------------------------------


def small(kind: type[PreTrainedConfig], depth: int) -> PreTrainedConfig:
    """A configuration with the sizes of the table above and nothing dropped at random."""
    fields = {each.name: _default(each) for each in dataclasses.fields(kind)}
    changes = {name: value for name, default in fields.items() if (value := _small(name, default, depth)) is not None}
    if "num_key_value_heads" in changes and fields["num_key_value_heads"] in (None, fields.get("num_attention_heads")):
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    parts = {name: getattr(kind(), name, None) for name in kind.sub_configs}
    changes |= {name: small(type(part), depth) for name, part in parts.items() if part is not None}
    config = kind(**changes | _OWN.get(kind.__name__, {}))
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    return config


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _small(name: str, default: Any, depth: int) -> Any:
    if isinstance(default, bool):
        return None
    if "drop" in name and isinstance(default, (int, float)):
        return type(default)(0)
    if name.endswith(("token_id", "token_index")) and isinstance(default, int) and default >= VOCAB:
        return VOCAB - 1 - default % 7
    size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
    if size is not None and re.fullmatch(_DEPTHS[0], name):
        size = depth
    if isinstance(default, (list, tuple)):
        return None if size is None or not all(isinstance(each, int) for each in default) else [size] * len(default)
    return size if isinstance(default, int) or name in _ABSENT_BUT_NEEDED else None


def built(name: str) -> Callable[[], nn.Module]:
    """What makes a small model of a class, always with the same weights, which transformers itself can train here.

    Raises what transformers does for the last depth where it cannot."""
    failure: Exception | None = None
    for depth in _DEPTHS[1]:
        try:
            make = _maker(getattr(transformers, name), depth)
            batch = batches(make())[0]
            make()(**batch).loss.backward()
            return make
        except Exception as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _maker(kind: Any, depth: int) -> Callable[[], nn.Module]:
    config = small(kind.config_class, depth)
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters are left of it")

    def make() -> nn.Module:
        torch.manual_seed(0)
        return kind(small(kind.config_class, depth)).train()

    return make


def batches(model: nn.Module) -> list[dict[str, Tensor]]:
    """Two of the same kind, and one that is padded where the model takes a mask. Raises ValueError for a model whose
    inputs `example_inputs` does not know."""
    first = example_inputs(model, BATCH, LENGTH)
    if first is None:
        raise ValueError("its inputs are more than text or an image")
    found = [first, {name: value.roll(1, -1) for name, value in first.items()}]
    if "input_ids" in first:
        mask = torch.ones_like(first["input_ids"])
        mask[0, LENGTH - 3 :] = 0
        found.append({**first, "attention_mask": mask})
    return found


# -- what is asked of a compiled one -----------------------------------------------------------------------


class DiffersError(Exception):
    """Something is not what plain PyTorch computes."""


def _check_near(found: Tensor, expected: Tensor, what: str) -> None:
    apart, size = (found - expected).float().norm().item(), expected.float().norm().item()
    if not apart <= 1e-3 * size + 1e-5:
        raise DiffersError(f"{what} differs by {apart:.1e} of {size:.1e}")


def _check_training(make: Callable[[], nn.Module], most: int | None = None, **options: Any) -> None:
    plain, model = make(), geminifx.compile(make(), **options)
    for i, batch in enumerate(batches(plain)[:most]):
        losses = []
        for each in (plain, model):
            each.zero_grad()
            losses.append(each(**batch).loss)
            losses[-1].backward()
        _check_near(losses[1].detach(), losses[0].detach(), f"the loss of batch {i}")
        for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
            if (p.grad is None) != (q.grad is None):
                raise DiffersError(f"only one has a gradient of {name}")
            if p.grad is not None:
                _check_near(q.grad, p.grad, f"the gradient of {name}, batch {i},")


def _check_evaluation(make: Callable[[], nn.Module]) -> None:
    plain, model = make().eval(), geminifx.compile(make().eval())
    batch = batches(plain)[-1]
    with torch.no_grad():
        expected, found = plain(**batch), model(**batch)
    for name in ("loss", "logits"):
        _check_near(found[name], expected[name], f"the {name}")


def _check_generate(make: Callable[[], nn.Module]) -> None:
    plain = make().eval()
    model = geminifx.compile(make().eval(), example_inputs=batches(plain)[0])
    given = {"inputs": batches(plain)[0]["input_ids"], "max_new_tokens": 3, "do_sample": False}
    if not torch.equal(model.generate(**given), plain.generate(**given)):
        raise DiffersError("other tokens are generated")


CHECKS: dict[str, Callable[[Callable[[], nn.Module]], None]] = {
    "training": _check_training,
    "evaluation": _check_evaluation,
    "recomputed, offloaded": lambda make: _check_training(make, 2, recompute="all", placement="cpu"),
    "generate": _check_generate,
}


@dataclasses.dataclass(frozen=True)
class Support:
    """Of one class of models: how each check ended, by its name ("yes", "-" where it does not apply, or why not); or
    `absent`, why there is nothing to check. `faults` are what was neither right nor refused."""

    name: str
    absent: str = ""
    found: dict[str, str] = dataclasses.field(default_factory=dict)
    faults: tuple[str, ...] = ()


def supported(name: str) -> Support:
    try:
        make = built(name)
    except Exception as error:
        return Support(name, absent=_line(error))
    found, faults = {}, []
    for check, run in CHECKS.items():
        if check == "generate" and not make().can_generate():
            found[check] = "-"
            continue
        try:
            run(make)
            found[check] = "yes"
        except (errors.CaptureError, errors.StateError) as error:
            found[check] = f"refused: {_line(error)}"
        except Exception as error:
            if any("attn_implementation='eager'" in note for note in getattr(error, "__notes__", ())):
                found[check] = "refused: it reads its mask; attn_implementation='eager'"
                continue
            found[check] = f"fails: {type(error).__name__}: {_line(error)}"
            faults.append(f"{name}, {check}: {found[check]}")
    return Support(name, "", found, tuple(faults))


def _line(error: Exception) -> str:
    """One line, that names files as they are within their package."""
    told = re.sub(r"\S*/site-packages/", "", " ".join(str(error).split()))
    return told if len(told) <= _LONGEST else f"{told[:_LONGEST]}..."
