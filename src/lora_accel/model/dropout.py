"""Dropout whose mask is a function of (seed, step, example, position, layer, feature) and of nothing else.

nn.Dropout draws from a stream, so what a token gets depends on what was drawn before it: on how a step was cut into
micro-batches, on padding, on the number of ranks. Here each token has a key and each layer has a key for each of its
features, and the mask is a hash of the two. Cutting a step otherwise, dealing it to other ranks, or computing a layer
again in activation checkpointing gives the same mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_accel.errors import ConfigError


class DropoutKeys:
    """The keys of the tokens in hand. The loop sets them with each micro-batch; every dropout layer reads them."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None  # [B, T] int32


class KeyedDropout(nn.Module):
    """Inverted dropout on [B, T, F], by the keys of the [B, T] tokens."""

    feature_keys: torch.Tensor  # [F] int32

    def __init__(self, p: float, layer: int, num_features: int, tokens: DropoutKeys) -> None:
        """Make the dropout of one layer.

        Args:
            p: share of zeros.
            layer: a number of its own, so that no two layers share a mask.
        """
        super().__init__()
        self.p = p
        self._tokens = tokens
        draw = torch.Generator().manual_seed(layer)
        keys = torch.randint(-(2**31), 2**31, (num_features,), generator=draw).to(torch.int32)
        self.register_buffer("feature_keys", keys | 1, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x with a share p of its values zeroed and the rest scaled by 1 / (1 - p)."""
        if not self.training or self.p == 0:
            return x
        keys = self._tokens.keys
        assert keys is not None  # handed over with every micro-batch
        if keys.numel() * x.shape[-1] != x.numel():
            raise ConfigError(
                f"adapter.dropout: a layer sees {x.shape[:-1].numel()} tokens of a batch of {keys.numel()}, so "
                "dropout cannot follow them (experts?); set it to 0, or leave such layers out of adapter.target_modules"
            )
        keys = keys.reshape(x.shape[:-1])  # OPT lays a batch's tokens end to end for its feed-forward layers
        dropped: torch.Tensor = _Drop.apply(x, keys, self.feature_keys, self.p)  # type: ignore[no-untyped-call]
        return dropped

    def extra_repr(self) -> str:
        """Return what print shows."""
        return f"p={self.p}"


def keep_mask(token_keys: torch.Tensor, feature_keys: torch.Tensor, p: float) -> torch.Tensor:
    """Return which values stay: [..., F] int32, 1 or 0, for odd int32 keys [...] and [F].

    The hash is the wrapped product of the two keys, read from the top: multiplicative hashing (Dietzfelbinger et al.,
    A reliable randomized algorithm for the closest-pair problem, 1997). A product and a comparison, no more; and in
    int32, for a product with bool takes twice as long on CPU.
    """
    return (token_keys[..., None] * feature_keys).ge_(round(p * 2**32) - 2**31)


class _Drop(torch.autograd.Function):
    """Keeps the keys for the way back and makes the mask again: that costs less than to keep it in memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, keys: torch.Tensor, features: torch.Tensor, p: float) -> torch.Tensor:
        ctx.save_for_backward(keys, features)
        ctx.p = p
        return _dropped(x, keys, features, p)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        keys, features = ctx.saved_tensors
        return _dropped(grad, keys, features, ctx.p), None, None, None


def _dropped(x: torch.Tensor, keys: torch.Tensor, features: torch.Tensor, p: float) -> torch.Tensor:
    return (x * keep_mask(keys, features, p)).mul_(1 / (1 - p))
