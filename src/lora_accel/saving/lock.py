"""Lock folders. A run folder is locked while a run writes to it: one run at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_accel.errors import ConfigError
from lora_accel.logs import logger
from lora_accel.paths import open_regular

LOCK = ".lock"
"""The file that names the process which has locked a run folder."""


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
        ConfigError: another process has locked it, or it cannot be written to.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        of_folder = lock_folder(folder)  # so that the lock holds even if somebody deletes the lock file
    except BlockingIOError:
        raise _in_use(folder) from None
    except OSError as error:
        raise ConfigError(f"output_dir: {folder}: {error.strerror}; choose another folder") from None
    path = folder / LOCK
    try:
        descriptor = _acquire(path)
    except BaseException:
        _close(of_folder)
        raise
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):  # not of another run, after this one was moved
                path.unlink()
        os.close(descriptor)
        _close(of_folder)
        with contextlib.suppress(OSError):  # not empty
            for parent in created:
                parent.rmdir()


def lock_folder(folder: Path) -> int | None:
    """Lock a folder itself until the returned descriptor is closed or the process ends.

    Returns:
        The descriptor; None on file systems where only files can be locked (NFS).

    Raises:
        BlockingIOError: it is locked, by another process or by another descriptor of this one.
        OSError: it cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _in_use(folder: Path) -> ConfigError:
    """Return the error that another process uses the folder, with what it has written into the lock file."""
    holder = "just started"
    with contextlib.suppress(OSError):
        descriptor = open_regular(folder / LOCK)
        holder = os.read(descriptor, 200).decode(errors="replace") or holder
        os.close(descriptor)
    return ConfigError(
        f"output_dir: {folder} is in use by another run ({holder}); wait for it, stop it, or choose another folder"
    )


def _acquire(path: Path) -> int:
    """Lock a file, and return its descriptor.

    Raises:
        ConfigError: another process has locked it, or it cannot be opened.
    """
    while True:
        try:
            descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise ConfigError(f"output_dir: {path}: {error.strerror}; move it, or choose another folder") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise _in_use(path.parent) from None
        except OSError as error:  # a network file system may not support locks
            logger.warning(f"note: {path.parent} cannot be locked ({error}); no other run may use it")
            return descriptor
        # The previous holder may have deleted the file after this process opened it: then the lock protects nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)
