"""One run per folder: the second is refused, and whatever way the first one ends, the folder is free again."""

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
    """Another process that holds tmp_path/run until its input ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def attempt(folder: Path) -> str:
    """Try to hold a folder in a process of its own; return what it says."""
    command = [sys.executable, "-c", TRY, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_second_run_is_refused_and_told_who_holds_the_folder(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused, locked(tmp_path / "run"):
        pytest.fail("held twice")
    said = str(refused.value)
    assert said.startswith(f"output_dir: {tmp_path / 'run'} is in use by another run (process {holder.pid} on ")
    assert f"on {socket.gethostname()})" in said
    assert "wait for it, stop it, or name another folder" in said
    assert attempt(tmp_path / "run") == said, "the first is still in the folder"
    assert (tmp_path / "run" / LOCK).read_text() == f"process {holder.pid} on {socket.gethostname()}"


@pytest.mark.usefixtures("holder")
def test_a_training_in_a_folder_in_use_writes_nothing(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is in use by another run"):
        run_training(make_config())
    assert names(tmp_path / "run") == {LOCK}


def test_the_death_of_the_holder_frees_the_folder(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.kill()
    assert holder.wait() == -9
    assert names(tmp_path / "run") == {LOCK}, "a killed process tidies nothing"
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}"
        assert f"(process {os.getpid()} on " in attempt(tmp_path / "run")
    assert names(tmp_path / "run") == set(), "another made the folder, so it is not ours to delete"


def test_when_the_holder_ends_the_next_one_may(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.communicate()
    assert holder.returncode == 0
    assert names(tmp_path) == set()
    assert attempt(tmp_path / "run") == "held"


@pytest.mark.parametrize("text", ["process 1 on elsewhere", "", "a" * 10_000, "\xff\x00"])
def test_the_lock_file_of_a_dead_process_is_no_obstacle(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text, encoding="latin-1")
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert names(tmp_path) == set()


def fail_in(folder: Path, *, writes: str = "") -> None:
    with locked(folder):
        assert names(folder) == {LOCK}
        if writes:
            (folder / writes).write_text("seed: 0")
        raise ZeroDivisionError


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_of_a_run_that_wrote_nothing(tmp_path: Path, fails: bool) -> None:
    (tmp_path / "there").mkdir()
    folder = tmp_path / "there" / "made" / "run"
    if fails:
        with pytest.raises(ZeroDivisionError):
            fail_in(folder)
    else:
        with locked(folder):
            assert names(folder) == {LOCK}
    assert names(tmp_path) == {"there"}
    assert names(tmp_path / "there") == set()


def test_what_a_run_wrote_stays_and_all_folders_above_it(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "run"
    with pytest.raises(ZeroDivisionError):
        fail_in(folder, writes="config.yaml")
    assert names(folder) == {"config.yaml"}
    with locked(tmp_path / "shared" / "one"):
        (tmp_path / "shared" / "another").mkdir()
    assert names(tmp_path / "shared") == {"another"}


def test_an_empty_folder_that_was_there_before_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        pass
    assert names(tmp_path) == {"run"}


def test_a_run_that_is_refused_leaves_the_folders_as_they_were(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    before = names(tmp_path)
    config = make_config(output_dir=str(tmp_path / "new" / "run"), data={"train": [{"path": str(tmp_path / "none")}]})
    with pytest.raises(Exception, match="none"):
        run_training(config)
    assert names(tmp_path) == before


def test_a_new_folder_is_made_when_all_may_begin_and_not_before(tmp_path: Path) -> None:
    """Else it would stay where the launcher kills the main process because another one has failed."""
    folder = tmp_path / "made" / "run"
    with lock_run_folder(folder, enabled=True) as begin:
        assert names(tmp_path) == set()
        begin()
        assert names(folder) == {LOCK}
        assert "is in use by another run" in attempt(folder)
    assert names(tmp_path) == set()
    with lock_run_folder(folder, enabled=False) as begin:
        begin()
        assert names(tmp_path) == set()


def test_a_run_has_made_nothing_until_all_processes_agree(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    agree, there = resume.check_ranks_agree, []

    def watched(*words: Any) -> None:
        there.append((tmp_path / "run").exists())
        agree(*words)

    monkeypatch.setattr(resume, "check_ranks_agree", watched)
    run_training(make_config())
    assert there == [False]


def test_a_folder_that_is_there_is_held_from_the_beginning(tmp_path: Path) -> None:
    with lock_run_folder(tmp_path, enabled=True) as begin:
        assert "is in use by another run" in attempt(tmp_path)
        begin()
        assert "is in use by another run" in attempt(tmp_path)


@pytest.mark.parametrize("writes", ["", "plan.json"])
def test_of_two_runs_that_begin_in_one_new_folder_one_is_refused(tmp_path: Path, writes: str) -> None:
    """Whether the other still runs or has ended: what to go on from was looked for before it began."""
    folder = tmp_path / "run"
    with lock_run_folder(folder, enabled=True) as begin:
        if writes:
            folder.mkdir()
            (folder / writes).write_text("{}")
            with pytest.raises(ConfigError, match=r"another run has begun in .* meanwhile"):
                begin()
        else:
            with locked(folder), pytest.raises(ConfigError, match="is in use by another run"):
                begin()


def test_a_lock_file_that_its_holder_deletes_after_it_was_opened_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between open and flock the run before may end: its file is locked then, but no longer in the folder."""
    flock, calls = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path):
        assert len(calls) == 2
        assert f"in use by another run (process {os.getpid()} " in attempt(tmp_path)


def test_a_file_system_without_locks_is_told_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path / "run"):
        assert names(tmp_path / "run") == {LOCK}
    said = capsys.readouterr().err
    assert said.startswith(f"note: {tmp_path / 'run'} cannot be locked ([Errno {errno.ENOLCK}] No locks available)")
    assert names(tmp_path) == set()
