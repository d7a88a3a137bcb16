"""Multiply a factor of the config by a count, without the rounding errors of floats."""

from __future__ import annotations

import math


def scale(factor: float, count: int) -> float:
    """Return factor * count; an integer if the product of the decimal number is one.

    In floats 1.1 * 100 is a hair above 110 and 0.29 * 100 a hair below 29, so rounding up or comparing them would be
    off by one.

    Args:
        factor: a number of the config, as its author wrote it: at most 12 significant digits.
        count: number of steps, rows or examples.
    """
    product = factor * count
    nearest = round(product)
    return nearest if math.isclose(product, nearest, rel_tol=1e-12) else product
