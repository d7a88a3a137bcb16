"""One run per folder: a second run fails, and however the first one ends, the lock is released."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_accel import RunConfig, run_training
from lora_accel.errors import ConfigError
from lora_accel.saving.lock import LOCK, lock_run_folder, locked
from lora_accel.setup import resume
from tests.conftest import ROOT

HOLD = """
import sys
from pathlib import Path
from lora_accel.saving.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
TRY = """
import sys
from pathlib import Path
from lora_accel.errors import ConfigError
from lora_accel.saving.lock import locked
try:
    with locked(Path(sys.argv[1])):
        print("held")
except ConfigError as error:
    print(error)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start another process that locks tmp_path/run until its stdin is closed."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def attempt(folder: Path) -> str:
    """Try to lock a folder in another process; return its output."""
    command = [sys.executable, "-c", TRY, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_second_run_fails_and_names_the_holder(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught, locked(tmp_path / "run"):
        pytest.fail("locked twice")
    message = str(caught.value)
    assert message.startswith(f"output_dir: {tmp_path / 'run'} is in use by another run (process {holder.pid} on ")
    assert f"on {socket.gethostname()})" in message
    assert "wait for it, stop it, or choose another folder" in message
    assert attempt(tmp_path / "run") == message, "the first process still has the lock"
    assert (tmp_path / "run" / LOCK).read_text() == f"process {holder.pid} on {socket.gethostname()}"


@pytest.mark.usefixtures("holder")
def test_training_in_a_locked_folder_writes_nothing(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is in use by another run"):
        run_training(make_config())
    assert names(tmp_path / "run") == {LOCK}


def test_killed_holder_releases_the_lock(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.kill()
    assert holder.wait() == -9
    assert names(tmp_path / "run") == {LOCK}, "a killed process does not clean up"
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}"
        assert f"(process {os.getpid()} on " in attempt(tmp_path / "run")
    assert names(tmp_path / "run") == set(), "another process created the folder, so it is not deleted"


def test_next_run_can_lock_after_the_holder_exits(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.communicate()
    assert holder.returncode == 0
    assert names(tmp_path) == set()
    assert attempt(tmp_path / "run") == "held"


@pytest.mark.parametrize("text", ["process 1 on elsewhere", "", "a" * 10_000, "\xff\x00"])
def test_lock_file_of_a_dead_process_is_reused(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text, encoding="latin-1")
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert names(tmp_path) == set()


def fail_in(folder: Path, *, file: str = "") -> None:
    with locked(folder):
        assert names(folder) == {LOCK}
        if file:
            (folder / file).write_text("seed: 0")
        raise ZeroDivisionError


@pytest.mark.parametrize("fails", [False, True])
def test_created_folders_are_deleted_if_the_run_wrote_nothing(tmp_path: Path, fails: bool) -> None:
    (tmp_path / "existing").mkdir()
    folder = tmp_path / "existing" / "new" / "run"
    if fails:
        with pytest.raises(ZeroDivisionError):
            fail_in(folder)
    else:
        with locked(folder):
            assert names(folder) == {LOCK}
    assert names(tmp_path) == {"existing"}
    assert names(tmp_path / "existing") == set()


def test_folders_with_files_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with pytest.raises(ZeroDivisionError):
        fail_in(folder, file="config.yaml")
    assert names(folder) == {"config.yaml"}
    with locked(tmp_path / "shared" / "one"):
        (tmp_path / "shared" / "another").mkdir()
    assert names(tmp_path / "shared") == {"another"}


def test_existing_empty_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        pass
    assert names(tmp_path) == {"run"}


def test_run_with_invalid_data_creates_no_folders(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    before = names(tmp_path)
    config = make_config(output_dir=str(tmp_path / "new" / "run"), data={"train": [{"path": str(tmp_path / "none")}]})
    with pytest.raises(Exception, match="none"):
        run_training(config)
    assert names(tmp_path) == before


def test_new_folder_is_created_only_when_all_ranks_can_start(tmp_path: Path) -> None:
    """Otherwise it would be left behind if the launcher kills the main process because another rank failed."""
    folder = tmp_path / "new" / "run"
    with lock_run_folder(folder, enabled=True) as begin:
        assert names(tmp_path) == set()
        begin()
        assert names(folder) == {LOCK}
        assert "is in use by another run" in attempt(folder)
    assert names(tmp_path) == set()
    with lock_run_folder(folder, enabled=False) as begin:
        begin()
        assert names(tmp_path) == set()


def test_run_creates_nothing_before_the_ranks_agree(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_ranks_agree, folder_existed = resume.check_ranks_agree, []

    def recording_check(*args: Any) -> None:
        folder_existed.append((tmp_path / "run").exists())
        check_ranks_agree(*args)

    monkeypatch.setattr(resume, "check_ranks_agree", recording_check)
    run_training(make_config())
    assert folder_existed == [False]


def test_existing_folder_is_locked_immediately(tmp_path: Path) -> None:
    with lock_run_folder(tmp_path, enabled=True) as begin:
        assert "is in use by another run" in attempt(tmp_path)
        begin()
        assert "is in use by another run" in attempt(tmp_path)


@pytest.mark.parametrize("file", ["", "plan.json"])
def test_second_of_two_runs_in_a_new_folder_fails(tmp_path: Path, file: str) -> None:
    """Also if the other run has ended: this run looked for checkpoints before the other one started."""
    folder = tmp_path / "run"
    with lock_run_folder(folder, enabled=True) as begin:
        if file:
            folder.mkdir()
            (folder / file).write_text("{}")
            with pytest.raises(ConfigError, match=r"another run has started in .* in the meantime"):
                begin()
        else:
            with locked(folder), pytest.raises(ConfigError, match="is in use by another run"):
                begin()


def test_lock_file_deleted_between_open_and_flock_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The previous run may end in between: its lock file is locked then, but no longer in the folder."""
    flock, calls = fcntl.flock, []

    def delayed_flock(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            (tmp_path / LOCK).unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", delayed_flock)
    with locked(tmp_path):
        assert len(calls) == 3
        assert f"in use by another run (process {os.getpid()} " in attempt(tmp_path)


def test_file_system_without_locks_prints_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported_flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported_flock)
    with locked(tmp_path / "run"):
        assert names(tmp_path / "run") == {LOCK}
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"note: {tmp_path / 'run'} cannot be locked ([Errno {errno.ENOLCK}] No locks available)")
    assert names(tmp_path) == set()
