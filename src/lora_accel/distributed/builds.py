"""Clean up the locks that killed builds of DeepSpeed's extensions leave behind.

torch compiles an extension under a lock file, which it deletes afterwards. If that process is killed, the file stays,
and every later process waits for it forever.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
from filelock import FileLock

from lora_accel.errors import ConfigError
from lora_accel.logs import logger

BUILT_OPS = ("deepspeed_shm_comm", "cpu_adam", "async_io", "pin_memory")
"""The extensions that this package can make DeepSpeed compile."""
UNSEEN_SECONDS = 600
"""Age below which a lock may belong to a process that is not visible here: on another machine, in a container."""
POLL_SECONDS = 0.5
NETWORK_FILE_SYSTEMS = (
    *("nfs", "smb", "cifs", "lustre", "gpfs", "beegfs", "ceph", "afs", "glusterfs", "fuse", "9p", "virtiofs"),
)
HOST_PID_NAMESPACE = "pid:[4026531836]"
"""The initial PID namespace of Linux (`PROC_PID_INIT_INO`), which sees all processes. A container has its own."""


def wait_for_builds(root: Path) -> None:
    """Wait for builds in progress, and delete the locks of those that died. Local rank 0 calls this.

    Args:
        root: where torch builds extensions.

    Raises:
        ConfigError: a lock is older than a build takes, and no process that is visible here holds it.
    """
    for lock in [lock for op in BUILT_OPS for folder in (op, f"*/{op}") for lock in root.glob(f"{folder}/lock")]:
        _wait_for_build(lock)


def _wait_for_build(lock: Path) -> None:
    """Wait until a lock is gone."""
    is_reported = False
    while (status := _status(lock)) is not None:
        age = time.time() - status.st_mtime
        if not is_held(lock):
            if status.st_uid != os.getuid() or _is_on_network(lock):
                if age > UNSEEN_SECONDS:
                    raise ConfigError(
                        f"{lock} was created {age / 60:.0f} minutes ago, and no process that is visible here holds it. "
                        "DeepSpeed would wait for it forever. If nothing builds there, delete that file"
                    )
            elif not (_is_container() and age < UNSEEN_SECONDS) and _delete_if_abandoned(lock):
                return
        if not is_reported:
            is_reported = True
            logger.warning(f"note: waiting for another process to build {lock.parent}")
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
        lock.unlink(missing_ok=True)
    logger.warning(f"note: deleted {lock}: its owner died")
    return True


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _is_on_network(path: Path) -> bool:
    """Whether a path is on a file system that other machines may share."""
    partitions = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    if not partitions:
        return False
    file_system: str = max(partitions, key=lambda part: len(part.mountpoint)).fstype
    return file_system.startswith(NETWORK_FILE_SYSTEMS)


def _is_container() -> bool:
    try:
        return os.readlink("/proc/self/ns/pid") != HOST_PID_NAMESPACE
    except OSError:
        return True
