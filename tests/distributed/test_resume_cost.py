"""Resuming from step 10,000 costs no more than starting a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lora_accel.config.files import config_to_yaml
from lora_accel.config.schema import RunConfig
from lora_accel.saving.atomic import read_json, write_json, write_manifest
from lora_accel.saving.discovery import STATE
from tests.distributed.forked import Forks
from tests.distributed.test_signals import wait_for

pytestmark = pytest.mark.distributed

STEP = 10_000


def test_resuming_far_into_a_run_is_as_fast_as_starting(
    forks: Forks, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    file, run = tmp_path / "config.yaml", tmp_path / "run"
    config = make_config(training={"max_steps": STEP + 100}, checkpoint={"every_steps": 1})
    file.write_text(config_to_yaml(config), encoding="utf-8")

    def seconds_to(step: int) -> float:
        """Return the CPU time in seconds of a process until its first step, which must be `step`."""
        fault = {"LORA_ACCEL_FAULT": "step.begin@2=pause", "LORA_ACCEL_FAULT_MARK": str(tmp_path / "mark")}
        (process,) = forks.start("cpu", ["--config", str(file)], **fault)
        wait_for(lambda: (tmp_path / "mark-0").exists() or not process.is_alive(), "no first step")
        assert process.is_alive(), forks.log()
        assert f'"kind": "train", "step": {step},' in (run / "metrics.jsonl").read_text(encoding="utf-8")[-2000:]
        times = psutil.Process(process.pid).cpu_times()
        process.kill()
        process.join()
        (tmp_path / "mark-0").unlink()
        return times.user + times.system

    start = seconds_to(1)
    shutil.rmtree(run)
    forks.run("cpu", ["--config", str(file)], LORA_ACCEL_FAULT="step.begin@3=kill")
    rename_checkpoint(STEP, run)
    resume = seconds_to(STEP + 1)
    print(f"first step after {start:.2f} s; step {STEP + 1:,} after {resume:.2f} s")
    assert resume < 2 * start + 1  # reading the log of 10,000 steps takes some of it


def rename_checkpoint(step: int, run: Path) -> None:
    """Turn the checkpoint and log of step 2 into those of a later step."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    (run / "checkpoints" / "step-00000002").rename(folder)
    write_json(folder / STATE, read_json(folder / STATE) | {"step": step, "epoch": None, "examples": None})
    write_manifest(folder)
    line = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[1])
    lines = [json.dumps(line | {"step": number}) for number in range(1, step + 1)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
