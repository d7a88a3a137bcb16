"""Products with the low-rank matrices of an adapter, dropout included. Each reads its large operand once.

T tokens, F features of a layer's input, N of its output, R = rank. Kernels run where there is dropout: without it, the
library of matrix products reads no more than they would.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lora_accel.model.dropout import keep_mask
from lora_accel.model.kernels.table import has_kernel

MAX_RANK = 128
"""The largest rank of the kernels: a tile of all ranks must fit into registers."""


class Dropout(NamedTuple):
    """Keyed dropout of x [T, F] (model/dropout.py), applied within a product."""

    token_keys: torch.Tensor
    """[T] int32."""
    feature_keys: torch.Tensor
    """[F] int32."""
    p: float
    """Probability of zeroing a value."""
    mask: torch.Tensor | None = None
    """1 = keep, [T, F] int32; None = computed at each use."""

    def with_mask(self, x: torch.Tensor, rank: int) -> Dropout:
        """Return the dropout with its mask, for several uses; without it, where kernels compute it themselves."""
        return self if self.has_kernels(x, rank) else self._replace(mask=self._mask())

    def has_kernels(self, x: torch.Tensor, rank: int) -> bool:
        """Whether kernels multiply a dropped x on its device."""
        return rank <= MAX_RANK and has_kernel("project_down", x)

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """Return x with values zeroed, and the rest scaled by 1 / (1 - p)."""
        return (x * self._mask()).mul_(1 / (1 - self.p))

    def drop_(self, x: torch.Tensor) -> torch.Tensor:
        """Zero values of x, in place; scale nothing."""
        return x.mul_(self._mask())

    def _mask(self) -> torch.Tensor:
        return keep_mask(self.token_keys, self.feature_keys, self.p) if self.mask is None else self.mask


def project_down(x: torch.Tensor, a: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """Return drop(x) @ a.T, [T, R], in the dtype of x.

    Args:
        x: [T, F].
        a: [R, F], any dtype.
    """
    if dropout is not None and dropout.has_kernels(x, len(a)):
        product: torch.Tensor = torch.ops.lora_accel.project_down(
            x, a, dropout.token_keys, dropout.feature_keys, dropout.p
        )
        return product
    return (x if dropout is None else dropout.drop(x)) @ a.to(x.dtype).t()


def add_gradient(output: torch.Tensor, down: torch.Tensor, a: torch.Tensor, dropout: Dropout | None) -> None:
    """Add the gradient of x in drop(x) @ a.T to output [T, F], in place.

    Args:
        down: gradient of the product, [T, R], with the dtype of output.
        a: [R, F], any dtype.
    """
    if dropout is None:
        output.addmm_(down, a.to(down.dtype))
    elif dropout.has_kernels(output, len(a)):
        torch.ops.lora_accel.add_gradient(output, down, a, dropout.token_keys, dropout.feature_keys, dropout.p)
    else:
        output.add_(dropout.drop_(down @ a.to(down.dtype)), alpha=1 / (1 - dropout.p))


def matrix_gradient(down: torch.Tensor, x: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """Return the gradient of a in drop(x) @ a.T, [R, F].

    Args:
        down: gradient of the product, [T, R].
        x: [T, F].
    """
    if dropout is not None and dropout.has_kernels(x, down.shape[1]):
        gradient: torch.Tensor = torch.ops.lora_accel.matrix_gradient(
            down, x, dropout.token_keys, dropout.feature_keys, dropout.p
        )
        return gradient
    return down.t() @ (x if dropout is None else dropout.drop(x))


def scaled_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """Return scale * left @ right: the scale costs nothing within the product."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)
