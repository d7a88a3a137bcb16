"""A run that is killed at any fault point and resumed with the same command has the result of an uninterrupted one.

Without `--faults` only a sample runs: every fault point in turn on one process, one on each backend of two.
"""

from __future__ import annotations

from typing import Any

import pytest

from lora_accel.faults import POINTS
from tests.distributed.disturbed import Runs
from tests.distributed.forked import SABOTAGES

pytestmark = pytest.mark.distributed

PRESETS = ("cpu", "cpu_ddp", "cpu_zero2", "cpu_zero3")
ONCE = ("export.mid",)
"""Fault points that a run reaches once."""
CELLS = [
    (preset, point, occurrence)
    for preset in PRESETS
    for point in POINTS
    if point != "merge.mid"  # covered by tests/merging
    for occurrence in ((1,) if point in ONCE else (1, 2, 3))
]
SAMPLE = {
    ("cpu_ddp", "save.mid_file", 2),
    ("cpu_zero2", "rotate.mid", 1),
    ("cpu_zero3", "step.after_backward", 2),
}


def cells() -> list[Any]:
    return [pytest.param(*cell, marks=() if cell in SAMPLE else pytest.mark.slow) for cell in CELLS]


@pytest.mark.parametrize(("preset", "point", "occurrence"), cells())
def test_killed_run_resumes_bit_for_bit(runs: Runs, preset: str, point: str, occurrence: int) -> None:
    runs.kill_and_resume(preset, point, occurrence)


def test_run_killed_at_every_fault_point_in_turn(runs: Runs) -> None:
    """Each process resumes where the previous one was killed. Removing old checkpoints and exporting are last."""
    expected = runs.uninterrupted("cpu")
    points = [point for point in POINTS if point not in ("merge.mid", "rotate.mid", *ONCE)]
    for point in (*points, "rotate.mid", *ONCE):
        runs.kill("cpu", point, 1)
    runs.check_resumed(expected, "cpu")


@pytest.mark.parametrize(
    ("sabotage", "point"),
    [("writes in place", "save.mid_file"), ("skips moments", "step.begin"), ("keeps the log", "save.begin")],
)
def test_removing_a_protection_fails_the_comparison(runs: Runs, sabotage: str, point: str) -> None:
    assert sabotage in SABOTAGES
    with pytest.raises(AssertionError) as caught:
        runs.kill_and_resume("cpu", point, 3, sabotage)
    assert "was not killed" not in str(caught.value)
