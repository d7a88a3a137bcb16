"""The content of data files that may be compressed, with a limit on what a small file expands to."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from lora_accel.data.files import COMPRESSED
from lora_accel.data.regular import HashedFile
from lora_accel.errors import DataError

MAX_RATIO, MIN_EXPANDED_BYTES = 200, 1 << 28
"""How many times its size a compressed file may expand to, and up to which size it may in any case. Text has a ratio
of 3 to 10, rows that repeat a long system message one of up to 100; a file of zeros has 1,000 (gz) or more."""


def decompressed(opened: HashedFile) -> io.BufferedReader:
    """Return a stream of a file's content. Reading it raises DataError if it expands to far more than the file."""
    suffix = opened.file.suffix.lower()
    if suffix not in COMPRESSED:
        return opened.reader()
    import pyarrow as pa

    stream = pa.CompressedInputStream(pa.PythonFile(opened.reader(), mode="r"), COMPRESSED[suffix])
    return io.BufferedReader(_Expanded(stream, Expansion(opened.name, opened.position)), 1 << 18)


def read_all(opened: HashedFile) -> bytearray:
    """Return the content of a file that is parsed in memory, where it takes three times its size at least.

    Raises:
        DataError: it expands to far more than the file.
        MemoryError: it is larger than a third of the memory that is free.
    """
    import psutil

    limit, data = psutil.virtual_memory().available // 3, bytearray()
    if opened.size > limit:  # before it is read: a sparse file may have any size
        raise MemoryError
    stream = decompressed(opened)
    while block := stream.read(1 << 24):
        data += block
        if len(data) > limit:
            raise MemoryError
    return data


class Expansion:
    """Counts the bytes that a compressed file expands to."""

    def __init__(self, name: str, position: Callable[[], int]) -> None:
        """Begin to count.

        Args:
            name: the file in messages.
            position: returns how many of its bytes are read.
        """
        self._name, self._position, self._num_bytes = name, position, 0

    def add(self, num_bytes: int) -> None:
        """Count bytes.

        Raises:
            DataError: they are too many.
        """
        self._num_bytes += num_bytes
        if self._num_bytes > MIN_EXPANDED_BYTES and self._num_bytes > MAX_RATIO * self._position():
            raise DataError(
                f"{self._name}: expands to more than {MAX_RATIO} times its size; if its rows are as intended, save "
                "them as a .jsonl file without compression and set path to it"
            )


class _Expanded(io.RawIOBase):
    """A stream of decompressed bytes, which are counted."""

    def __init__(self, stream: Any, expansion: Expansion) -> None:
        self._stream, self._expansion = stream, expansion

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        num_bytes = int(self._stream.readinto(buffer))
        self._expansion.add(num_bytes)
        return num_bytes
