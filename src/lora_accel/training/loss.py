"""The loss of a micro-batch: a sum over its supervised tokens."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lora_accel.batching.batch import MicroBatch
from lora_accel.labels import IGNORE_INDEX


def summed_token_loss(model: nn.Module, batch: MicroBatch, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return the cross-entropy summed over supervised tokens, a float32 scalar.

    A sum, because only the full step knows how many tokens to divide by.

    Args:
        label_smoothing: share of each target's probability that is spread evenly over the vocabulary.
    """
    if forward_takes(model, "targets"):  # model/fused_loss.py
        loss: torch.Tensor = model(
            **batch.inputs,
            logit_positions=batch.logit_positions,
            targets=batch.targets,
            label_smoothing=label_smoothing,
        )
        return loss
    if forward_takes(model, "logits_to_keep"):
        logits = model(**batch.inputs, logits_to_keep=batch.logit_positions).logits  # [B, P, V]
    else:
        logits = model(**batch.inputs).logits[:, batch.logit_positions]  # [B, P, V]; materializes [B, T, V]
    logits, targets = logits.flatten(0, 1).float(), batch.targets.flatten()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=label_smoothing)


def perplexity(loss: float) -> float:
    """Return exp(loss), with losses over 700 capped: exp would overflow."""
    return math.exp(min(loss, 700.0))


def forward_takes(model: Any, argument: str) -> bool:
    """Whether the forward of the model within the wrappers of DDP, DeepSpeed and PEFT takes an argument."""
    while hasattr(model, "module"):
        model = model.module
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    forwards = (inspect.signature(base.forward, follow_wrapped=False), inspect.signature(type(base).forward))
    return any(argument in forward.parameters for forward in forwards)
