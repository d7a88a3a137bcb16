"""The model families that GGUF export supports: llama.cpp's names, metadata and layout of their tensors.

To add a family, add an entry to `FAMILIES`, and its case to tests/export/test_gguf.py. What llama.cpp computes for each
architecture is in its `src/models/*.cpp`, and what its own converter writes in `conversion/*.py`
(https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lora_accel.errors import ArtifactError
from lora_accel.logs import logger

CONVERTER = "convert_hf_to_gguf.py of llama.cpp"
ROPE_FREQS = "rope_freqs.weight"
ROPE_KEYS = {
    "default": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "llama3": {"rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"},
}
"""RoPE type -> the parameters that a GGUF file stores for it."""


@dataclasses.dataclass(frozen=True)
class GgufFamily:
    """How llama.cpp stores a model type."""

    architecture: str
    """llama.cpp's name."""
    activation: str = "silu"
    """The only one that llama.cpp computes for this architecture."""
    interleaves_heads: bool = False
    """Whether llama.cpp rotates neighboring pairs of q and k, where transformers rotates the halves of a head."""
    norm_offset: float = 0.0
    """Added to the weights of norms: transformers multiplies by 1 + weight, llama.cpp by the stored weight."""
    uses_windows: bool = False
    """Whether llama.cpp attends within `sliding_window` in the layers in which transformers does."""
    add_metadata: Callable[[Any, PretrainedConfig], None] | None = None
    """Writes further metadata with a GGUFWriter."""
    check: Callable[[PretrainedConfig], str | None] | None = None
    """Returns why llama.cpp would compute something else with a config; None = it would not."""


def family_of(name: str, config: PretrainedConfig) -> GgufFamily:
    """Return the family of a model, after a check that GGUF can hold everything that its config describes.

    Args:
        name: of the model, for messages.

    Raises:
        ArtifactError: the family is not supported, or a setting of the config is not.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ArtifactError(
            f"{name}: GGUF export does not support model_type={config.model_type!r}, only {', '.join(FAMILIES)}; merge "
            f"the adapter, and convert the merged folder with {CONVERTER}"
        )
    if reason := _why_unsupported(family, config):
        raise ArtifactError(f"{name}: GGUF export does not support {reason}; use {CONVERTER}")
    window = getattr(config, "sliding_window", None)
    if window and not family.uses_windows and getattr(config, "use_sliding_window", True):
        logger.warning(f"note: {name}: llama.cpp ignores sliding_window={window}: longer texts get full attention")
    return family


def add_metadata(writer: Any, family: GgufFamily, config: PretrainedConfig) -> None:
    """Write the sizes of a model and its rotary embeddings.

    Args:
        writer: a GGUFWriter.
    """
    head_dim = head_size(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_rope(writer, rope_of(config))
    if family.add_metadata is not None:
        family.add_metadata(writer, config)


def head_size(config: PretrainedConfig) -> int:
    """Return the number of elements of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_of(config: PretrainedConfig, layer_type: str = "full_attention") -> dict[str, Any]:
    """Return the parameters of the rotary embeddings of one type of layers."""
    parameters: dict[str, Any] = dict(config.rope_parameters or {})
    return dict(parameters.get(layer_type) or parameters)


def rope_factors(config: PretrainedConfig) -> torch.Tensor | None:
    """Return what llama.cpp divides the frequencies of a `llama3` RoPE by, [head_dim / 2]; None for other types.

    They are the quotient of transformers' own frequencies without and with scaling.
    """
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    scaled: torch.Tensor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    size = head_size(config)
    plain: torch.Tensor = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return plain / scaled


def to_gguf_layout(
    family: GgufFamily, config: PretrainedConfig, name: str, tensor: torch.Tensor, *, is_lora_b: bool = False
) -> torch.Tensor:
    """Return a tensor as llama.cpp expects it: rows of q and k interleaved, norms with their offset.

    Args:
        name: in transformers' model.
        tensor: a weight [out, in], a bias or norm [out], or the B of LoRA [out, r].
        is_lora_b: whether it is a B, to which no offset is added.
    """
    module = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    if family.interleaves_heads and module in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)
    if family.norm_offset and module.endswith("norm") and not is_lora_b:
        return tensor.float() + family.norm_offset
    return tensor


def _add_rope(writer: Any, rope: Mapping[str, Any]) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_string(f"{writer.arch}.rope.scaling.type", kind)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


def _add_gemma2(writer: Any, config: PretrainedConfig) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping or 0.0)
    writer.add_final_logit_softcapping(config.final_logit_softcapping or 0.0)
    writer.add_sliding_window(config.sliding_window)


def _add_gemma3(writer: Any, config: PretrainedConfig) -> None:
    writer.add_rope_freq_base_swa(rope_of(config, "sliding_attention")["rope_theta"])
    writer.add_sliding_window(config.sliding_window)


def _why_unsupported(family: GgufFamily, config: PretrainedConfig) -> str | None:
    """Return the setting of a config that a GGUF file cannot hold; None if there is none."""
    if getattr(config, "quantization_config", None):
        return "quantized weights"
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != family.activation:
        return f"the activation {activation!r} in this family"
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_KEYS or (kind == "llama3" and family.architecture != "llama"):
        return f"rope_type={kind!r} in this family"
    for key, value in rope.items():
        if key not in ROPE_KEYS[kind] | {"rope_type"} and value is not None and (key, value) != (_PARTIAL, 1.0):
            return f"the RoPE parameter {key}={value!r}"
    return family.check(config) if family.check is not None else None


_PARTIAL = "partial_rotary_factor"
_ALTERNATING = {"gemma2": 2, "gemma3_text": 6}
"""Model type -> every n-th layer attends to everything."""


def _check_gemma(config: PretrainedConfig) -> str | None:
    """Return what of a Gemma config differs from what llama.cpp assumes for its architecture."""
    if not config.tie_word_embeddings:
        return "an output layer of its own in this family"
    if config.model_type == "gemma":
        return None
    # llama.cpp scales by the size of a head; in the models with 27B parameters by hidden size / heads.
    num_layers_27b = {"gemma2": 46, "gemma3_text": 62}[config.model_type]
    is_27b = config.num_hidden_layers == num_layers_27b
    expected = config.hidden_size // config.num_attention_heads if is_27b else head_size(config)
    if not math.isclose(config.query_pre_attn_scalar, expected):
        return f"query_pre_attn_scalar={config.query_pre_attn_scalar} (llama.cpp assumes {expected})"
    period = _ALTERNATING[config.model_type]
    for number, kind in enumerate(config.layer_types):
        if (kind == "full_attention") != ((number + 1) % period == 0):
            return f"layer_types[{number}]={kind!r} (llama.cpp assumes full attention in every layer {period})"
    if config.model_type == "gemma3_text" and config.final_logit_softcapping:
        return f"final_logit_softcapping={config.final_logit_softcapping} in this family"
    return None


_LLAMA = GgufFamily("llama", interleaves_heads=True)
_GEMMA = GgufFamily("gemma", activation="gelu_pytorch_tanh", norm_offset=1.0, check=_check_gemma)
FAMILIES: dict[str, GgufFamily] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3"),
    "gemma": _GEMMA,
    "gemma2": dataclasses.replace(_GEMMA, architecture="gemma2", uses_windows=True, add_metadata=_add_gemma2),
    "gemma3_text": dataclasses.replace(_GEMMA, architecture="gemma3", uses_windows=True, add_metadata=_add_gemma3),
}
"""By `model_type` of transformers' configs."""
