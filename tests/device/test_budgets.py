"""Budgets of a training step on a GPU, per decoder layer: kernels, copies, traffic, memory saved for backward.

Modeled, not measured: kernels are counted on fake tensors of real sizes (tests/device/layers.py). If a change exceeds
a budget on purpose, or stays well below it, change the number in budgets.py; `python -m tests.device.budget --top 20`
shows which kernels there are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import PATIENCE_SECONDS, ROOT
from tests.device.budgets import BUDGETS, COLUMNS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")

CONTROL = "kernel_per_layer"

Figures = Mapping[str, float]


@pytest.fixture(scope="module")
def measured(library: Path) -> dict[tuple[str, bool, str], Figures]:
    """Return the figures of each case, by size, nf4, and control."""
    command = [sys.executable, "-m", "tests.device.budget", "--json", "--ways", "ours", "--dropout", "0.05"]
    environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--control", CONTROL],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    cases = [(entry["case"], entry["figures"]) for entry in json.loads(result.stdout)]
    return {(case["size"], case["is_quantized"], case["control"]): figures for case, figures in cases}


@pytest.mark.parametrize("case", BUDGETS)
def test_a_layer_stays_within_its_budget(
    measured: dict[tuple[str, bool, str], Figures], case: tuple[str, bool]
) -> None:
    size, is_quantized = case
    assert exceeded(measured[size, is_quantized, "none"], case) == {}


def test_a_kernel_too_many_is_found(measured: dict[tuple[str, bool, str], Figures]) -> None:
    """One operation more in each layer: the check above would fail."""
    plain, changed = measured["135M", False, "none"], measured["135M", False, CONTROL]
    assert changed["forward kernels"] == plain["forward kernels"] + 1
    assert changed["backward kernels"] == plain["backward kernels"] + 1
    two_tensors = 2 * 4096 * 576 * 2 / 1e6  # read and written in 16 bits, [4096, 576]
    assert changed["element-wise MB"] - plain["element-wise MB"] == pytest.approx(2 * two_tensors, abs=0.2)


def test_matrix_products_are_those_of_the_model(measured: dict[tuple[str, bool, str], Figures]) -> None:
    """The products of an 8B layer by hand: if some were not counted, neither would their traffic be classed right."""
    hidden, intermediate, kv, rank, tokens, length = 4096, 14336, 1024, 16, 4096, 512
    shapes = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]  # q, k, v, o
    shapes += [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
    base = sum(2 * tokens * a * b for a, b in shapes) * 2  # forward, and the gradient of the input
    lora = sum(2 * tokens * rank * (a + b) for a, b in shapes) * 3  # and that of the weights
    attention = 2 * tokens * length * hidden * 3.5
    expected = (base + lora + attention) / 1e12
    for is_quantized in (False, True):
        assert measured["8B", is_quantized, "none"]["TFLOP"] == pytest.approx(expected, abs=0.001)


def exceeded(figures: Figures, case: tuple[str, bool]) -> dict[str, str]:
    """Return the figures that are over budget."""
    limits = zip(COLUMNS, BUDGETS[case], strict=True)
    return {name: f"{figures[name]:,} > {limit:,}" for name, limit in limits if figures[name] > limit}
