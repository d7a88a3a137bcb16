"""A stalled rank is reported by the others, and a signal then ends the run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_accel.distributed import heartbeat
from lora_accel.distributed.heartbeat import Missing, Position, Process, find_missing, watch_ranks
from lora_accel.training.stopping import signal_handler
from tests.distributed.disturbed import Runs
from tests.distributed.test_signals import is_running, status, wait_for


class DictStore:
    """A store in this process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return set(keys) <= set(self.values)


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Shorten all times, and return the exit codes with which a monitor would have ended the process."""
    times = {"BEAT": 0.05, "REPORT": 0.6, "SILENT": 0.4, "GRACE": 0.4, "AGAIN": 0.1, "ABORT": 0.2}
    for name, seconds in times.items():
        monkeypatch.setattr(heartbeat, f"{name}_SECONDS", seconds)
    codes: list[int] = []

    def exit_process(code: int) -> None:
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr(heartbeat.os, "_exit", exit_process)
    return codes


def other_rank(store: DictStore, rank: int, position: tuple[int, int], end: threading.Event) -> threading.Thread:
    """Return a thread that responds for another rank, which stays at one position."""

    def run() -> None:
        beat = 0
        while not end.wait(0.05):
            beat += 1
            store.set(str(rank), json.dumps([beat, *position]))

    return threading.Thread(target=run)


@contextlib.contextmanager
def watched(rank: int, *others: tuple[int, tuple[int, int]], size: int = 2) -> Iterator[tuple[DictStore, list[str]]]:
    """Watch from a rank in step 2 within the block, while other ranks respond."""
    store, position, end, states = DictStore(), Position(), threading.Event(), []
    for number in range(size):
        store.set(str(number), "[0, 0, 0]")
    position.reach(1, 2)
    processes = [Process(os.getpid() if number == rank else 2**22 + number, "host") for number in range(size)]
    threads = [other_rank(store, number, location, end) for number, location in others]
    for thread in threads:
        thread.start()
    try:
        with (
            signal_handler(lambda *_: None),
            watch_ranks(store, position, processes, rank, on_abort=states.append),
        ):
            yield store, states
    finally:
        end.set()
        for thread in threads:
            thread.join()


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_ranks_that_wait_for_each_other_are_not_reported(codes: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    with watched(0, (1, (1, 2))):
        time.sleep(1.2)
        send(signal.SIGTERM)  # the step is finished first
        time.sleep(0.8)
    assert capsys.readouterr().err == ""
    assert codes == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_silent_rank_is_reported_and_a_signal_ends_the_run(
    codes: list[int], capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    with watched(0) as (store, states):
        time.sleep(1.0)
        assert json.loads(store.get(heartbeat.STATE_KEY)) == [[1, 0, True]]
        assert states == []
        send(number)
        wait_for(lambda: bool(codes), "not ended", seconds=10)
    assert codes == [{signal.SIGINT: 130, signal.SIGQUIT: 131}.get(number, 143)]
    assert states == ["failed"]
    err = capfd.readouterr().err
    assert "rank 1 (process 4194305 on host) has not arrived at the next exchange of step 2 for " in err
    assert "it does not respond (stopped or swapping?); it was last in step 1. " in err
    assert f"error: ended by {number.name} while rank 1 was stalled; run the same command to resume" in err


def test_rank_that_responds_is_waited_for_before_a_signal_ends_the_run(
    codes: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    with watched(0, (1, (1, 1))) as (_, states):
        time.sleep(1.0)
        sent = time.monotonic()
        send(signal.SIGTERM)
        wait_for(lambda: bool(codes), "not ended", seconds=10)
        assert time.monotonic() - sent >= heartbeat.GRACE_SECONDS
    assert states == ["failed"]
    assert "it responds; it was last in step 2, micro-batch 1. " in capfd.readouterr().err


def test_recovery_is_reported(codes: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    end = threading.Event()
    with watched(0) as (store, _):
        time.sleep(1.0)
        thread = other_rank(store, 1, (1, 2), end)
        thread.start()
        time.sleep(0.5)
        end.set()
        thread.join()
    assert capsys.readouterr().err.splitlines()[-1] == "all ranks respond again; training continues"
    assert codes == []


def test_other_ranks_end_too_and_only_one_writes_the_state(codes: list[int]) -> None:
    with watched(2, size=3) as (store, states):
        store.set(heartbeat.STATE_KEY, "[[1, 0, true]]")
        time.sleep(0.3)
        send(signal.SIGTERM)
        wait_for(lambda: bool(codes), "not ended", seconds=10)
    assert (codes, states) == ([143], [])


def test_rank_1_reports_rank_0(codes: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    with watched(1) as (_, states):
        time.sleep(1.0)
        send(signal.SIGTERM)
        wait_for(lambda: bool(codes), "not ended", seconds=10)
    assert states == ["failed"]
    assert "rank 0 (process 4194304 on host) has not arrived" in capfd.readouterr().err


def test_second_ctrl_c_ends_a_main_thread_that_waits(codes: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    with watched(0, (1, (1, 2))) as (_, states):
        send(signal.SIGINT)
        time.sleep(0.3)
        assert codes == []
        send(signal.SIGINT)
        wait_for(lambda: bool(codes), "not ended", seconds=10)
    assert (codes, states) == ([130], ["preempted"])
    assert "error: ended by SIGINT; run the same command" in capfd.readouterr().err


@pytest.mark.parametrize("presses", [1, 2])
def test_second_ctrl_c_explains_a_failed_collective(
    codes: list[int], monkeypatch: pytest.MonkeyPatch, presses: int
) -> None:
    """The other rank has exited at it; Python has handled both as one."""
    monkeypatch.setattr(heartbeat, "ABORT_SECONDS", 60)

    def fail() -> None:
        with watched(0, (1, (1, 2))):
            for _ in range(presses):
                send(signal.SIGINT)
                time.sleep(0.3)
            raise RuntimeError("Connection closed by peer")

    with pytest.raises(KeyboardInterrupt if presses == 2 else RuntimeError):
        fail()
    assert codes == []


def test_limits_by_position() -> None:
    ranks = [heartbeat._Rank(0.0) for _ in range(4)]
    for rank, text in zip(ranks, ("[9, 3, 2]", "[9, 3, 1]", "[9, 3, 2]", "[9, 2, 4]"), strict=True):
        rank.update(text, 10 if rank is ranks[3] else 99)
    ranks[3].update("[10, 2, 4]", 99)
    assert find_missing(ranks, 100.0, 60.0, 60.0) == [], "the leading ranks have just moved"
    assert find_missing(ranks, 158.0, 59.0, 60.0) == [Missing(1, 59.0, False), Missing(3, 148.0, False)]
    assert find_missing(ranks, 160.0, 60.0, 60.0) == [Missing(number, 61.0, True) for number in range(4)]
    assert find_missing(ranks[:3], 100.0, 0.5, 60.0) == [Missing(1, 1.0, False)]


def test_default_times() -> None:
    """torchrun kills 30 seconds after a signal."""
    assert heartbeat.REPORT_SECONDS == 60
    assert heartbeat.SILENT_SECONDS + heartbeat.BEAT_SECONDS < 30
    assert heartbeat.GRACE_SECONDS + heartbeat.BEAT_SECONDS <= 30


def test_one_process_is_not_watched() -> None:
    before = threading.active_count()
    with watch_ranks(None, Position(), [Process.current()], 0, on_abort=lambda _: None):
        assert threading.active_count() == before


@pytest.mark.distributed
@pytest.mark.parametrize("stopped", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_stopped_rank_of_a_real_run(runs: Runs, tmp_path: Path, stopped: int) -> None:
    """SIGSTOP; the other rank waits in a collective. SIGTERM leaves the state failed, no process, and a checkpoint."""
    expected = runs.uninterrupted("cpu_ddp")
    fault = {"LORA_ACCEL_FAULT": f"step.begin@3=pause:rank={stopped}", "LORA_ACCEL_FAULT_MARK": str(tmp_path / "mark")}
    processes = runs.forks.start("cpu_ddp", runs.args, SABOTAGE="impatient", **fault)
    pids = [process.pid for process in processes if process.pid]
    mark = tmp_path / f"mark-{stopped}"
    try:
        wait_for(lambda: mark.exists() or not all(map(is_running, pids)), "no step 3")
        os.kill(pids[stopped], signal.SIGSTOP)
        message = f"rank {stopped} (process {pids[stopped]} on "
        wait_for(lambda: message in runs.forks.log(processes), "not reported", seconds=60)
        assert status(runs.output)["state"] == "running"
        os.kill(pids[1 - stopped], signal.SIGTERM)
        wait_for(lambda: not any(map(is_running, pids)), "still running", seconds=30)
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert processes[1 - stopped].exitcode == 143, runs.forks.log(processes)
    assert (status(runs.output)["state"], status(runs.output)["step"]) == ("failed", 2)
    assert "Traceback" not in runs.forks.log(processes)
    if stopped == 1:
        runs.check_resumed(expected, "cpu_ddp")


@pytest.mark.distributed
def test_second_ctrl_c_ends_ranks_that_wait_in_a_collective(runs: Runs, tmp_path: Path) -> None:
    """Rank 1 hangs, rank 0 waits for it, where Python handles no signal."""
    runs.uninterrupted("cpu_ddp")
    fault = {"LORA_ACCEL_FAULT": "step.begin@3=hang:rank=1", "LORA_ACCEL_FAULT_MARK": str(tmp_path / "mark")}
    processes = runs.forks.start("cpu_ddp", runs.args, **fault)
    pids = [process.pid for process in processes if process.pid]
    try:
        wait_for(lambda: (tmp_path / "mark-1").exists() or not all(map(is_running, pids)), "no step 3")
        time.sleep(1.0)  # rank 0 waits from now on
        for _ in range(2):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGINT)
            time.sleep(1.5)
        wait_for(lambda: not any(map(is_running, pids)), "still running", seconds=30)
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert [process.exitcode for process in processes] == [130, 130]
    assert "Traceback" not in runs.forks.log(processes)
    assert status(runs.output)["state"] == "preempted"
