"""The loss of a micro-batch: the sum over its supervised tokens, from logits of the columns that need them only."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch.nn import functional as F


class Batch(Protocol):
    """What the loss reads of a micro-batch. B examples, T tokens, C columns."""

    input_ids: torch.Tensor  # [B, T]
    attention_mask: torch.Tensor  # [B, T]
    columns: torch.Tensor  # [C]
    targets: torch.Tensor  # [B, C]


def summed_token_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the cross-entropy summed over supervised tokens, in float32.

    A sum, since only the whole step knows how many tokens to divide by.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if takes_logits_to_keep(model):
        logits = model(**inputs, logits_to_keep=batch.columns).logits  # [B, C, V]
    else:
        logits = model(**inputs).logits[:, batch.columns]  # [B, C, V], after all [B, T, V] were made
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=-100, reduction="sum")


def takes_logits_to_keep(model: Any) -> bool:
    """Whether the model within the wrappers of DDP, DeepSpeed and PEFT can leave out logits not asked for."""
    while hasattr(model, "module"):
        model = model.module
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(type(base).forward).parameters
