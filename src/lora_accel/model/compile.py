"""torch.compile for decoder layers: compiled once for all layers and any number of tokens.

It fuses the operations between matrix products: norms, gates, rotary embeddings, dropout and the adapter's addition.
Attention is not compiled, since its segments change with each micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_accel.errors import ConfigError, first_line
from lora_accel.model.recompute import decoder_layers


def compile_layers(model: nn.Module, device: torch.device) -> None:
    """Compile the forward of a model's decoder layers for training. Evaluation and generation are not compiled.

    Module names and classes do not change. Activation checkpointing still works, as it wraps a layer's forward.

    Args:
        device: the device that trains; the model may still be on the CPU.

    Raises:
        ConfigError: the model has no decoder layers of transformers, or torch.compile does not work on this machine.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ConfigError(
            f"training.compile: {type(model).__name__} has no decoder layers of transformers; set it to false"
        )
    try:  # fail now, not in the first step
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception as error:  # compilers raise many types
        reason = first_line(error)
        raise ConfigError(
            f"training.compile: torch.compile does not work here: {reason}. Install its requirements (a C++ compiler "
            "on CPU, triton on CUDA), or set it to false"
        ) from None
    for layer in layers:
        layer.forward = _compile_forward(layer, layer.forward)


def _compile_forward(layer: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    # With static shapes it would recompile for each number of tokens.
    compiled = torch.compile(original, dynamic=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if layer.training else original)(*args, **kwargs)

    return forward
