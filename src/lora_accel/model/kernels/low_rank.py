"""Products with the low-rank matrices of an adapter, dropout included. Each reads its large operand once.

T tokens, F features of a layer's input, N of its output, R = rank. Kernels run where there is dropout: without it, the
library of matrix products reads no more than they would.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lora_accel.model.dropout import make_selection, select
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
    selection: torch.Tensor | None = None
    """`make_selection` of the tokens and features, [T, F]; None = computed at each use."""

    def with_selection(self, x: torch.Tensor, rank: int) -> Dropout:
        """Return the dropout with its selection, for several uses; without it, where kernels compute it themselves."""
        return self if self.has_kernels(x, rank) else self._replace(selection=self._selection(x.dtype))

    def has_kernels(self, x: torch.Tensor, rank: int) -> bool:
        """Whether kernels multiply a dropped x on its device."""
        return rank <= MAX_RANK and has_kernel("project_down", x)

    @property
    def scale(self) -> float:
        """The factor 1 / (1 - p) of the values that are kept."""
        return 1 / (1 - self.p)

    def zero(self, x: torch.Tensor) -> torch.Tensor:
        """Return x with values zeroed; products apply `scale` to their smaller operand or result."""
        return select(x, self._selection(x.dtype), self.p)

    def _selection(self, dtype: torch.dtype) -> torch.Tensor:
        if self.selection is not None:
            return self.selection
        return make_selection(self.token_keys, self.feature_keys, self.p, dtype)


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
    a = a.to(x.dtype).t()
    return x @ a if dropout is None else scaled_product(dropout.zero(x), a, dropout.scale)


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
        output.add_(dropout.zero(down @ a.to(down.dtype)), alpha=dropout.scale)


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
    return down.t() @ x if dropout is None else scaled_product(down.t(), dropout.zero(x), dropout.scale)


def scaled_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """Return scale * left @ right: the scale costs nothing within the product."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)
