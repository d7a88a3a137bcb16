"""Budgets of a training step on a GPU, per decoder layer: kernels, copies, traffic, memory saved for backward.

Modeled, not measured: kernels are counted on fake tensors of real sizes (tests/device/layers.py). If a change exceeds a
budget on purpose, or stays well below it, change the number in budgets.py; `python -m tests.device.budget --top 20`
shows which kernels there are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PATIENCE_SECONDS, ROOT
from tests.device.budgets import BUDGETS, COLUMNS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")

PEER = "TRL + Liger"
SPEED = {False: 1.25, True: 1.1}
"""Modeled speed of an 8B model, as a multiple of the peer's, in LoRA and QLoRA: at least this on every GPU."""
CONTROL = "kernel_per_layer"

Figures = Mapping[str, Any]
Measured = Mapping[tuple[str, str, bool, str], Figures]


@pytest.fixture(scope="module")
def measured(library: Path) -> Measured:
    """Return the figures of each case, by way, size, nf4, and control."""
    command = [sys.executable, "-m", "tests.device.budget", "--json", "--dropout", "0.05"]
    result = subprocess.run(
        [*command, "--ways", "ours", PEER, "--control", CONTROL],
        cwd=ROOT,
        env=os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    entries = json.loads(result.stdout)
    return {(entry["way"], entry["size"], entry["is_quantized"], entry["control"]): entry for entry in entries}


@pytest.mark.parametrize(("size", "is_quantized"), BUDGETS)
def test_a_layer_stays_within_its_budget(measured: Measured, size: str, is_quantized: bool) -> None:
    figures = measured["ours", size, is_quantized, "none"]
    limits = dict(zip(COLUMNS, BUDGETS[size, is_quantized], strict=True))
    assert {name: figures[name] for name, limit in limits.items() if figures[name] > limit} == {}, limits


@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_layer_costs_less_than_with_liger_kernels(measured: Measured, is_quantized: bool) -> None:
    ours, peer = (measured[way, "8B", is_quantized, "none"] for way in ("ours", PEER))
    kernels = [figures["forward kernels"] + figures["backward kernels"] for figures in (ours, peer)]
    assert kernels[0] <= kernels[1]
    assert ours["element-wise MB"] <= 0.7 * peer["element-wise MB"]
    assert ours["saved MB"] <= peer["saved MB"]
    assert ours["TFLOP"] == peer["TFLOP"], "the same mathematics"
    for gpu, seconds in ours["seconds"].items():
        assert peer["seconds"][gpu] / seconds >= SPEED[is_quantized], gpu


def test_a_kernel_too_many_is_found(measured: Measured) -> None:
    """One operation more in each layer: the budgets above are exact enough to fail."""
    figures = measured["ours", "135M", False, CONTROL]
    forward, backward, _, megabytes, _ = BUDGETS["135M", False]
    assert figures["forward kernels"] == forward + 1
    assert figures["backward kernels"] == backward + 1
    product = 2 * (2 * 4096 * 576) / 1e6  # a tensor is read and another one written, [4096, 576] in 16 bits
    assert figures["element-wise MB"] == pytest.approx(megabytes + 2 * product, abs=1)


def test_matrix_products_are_those_of_the_model(measured: Measured) -> None:
    """The products of an 8B layer by hand. A product that is not known as one would count as element-wise."""
    hidden, intermediate, kv, rank, tokens, length = 4096, 14336, 1024, 16, 4096, 512
    shapes = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]  # q, k, v, o
    shapes += [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]  # gate, up, down
    base = sum(2 * tokens * a * b for a, b in shapes) * 2  # forward, and the gradient of the input
    lora = sum(2 * tokens * rank * (a + b) for a, b in shapes) * 3  # and the gradients of the weights
    attention = 2 * tokens * length * hidden * 3.5
    for is_quantized in (False, True):
        teraflop = measured["ours", "8B", is_quantized, "none"]["TFLOP"]
        assert teraflop == pytest.approx((base + lora + attention) / 1e12, abs=0.001)
