"""Killed anywhere and started again with the same command, a run ends with the bytes of one that was never killed.

The ordinary run holds a sample: every place on one process, two on each backend of two. `--faults` runs all of them.
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
"""Places that a run passes once."""
CELLS = [
    (preset, point, occurrence)
    for preset in PRESETS
    for point in POINTS
    if point != "merge.mid"  # below
    for occurrence in ((1,) if point in ONCE else (1, 2, 3))
]
SAMPLE = {("cpu", point, 1 if point in ONCE else 2) for point in POINTS} | {
    *(("cpu_ddp", "step.after_optimizer", 3), ("cpu_ddp", "save.mid_file", 2)),
    *(("cpu_zero2", "save.before_rename", 2), ("cpu_zero2", "rotate.mid", 1)),
    *(("cpu_zero3", "step.after_backward", 2), ("cpu_zero3", "save.after_rename", 3)),
}


def cells() -> list[Any]:
    return [pytest.param(*cell, marks=() if cell in SAMPLE else pytest.mark.slow) for cell in CELLS]


@pytest.mark.parametrize(("preset", "point", "occurrence"), cells())
def test_killed_there_a_run_goes_on_to_the_same_bytes(runs: Runs, preset: str, point: str, occurrence: int) -> None:
    runs.killed_and_resumed(preset, point, occurrence)


@pytest.mark.parametrize(
    ("sabotage", "point"),
    [("writes in place", "save.mid_file"), ("forgets moments", "step.begin"), ("keeps the log", "save.begin")],
)
def test_without_a_protection_this_test_fails(runs: Runs, sabotage: str, point: str) -> None:
    assert sabotage in SABOTAGES
    with pytest.raises(AssertionError) as failed:
        runs.killed_and_resumed("cpu", point, 3, sabotage)
    assert "was not killed" not in str(failed.value)
