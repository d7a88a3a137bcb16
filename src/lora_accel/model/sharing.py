"""Whether the examples of a packed row may share the tokens with which they begin (batching/prefixes.py)."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from lora_accel.config.schema import TrainingSection
from lora_accel.errors import ConfigError
from lora_accel.model.attention import RECURRENT_LAYERS, is_flash_package

MIN_SAVING_ON_GPU = 0.25
"""Attention that finds shared keys (FlexAttention) is slower than FlashAttention."""


RANDOM_OPTIONS = (
    *("dropout", "embd_pdrop", "resid_pdrop", "hidden_dropout", "residual_dropout", "embedding_dropout"),
    *("layerdrop", "router_jitter_noise"),
)
"""Names in configs of what a base draws itself. Attention dropout is not among them: such a base is not packed."""


def min_saving_of(
    training: TrainingSection, base: PreTrainedModel, device: torch.device, *, packed: bool
) -> float | None:
    """Return from which share of saved tokens on the examples of a micro-batch share them; None = they never do.

    Raises:
        ConfigError: share_prefixes is true, and not supported.
    """
    reason = why_not_shared(training, base, packed=packed)
    if training.share_prefixes is True and reason is not None:
        raise ConfigError(f"training.share_prefixes: {reason}; set it to auto")
    if training.share_prefixes is False or reason is not None:
        return None
    return 0.0 if training.share_prefixes is True or device.type == "cpu" else MIN_SAVING_ON_GPU


def why_not_shared(training: TrainingSection, base: PreTrainedModel, *, packed: bool) -> str | None:
    """Return why examples cannot share the tokens with which they begin; None = they can."""
    config = base.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    if not packed:
        return "rows are padded"
    if training.neftune_alpha is not None:
        return "the noise of neftune_alpha depends on the length of each example"
    if layers & RECURRENT_LAYERS:
        return f"layers of {config.model_type} carry a state from token to token"
    has_window = "sliding_attention" in layers if layers else getattr(config, "sliding_window", None) is not None
    if has_window:
        return f"layers of {config.model_type} attend to a window of tokens only"
    if is_flash_package(base.config._attn_implementation):
        return f"{base.config._attn_implementation} does not support it"
    random = [f"{name}={value}" for name in RANDOM_OPTIONS if (value := getattr(config, name, None))]
    if random:
        return f"{config.model_type} draws random numbers for each token it computes ({', '.join(random)})"
    return None
