"""Keyed dropout: the mask is a pure function of (seed, step, tokens up to it, layer, feature).

nn.Dropout draws from a generator, so a token's mask depends on all earlier draws: on micro-batches, padding and the
number of ranks. Here each token and each feature of a layer has a key, and the mask is a hash of the two. It does not
depend on how a step is divided into micro-batches and ranks, and activation checkpointing recomputes the same mask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lora_accel.errors import ConfigError
from lora_accel.model.kernels.table import has_kernel


class DropoutKeys:
    """The keys of the current tokens. The loop sets them for each micro-batch; all dropout layers read them."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None  # [B, T] int32
        self.lengths: torch.Tensor | None = None  # [B, T] float32, of each token's example: for model/noise.py

    @contextlib.contextmanager
    def replaced(self, keys: torch.Tensor) -> Iterator[None]:
        """Replace the keys in the block, for a layer that gets only some of the tokens."""
        original, self.keys = self.keys, keys
        try:
            yield
        finally:
            self.keys = original


class KeyedDropout(nn.Module):
    """Inverted dropout on [B, T, F]."""

    feature_keys: torch.Tensor  # [F] int32

    def __init__(self, p: float, layer: int, num_features: int, token_keys: DropoutKeys) -> None:
        """Create the dropout of one layer.

        Args:
            p: probability of zeroing a value.
            layer: number of the layer; layers with different numbers have independent masks.
            num_features: F.
        """
        super().__init__()
        self.p = p
        self.token_keys = token_keys
        self.register_buffer("feature_keys", feature_keys(num_features, layer), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x with values zeroed with probability p and the rest scaled by 1 / (1 - p).

        Raises:
            ConfigError: x has a different number of tokens than the micro-batch.
        """
        if not self.is_active:
            return x
        dropped: torch.Tensor = _Drop.apply(x, self.keys_of(x), self.feature_keys, self.p)  # type: ignore[no-untyped-call]
        return dropped

    @property
    def is_active(self) -> bool:
        """Whether a forward zeroes values now."""
        return self.training and self.p > 0

    def keys_of(self, x: torch.Tensor) -> torch.Tensor:
        """Return the keys of the tokens of x [..., F], with its leading dimensions.

        Raises:
            ConfigError: x has a different number of tokens than the micro-batch.
        """
        keys = self.token_keys.keys
        assert keys is not None  # the loop sets them for each micro-batch
        if keys.numel() * x.shape[-1] != x.numel():
            raise ConfigError(
                f"adapter.dropout: a layer gets {x.shape[:-1].numel()} tokens of a batch of {keys.numel()}, so their "
                "keys are unknown; set it to 0, or remove such layers from adapter.target_modules"
            )
        return keys.reshape(x.shape[:-1])  # OPT flattens a batch's tokens for its feed-forward layers

    def extra_repr(self) -> str:
        """Return the options that `repr` shows."""
        return f"p={self.p}"


def dropout_keys_of(module: nn.Module) -> DropoutKeys | None:
    """Return the keys that the dropout in a module reads; None if it has no dropout, or does not train."""
    layers = (layer for layer in module.modules() if isinstance(layer, KeyedDropout))
    return next((layer.token_keys for layer in layers if layer.training), None)


def feature_keys(count: int, seed: int) -> torch.Tensor:
    """Return an odd int32 key for each feature, [count]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32) | 1


def keep_mask(token_keys: torch.Tensor, feature_keys: torch.Tensor, p: float) -> torch.Tensor:
    """Return the mask [..., F] for odd int32 keys [...] and [F]: int32, 1 = keep, 0 = zero.

    Multiplicative hashing (Dietzfelbinger et al., A reliable randomized algorithm for the closest-pair problem, 1997):
    the upper bits of the wrapped product of the two keys. The mask is int32, since multiplying by bool takes twice as
    long on CPU.
    """
    return _hashes(token_keys, feature_keys).ge_(round(p * 2**32) - 2**31)


def make_selection(token_keys: torch.Tensor, feature_keys: torch.Tensor, p: float, dtype: torch.dtype) -> torch.Tensor:
    """Return integers [..., F] of the size of a dtype, for `select`.

    In 32 bits they are the hashes themselves, in 16 bits the mask.
    """
    if dtype.itemsize == 4:
        return _hashes(token_keys, feature_keys)
    return keep_mask(token_keys, feature_keys, p).to(torch.int16 if dtype.itemsize == 2 else torch.int64)


def select(x: torch.Tensor, selection: torch.Tensor, p: float) -> torch.Tensor:
    """Return x [..., F] with values zeroed, by one operation on its bits. The rest is not scaled.

    Args:
        selection: `make_selection` for the dtype of x.
    """
    # where(selection <= limit, 0, x). No hash is -2**31, since products of odd keys are odd.
    limit = max(round(p * 2**32) - 2**31 - 1, -(2**31)) if x.dtype.itemsize == 4 else 0
    bits: torch.Tensor = torch.ops.aten.threshold_backward(x.view(selection.dtype), selection, limit)
    return bits.view(x.dtype)


def _hashes(token_keys: torch.Tensor, feature_keys: torch.Tensor) -> torch.Tensor:
    return token_keys[..., None] * feature_keys


class _Drop(torch.autograd.Function):
    """Saves the keys for backward and recomputes the mask there, which costs less than saving it."""

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
    if has_kernel("drop", x):
        dropped: torch.Tensor = torch.ops.lora_accel.drop(x, keys, features, p)
        return dropped
    return select(x, make_selection(keys, features, p, x.dtype), p).mul_(1 / (1 - p))
