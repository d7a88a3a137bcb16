"""The learning-rate schedules, as pure functions of the step: there is no scheduler state to save.

To add a schedule, add it to `SCHEDULES`. Its keyword parameters are options of `training.scheduler_options`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping

from lora_accel.config.counts import scale


def cosine(progress: float) -> float:
    """Return half a cosine, from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def cosine_with_min(progress: float, *, min_ratio: float = 0.1) -> float:
    """Return half a cosine, from 1 to `min_ratio`."""
    return cosine(progress) * (1 - min_ratio) + min_ratio


def cosine_with_restarts(progress: float, *, num_cycles: int = 1) -> float:
    """Return `num_cycles` half cosines from 1 to 0: Loshchilov & Hutter, SGDR, arXiv 1608.03983, with equal cycles."""
    return cosine(scale(progress, num_cycles) % 1)  # a hair below an integer would be the end of the previous cycle


def polynomial(progress: float, *, power: float = 1.0, min_ratio: float = 0.0) -> float:
    """Return (1 - progress)^power, scaled to end at `min_ratio`."""
    return float((1 - progress) ** power * (1 - min_ratio) + min_ratio)


def warmup_stable_decay(progress: float, *, decay_ratio: float = 0.1, min_ratio: float = 0.0) -> float:
    """Return 1, and during the last part a half cosine from 1 to `min_ratio`: Hu et al., MiniCPM, arXiv 2404.06395.

    Args:
        decay_ratio: share of the steps after warm-up.
    """
    decay = (progress - (1 - decay_ratio)) / decay_ratio
    return 1.0 if decay <= 0 else cosine_with_min(decay, min_ratio=min_ratio)


def constant(progress: float) -> float:
    """Return 1."""
    return 1.0


SCHEDULES: dict[str, Callable[..., float]] = {
    "cosine": cosine,
    "linear": lambda progress: 1 - progress,
    "constant": constant,
    "constant_with_warmup": constant,  # transformers' name; every schedule begins with the warm-up
    "cosine_with_min": cosine_with_min,
    "cosine_with_restarts": cosine_with_restarts,
    "polynomial": polynomial,
    "wsd": warmup_stable_decay,
}
"""Names for `training.scheduler` -> factor of the learning rate at a progress from 0 (end of warm-up) to 1."""


def schedule_options(scheduler: str) -> dict[str, float]:
    """Return the options of a schedule with their defaults."""
    _, *options = inspect.signature(SCHEDULES[scheduler]).parameters.values()
    return {option.name: option.default for option in options}


def learning_rate(
    step: int,
    *,
    peak: float,
    scheduler: str,
    warmup_steps: int,
    total_steps: int,
    from_zero: bool = False,
    options: Mapping[str, float] | None = None,
) -> float:
    """Return the learning rate of the 0-based step: linear warm-up to `peak`, then the schedule.

    With w warm-up steps of N, the peak is at step p = max(w - 1, 0):

        step < p:  peak * (step + 1) / w
        else:      peak * SCHEDULES[scheduler]((step - p) / (N - p))

    So no step has a learning rate of 0: the first one has peak / w, and the decay would reach 0 one step after the run.
    These are the values of transformers' get_…_schedule_with_warmup for N + 1 steps, without their first step, which is
    at 0. Without warm-up, they are the values for N steps.

    Args:
        peak: the largest learning rate (`training.learning_rate`).
        warmup_steps: if there are more than `total_steps`, the peak is not reached.
        from_zero: return the values of transformers for N steps, with the first step at 0
            (`training.warmup_from_zero`).
        options: of the schedule (`training.scheduler_options`); those that are not set have its defaults.
    """
    peak_step = warmup_steps if from_zero else max(warmup_steps - 1, 0)
    if step < peak_step:
        return peak * (step if from_zero else step + 1) / warmup_steps
    return peak * SCHEDULES[scheduler]((step - peak_step) / max(1, total_steps - peak_step), **(options or {}))
