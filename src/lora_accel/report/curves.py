"""Arithmetic on curves: smoothing, and fewer points that look the same."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from lora_accel.report.metrics_log import Series

MAX_POINTS = 800
"""Points of a drawn curve: more than a chart is wide in pixels."""
SMOOTHING_SHARE = 0.02
"""Time constant of smoothing, as a share of the points."""
MIN_SMOOTHING = 5
"""Smallest time constant, in points."""

Floats = npt.NDArray[np.float64]
Curve = tuple[Floats, Floats]
"""Steps and values, each [N]."""


def curve_of(series: Series) -> Curve:
    """Return a series as arrays, sorted by step. Values that are not finite are NaN: a gap in the line."""
    steps, values = np.array(series.steps, dtype=np.float64), np.array(series.values, dtype=np.float64)
    order = np.argsort(steps, kind="stable")
    return steps[order], np.where(np.isfinite(values), values, np.nan)[order]


def time_constant(num_points: int) -> int:
    """Return the time constant of smoothing for a curve, in points."""
    return max(MIN_SMOOTHING, round(num_points * SMOOTHING_SHARE))


def smooth(values: Floats, constant: int) -> Floats:
    """Return the exponential moving average of values, corrected for its start as Adam's moments are (Kingma and Ba).

    Args:
        values: [N]; NaN does not change the average, and has none.
        constant: points after which a value counts 1/e.
    """
    decay = float(np.exp(-1 / constant))
    average, weight, result = 0.0, 0.0, np.full_like(values, np.nan)
    for index, value in enumerate(values.tolist()):
        if value == value:
            average = decay * average + (1 - decay) * value
            weight = decay * weight + (1 - decay)
            result[index] = average / weight
    return result


def thin_out(curve: Curve, most: int = MAX_POINTS) -> Curve:
    """Return a curve of at most `most` points: the least and the greatest value of each of equal stretches.

    So no peak is lost. The first and the last point are kept.

    Args:
        most: at least 4.
    """
    steps, values = curve
    if len(steps) <= most:
        return curve
    bounds = np.linspace(0, len(steps), (most - 2) // 2 + 1).astype(int)
    kept = {0, len(steps) - 1}
    for start, end in itertools.pairwise(bounds):
        stretch = values[start:end]
        if not np.isnan(stretch).all():
            kept |= {start + int(np.nanargmin(stretch)), start + int(np.nanargmax(stretch))}
        else:
            kept.add(int(start))  # keeps the gap
    index = sorted(kept)
    return steps[index], values[index]
