"""Dynamic loss scale of float16 training: the loss is multiplied by it, so that small gradients do not underflow.

Micikevicius et al., Mixed Precision Training, arXiv 1710.03740, with the update rules of torch.amp.GradScaler. It needs
no synchronization of its own: the loop detects an overflow from the gradient norm.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lora_accel.errors import ArtifactError

INITIAL = 2.0**16
GROWTH_STEPS = 2000
"""Consecutive steps without an overflow after which the scale doubles. An overflow halves it."""


@dataclasses.dataclass
class LossScale:
    """The factor of the loss. Always a power of two, so scaling and unscaling a float32 gradient is exact."""

    value: float = INITIAL
    good_steps: int = 0
    """Steps without an overflow since the value last changed."""

    def overflowed(self, loss: float, grad_norm: float) -> bool:
        """Whether the scaled gradients overflowed: the loss is finite, the gradient norm is not.

        False at scale 1: there a smaller scale cannot help, and the step counts as not finite.
        """
        return math.isfinite(loss) and not math.isfinite(grad_norm) and self.value > 1

    def update(self, *, overflowed: bool) -> None:
        """Update the scale after a step."""
        if overflowed:
            self.value, self.good_steps = self.value / 2, 0
        elif self.good_steps + 1 == GROWTH_STEPS:
            self.value, self.good_steps = self.value * 2, 0
        else:
            self.good_steps += 1

    def state(self) -> dict[str, Any]:
        """Return the value for state.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_state(cls, state: object) -> LossScale:
        """Return the scale of a checkpoint; the initial one if it has none, since it was not trained in float16.

        Raises:
            ArtifactError: the state is invalid.
        """
        if state is None:
            return cls()
        values = state if isinstance(state, dict) else {}
        value, good_steps = values.get("value"), values.get("good_steps")
        is_scale = isinstance(value, float) and math.isfinite(value) and value >= 1 and math.frexp(value)[0] == 0.5
        if not (is_scale and type(good_steps) is int and 0 <= good_steps < GROWTH_STEPS):
            raise ArtifactError(f"state.json: loss_scale {state!r} is not a power of two with a count of steps")
        assert isinstance(value, float)
        return cls(value, good_steps)
