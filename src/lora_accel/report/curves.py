"""Arithmetic on curves: smoothing, and fewer points that look the same."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from lora_accel.report.metrics_log import Series

MAX_POINTS = 800
"""Points of a drawn curve: more than a chart is wide in pixels."""
SMOOTHING_SHARE = 0.01
"""Distance at which a value counts 1/e in smoothing, as a share of the points."""
MIN_SMOOTHING = 3
"""Smallest such distance, in points."""

Floats = npt.NDArray[np.float64]
Curve = tuple[Floats, Floats]
"""Steps and values, each [N]."""


def curve_of(series: Series) -> Curve:
    """Return a series as arrays, sorted by step. Values that are not finite are NaN: a gap in the line."""
    steps, values = np.array(series.steps, dtype=np.float64), np.array(series.values, dtype=np.float64)
    order = np.argsort(steps, kind="stable")
    return steps[order], np.where(np.isfinite(values), values, np.nan)[order]


def smoothing_distance(num_points: int) -> int:
    """Return the distance at which a value counts 1/e in the smoothed curve, in points."""
    return max(MIN_SMOOTHING, round(num_points * SMOOTHING_SHARE))


def smooth(values: Floats, distance: int) -> Floats:
    """Return the local linear fit at each value, with weights exp(-d / distance) for the d-th value on either side.

    Where a loss falls steeply, an average lags behind it: a moving one everywhere, a centered one at both ends.

    Args:
        values: [N]; NaN has no weight, and no fit.
        distance: in points.
    """
    is_known = np.isfinite(values)
    known, position = is_known.astype(np.float64), np.arange(len(values), dtype=np.float64)
    decay = float(np.exp(-1 / distance))
    total, first, second = (_both_sided(known * position**power, decay) for power in (0, 1, 2))
    y = np.where(is_known, values, 0.0)
    total_y, first_y = (_both_sided(y * position**power, decay) for power in (0, 1))
    # Moments around each position.
    second = second - 2 * position * first + position**2 * total
    first, first_y = first - position * total, first_y - position * total_y
    spread = total * second - first**2
    is_line = spread > 1e-9 * total**2  # a single value has no slope
    mean = total_y / np.where(is_known, total, 1.0)
    fit = (second * total_y - first * first_y) / np.where(is_line, spread, 1.0)
    return np.where(is_known, np.where(is_line, fit, mean), np.nan)


def _both_sided(values: Floats, decay: float) -> Floats:
    """Return the sum around each value [N], with weights decay^d."""

    def up_to(each: Floats) -> Floats:
        return np.array(list(itertools.accumulate(each.tolist(), lambda total, value: decay * total + value)))

    return up_to(values) + up_to(values[::-1])[::-1] - values


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
