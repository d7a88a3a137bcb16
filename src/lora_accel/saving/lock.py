"""Check that a path can be used as a run folder, and lock it: one run at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_accel.errors import ConfigError
from lora_accel.logs import logger
from lora_accel.saving.discovery import step_folders

LOCK = ".lock"


def check_output_folder(folder: Path) -> None:
    """Check that a path can be used as a run folder.

    Raises:
        ConfigError: it is a file, is not writable, contains other files or an adapter that would be lost, or has a name
            that other programs misread.
    """
    if "[" in str(folder) or ".." in folder.parts:
        raise ConfigError(
            f"output_dir: {folder}: many programs read `[` as a pattern, and `..` depends on symbolic links; "
            "write the path without them"
        )
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    except OSError as error:
        raise ConfigError(f"output_dir: {folder}: {error.strerror}; choose another folder") from None
    if not nearest.is_dir():
        raise ConfigError(f"output_dir: {nearest} is a file; choose a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir: {nearest} is not writable; choose another folder")
    if not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir()} - {LOCK, ".plan.json.writing"}
    checkpoints = folder / "checkpoints"
    if checkpoints.exists() and not checkpoints.is_dir():
        raise ConfigError(f"output_dir: {checkpoints} is a file; choose another folder, or move the file")
    has_checkpoints = bool(step_folders(checkpoints))
    if names and "plan.json" not in names and not has_checkpoints:
        raise ConfigError(f"output_dir: {folder} contains other files but no run; choose a new or empty folder")
    if "adapter" in names and not has_checkpoints:
        raise ConfigError(
            f"output_dir: {folder} contains an adapter but no checkpoints; a new run would replace it. "
            "Choose another folder, or move the adapter"
        )


@contextlib.contextmanager
def lock_run_folder(folder: Path, *, enabled: bool) -> Iterator[Callable[[], None]]:
    """Lock a run folder: immediately if it exists, otherwise when the yielded function creates it.

    Call the yielded function once all ranks are ready to start. Nothing is written before: if another rank fails
    during setup, the launcher kills this process, and it must not leave a folder behind.

    Args:
        enabled: whether this process locks; True on the main process.

    Raises:
        ConfigError: another process has locked the folder, or created it in the meantime.
    """
    is_new = not folder.exists()
    with contextlib.ExitStack() as stack:
        if enabled and not is_new:
            stack.enter_context(locked(folder))

        def begin() -> None:
            if not (enabled and is_new):
                return
            stack.enter_context(locked(folder))
            if {path.name for path in folder.iterdir()} != {LOCK}:
                raise ConfigError(
                    f"output_dir: another run has started in {folder} in the meantime; start again, or choose another "
                    "folder"
                )

        yield begin


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run folder until the block or the process ends. Folders created here are deleted if they stay empty.

    Raises:
        ConfigError: another process has locked it.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    descriptor = _acquire(path)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):  # not empty
            for parent in created:
                parent.rmdir()


def _acquire(path: Path) -> int:
    """Lock a file, and return its descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace") or "just started"
            os.close(descriptor)
            raise ConfigError(
                f"output_dir: {path.parent} is in use by another run ({holder}); wait for it, stop it, or choose "
                "another folder"
            ) from None
        except OSError as error:  # a network file system may not support locks
            logger.warning(f"note: {path.parent} cannot be locked ({error}); no other run may use it")
            return descriptor
        # The previous holder may have deleted the file after this process opened it: then the lock protects nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)
