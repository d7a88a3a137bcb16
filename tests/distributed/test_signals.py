"""Asked to stop at any moment, through whichever process, a launched run saves, leaves no orphan, and goes on equal.

The ordinary run holds a sample; `--faults` runs all.
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
"""Where a rank pauses, until it is asked to stop."""
CELLS = [
    (preset, target, moment)
    for preset, targets in (("cpu", ("launcher", "rank 0")), ("cpu_ddp", ("launcher", "rank 0", "rank 1")))
    for target in targets
    for moment in MOMENTS
]
SAMPLE = {
    ("cpu", "launcher", "mid-step"),
    ("cpu_ddp", "launcher", "mid-save"),
    ("cpu_ddp", "rank 1", "mid-evaluation"),
}


def cells() -> list[Any]:
    return [pytest.param(*cell, marks=() if cell in SAMPLE else pytest.mark.slow) for cell in CELLS]


def wait_for(condition: Callable[[], bool], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def lives(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def status(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "status.json").read_text())
    return value


@pytest.mark.parametrize(("preset", "target", "moment"), cells())
def test_sigterm_saves_and_leaves_no_orphan(runs: Runs, tmp_path: Path, preset: str, target: str, moment: str) -> None:
    straight = runs.straight(preset)
    pauses = 1 if target == "rank 1" and moment != "mid-save" else 0  # rank 0 writes; the others wait for this one
    fault = f"{MOMENTS[moment]}=pause:rank={pauses}"
    mark = tmp_path / f"mark-{pauses}"
    launcher = start(
        *("--main_process_port", free_port(), "-m", "lora_accel.train", *runs.words),
        preset=preset,
        LORA_ACCEL_FAULT=fault,
        LORA_ACCEL_FAULT_MARK=str(tmp_path / "mark"),
    )
    try:
        wait_for(lambda: mark.exists() or launcher.poll() is not None, f"never came to {moment}")
        pids = status(runs.output)["pids"]
        assert len(pids) == (1 if preset == "cpu" else 2)
        assert all(map(lives, pids))
        os.kill({"launcher": launcher.pid, "rank 0": pids[0], "rank 1": pids[-1]}[target], signal.SIGTERM)
        if target == "rank 1":
            mark.unlink(missing_ok=True)  # where rank 0 pauses, it gets no signal
        ran = finish(launcher)
        assert ran.returncode != 0
        wait_for(lambda: not any(map(lives, pids)), "an orphan trains on")
    finally:
        launcher.kill()
    told = status(runs.output)
    assert told["state"] == "preempted", ran.stderr[-3000:]
    assert told["step"] < 6
    newest = max((runs.output / "checkpoints").glob("step-*"))
    assert (str(newest), why_invalid(newest, required=FILES)) == (told["checkpoint"], None)
    assert int(newest.name[5:]) == told["step"]
    stops = [line for line in read_metrics(runs.output, "event") if line["event"] == "stopped"]
    assert [(line["step"], line["cause"]) for line in stops] == [(told["step"], "SIGTERM")]
    runs.resumes_to(straight, preset)


@contextlib.contextmanager
def in_its_third_step(runs: Runs, mark: Path, action: str = "pause") -> Iterator[BaseProcess]:
    """Start a run on one process, and give it while it waits in its third step."""
    fault = {"LORA_ACCEL_FAULT": f"step.after_backward@3={action}", "LORA_ACCEL_FAULT_MARK": str(mark)}
    (process,) = runs.forks.start("cpu", runs.words, **fault)
    try:
        wait_for(lambda: Path(f"{mark}-0").exists() or not process.is_alive(), "no step 3")
        assert process.is_alive(), runs.forks.log()
        yield process
    finally:
        process.kill()
        process.join()


def send(process: BaseProcess, number: signal.Signals) -> None:
    assert process.pid is not None
    os.kill(process.pid, number)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143), (signal.SIGHUP, 143)]
)
def test_each_signal_has_its_exit_code(runs: Runs, tmp_path: Path, number: signal.Signals, code: int) -> None:
    straight = runs.straight("cpu")
    with in_its_third_step(runs, tmp_path / "mark") as process:
        send(process, number)
        process.join(PATIENCE_SECONDS)
        assert process.exitcode == code
    assert f"stopped by {number.name} (rank 0) after step 3; a checkpoint is saved" in runs.forks.log()
    assert "Traceback" not in runs.forks.log()
    told = status(runs.output)
    newest = str(runs.output / "checkpoints" / "step-00000003")
    assert (told["state"], told["step"], told["checkpoint"]) == ("preempted", 3, newest)
    assert told["pids"] == [process.pid]
    runs.resumes_to(straight, "cpu")


def test_a_second_ctrl_c_aborts(runs: Runs, tmp_path: Path) -> None:
    """In a step that never ends."""
    straight = runs.straight("cpu")
    with in_its_third_step(runs, tmp_path / "mark", "hang") as process:
        send(process, signal.SIGINT)
        time.sleep(1.5)
        assert process.is_alive()
        send(process, signal.SIGINT)
        process.join(PATIENCE_SECONDS)
        assert process.exitcode == 130
    assert "interrupted; the same command goes on from the newest checkpoint" in runs.forks.log()
    assert (status(runs.output)["state"], status(runs.output)["step"]) == ("preempted", 2)
    runs.resumes_to(straight, "cpu")


def test_two_runs_do_not_share_a_folder(runs: Runs, tmp_path: Path) -> None:
    straight = runs.straight("cpu")
    with in_its_third_step(runs, tmp_path / "mark") as process:
        before = sorted(path for path in runs.output.rglob("*") if path.is_file())
        second = run_module("lora_accel.train", *runs.words)
        assert second.returncode == 2
        assert f"is in use by another run (process {process.pid} on " in second.stderr
        assert set(before) <= set(runs.output.rglob("*")), "the second run took nothing away"
    assert status(runs.output)["state"] == "running", "killed without a word"
    runs.resumes_to(straight, "cpu")


@pytest.mark.slow
def test_slurms_warning_reaches_the_ranks_and_not_the_launcher(runs: Runs, tmp_path: Path) -> None:
    """As in scripts/train.slurm: a launcher that ignores SIGUSR1 starts ranks that take it."""
    straight = runs.straight("cpu_ddp")
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a child begins with what its parent ignores
    try:
        words = ("--main_process_port", free_port(), "-m", "lora_accel.train", *runs.words)
        fault = {"LORA_ACCEL_FAULT": "step.after_backward@3=pause", "LORA_ACCEL_FAULT_MARK": str(tmp_path / "mark")}
        launcher = start(*words, preset="cpu_ddp", **fault)
    finally:
        signal.signal(signal.SIGUSR1, before)
    wait_for(lambda: all((tmp_path / f"mark-{rank}").exists() for rank in (0, 1)), "no step 3")
    for pid in (launcher.pid, *status(runs.output)["pids"]):
        os.kill(pid, signal.SIGUSR1)
    finish(launcher)
    assert (status(runs.output)["state"], status(runs.output)["step"]) == ("preempted", 3)
    runs.resumes_to(straight, "cpu_ddp")
