"""Locks of DeepSpeed's builds: wait for builds in progress, delete the locks of dead processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_build_directory
from torch.utils.file_baton import FileBaton

from lora_accel.distributed import builds
from lora_accel.distributed.builds import UNSEEN_SECONDS, is_held, wait_for_builds
from lora_accel.distributed.launch import wait_for_extension_builds
from lora_accel.errors import ConfigError

LAYOUTS = pytest.mark.parametrize("layout", ["deepspeed_shm_comm", "py311_cpu/deepspeed_shm_comm"])


@pytest.fixture(autouse=True)
def _poll_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "POLL_SECONDS", 0.05)


@pytest.fixture
def locked() -> Iterator[Callable[..., FileBaton]]:
    """Return a function that locks a build folder as torch does, `age` seconds ago. died: whether its owner died."""
    batons = []

    def lock(folder: Path, age: float = 0, *, died: bool = False) -> FileBaton:
        folder.mkdir(parents=True, exist_ok=True)
        baton = FileBaton(str(folder / "lock"))
        assert baton.try_acquire()
        then = time.time() - age
        os.utime(baton.lock_file_path, (then, then))
        if died:
            os.close(baton.fd)
        else:
            batons.append(baton)
        return baton

    yield lock
    for baton in batons:
        if os.path.exists(baton.lock_file_path):
            baton.release()


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Callable[[], Future[None]]]:
    """Return a function that waits for the builds below tmp_path in a thread."""
    with ThreadPoolExecutor() as threads:
        yield lambda: threads.submit(wait_for_builds, tmp_path)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Return an event that is set when `wait_for_builds` has checked a lock's owner."""
    event = threading.Event()

    def recording_is_held(lock: Path) -> bool:
        result = is_held(lock)
        event.set()
        return result

    monkeypatch.setattr(builds, "is_held", recording_is_held)
    return event


def test_without_a_lock_nothing_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wait_for_builds(tmp_path / "nowhere")
    built = tmp_path / "py311_cpu" / "cpu_adam"
    built.mkdir(parents=True)
    (built / "cpu_adam.so").touch()
    (built / ".ninja_log").touch()
    wait_for_builds(tmp_path)
    assert capsys.readouterr() == ("", "")


@LAYOUTS
@pytest.mark.parametrize("age", [0, 10 * UNSEEN_SECONDS])
def test_wait_for_a_live_owner_at_any_age(
    tmp_path: Path,
    locked: Callable[..., FileBaton],
    waiting: Callable[[], Future[None]],
    checked: threading.Event,
    capsys: pytest.CaptureFixture[str],
    layout: str,
    age: float,
) -> None:
    baton = locked(tmp_path / layout, age)
    done = waiting()
    for _ in range(2):
        checked.wait()
        checked.clear()
    assert not done.done()
    baton.release()
    done.result()
    assert capsys.readouterr() == ("", f"note: waiting for another process to build {tmp_path / layout}\n")


@LAYOUTS
def test_lock_of_a_dead_owner_is_deleted(
    tmp_path: Path, locked: Callable[..., FileBaton], capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    lock = locked(tmp_path / layout, died=True).lock_file_path
    wait_for_builds(tmp_path)
    assert not os.path.exists(lock)
    assert capsys.readouterr().err == f"note: deleted {lock}: its owner died\n"


def test_death_of_the_owner_is_detected(
    tmp_path: Path, waiting: Callable[[], Future[None]], checked: threading.Event
) -> None:
    """The owner is torch, killed while the compiler runs; the compiler outlives it."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-c*) echo $$ > PID.part; mv PID.part PID; exec sleep 3600;; esac\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    (tmp_path / "op.cpp").write_text("int one() { return 1; }")
    folder = tmp_path / "cpu_adam"
    folder.mkdir()
    program = (
        "from torch.utils.cpp_extension import load\n"
        f"load('cpu_adam', [{str(tmp_path / 'op.cpp')!r}], build_directory={str(folder)!r})"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"CXX": str(compiler)}, stderr=subprocess.DEVNULL
    )
    while not (folder / "PID").exists():
        assert owner.poll() is None
        time.sleep(0.05)
    owner.kill()
    owner.wait()
    done = waiting()
    checked.wait()
    assert not done.done(), "ninja and the compiler are still writing"
    os.kill(int((folder / "PID").read_text()), signal.SIGKILL)
    done.result()
    assert not (folder / "lock").exists()


def test_lock_of_a_new_build_is_not_deleted(
    tmp_path: Path,
    locked: Callable[..., FileBaton],
    waiting: Callable[[], Future[None]],
    monkeypatch: pytest.MonkeyPatch,
    checked: threading.Event,
) -> None:
    """Between two checks, another run deletes the same lock and starts to build."""
    lock = Path(locked(tmp_path / "cpu_adam", died=True).lock_file_path)
    new_locks: list[FileBaton] = []
    sleep = time.sleep

    def sleep_and_lock(seconds: float) -> None:
        if not new_locks:
            lock.unlink()
            new_locks.append(locked(tmp_path / "cpu_adam"))
        sleep(seconds)

    monkeypatch.setattr(builds.time, "sleep", sleep_and_lock)
    done = waiting()
    for _ in range(3):
        checked.wait()
        checked.clear()
    assert lock.exists()
    new_locks[0].release()
    done.result()


@pytest.mark.parametrize("condition", ["_is_on_network", "_is_container"])
def test_lock_is_kept_for_a_while_if_its_owner_may_be_invisible(
    tmp_path: Path,
    locked: Callable[..., FileBaton],
    waiting: Callable[[], Future[None]],
    monkeypatch: pytest.MonkeyPatch,
    checked: threading.Event,
    condition: str,
) -> None:
    monkeypatch.setattr(builds, condition, lambda *_: True)
    lock = Path(locked(tmp_path / "cpu_adam", died=True).lock_file_path)
    done = waiting()
    for _ in range(2):
        checked.wait()
        checked.clear()
    assert lock.exists()
    then = time.time() - UNSEEN_SECONDS - 120
    os.utime(lock, (then, then))
    if condition == "_is_container":
        done.result()
        assert not lock.exists()
    else:
        with pytest.raises(ConfigError, match=rf"^{lock} was created 12 minutes ago, .* delete that file$"):
            done.result()
        assert lock.exists()


def test_locks_of_other_extensions_are_ignored(
    tmp_path: Path, locked: Callable[..., FileBaton], capsys: pytest.CaptureFixture[str]
) -> None:
    lock = locked(tmp_path / "py311_cpu" / "another_op", died=True).lock_file_path
    wait_for_builds(tmp_path)
    assert os.path.exists(lock)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("variable", ["TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"])
def test_local_rank_0_checks_the_folder_that_torch_builds_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: Callable[..., FileBaton], variable: str
) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    folder = Path(_get_build_directory("deepspeed_shm_comm", verbose=False))
    assert tmp_path in folder.parents
    lock = locked(folder, died=True).lock_file_path
    monkeypatch.setenv("LOCAL_RANK", "1")
    wait_for_extension_builds()
    assert os.path.exists(lock)
    monkeypatch.setenv("LOCAL_RANK", "0")
    wait_for_extension_builds()
    assert not os.path.exists(lock)
