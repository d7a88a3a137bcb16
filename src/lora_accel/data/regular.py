"""Open a file once: what is hashed is what is read, and a change in between is noticed."""

from __future__ import annotations

import hashlib
import os
from io import BufferedReader, FileIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lora_accel.errors import DataError
from lora_accel.paths import open_regular, open_to_read


class Stamp(NamedTuple):
    """What changes with a file. Equal stamps mean equal bytes; a file with another stamp may still have the same."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int
    """Of the content or of the metadata, in nanoseconds. Unlike the time before, it cannot be set back."""

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """Return the stamp of a file's status."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class HashedFile:
    """An open data file whose bytes have a known hash. Use it as a context manager."""

    def __init__(self, file: Path, name: str, sha256: str) -> None:
        """Open a file and check its hash.

        Args:
            name: the file in messages.
            sha256: the hash that its bytes had before.

        Raises:
            DataError: it has changed.
            OSError: it cannot be read.
        """
        self.file, self.name, self._sha256 = file, name, sha256
        self._stream = open_unbuffered(file)
        self._stamp: Stamp | None = None
        try:
            self.check()
        except BaseException:
            self._stream.close()
            raise

    @property
    def size(self) -> int:
        """Return the number of bytes."""
        return os.fstat(self._stream.fileno()).st_size

    def position(self) -> int:
        """Return how many bytes the reader has read."""
        return os.lseek(self._stream.fileno(), 0, os.SEEK_CUR)

    def reader(self) -> BufferedReader:
        """Return a new stream of the bytes from the start. There may be one at a time; closing it is optional."""
        self._stream.seek(0)
        return BufferedReader(FileIO(self._stream.fileno(), closefd=False), 1 << 18)

    def check(self) -> None:
        """Check that the bytes are still those of the hash. They are hashed again only if the file's status changed.

        Raises:
            DataError: they are not.
        """
        stamp = Stamp.of(os.fstat(self._stream.fileno()))  # before the bytes: a change while they are hashed counts
        if stamp != self._stamp and hash_file(self._stream) != self._sha256:
            raise changed(self.name)
        self._stamp = stamp

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def stamp_and_hash(file: Path, name: str) -> tuple[Stamp, str]:
    """Return the stamp and the SHA-256 of a file.

    Raises:
        DataError: it cannot be read, or changes while it is read. The message begins with `name`.
    """
    try:
        with open_unbuffered(file) as stream:
            stamp = Stamp.of(os.fstat(stream.fileno()))
            sha256 = hash_file(stream)
            if stamp != Stamp.of(os.fstat(stream.fileno())) and sha256 != hash_file(stream):
                raise changed(name)
            return stamp, sha256
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None


def changed(name: str) -> DataError:
    """Return the error for a file that changed after it was hashed."""
    return DataError(f"{name}: was written to or replaced while it was read; run again once the file no longer changes")


def read_regular(file: Path) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        OSError: it cannot be read, or is something else.
    """
    with open_to_read(file) as stream:
        return stream.read()


def open_unbuffered(file: Path) -> BinaryIO:
    """Open a regular file for reading, unbuffered. Unlike `open`, it does not wait for the writer of a named pipe.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    return open(open_regular(file), "rb", buffering=0)


def hash_file(stream: BinaryIO) -> str:
    """Return the SHA-256 of all bytes of an open file. Its position does not change."""
    digest, offset, descriptor = hashlib.sha256(), 0, stream.fileno()
    while block := os.pread(descriptor, 1 << 20, offset):
        digest.update(block)
        offset += len(block)
    return digest.hexdigest()
