"""Decoder layers through torch.compile: one compilation serves all layers, at any number of tokens.

What is between the matrix products (norms, gates, rotary positions, dropout, the adapter's sum) becomes a few fused
loops. Attention stays as it is: its segments differ from one micro-batch to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_accel.errors import ConfigError


def compile_layers(model: nn.Module) -> None:
    """Let a model's decoder layers train through torch.compile; evaluation and generation compute as before.

    Names and classes of modules stay, and so does activation checkpointing, which goes around a layer's forward.

    Raises:
        ConfigError: the model has none of transformers' layers, or nothing can be compiled on this machine.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(f"training.compile: {type(model).__name__} has none of transformers' layers; set it to false")
    try:  # now, not after the data have been read and the first batch has been laid out
        torch.compile(torch.sin)(next(model.parameters()).new_ones(8))
    except Exception as error:  # whatever a compiler can do wrong
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ConfigError(
            f"training.compile: torch.compile does not work here: {reason}. Install what it needs (a C++ compiler on "
            "CPU, triton on CUDA), or set it to false"
        ) from None
    for layer in layers:
        layer.forward = _compiled(layer, layer.forward)


def _compiled(layer: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
    # Any number of tokens, or each micro-batch's would be compiled for itself.
    compiled = torch.compile(own, dynamic=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if layer.training else own)(*args, **kwargs)

    return forward
