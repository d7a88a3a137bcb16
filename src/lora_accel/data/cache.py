"""A cache of folders that are written once: one process builds an entry, the others wait, and all of them check it.

    CACHE/KEY/  the files of the entry  entry.json: the size and SHA-256 of each

An entry is written under a temporary name and renamed. It is used only if every file is what was written: one that is
damaged (by a disk, a crash, or hand) is built again with a note. What is hashed is what is read: each file is opened
once. Processes that build the same entry wait on a file lock.

Several users may share a cache. Entries of others are read; where another user's entry can neither be read nor
replaced, a user has an entry of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from lora_accel.data.regular import hash_file, open_unbuffered
from lora_accel.errors import ConfigError
from lora_accel.logs import logger

MANIFEST, VERSION = "entry.json", 1
MAX_MANIFEST_BYTES = 1 << 20
NOTE_SECONDS, REPEAT_SECONDS = 10, 60
"""When a process reports that it waits for another one, and how often it repeats that."""

Content = TypeVar("Content")


class CacheError(ConfigError):
    """The folder of a cache cannot be written to."""

    def __init__(self, cache: Path, reason: str) -> None:
        self.reason = reason
        super().__init__(f"data.cache_dir: {cache} cannot be written to: {reason}; free up space or set another folder")


class DamagedEntry(Exception):
    """An entry is not what was written. The message is the reason."""


class _ForeignEntry(Exception):
    """An entry, or its lock, cannot be used or replaced by this user."""


class Entry:
    """The files of an entry, each opened once and equal to what was written."""

    def __init__(self, folder: Path, files: dict[str, BinaryIO]) -> None:
        self.folder, self._files = folder, files

    def read(self, name: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            DamagedEntry: the entry does not have this file.
        """
        file = self._file(name)
        file.seek(0)
        return file.read()

    def map(self, name: str, dtype: Any) -> Any:
        """Return a file as a memory-mapped array; it is valid after the entry is closed, replaced or deleted.

        Raises:
            DamagedEntry: the entry does not have this file.
        """
        file = self._file(name)
        return np.memmap(file, dtype, "r") if os.fstat(file.fileno()).st_size else np.empty(0, dtype)

    def _file(self, name: str) -> BinaryIO:
        if name not in self._files:
            raise DamagedEntry(f"{name} is missing")
        return self._files[name]


def get_or_build(cache: Path, key: str, build: Callable[[Path], None]) -> Path:
    """Return the folder of an entry. If there is none, or it is damaged, one process builds it while others wait.

    Args:
        cache: folder of the cache.
        key: name of the entry.
        build: writes the entry's files into a folder.

    Raises:
        CacheError: the cache cannot be written to.
    """
    return load_or_build(cache, key, build, lambda entry: entry.folder)


def load_or_build(cache: Path, key: str, build: Callable[[Path], None], read: Callable[[Entry], Content]) -> Content:
    """Return the content of an entry; see `get_or_build`.

    Args:
        read: returns the content. Raises `DamagedEntry` if the files do not fit together.

    Raises:
        CacheError: the cache cannot be written to.
    """
    try:
        return _load_or_build(cache, key, key, build, read)
    except _ForeignEntry:
        own = f"{key}-{os.geteuid() if hasattr(os, 'geteuid') else 0}"
    try:
        return _load_or_build(cache, own, key, build, read)
    except _ForeignEntry as error:
        raise CacheError(cache, str(error)) from None


def _load_or_build(
    cache: Path, name: str, key: str, build: Callable[[Path], None], read: Callable[[Entry], Content]
) -> Content:
    """Load or build the entry of a name.

    Raises:
        _ForeignEntry: it can be neither used nor replaced.
    """
    with contextlib.suppress(DamagedEntry, FileNotFoundError):
        return _load(cache / name, key, read)
    with write_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{name}.lock"):
        try:
            return _load(cache / name, key, read)  # another process may have built it
        except FileNotFoundError:
            pass
        except DamagedEntry as damage:
            _remove(cache, name)
            logger.warning(f"note: {cache / name} in the cache is damaged ({damage}); building it again")
        _build(cache, name, key, build)
        try:
            return _load(cache / name, key, read)
        except (DamagedEntry, FileNotFoundError) as error:
            raise CacheError(cache, f"what was written there just now cannot be read ({error})") from None


