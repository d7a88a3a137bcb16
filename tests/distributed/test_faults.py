"""One rank that fails ends the whole run soon, its own error is shown last, and nothing half-written is saved."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_accel.config.schema import RunConfig
from lora_accel.saving.atomic import why_invalid
from tests.conftest import read_metrics
from tests.distributed.forked import Forks
from tests.distributed.launching import TRAIN, launch

pytestmark = pytest.mark.distributed


Fail = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def fail(
    forks: Forks, make_config: Callable[..., RunConfig], config_file: Callable[[RunConfig], Path], tmp_path: Path
) -> Fail:
    """Launch a training of which rank 1 fails; say how it ended. What the launcher prints needs `launcher=True`."""

    def attempt(fault: str, preset: str, launcher: bool = False) -> subprocess.CompletedProcess[str]:
        config = make_config(checkpoint={"every_steps": 1}, training={"warmup_steps": 0})
        words = ("--num_processes", "2", "tests/distributed/faults.py", fault, config_file(config))
        ran = (launch if launcher else forks.launch)(*words, preset=preset)
        assert ran.returncode != 0
        assert not (tmp_path / "run" / "adapter").exists()
        return ran

    return attempt


def last_told(ran: subprocess.CompletedProcess[str]) -> str:
    """Return the launcher's last words: its report of the first failure."""
    assert "Root Cause" in ran.stderr, ran.stderr[-3000:]
    return ran.stderr.split("Root Cause")[-1]


def checkpoints(folder: Path) -> dict[str, str | None]:
    """Return each checkpoint folder, and why it is none."""
    found = sorted((folder / "checkpoints").iterdir())
    return {path.name: why_invalid(path) for path in found if path.name.startswith("step-")}


@pytest.mark.parametrize("preset", ["cpu_ddp", "cpu_zero3"])
def test_a_rank_that_raises_ends_the_run_with_its_own_error(fail: Fail, preset: str, tmp_path: Path) -> None:
    ran = fail("raise", preset, launcher=True)
    assert "rank      : 1" in last_told(ran)
    assert "RuntimeError: rank 1 has a fault of its own" in last_told(ran)
    assert checkpoints(tmp_path / "run") == {"step-00000001": None}


def test_a_rank_that_is_killed_ends_the_run(fail: Fail, tmp_path: Path) -> None:
    ran = fail("kill", "cpu_ddp", launcher=True)
    assert "exitcode  : -9" in ran.stderr
    assert checkpoints(tmp_path / "run") == {"step-00000001": None}


def test_what_one_rank_alone_meets_is_told_by_it(fail: Fail, tmp_path: Path) -> None:
    ran = fail("user", "cpu_ddp", launcher=True)
    assert "error on rank 1: rows.jsonl: only rank 1 cannot read it" in last_told(ran)
    assert not (tmp_path / "run").exists()


def test_processes_that_found_different_things_do_not_train_together(fail: Fail, tmp_path: Path) -> None:
    """As on two machines whose disks hold other files."""
    ran = fail("differ", "cpu_ddp")
    assert "error: processes 0 and 1 have found different things" in ran.stderr
    assert "seed: 0 -> 1" in ran.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", ["cpu_ddp", "zero1", "cpu_zero2", "cpu_zero3"])
def test_no_backend_steps_with_a_gradient_that_is_not_finite(fail: Fail, preset: str, tmp_path: Path) -> None:
    ran = fail("nan", preset)
    assert "error: step 2: loss nan" in ran.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert checkpoints(tmp_path / "run") == {"step-00000001": None}
    before = load_file(tmp_path / "run" / "checkpoints" / "step-00000001" / "adapter_model.safetensors")
    after = load_file(tmp_path / "run" / "after.safetensors")
    assert len(before) == len(after) > 0
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name.replace(".default", "")]), f"{name}: the step was made"


def test_a_step_that_is_not_finite_is_left_out_alike_on_every_backend(
    forks: Forks, make_config: Callable[..., RunConfig], config_file: Callable[[RunConfig], Path], tmp_path: Path
) -> None:
    """Skipped, counted, and gone on from: Adam has then seen one update less than there were steps."""
    config = make_config(
        checkpoint={"every_steps": 1}, training={"warmup_steps": 0, "skip_nonfinite": 1, "learning_rate": 1e-3}
    )
    file, lines = config_file(config), {}
    for preset in ("cpu", "cpu_ddp", "cpu_zero2", "cpu_zero3"):
        run = tmp_path / preset
        for fault, fails in (("step.begin@5=kill", True), ("", False)):
            words = ("tests/distributed/faults.py", "nan" if fails else "none", file, f"output_dir={run}")
            ran = forks.launch(*words, preset=preset, LORA_ACCEL_FAULT=fault)
            assert (ran.returncode != 0) == fails, ran.stderr[-3000:]
        (skipped,) = (line for line in read_metrics(run, "event") if line["event"] == "skipped")
        assert (skipped["step"], skipped["loss"]) == (2, "nan")
        assert "rows.jsonl, rows " in skipped["rows"]
        assert json.loads((run / "checkpoints" / "step-00000006" / "state.json").read_text())["skipped"] == 1
        lines[preset] = read_metrics(run)
        assert [line["step"] for line in lines[preset]] == [1, 3, 4, 5, 6]
    for preset, found in lines.items():
        for line, expected in zip(found, lines["cpu"], strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5), (preset, line["step"])
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5), (preset, line["step"])


def test_a_wrong_config_is_told_once(
    make_config: Callable[..., RunConfig], config_file: Callable[[RunConfig], Path]
) -> None:
    config = make_config()
    ran = launch(*TRAIN, config_file(config), "training.lerning_rate=1", preset="cpu_ddp")
    assert ran.returncode != 0
    told = [line for line in ran.stderr.splitlines() if line.startswith("error")]
    assert len(told) == 1
    assert "learning_rate" in told[0]
    assert not Path(config.output_dir).exists()
