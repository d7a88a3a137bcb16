"""A rank that fails ends the run, its error is printed last, and no partial files are left."""

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


TrainWithFault = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def train_with_fault(
    forks: Forks, make_config: Callable[..., RunConfig], config_file: Callable[[RunConfig], Path], tmp_path: Path
) -> TrainWithFault:
    """Return a function that trains with a fault on rank 1. `launcher=True` includes the launcher's output."""

    def train(fault: str, preset: str, launcher: bool = False) -> subprocess.CompletedProcess[str]:
        config = make_config(checkpoint={"every_steps": 1}, training={"warmup_steps": 0})
        args = ("--num_processes", "2", "tests/distributed/faults.py", fault, config_file(config))
        result = (launch if launcher else forks.launch)(*args, preset=preset)
        assert result.returncode != 0
        assert not (tmp_path / "run" / "adapter").exists()
        return result

    return train


def root_cause(result: subprocess.CompletedProcess[str]) -> str:
    """Return the launcher's report of the first failure."""
    assert "Root Cause" in result.stderr, result.stderr[-3000:]
    return result.stderr.split("Root Cause")[-1]


def checkpoints(folder: Path) -> dict[str, str | None]:
    """Return the name of each checkpoint folder, and why it is invalid (None = valid)."""
    paths = sorted((folder / "checkpoints").iterdir())
    return {path.name: why_invalid(path) for path in paths if path.name.startswith("step-")}


@pytest.mark.parametrize("preset", [pytest.param("cpu_ddp", marks=pytest.mark.slow), "cpu_zero3"])
def test_exception_on_one_rank_ends_the_run_with_its_traceback(
    train_with_fault: TrainWithFault, preset: str, tmp_path: Path
) -> None:
    result = train_with_fault("raise", preset, launcher=True)
    assert "rank      : 1" in root_cause(result)
    assert "RuntimeError: rank 1 has a fault of its own" in root_cause(result)
    assert checkpoints(tmp_path / "run") == {"step-00000001": None}


def test_killed_rank_ends_the_run(train_with_fault: TrainWithFault, tmp_path: Path) -> None:
    result = train_with_fault("kill", "cpu_ddp", launcher=True)
    assert "exitcode  : -9" in result.stderr
    assert checkpoints(tmp_path / "run") == {"step-00000001": None}


def test_user_error_on_one_rank_is_printed_with_its_rank(train_with_fault: TrainWithFault, tmp_path: Path) -> None:
    result = train_with_fault("user", "cpu_ddp", launcher=True)
    assert "error on rank 1: rows.jsonl: only rank 1 cannot read it" in root_cause(result)
    assert not (tmp_path / "run").exists()


def test_ranks_with_different_configs_do_not_train(train_with_fault: TrainWithFault, tmp_path: Path) -> None:
    """As on two machines with different files."""
    result = train_with_fault("differ", "cpu_ddp")
    assert "error: ranks 0 and 1 disagree" in result.stderr
    assert "seed: 0 -> 1" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.sample(2)
@pytest.mark.parametrize("preset", ["cpu_ddp", "zero1", "cpu_zero2", "cpu_zero3"])
def test_non_finite_gradient_updates_no_weights(train_with_fault: TrainWithFault, preset: str, tmp_path: Path) -> None:
    result = train_with_fault("nan", preset)
    assert "error: step 2: loss nan" in result.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert checkpoints(tmp_path / "run") == {"step-00000001": None}
    before = load_file(tmp_path / "run" / "checkpoints" / "step-00000001" / "adapter_model.safetensors")
    after = load_file(tmp_path / "run" / "after.safetensors")
    assert len(before) == len(after) > 0
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name.replace(".default", "")]), f"{name}: was updated"


def test_non_finite_step_is_skipped_equally_on_every_backend(
    forks: Forks, make_config: Callable[..., RunConfig], config_file: Callable[[RunConfig], Path], tmp_path: Path
) -> None:
    """The step is skipped and counted, and the run resumes: Adam has one update less than there were steps."""
    config = make_config(
        checkpoint={"every_steps": 1}, training={"warmup_steps": 0, "skip_nonfinite": 1, "learning_rate": 1e-3}
    )
    file, lines = config_file(config), {}
    for preset in ("cpu", "cpu_ddp", "cpu_zero2", "cpu_zero3"):
        run = tmp_path / preset
        for fault, fails in (("step.begin@5=kill", True), ("", False)):
            args = ("tests/distributed/faults.py", "nan" if fails else "none", file, f"output_dir={run}")
            result = forks.launch(*args, preset=preset, LORA_ACCEL_FAULT=fault)
            assert (result.returncode != 0) == fails, result.stderr[-3000:]
        (skipped,) = (line for line in read_metrics(run, "event") if line["event"] == "skipped")
        assert (skipped["step"], skipped["loss"]) == (2, "nan")
        assert "rows.jsonl, rows " in skipped["rows"]
        assert json.loads((run / "checkpoints" / "step-00000006" / "state.json").read_text())["skipped"] == 1
        lines[preset] = read_metrics(run)
        assert [line["step"] for line in lines[preset]] == [1, 3, 4, 5, 6]
    for preset, metrics in lines.items():
        for line, expected in zip(metrics, lines["cpu"], strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5), (preset, line["step"])
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5), (preset, line["step"])


def test_config_error_is_printed_once(
    make_config: Callable[..., RunConfig], config_file: Callable[[RunConfig], Path]
) -> None:
    config = make_config()
    result = launch(*TRAIN, config_file(config), "training.lerning_rate=1", preset="cpu_ddp")
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "learning_rate" in errors[0]
    assert not Path(config.output_dir).exists()
