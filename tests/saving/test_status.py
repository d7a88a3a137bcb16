"""status.json records the state of a run, its step and how it ended."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_accel.errors import Interrupted, TrainingError
from lora_accel.saving.status import track_status


def read(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return values


def fail_in(
    folder: Path, error: BaseException, *, enabled: bool = True, before: Callable[[Path], None] | None = None
) -> None:
    """Record step 2, call `before`, and raise an error."""
    with track_status(folder, 0, None, total_steps=9, pids=[1], enabled=enabled) as note:
        note(2, folder / "step-00000002")
        if before is not None:
            before(folder)
        raise error


def test_state_is_running_then_done(tmp_path: Path) -> None:
    with track_status(tmp_path, 0, None, total_steps=9, pids=[os.getpid(), 7], enabled=True) as note:
        expected = {"state": "running", "step": 0, "total_steps": 9, "checkpoint": None}
        assert read(tmp_path) == expected | {"pids": [os.getpid(), 7], "host": socket.gethostname()}
        note(3, tmp_path / "checkpoints" / "step-00000003")
        status = read(tmp_path)
        assert (status["state"], status["step"]) == ("running", 3)
        assert status["checkpoint"] == str(tmp_path / "checkpoints" / "step-00000003")
    assert read(tmp_path) == status | {"state": "done"}
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_resumed_run_records_its_checkpoint_at_once(tmp_path: Path) -> None:
    with track_status(tmp_path, 4, tmp_path / "step-00000004", total_steps=9, pids=[1], enabled=True):
        status = read(tmp_path)
        assert (status["step"], status["checkpoint"]) == (4, str(tmp_path / "step-00000004"))


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (Interrupted("stopped", 143), "preempted"),
        (KeyboardInterrupt(), "preempted"),
        (TrainingError("loss nan"), "failed"),
        (ValueError("a bug"), "failed"),
        (SystemExit(1), "failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value,
)
def test_state_after_an_error_and_the_error_is_raised(tmp_path: Path, error: BaseException, state: str) -> None:
    with pytest.raises(type(error)) as caught:
        fail_in(tmp_path, error)
    assert caught.value is error
    status = read(tmp_path)
    assert (status["state"], status["step"], status["checkpoint"]) == (state, 2, str(tmp_path / "step-00000002"))


def test_failed_status_write_does_not_hide_the_error(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(TrainingError, match="loss nan"):
        fail_in(tmp_path / "run", TrainingError("loss nan"), before=shutil.rmtree)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    with track_status(tmp_path, 0, None, total_steps=9, pids=[1], enabled=False) as note:
        note(3, None)
    with pytest.raises(ValueError, match="a bug"):
        fail_in(tmp_path, ValueError("a bug"), enabled=False)
    assert not any(tmp_path.iterdir())
