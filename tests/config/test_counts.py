"""A factor of the config times a count is rounded as in decimal numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from lora_accel.batching.order import source_count
from lora_accel.config.counts import scale

COUNTS = (1, 2, 3, 7, 10, 30, 50, 64, 97, 100, 1000, 12_345)


@pytest.mark.parametrize("decimals", [1, 2, 3])
def test_every_factor_below_three_scales_as_a_decimal_number(decimals: int) -> None:
    wrong_in_floats = 0
    for numerator in range(1, 3 * 10**decimals):
        exact, factor = Fraction(numerator, 10**decimals), float(f"{numerator}e-{decimals}")
        for count in COUNTS:
            product = scale(factor, count)
            assert math.ceil(product) == math.ceil(exact * count)
            assert math.floor(product) == math.floor(exact * count)
            # Halves may be rounded to either side.
            assert abs(source_count(count, factor) - max(exact * count, Fraction(1))) <= Fraction(1, 2)
            assert abs(round(factor * count) - exact * count) <= Fraction(1, 2)
            wrong_in_floats += math.ceil(factor * count) != math.ceil(exact * count)
    assert wrong_in_floats > 0, "without scale, some are off by one"


@pytest.mark.parametrize(
    ("factor", "count", "rounded_up"),
    [
        (0.1 + 0.2, 10, 3),
        (1 / 3, 30, 10),
        (2 / 3, 30, 20),
        (1e-9, 1, 1),
        (1e-9, 10**9, 1),
        (0.0, 7, 0),
        (3.0, 10**15, 3 * 10**15),
    ],
)
def test_computed_and_extreme_factors(factor: float, count: int, rounded_up: int) -> None:
    assert math.ceil(scale(factor, count)) == rounded_up


@pytest.mark.parametrize(("size", "weight", "count"), [(30, 0.1, 3), (10, 1.1, 11), (3, 0.001, 1), (0, 2.0, 0)])
def test_examples_of_a_source_per_epoch(size: int, weight: float, count: int) -> None:
    assert source_count(size, weight) == count
