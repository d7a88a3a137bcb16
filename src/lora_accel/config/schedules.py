"""The learning-rate schedules, as pure functions of the step: there is no scheduler state to save.

To add a schedule, add it to `SCHEDULES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
"""Names for `training.scheduler` -> factor of the learning rate at a progress from 0 (end of warm-up) to 1."""


def learning_rate(step: int, *, peak: float, scheduler: str, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of the 0-based step: linear warm-up from 0 to `peak`, then the schedule.

    Gives the same values as transformers' get_cosine_, get_linear_ and get_constant_schedule_with_warmup.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * SCHEDULES[scheduler]((step - warmup_steps) / max(1, total_steps - warmup_steps))
