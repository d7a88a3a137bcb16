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


def learning_rate(
    step: int, *, peak: float, scheduler: str, warmup_steps: int, total_steps: int, from_zero: bool = False
) -> float:
    """Return the learning rate of the 0-based step: linear warm-up to `peak`, then the schedule.

    With w warm-up steps of N, the peak is at step p = max(w - 1, 0):

        step < p:  peak * (step + 1) / w
        else:      peak * SCHEDULES[scheduler]((step - p) / (N - p))

    So no step has a learning rate of 0: the first one has peak / w, and the decay would reach 0 one step after the run.
    These are the values of transformers' get_cosine_, get_linear_ and get_constant_schedule_with_warmup for N + 1
    steps, without their first step, which is at 0. Without warm-up, they are the values for N steps.

    Args:
        peak: the largest learning rate (`training.learning_rate`).
        warmup_steps: if there are more than `total_steps`, the peak is not reached.
        from_zero: return the values of transformers for N steps, with the first step at 0
            (`training.warmup_from_zero`).
    """
    peak_step = warmup_steps if from_zero else max(warmup_steps - 1, 0)
    if step < peak_step:
        return peak * (step if from_zero else step + 1) / warmup_steps
    return peak * SCHEDULES[scheduler]((step - peak_step) / max(1, total_steps - peak_step))
