"""Build and load DeepSpeed's extensions one process at a time, and delete the locks that killed processes left.

torch builds and loads an extension under a lock file, which it deletes afterwards. If that process is killed, the file
stays, and every later process waits for it forever. Here all processes of this package take one file lock, which the
kernel releases when its owner dies. While a process holds it in a folder of this package, every lock of torch's in
there is one of a dead process. A folder that other programs build in too gives no such proof: there the owner of a
lock is searched among the processes of this machine.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from lora_accel.errors import ConfigError
from lora_accel.logs import logger

BUILT_OPS = ("deepspeed_shm_comm", "cpu_adam", "async_io", "pin_memory")
"""The extensions that this package can make DeepSpeed compile."""
UNSEEN_SECONDS = 600
"""Age below which a lock may belong to a process that is not visible here: on another machine, in a container."""
MAX_WAIT_SECONDS = 600
"""Longest wait for another process. A build takes about a minute."""
REPORT_SECONDS = 10.0
"""Interval at which a wait is reported."""
OWN_LOCK = "lora_accel.lock"
POLL_SECONDS = 0.5
NETWORK_FILE_SYSTEMS = (
    *("nfs", "smb", "cifs", "lustre", "gpfs", "beegfs", "ceph", "afs", "glusterfs", "fuse", "9p", "virtiofs"),
)
HOST_PID_NAMESPACE = "pid:[4026531836]"
"""The initial PID namespace of Linux (`PROC_PID_INIT_INO`), which sees all processes. A container has its own."""


@contextlib.contextmanager
def exclusive_builds(root: Path, *, is_own: bool) -> Iterator[None]:
    """Let no other process of this package build or load extensions within the block; first delete dead locks.

    Args:
        root: where torch builds extensions.
        is_own: whether only this package builds there.

    Raises:
        ConfigError: another process has been building for too long, or nothing shows whether it is alive.
    """
    own_lock = FileLock(root / OWN_LOCK)
    wait = _Wait(f"{root} (held by another run)")
    with contextlib.ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            while True:
                with contextlib.suppress(Timeout):
                    stack.enter_context(own_lock.acquire(timeout=POLL_SECONDS))
                    break
                wait.check()
        except OSError:  # the folder of another user
            is_own = False
        is_own = is_own and not _is_on_network(root)
        for lock in [lock for op in BUILT_OPS for folder in (op, f"*/{op}") for lock in root.glob(f"{folder}/lock")]:
            _wait_for_build(lock, is_own=is_own)
        yield


class _Wait:
    """A wait that is reported every few seconds, and ends with an error."""

    def __init__(self, what: str) -> None:
        self._what, self._start, self._next_report = what, time.monotonic(), 0.0

    def check(self) -> None:
        """Report the wait if it is time to.

        Raises:
            ConfigError: it took too long.
        """
        seconds = time.monotonic() - self._start
        if seconds >= MAX_WAIT_SECONDS:
            raise ConfigError(
                f"another process has been building {self._what} for more than {MAX_WAIT_SECONDS / 60:.0f} minutes; "
                "end it, or set the environment variable TORCH_EXTENSIONS_DIR to another folder"
            )
        if seconds >= self._next_report:
            self._next_report = seconds + REPORT_SECONDS
            waited = f" ({seconds:.0f} s of at most {MAX_WAIT_SECONDS} s)" if seconds >= REPORT_SECONDS else ""
            logger.warning(f"note: waiting for another process to build {self._what}{waited}")


def _wait_for_build(lock: Path, *, is_own: bool) -> None:
    """Wait until a lock is gone, or delete it if its owner is dead.

    Args:
        is_own: whether a live owner would hold the lock of this package, which this process holds.
    """
    wait = _Wait(str(lock.parent))
    while (status := _status(lock)) is not None:
        age = time.time() - status.st_mtime
        if not is_held(lock):
            if is_own:
                _delete(lock)
                return
            if status.st_uid != os.getuid() or _is_on_network(lock):
                if age > UNSEEN_SECONDS:
                    raise ConfigError(
                        f"{lock} was created {age / 60:.0f} minutes ago, and no process that is visible here holds it. "
                        "DeepSpeed would wait for it forever. If nothing builds there, delete that file"
                    )
            elif not (_may_be_shared(lock) and age < UNSEEN_SECONDS) and _delete_if_abandoned(lock):
                return
        wait.check()
        time.sleep(POLL_SECONDS)


def is_held(lock: Path) -> bool:
    """Whether a process that is visible here holds a lock.

    Its owner keeps the file open until it is done. ninja and the compiler, which outlive an owner that is killed, run
    in its folder.
    """
    targets = [status for path in (lock, lock.parent) if (status := _status(path)) is not None]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            files = [process / "cwd", *(process / "fd").iterdir()]
        except OSError:  # the process ended, or belongs to another user
            continue
        used = [status for path in files if (status := _status(path)) is not None]
        if any(os.path.samestat(one, other) for one in used for other in targets):
            return True
    return False


def _delete_if_abandoned(lock: Path) -> bool:
    """Delete a lock that no process holds; return whether it is gone."""
    # If several runs find the same lock, one deletes it. The others must not delete the lock of its new build.
    with FileLock(lock.with_name("lora_accel.lock")):
        before = _status(lock)
        time.sleep(2 * POLL_SECONDS)  # an owner that is done closes its lock first and then deletes it
        after = _status(lock)
        if before is None or after is None:
            return True
        if not os.path.samestat(before, after) or is_held(lock):
            return False
        _delete(lock)
    return True


def _delete(lock: Path) -> None:
    lock.unlink(missing_ok=True)
    logger.warning(f"note: deleted {lock}: its owner died")


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _is_on_network(path: Path) -> bool:
    """Whether a path is on a file system that other machines may share."""
    return _file_system(path).startswith(NETWORK_FILE_SYSTEMS)


def _may_be_shared(path: Path) -> bool:
    """Whether processes that are not visible here may use a path: in a container, unless on its own file system."""
    try:
        is_container = os.readlink("/proc/self/ns/pid") != HOST_PID_NAMESPACE
    except OSError:
        is_container = True
    return is_container and _file_system(path) != "overlay"


def _file_system(path: Path) -> str:
    """Return the type of the file system of a path; empty if it is not known."""
    partitions = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    return max(partitions, key=lambda part: len(part.mountpoint)).fstype if partitions else ""
