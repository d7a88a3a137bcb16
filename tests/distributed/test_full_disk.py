"""A full disk ends all ranks with exit code 3, keeps earlier checkpoints, and the run resumes bit for bit."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_accel.saving.atomic import why_invalid
from lora_accel.saving.discovery import FILES, OPTIMIZER, step_folders
from tests.distributed.disturbed import Result, Runs
from tests.distributed.test_signals import wait_for

pytestmark = pytest.mark.distributed


def interrupt_after_three_steps(runs: Runs, preset: str) -> Result:
    """Kill a run in step 4; return the result of the uninterrupted run."""
    expected = runs.uninterrupted(preset)
    runs.train(preset, LORA_ACCEL_FAULT="step.begin@4=kill")
    return expected


def check_newest(runs: Runs, step: int) -> None:
    """Check that the newest checkpoint is that of a step, all are valid, and there are no leftovers."""
    folders = step_folders(runs.output / "checkpoints")
    assert folders[-1].name == f"step-{step:08d}"
    assert all(why_invalid(folder, required=FILES) is None for folder in folders)
    assert not list((runs.output / "checkpoints").glob(".*"))


@pytest.mark.parametrize("preset", ["cpu", pytest.param("cpu_ddp", marks=pytest.mark.slow), "cpu_zero3"])
def test_file_size_limit_ends_the_run_and_loses_nothing(runs: Runs, preset: str) -> None:
    """RLIMIT_FSIZE on the rank that writes: 3/4 of the size of the moments' file."""
    expected = interrupt_after_three_steps(runs, preset)
    size = (runs.output / "checkpoints" / "step-00000003" / OPTIMIZER).stat().st_size
    codes = runs.train(preset, FSIZE=str(size * 3 // 4), FSIZE_RANK="0")
    assert 3 in codes, f"{codes}\n{runs.forks.log()}"
    assert 0 not in codes
    assert "saving step-00000004 failed on rank 0: OSError: [Errno 27] File too large" in runs.forks.log()
    check_newest(runs, 3)
    runs.check_resumed(expected, preset)


def test_file_size_limit_on_another_rank_has_no_effect(runs: Runs) -> None:
    expected = interrupt_after_three_steps(runs, "cpu_ddp")
    log_bytes = 100_000
    assert runs.train("cpu_ddp", FSIZE=str(log_bytes), FSIZE_RANK="1") == [0, 0], runs.forks.log()
    runs.check_resumed(expected, "cpu_ddp")


@pytest.mark.parametrize(
    ("preset", "rank"),
    [
        ("cpu_ddp", 1),
        ("cpu_zero3", 0),
        pytest.param("cpu_ddp", 0, marks=pytest.mark.slow),
        pytest.param("cpu_zero3", 1, marks=pytest.mark.slow),
    ],
)
def test_full_disk_on_one_rank_ends_all_ranks(runs: Runs, preset: str, rank: int) -> None:
    expected = interrupt_after_three_steps(runs, preset)
    codes = runs.train(preset, LORA_ACCEL_FAULT=f"save.begin@1=enospc:rank={rank}")
    assert 3 in codes
    assert 0 not in codes, f"{codes}\n{runs.forks.log()}"
    assert f"saving step-00000004 failed on rank {rank}" in runs.forks.log()
    check_newest(runs, 3)
    runs.check_resumed(expected, preset)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False)
    if mounted.returncode != 0:
        pytest.skip("no permission to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


@pytest.mark.parametrize("preset", ["cpu", "cpu_ddp"])
def test_full_disk_ends_the_run_and_loses_nothing(runs: Runs, tmp_path: Path, preset: str) -> None:
    expected = runs.uninterrupted(preset)
    with small_disk(runs.output, 4 << 20):
        fault = {"LORA_ACCEL_FAULT": "step.begin@4=pause", "LORA_ACCEL_FAULT_MARK": str(tmp_path / "mark")}
        processes = runs.forks.start(preset, runs.args, **fault)
        marks = [tmp_path / f"mark-{rank}" for rank in range(len(processes))]
        filler = runs.output / "filler"
        wait_for(lambda: all(mark.exists() for mark in marks) or not processes[0].is_alive(), "no step 4")
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(os.urandom(4096))
        for mark in marks:
            mark.unlink()
        codes = runs.forks.finish(processes)
        assert 3 in codes, f"{codes}\n{runs.forks.log()}"
        assert 0 not in codes
        assert "No space left on device" in runs.forks.log()
        check_newest(runs, 3)

        # A rank that the launcher ends exits with -15, 1, or 143 if it still handled the signal.
        assert set(runs.train(preset)) - {-15, 1, 143} == {2}, "the check before the first step fails"
        assert "MB free, but 3 checkpoints of" in runs.forks.log()
        check_newest(runs, 3)

        filler.unlink()
        runs.check_resumed(expected, preset)
        shutil.rmtree(runs.output, ignore_errors=True)
