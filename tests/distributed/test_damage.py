"""A corrupt newest checkpoint, or a killed rank: the resumed run has the same result."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_accel.saving.atomic import MANIFEST, why_invalid
from lora_accel.saving.discovery import FILES, OPTIMIZER, WEIGHTS
from tests.distributed.disturbed import Runs
from tests.distributed.test_signals import is_running, wait_for

pytestmark = pytest.mark.distributed

PRESETS = ("cpu", "cpu_ddp")


def truncated(folder: Path) -> None:
    file = folder / OPTIMIZER
    file.write_bytes(file.read_bytes()[:-100])


def flipped(folder: Path) -> None:
    file = folder / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-5] ^= 0x40
    file.write_bytes(data)


def emptied(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def without_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def swapped_for_a_link(folder: Path) -> None:
    file = folder / OPTIMIZER
    elsewhere = folder.parent.parent.parent / "elsewhere.safetensors"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


CASES = [(damage, p) for damage in (truncated, flipped, emptied, without_manifest, swapped_for_a_link) for p in PRESETS]
SAMPLE = [(flipped, "cpu"), (without_manifest, "cpu_ddp"), (swapped_for_a_link, "cpu")]


@pytest.mark.parametrize(
    ("damage", "preset"), [pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.slow) for case in CASES]
)
def test_corrupt_newest_checkpoint_is_quarantined_and_the_previous_one_used(
    runs: Runs, damage: Callable[[Path], None], preset: str
) -> None:
    expected = runs.uninterrupted(preset)
    runs.train(preset, LORA_ACCEL_FAULT="step.begin@5=kill")
    newest = runs.output / "checkpoints" / "step-00000004"
    damage(newest)
    assert set(runs.train(preset)) == {0}, runs.forks.log()
    assert "skipped a corrupt checkpoint: step-00000004: " in runs.forks.log()
    assert "resuming after step 3 from" in runs.forks.log()
    assert (runs.output / "checkpoints" / "corrupt-step-00000004").is_dir()
    runs.check_resumed(expected, preset)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["cpu_ddp", "cpu_zero2", "cpu_zero3"])
def test_rank_that_is_out_of_memory_ends_the_run(runs: Runs, preset: str) -> None:
    codes = runs.train(preset, SABOTAGE="rank 1 exhausts memory")
    assert codes[1] == 3, runs.forks.log()
    assert codes[0] in (3, 143, -15), "the launcher may be faster"
    assert "error on rank 1: out of memory: " in runs.forks.log()
    assert "training.activation_checkpointing=true: " in runs.forks.log()


@pytest.mark.parametrize("preset", [pytest.param("cpu_ddp", marks=pytest.mark.slow), "cpu_zero3"])
def test_killed_rank_ends_the_run(runs: Runs, preset: str, tmp_path: Path) -> None:
    """The other rank is waiting for it in a collective."""
    expected = runs.uninterrupted(preset)
    fault = {"LORA_ACCEL_FAULT": "step.after_backward@4=pause:rank=1", "LORA_ACCEL_FAULT_MARK": str(tmp_path / "mark")}
    processes = runs.forks.start(preset, runs.args, **fault)
    wait_for(lambda: (tmp_path / "mark-1").exists() or not processes[0].is_alive(), "no step 4")
    pids = json.loads((runs.output / "status.json").read_text())["pids"]
    os.kill(pids[1], signal.SIGKILL)
    assert 0 not in runs.forks.finish(processes)
    wait_for(lambda: not any(map(is_running, pids)), "a rank is still running")
    newest = max((runs.output / "checkpoints").glob("step-*"))
    assert (newest.name, why_invalid(newest, required=FILES)) == ("step-00000003", None)
    assert json.loads((runs.output / "status.json").read_text())["state"] == "failed"
    runs.check_resumed(expected, preset)
