"""The optimizers: how each is constructed, and which tensors of its state a checkpoint stores.

To add an optimizer, add it to `OPTIMIZERS`. Nothing is imported before the optimizer is constructed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer class that takes parameter groups with `lr` and `weight_decay`."""

    path: str
    """Where to import the class from."""
    moments: tuple[str, ...]
    """Its state tensors, shaped like their parameter, by torch's names; zero before the first update."""
    non_negative: tuple[str, ...] = ()
    """Moments that cannot be negative: a checkpoint in which one is negative is corrupt."""
    has_fused: bool = False
    """Whether `fused=True` updates all parameters in one kernel, on devices that support it."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further keyword arguments."""


OPTIMIZERS: dict[str, OptimizerSpec] = {
    # Loshchilov & Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101.
    "adamw": OptimizerSpec(
        "torch.optim.AdamW", moments=("exp_avg", "exp_avg_sq"), non_negative=("exp_avg_sq",), has_fused=True
    ),
}
"""Names for `training.optimizer`."""
