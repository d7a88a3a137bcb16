"""Activation checkpointing: layers save their inputs only, and compute the rest again in the backward pass."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_accel.errors import ConfigError


def recompute_layers(model: nn.Module, num_layers: int | None = None) -> int:
    """Make the first decoder layers of a model recompute their activations, and return how many do.

    The backward pass reaches the first layers last. By then it has freed what the other layers saved, so recomputing a
    layer does not add to the peak.

    Args:
        model: a PeftModel, or a model of transformers.
        num_layers: None = all. Models without layers of transformers recompute all or nothing.

    Raises:
        ConfigError: the model does not support it.
    """
    if not can_recompute(model):
        raise ConfigError("training.activation_checkpointing: this model does not support it; set it to auto or false")
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    layers = decoder_layers(model)
    num_layers = len(layers) if num_layers is None else num_layers
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < num_layers
    return num_layers


def can_recompute(model: nn.Module) -> bool:
    """Whether a model supports activation checkpointing."""
    return bool(getattr(model, "supports_gradient_checkpointing", False))


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the layers of a model that can recompute their activations, in the order in which they run."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
