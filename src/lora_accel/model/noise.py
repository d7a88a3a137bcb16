"""NEFTune: noise on the embeddings in training, as a function of (seed, step, tokens up to it, feature).

Jain et al., NEFTune: Noisy Embeddings Improve Instruction Finetuning, arXiv 2310.05914. The noise is keyed, as dropout
is (model/dropout.py), and its size depends on the length of the token's example. So neither depends on how a step is
divided into micro-batches and ranks.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from lora_accel.model.dropout import DropoutKeys, feature_keys

FEATURE_SEED = 2**40
"""Seed of the feature keys: dropout layers have small numbers."""


def add_embedding_noise(model: PeftModel, alpha: float, tokens: DropoutKeys) -> None:
    """Add uniform noise in ±alpha / sqrt(L * H) to the output of the input embeddings while the model trains.

    L is the length of a token's example, H the hidden size.

    Args:
        alpha: `training.neftune_alpha`.
        tokens: where the keys of the current tokens and the lengths of their examples are read.
    """
    embeddings = model.get_base_model().get_input_embeddings()

    def add_noise(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        keys, lengths = tokens.keys, tokens.lengths
        assert keys is not None  # the loop sets both for each micro-batch
        assert lengths is not None
        size = output.shape[-1]
        noise = uniform_noise(keys, _features(size, output.device))
        noise *= alpha * (lengths * size).rsqrt()[..., None]
        return output + noise.to(output.dtype)

    embeddings.register_forward_hook(add_noise)


@functools.cache
def _features(size: int, device: torch.device) -> torch.Tensor:
    return feature_keys(size, FEATURE_SEED).to(device)


def uniform_noise(token_keys: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Return float32 noise in [-1, 1] for odd int32 keys [...] and [F], [..., F]: the hash that dropout uses."""
    return (token_keys[..., None] * features).float().mul_(2.0**-31)
