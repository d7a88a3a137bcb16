"""The loss scale of float16 training: gradients are computed so many times too large, so that small ones survive.

Micikevicius et al., Mixed Precision Training, arXiv 1710.03740; the rules are those of torch.amp.GradScaler. The scale
is a plain number: whether a step overflowed is read off the gradient norm, which the loop synchronizes on anyway.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lora_accel.errors import ArtifactError

INITIAL = 2.0**16
GROWTH_STEPS = 2000
"""After so many steps in a row without an overflow the scale doubles; an overflow halves it."""


@dataclasses.dataclass
class LossScale:
    """A factor of the loss, always a power of two: scaling and unscaling change no bit of a float32 gradient."""

    value: float = INITIAL
    good_steps: int = 0
    """Steps without an overflow since the value has changed."""

    def overflowed(self, loss: float, grad_norm: float) -> bool:
        """Whether a smaller scale can help: the loss is finite, its scaled gradients are not.

        At scale 1 nothing is scaled, so there it is a step that is not finite, as in any other precision.
        """
        return math.isfinite(loss) and not math.isfinite(grad_norm) and self.value > 1

    def update(self, *, overflowed: bool) -> None:
        """Count a step."""
        if overflowed:
            self.value, self.good_steps = self.value / 2, 0
        elif self.good_steps + 1 == GROWTH_STEPS:
            self.value, self.good_steps = self.value * 2, 0
        else:
            self.good_steps += 1

    def state(self) -> dict[str, Any]:
        """Return what state.json holds."""
        return dataclasses.asdict(self)

    @classmethod
    def from_state(cls, state: object) -> LossScale:
        """Return the scale that a checkpoint holds; a fresh one if it holds none (it was trained in another precision).

        Raises:
            ArtifactError: it is not a scale.
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