def _load(folder: Path, key: str, read: Callable[[Entry], Content]) -> Content:
    """Read an entry.

    Raises:
        FileNotFoundError: there is none.
        DamagedEntry: it is not what was written.
        _ForeignEntry: it may not be read.
    """
    try:
        if not os.path.lexists(folder):
            raise FileNotFoundError
        with contextlib.ExitStack() as stack:
            listed = _read_manifest(folder, key)
            return read(Entry(folder, {name: _open(stack, folder, name, *listed[name]) for name in listed}))
    except PermissionError as error:
        raise _ForeignEntry(f"{error.filename or folder}: {error.strerror}") from None


def _read_manifest(folder: Path, key: str) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 of each file of an entry."""
    try:
        with open_unbuffered(folder / MANIFEST) as file:
            manifest = json.loads(file.read(MAX_MANIFEST_BYTES))
        if manifest["version"] != VERSION or manifest["key"] != key:
            raise DamagedEntry(f"{MANIFEST} is that of another entry or version")
        files = {name: (size, sha256) for name, (size, sha256) in manifest["files"].items()}
    except PermissionError:
        raise
    except OSError as error:
        raise DamagedEntry(f"{MANIFEST} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise DamagedEntry(f"{MANIFEST} cannot be read") from None
    if any(os.path.basename(name) != name or "\0" in name for name in files):
        raise DamagedEntry(f"{MANIFEST} lists files outside the entry")
    return files


def _open(stack: contextlib.ExitStack, folder: Path, name: str, size: int, sha256: str) -> BinaryIO:
    """Open a file of an entry and check all of its bytes."""
    try:
        file = stack.enter_context(open_unbuffered(folder / name))
        is_intact = os.fstat(file.fileno()).st_size == size and hash_file(file) == sha256
    except PermissionError:
        raise
    except FileNotFoundError:
        raise DamagedEntry(f"{name} is missing") from None
    except OSError as error:
        raise DamagedEntry(f"{name} cannot be read: {error.strerror}") from None
    if not is_intact:
        raise DamagedEntry(f"{name} is not what was written")
    return file


def _build(cache: Path, name: str, key: str, build: Callable[[Path], None]) -> None:
    """Build an entry that does not exist. The caller holds its lock."""
    temporary = cache / f".{name}.{uuid.uuid4().hex}"
    try:
        with write_errors(cache):
            for leftover in cache.glob(f".{name}.*"):  # of killed processes
                shutil.rmtree(leftover, ignore_errors=True)
            temporary.mkdir()  # not by mkdtemp, whose folders other users cannot read
        build(temporary)
        with write_errors(cache):
            _write_manifest(temporary, key)
            # Fails if the folder exists: without working locks, such as on some network file systems, another process
            # may have built it. The caller reads what is there.
            with contextlib.suppress(FileExistsError):
                _rename_new(temporary, cache / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_new(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        if target.is_dir():
            raise FileExistsError from error
        raise


def _write_manifest(folder: Path, key: str) -> None:
    """Sync all files of a new entry, and write their sizes and hashes."""
    files = {}
    for path in sorted(folder.iterdir()):
        with open_unbuffered(path) as file:
            os.fsync(file.fileno())
            files[path.name] = (os.fstat(file.fileno()).st_size, hash_file(file))
    with (folder / MANIFEST).open("w", encoding="utf-8") as text:
        json.dump({"version": VERSION, "key": key, "files": files}, text)
        text.flush()
        os.fsync(text.fileno())


def _remove(cache: Path, name: str) -> None:
    """Remove a damaged entry, whatever it is now. It is renamed first, so that no process opens half of it.

    Raises:
        _ForeignEntry: it belongs to another user.
    """
    trash = cache / f".{name}.{uuid.uuid4().hex}"
    try:
        (cache / name).rename(trash)
    except OSError as error:
        raise _ForeignEntry(f"{cache / name}: {error.strerror}") from None
    if trash.is_dir() and not trash.is_symlink():
        shutil.rmtree(trash, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            trash.unlink()


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock of an entry. A process that waits for long reports it.

    Raises:
        _ForeignEntry: it cannot be opened.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(file, mode=0o666)  # whatever the umask: other users of a shared cache lock it, too
    seconds = NOTE_SECONDS
    while not lock.is_locked:
        try:
            lock.acquire(timeout=seconds)
        except Timeout:
            logger.info(f"waiting for another process that builds the same entry of the cache; it holds {file}")
            seconds = REPEAT_SECONDS
        except OSError as error:
            raise _ForeignEntry(f"{file}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def write_errors(cache: Path) -> Iterator[None]:
    """Convert the errors of a block that writes to a cache.

    Raises:
        CacheError: the disk is full or fails, or the folder is not writable.
    """
    try:
        yield
    except OSError as error:
        raise CacheError(cache, error.strerror or str(error)) from None
    except ValueError as error:  # a null byte in the path
        raise CacheError(cache, str(error)) from None
