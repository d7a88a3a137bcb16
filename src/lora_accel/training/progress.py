"""The step counters of a run, and the result of one step."""

from __future__ import annotations

import dataclasses
import math

from lora_accel.batching.batch import StepBatch


@dataclasses.dataclass
class Progress:
    """Steps done so far; stored in every checkpoint."""

    step: int = 0
    skipped: int = 0
    """Of these, steps without an update because the loss or the gradient norm was not finite."""
    overflowed: int = 0
    """Of these, steps without an update because the loss scale was too large."""
    evaluations: list[dict[str, float]] = dataclasses.field(default_factory=list)
    """The step, the fingerprint and the metrics of the evaluations since the first step; see `Selection.shorten`."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """The outcome of one step, the same on every rank."""

    loss: float
    """Mean per supervised token, before the update."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    should_stop: bool
    """Whether any rank was asked to stop."""
    batch: StepBatch
    overflowed: bool = False
    """Whether the update was skipped because the loss scale was too large."""

    @property
    def is_finite(self) -> bool:
        """Whether the update was made: loss and gradient norm are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)
