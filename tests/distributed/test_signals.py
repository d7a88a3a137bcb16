"""A run that gets a signal at any moment, in any of its processes, saves, leaves no orphan, and resumes bit for bit.

Without `--faults` only a sample of the matrix runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from lora_accel.saving.atomic import why_invalid
from lora_accel.saving.discovery import FILES
from tests.conftest import PATIENCE_SECONDS, read_metrics, run_module
from tests.distributed.disturbed import Runs
from tests.distributed.launching import finish, free_port, start

pytestmark = pytest.mark.distributed

MOMENTS = {"mid-step": "step.after_backward@3", "mid-save": "save.mid_file@4", "mid-evaluation": "evaluate.begin@1"}
"""Fault points where a rank pauses until it gets the signal."""
CELLS = [
    (preset, target, moment)
    for preset, targets in (("cpu", ("launcher", "rank 0")), ("cpu_ddp", ("launcher", "rank 0", "rank 1")))
    for target in targets
    for moment in MOMENTS
]
SAMPLE = {("cpu_ddp", "launcher", "mid-save"), ("cpu_ddp", "rank 1", "mid-evaluation")}


def cells() -> list[Any]:
    return [pytest.param(*cell, marks=() if cell in SAMPLE else pytest.mark.slow) for cell in CELLS]


def wait_for(condition: Callable[[], bool], message: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Wait until a condition is true; fail with a message after some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def status(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "status.json").read_text())
    return value


@pytest.mark.parametrize(("preset", "target", "moment"), cells())
def test_sigterm_saves_and_leaves_no_orphan(runs: Runs, tmp_path: Path, preset: str, target: str, moment: str) -> None:
    expected = runs.uninterrupted(preset)
    paused = 1 if target == "rank 1" and moment != "mid-save" else 0  # only rank 0 writes
    fault = f"{MOMENTS[moment]}=pause:rank={paused}"
    mark = tmp_path / f"mark-{paused}"
    launcher = start(
        *("--main_process_port", free_port(), "-m", "lora_accel.train", *runs.args),
        preset=preset,
        LORA_ACCEL_FAULT=fault,
        LORA_ACCEL_FAULT_MARK=str(tmp_path / "mark"),
    )
    try:
        has_status = (runs.output / "status.json").exists  # rank 1 may be faster than rank 0, which writes it
        wait_for(lambda: (mark.exists() and has_status()) or launcher.poll() is not None, f"did not reach {moment}")
        pids = status(runs.output)["pids"]
        assert len(pids) == (1 if preset == "cpu" else 2)
        assert all(map(is_running, pids))
        os.kill({"launcher": launcher.pid, "rank 0": pids[0], "rank 1": pids[-1]}[target], signal.SIGTERM)
        if target == "rank 1":
            mark.unlink(missing_ok=True)  # the paused rank 0 gets no signal, so end its pause
        result = finish(launcher)
        assert result.returncode != 0
        wait_for(lambda: not any(map(is_running, pids)), "an orphan is still running")
    finally:
        launcher.kill()
    values = status(runs.output)
    assert values["state"] == "preempted", result.stderr[-3000:]
    assert values["step"] < 6
    newest = max((runs.output / "checkpoints").glob("step-*"))
    assert (str(newest), why_invalid(newest, required=FILES)) == (values["checkpoint"], None)
    assert int(newest.name[5:]) == values["step"]
    stops = [line for line in read_metrics(runs.output, "event") if line["event"] == "stopped"]
    assert [(line["step"], line["cause"]) for line in stops] == [(values["step"], "SIGTERM")]
    runs.check_resumed(expected, preset)


@contextlib.contextmanager
def paused_in_step_3(runs: Runs, mark: Path, action: str = "pause") -> Iterator[BaseProcess]:
    """Start a run on one process, and yield the process while it waits in step 3."""
    fault = {"LORA_ACCEL_FAULT": f"step.after_backward@3={action}", "LORA_ACCEL_FAULT_MARK": str(mark)}
    (process,) = runs.forks.start("cpu", runs.args, **fault)
    try:
        wait_for(lambda: Path(f"{mark}-0").exists() or not process.is_alive(), "no step 3")
        assert process.is_alive(), runs.forks.log()
        yield process
    finally:
        process.kill()
        process.join()


def send_signal(process: BaseProcess, number: signal.Signals) -> None:
    assert process.pid is not None
    os.kill(process.pid, number)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        *((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGQUIT, 131)),
        *(pytest.param(number, 143, marks=pytest.mark.slow) for number in (signal.SIGUSR1, signal.SIGHUP)),
    ],
)
def test_exit_codes(runs: Runs, tmp_path: Path, number: signal.Signals, code: int) -> None:
    expected = runs.uninterrupted("cpu")
    with paused_in_step_3(runs, tmp_path / "mark") as process:
        send_signal(process, number)
        process.join(PATIENCE_SECONDS)
        assert process.exitcode == code
    assert f"stopped by {number.name} on rank 0 after step 3; checkpoint saved" in runs.forks.log()
    assert "Traceback" not in runs.forks.log()
    values = status(runs.output)
    newest = str(runs.output / "checkpoints" / "step-00000003")
    assert (values["state"], values["step"], values["checkpoint"]) == ("preempted", 3, newest)
    assert values["pids"] == [process.pid]
    runs.check_resumed(expected, "cpu")


def test_second_ctrl_c_aborts(runs: Runs, tmp_path: Path) -> None:
    """Even in a step that hangs."""
    expected = runs.uninterrupted("cpu")
    with paused_in_step_3(runs, tmp_path / "mark", "hang") as process:
        send_signal(process, signal.SIGINT)
        time.sleep(1.5)
        assert process.is_alive()
        send_signal(process, signal.SIGINT)
        process.join(PATIENCE_SECONDS)
        assert process.exitcode == 130
    assert "interrupted; run the same command to resume from the newest checkpoint" in runs.forks.log()
    assert (status(runs.output)["state"], status(runs.output)["step"]) == ("preempted", 2)
    runs.check_resumed(expected, "cpu")


def test_second_run_in_the_same_folder_fails(runs: Runs, tmp_path: Path) -> None:
    expected = runs.uninterrupted("cpu")
    with paused_in_step_3(runs, tmp_path / "mark") as process:
        before = sorted(path for path in runs.output.rglob("*") if path.is_file())
        second = run_module("lora_accel.train", *runs.args)
        assert second.returncode == 2
        assert f"is in use by another run (process {process.pid} on " in second.stderr
        assert set(before) <= set(runs.output.rglob("*")), "the second run deleted nothing"
    assert status(runs.output)["state"] == "running", "SIGKILL leaves the state unchanged"
    runs.check_resumed(expected, "cpu")


@pytest.mark.slow
def test_slurm_signal_stops_the_ranks_and_not_the_launcher(runs: Runs, tmp_path: Path) -> None:
    """As in scripts/train.slurm: the launcher ignores SIGUSR1, the ranks handle it."""
    expected = runs.uninterrupted("cpu_ddp")
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # children inherit ignored signals
    try:
        args = ("--main_process_port", free_port(), "-m", "lora_accel.train", *runs.args)
        fault = {"LORA_ACCEL_FAULT": "step.after_backward@3=pause", "LORA_ACCEL_FAULT_MARK": str(tmp_path / "mark")}
        launcher = start(*args, preset="cpu_ddp", **fault)
    finally:
        signal.signal(signal.SIGUSR1, before)
    wait_for(lambda: all((tmp_path / f"mark-{rank}").exists() for rank in (0, 1)), "no step 3")
    for pid in (launcher.pid, *status(runs.output)["pids"]):
        os.kill(pid, signal.SIGUSR1)
    finish(launcher)
    assert (status(runs.output)["state"], status(runs.output)["step"]) == ("preempted", 3)
    runs.check_resumed(expected, "cpu_ddp")
