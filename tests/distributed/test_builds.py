"""Locks of DeepSpeed's builds: wait for builds in progress, delete the locks of dead processes."""

from __future__ import annotations

import contextlib
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
from filelock import FileLock
from torch.utils.cpp_extension import _get_build_directory
from torch.utils.file_baton import FileBaton

from lora_accel.distributed import builds
from lora_accel.distributed.builds import OWN_LOCK, UNSEEN_SECONDS, exclusive_builds, is_held
from lora_accel.distributed.launch import extensions_root
from lora_accel.errors import ConfigError

LAYOUTS = pytest.mark.parametrize("layout", ["deepspeed_shm_comm", "py311_cpu/deepspeed_shm_comm"])


@pytest.fixture(autouse=True)
def _poll_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "POLL_SECONDS", 0.05)


def wait_for_builds(root: Path, *, is_own: bool = False) -> None:
    with exclusive_builds(root, is_own=is_own):
        assert not list(root.rglob("lock")) or not is_own


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


@pytest.mark.parametrize("condition", ["_is_on_network", "_may_be_shared"])
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
    if condition == "_may_be_shared":
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


@pytest.mark.parametrize("condition", ["_may_be_shared", "no_condition"])
def test_lock_in_a_folder_of_this_package_is_deleted_at_once(
    tmp_path: Path,
    locked: Callable[..., FileBaton],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    condition: str,
) -> None:
    """In a container too, where other processes that use the folder are not visible: they would hold the lock."""
    monkeypatch.setattr(builds, condition, lambda *_: True, raising=False)
    lock = locked(tmp_path / "deepspeed_shm_comm", died=True).lock_file_path
    start = time.monotonic()
    wait_for_builds(tmp_path, is_own=True)
    assert time.monotonic() - start < 5
    assert not os.path.exists(lock)
    assert capsys.readouterr().err == f"note: deleted {lock}: its owner died\n"


def test_processes_of_this_package_build_one_at_a_time(
    tmp_path: Path, waiting: Callable[[], Future[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed owner releases its lock: it is the kernel's."""
    acquire = f"lock = FileLock({str(tmp_path / OWN_LOCK)!r})\nlock.acquire()"
    code = f"import time\nfrom filelock import FileLock\n{acquire}\nprint(1, flush=True)\ntime.sleep(600)"
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    owner.stdout.readline()
    done = waiting()
    time.sleep(0.3)
    assert not done.done()
    owner.kill()
    owner.wait()
    done.result(timeout=60)
    owner.stdout.close()


@pytest.mark.parametrize("is_torchs", [True, False])
def test_a_wait_is_reported_and_bounded(
    tmp_path: Path,
    locked: Callable[..., FileBaton],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_torchs: bool,
) -> None:
    monkeypatch.setattr(builds, "REPORT_SECONDS", 0.2)
    monkeypatch.setattr(builds, "MAX_WAIT_SECONDS", 0.7)
    if is_torchs:
        locked(tmp_path / "cpu_adam")
    own = FileLock(tmp_path / OWN_LOCK)
    message = "set the environment variable TORCH_EXTENSIONS_DIR to another folder"
    with contextlib.nullcontext() if is_torchs else own, pytest.raises(ConfigError, match=message):
        wait_for_builds(tmp_path)
    notes = capsys.readouterr().err.splitlines()
    assert 3 <= len(notes) <= 5
    assert all(note.startswith(f"note: waiting for another process to build {tmp_path}") for note in notes)


def test_extensions_are_built_in_a_folder_of_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user chooses one, which other programs may use."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    root, is_own = extensions_root()
    assert is_own
    assert root.parent == tmp_path / "torch_extensions"
    assert root.name.startswith("lora_accel-torch-")
    assert Path(_get_build_directory("deepspeed_shm_comm", verbose=False)).parent == root
    assert extensions_root() == (root, True), "every rank"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "theirs"))
    assert extensions_root() == (tmp_path / "theirs", False)
