"""Tiny models of the model families that the package supports specially."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lora_accel.model.families import FAMILIES

PACKING = sorted(name for name, family in FAMILIES.items() if family.supports_packing)
FUSED_LOSS = sorted(name for name, family in FAMILIES.items() if family.supports_fused_loss)

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
FAMILY_OPTIONS = {
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


def model_of(family: str, **options: Any) -> PreTrainedModel:
    """Return a tiny model of a family in eval mode, with the same weights at every call."""
    options = SIZES | FAMILY_OPTIONS.get(family, {}) | options
    implementation = options.pop("attn_implementation", None)
    config = AutoConfig.for_model(family, **options)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    return model
