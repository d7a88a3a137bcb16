"""A run folder: whether a path can become one, and that it is one run's alone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_accel.errors import ConfigError
from lora_accel.saving.discovery import step_folders

LOCK = ".lock"


def check_output_folder(folder: Path) -> None:
    """Refuse a run folder that cannot become one.

    Raises:
        ConfigError: it is a file, cannot be written to, holds other things or a result that would be lost, or has a
            name that other programs stumble over.
    """
    if "[" in str(folder) or ".." in folder.parts:
        raise ConfigError(
            f"output_dir: {folder}: a `[` in a name is a pattern to many programs, and `..` leads elsewhere once a "
            "folder above is a link; write the path without them"
        )
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    except OSError as error:
        raise ConfigError(f"output_dir: {folder}: {error.strerror}; name another folder") from None
    if not nearest.is_dir():
        raise ConfigError(f"output_dir: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir: {nearest} cannot be written to; name another folder")
    if not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir()} - {LOCK, ".plan.json.writing"}
    checkpoints = folder / "checkpoints"
    if checkpoints.exists() and not checkpoints.is_dir():
        raise ConfigError(f"output_dir: {checkpoints} is a file; name another folder, or move it away")
    has_checkpoints = bool(step_folders(checkpoints))
    if names and "plan.json" not in names and not has_checkpoints:
        raise ConfigError(f"output_dir: {folder} holds other things and no run; name a new or empty folder")
    if "adapter" in names and not has_checkpoints:
        raise ConfigError(
            f"output_dir: {folder} holds an adapter and no checkpoints; a run from the beginning would replace it. "
            "Name another folder, or move the adapter away"
        )


@contextlib.contextmanager
def lock_run_folder(folder: Path, *, enabled: bool) -> Iterator[Callable[[], None]]:
    """Hold a run folder: at once if it is there, else once what is yielded makes it. To be called when all may begin.

    Until then nothing is written, so that nothing stays of a run that one process alone cannot begin: the launcher may
    kill this one at any moment.

    Raises:
        ConfigError: another process holds it, now or by then.
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
                    f"output_dir: another run has begun in {folder} meanwhile; start again, or name another"
                )

        yield begin


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process; its death frees it, however it dies. Nothing stays of a run that wrote none.

    Raises:
        ConfigError: another process holds it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
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
        with contextlib.suppress(OSError):  # it holds something
            for created in made:
                created.rmdir()


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace") or "which has just begun"
            os.close(descriptor)
            raise ConfigError(
                f"output_dir: {path.parent} is in use by another run ({holder}); wait for it, stop it, or name "
                "another folder"
            ) from None
        except OSError as error:  # a network file system may have none
            print(f"note: {path.parent} cannot be locked ({error}); let no other run use it", file=sys.stderr)
            return descriptor
        # Whoever held it before may have deleted the file after we opened it: then we hold nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)
