"""Tiny models of the model families that the package supports specially."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lora_accel.model.families import FAMILIES, RECURRENT_FROM, is_installed

INSTALLED = {name: family for name, family in sorted(FAMILIES.items()) if name in CONFIG_MAPPING}
"""Those that the installed version of transformers has."""
PACKING = [name for name, family in INSTALLED.items() if family.why_padded is None]
FUSED_LOSS = [name for name, family in INSTALLED.items() if family.supports_fused_loss]
PATCHED = [name for name, family in INSTALLED.items() if family.norm or family.gemma_norm or family.gate]

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED |= {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT_ATTENTION = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
LATENT_ATTENTION |= {"v_head_dim": 6, "num_key_value_heads": 4, "head_dim": 4}
LINEAR_ATTENTION = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8}
LINEAR_ATTENTION |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
SHARED_EXPERT = EXPERTS | {"shared_expert_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
SHARED_KEYS = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 6}
SHARED_KEYS |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
LAYER_INPUTS = {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8}
VISION: dict[str, dict[str, Any]] = {
    "gemma3": {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "image_size": 28},
    "gemma4": {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8},
}
for _options in VISION.values():
    _options |= {"num_attention_heads": 2, "num_key_value_heads": 2}
"""Models that read images, too, by the options of their image encoder."""
NO_OPTION = {"falcon": "head_dim"}
FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "axk1": LATENT_ATTENTION | ROUTED | {"n_group": 2},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "flint": SHARED_EXPERT | {"sliding_window": 6},
    "gemma4_unified_text": {"global_head_dim": 16, "sliding_window": 6},
    "hy_v3": EXPERTS,
    "kimi_linear": LATENT_ATTENTION
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "linear_head_dim": 8}
    | {"linear_num_heads": 2, "layer_types": ["linear_attention", "full_attention"]},
    "kolibri1": SHARED_EXPERT | {"sliding_window": 6},
    "laguna": SHARED_EXPERT | {"sliding_window": 6},
    "lfm2_moe": EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": LATENT_ATTENTION
    | {"num_layers": 2, "ffn_hidden_size": 48, "moe_topk": 2, "n_routed_experts": 4, "zero_expert_num": 2}
    | {"expert_ffn_hidden_size": 16, "qk_head_dim": 12},
    "mellum": EXPERTS | {"sliding_window": 6},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "mlp"], "num_hidden_layers": 3}
    | {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1},
    "olmo_hybrid": LINEAR_ATTENTION,
    "afmoe": EXPERTS | {"sliding_window": 6, "global_attn_every_n_layers": 2},
    "cohere2_moe": {"num_experts": 4, "sliding_window": 6},
    "cwm": {"sliding_window": 6},
    "deepseek_v2": LATENT_ATTENTION | ROUTED,
    "deepseek_v3": LATENT_ATTENTION | ROUTED | {"n_group": 2},
    "dots1": ROUTED | {"sliding_window": 6, "max_window_layers": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "exaone_moe": EXPERTS | {"sliding_window": 6, "sliding_window_pattern": 2},
    "flex_olmo": EXPERTS,
    "gemma3": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3n_text": SHARED_KEYS
    | LAYER_INPUTS
    | {"intermediate_size": [48] * 4, "laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gemma4": SHARED_KEYS | LAYER_INPUTS | {"global_head_dim": 16},
    "gemma4_text": SHARED_KEYS | LAYER_INPUTS | {"global_head_dim": 16},
    "glm4_moe": ROUTED,
    "glm4_moe_lite": LATENT_ATTENTION | ROUTED,
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    "gptj": {"rotary_dim": 4},
    "granite_swa": {"sliding_window": 6},
    "granitemoe": {"num_local_experts": 4},
    "granitemoe_swa": {"num_local_experts": 4, "sliding_window": 6},
    "granitemoehybrid": MAMBA
    | {"num_local_experts": 4, "layer_types": ["mamba" if is_installed(RECURRENT_FROM) else "attention", "attention"]},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 24},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "jetmoe": {"num_local_experts": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"num_hidden_layers": 4, "intermediate_size_mlp": 48, "num_local_experts": 4}
    | {"attention_chunk_size": 6, "floor_scale": 4},
    "mimo_v2_flash": ROUTED | {"sliding_window": 6, "v_head_dim": 6},
    "minicpm3": LATENT_ATTENTION,
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ministral3": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5}
        | {"original_max_position_embeddings": 4}
    },
    "qwen3_5_moe_text": LINEAR_ATTENTION | EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_5_text": LINEAR_ATTENTION,
    "qwen3_next": LINEAR_ATTENTION | EXPERTS | {"shared_expert_intermediate_size": 16},
    "solar_open": ROUTED,
    "vaultgemma": {"sliding_window": 6, "query_pre_attn_scalar": 8, "attn_implementation": "eager"},
    "youtu": LATENT_ATTENTION,
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8, "attn_implementation": "eager"},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "starcoder2": {"sliding_window": 6},
    "cohere2": {"sliding_window": 6},
    "exaone4": {"sliding_window": 6},
    "ministral": {"sliding_window": 6},
    "olmo3": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "gpt2": {"n_inner": 48, "attn_pdrop": 0.0},
    "seed_oss": {"attention_dropout": 0.0},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
}

RECURRENT = {name for name, family in FAMILIES.items() if family.packed_from == RECURRENT_FROM} - {"ministral3"}
RECURRENT.add("granitemoehybrid")
ROUTING = {name for name, options in FAMILY_OPTIONS.items() if any("expert" in option for option in options)}
"""Mixtures of experts. An expert multiplies all of its tokens at once, so rounding depends on their number."""


def model_of(family: str, **options: Any) -> PreTrainedModel:
    """Return a tiny model of a family in eval mode, with the same weights at every call."""
    options = SIZES | FAMILY_OPTIONS.get(family, {}) | options
    implementation = options.pop("attn_implementation", None)
    options.pop(NO_OPTION.get(family, ""), None)
    if family in VISION:
        is_tied = options.get("tie_word_embeddings", True)
        options = {"text_config": options, "vision_config": VISION[family], "tie_word_embeddings": is_tied}
    config = AutoConfig.for_model(family, **options)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    return model
