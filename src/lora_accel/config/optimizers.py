"""The optimizers: how to construct each one, and which of its state tensors a checkpoint stores.

To add an optimizer, add it to `OPTIMIZERS`. Its class is imported only when it is constructed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer class that accepts parameter groups with `lr` and `weight_decay`."""

    path: str
    """Import path of the class."""
    moments: tuple[str, ...]
    """Names of its state tensors in torch. Each has the shape of its parameter and is zero before the first update."""
    non_negative: tuple[str, ...] = ()
    """Moments that cannot be negative. A checkpoint with a negative value in one of them is corrupt."""
    has_fused: bool = False
    """Whether the class accepts `fused=True`, which updates all parameters in one kernel."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further keyword arguments of the class."""


OPTIMIZERS: dict[str, OptimizerSpec] = {
    # Loshchilov & Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101.
    "adamw": OptimizerSpec(
        "torch.optim.AdamW", moments=("exp_avg", "exp_avg_sq"), non_negative=("exp_avg_sq",), has_fused=True
    ),
}
"""Names for `training.optimizer`."""
