"""Store tokenized examples on disk, under a hash of everything they depend on, and read them through memory maps.

    CACHE/KEY/  input_ids.int32  supervised.bool  table.npy  ledger.json

A folder is written under a temporary name and renamed atomically. Processes that need the same folder wait on a file
lock, so only one of them builds it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from lora_accel.data.chat import Example
from lora_accel.errors import ConfigError
from lora_accel.labels import IGNORE_INDEX

INPUT_IDS, SUPERVISED, TABLE, LEDGER = "input_ids.int32", "supervised.bool", "table.npy", "ledger.json"
FIELDS = 6
"""Columns of the table: end of the example's tokens, number of supervised tokens, file, row, and first and end token of
its answer (0, 0 = none)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """Examples in flat, memory-mapped arrays. N tokens, E examples."""

    input_ids: npt.NDArray[np.int32]
    """[N]"""
    supervised: npt.NDArray[np.bool_]
    """[N]"""
    table: npt.NDArray[np.int64]
    """[E, 6]: end of the example's tokens, number of supervised tokens, index of its file, number of its row, first and
    end token of its answer."""
    files: Sequence[str]
    indices: npt.NDArray[np.intp] | None = None
    """Which of the E examples these are; None = all."""

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Examples:
        """Return examples from a list, in memory."""
        files = list(dict.fromkeys(example.row[0] for example in examples))
        arrays = _Arrays()
        for example in examples:
            arrays.add(example, files.index(example.row[0]))
        table = np.asarray(arrays.table, np.int64).reshape(-1, FIELDS)
        return cls(np.asarray(arrays.input_ids, np.int32), np.frombuffer(arrays.supervised, np.bool_), table, files)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each example."""
        return self._select(np.diff(self.table[:, 0], prepend=0))

    @property
    def num_supervised(self) -> npt.NDArray[np.int64]:
        """Return the number of supervised tokens of each example."""
        return self._select(self.table[:, 1])

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Return the index of the file and the number of the row of each example, [E, 2]."""
        return self._select(self.table)[:, 2:4]

    def take(self, indices: npt.NDArray[np.intp]) -> Examples:
        """Return the examples at some indices, without copying tokens."""
        return dataclasses.replace(self, indices=indices if self.indices is None else self.indices[indices])

    def __len__(self) -> int:
        return len(self.table if self.indices is None else self.indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]  # IndexError beyond the end
        i = i if self.indices is None else int(self.indices[i])
        end, _, file, row, *answer = self.table[i].tolist()
        start = int(self.table[i - 1, 0]) if i else 0
        tokens = self.input_ids[start:end]
        labels = np.where(self.supervised[start:end], tokens, IGNORE_INDEX)
        return Example(
            tokens.tolist(),
            labels.tolist(),
            row=(self.files[file], row),
            answer=(answer[0], answer[1]) if answer[1] else None,
        )

    def _select(self, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return values if self.indices is None else values[self.indices]


class _Arrays:
    """Growing arrays of examples."""

    def __init__(self) -> None:
        self.input_ids, self.supervised, self.table = array("i"), bytearray(), array("q")
        self._end = 0

    def add(self, example: Example, file: int) -> None:
        # array("i", list) takes a third of the time of a comprehension.
        supervised = np.frombuffer(array("i", example.labels), np.int32) != IGNORE_INDEX
        self.input_ids += array("i", example.input_ids)
        self.supervised += supervised.tobytes()
        self._end += len(supervised)
        self.table.extend((self._end, int(supervised.sum()), file, example.row[1], *(example.answer or (0, 0))))


class Writer:
    """Writes examples to a folder, chunk by chunk."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._table, self._end = folder, array("q"), 0
        self._input_ids, self._supervised = (folder / INPUT_IDS).open("wb"), (folder / SUPERVISED).open("wb")
        self._digest = hashlib.sha256()

    def add(self, examples: SerializedExamples, file: int) -> None:
        """Append examples of one file, given by its index."""
        self._input_ids.write(examples.input_ids)
        self._supervised.write(examples.supervised)
        table = np.frombuffer(examples.table, np.int64).reshape(-1, FIELDS).copy()
        table[:, 0] += self._end
        table[:, 2] = file
        self._table.frombytes(table.tobytes())
        self._end += len(examples.supervised)
        # Without the answers, which follow from the rest, so that checkpoints of older versions have the same hash.
        hashed = np.frombuffer(examples.table, np.int64).reshape(-1, FIELDS)[:, :4]
        self._digest.update(examples.input_ids + examples.supervised + hashed.tobytes())

    def close(self, ledger: dict[str, Any]) -> None:
        """Write the table, and the ledger with the hash of all tokens and masks; fsync all files."""
        ledger = ledger | {"tokens_sha256": self._digest.hexdigest()}
        table = np.asarray(self._table, np.int64).reshape(-1, FIELDS)
        with (self._folder / TABLE).open("wb") as file, (self._folder / LEDGER).open("w", encoding="utf-8") as text:
            np.save(file, table)
            json.dump(ledger, text)
            for stream in (self._input_ids, self._supervised, file, text):
                stream.flush()
                os.fsync(stream.fileno())
        self._input_ids.close()
        self._supervised.close()


@dataclasses.dataclass(frozen=True)
class SerializedExamples:
    """Examples as bytes, to send from a worker to the main process."""

    input_ids: bytes
    supervised: bytes
    table: bytes

    @classmethod
    def of(cls, examples: Sequence[Example]) -> SerializedExamples:
        """Serialize examples."""
        arrays = _Arrays()
        for example in examples:
            arrays.add(example, 0)
        return cls(arrays.input_ids.tobytes(), bytes(arrays.supervised), arrays.table.tobytes())


def get_or_build(cache: Path, key: str, build: Callable[[Path], None]) -> Path:
    """Return the folder of a key. If it does not exist, one process builds it while others wait.

    Args:
        cache: folder of the cache.
        build: writes the entry's files into a folder.

    Raises:
        ConfigError: the cache cannot be written to.
    """
    from filelock import FileLock

    final = cache / key
    if final.is_dir():
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f"{key}.lock")
        lock.acquire()
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir: {cache} cannot be written to: {error.strerror}; set another folder"
        ) from None
    try:
        if not final.is_dir():  # another process may have built it
            with _temporary_folder(cache, key) as temporary:
                build(temporary)
                temporary.rename(final)
    finally:
        lock.release()
    return final


def open_examples(folder: Path, files: Sequence[str]) -> tuple[Examples, dict[str, Any]]:
    """Return the examples of a cache folder, and their ledger as plain values.

    Args:
        files: names of the data files, in the order of their hashes. They may have moved since the folder was written.
    """
    table = np.load(folder / TABLE)
    input_ids, supervised = (_memmap(folder / n, t) for n, t in ((INPUT_IDS, np.int32), (SUPERVISED, np.bool_)))
    ledger = json.loads((folder / LEDGER).read_text(encoding="utf-8"))
    return Examples(input_ids, supervised, table, files), ledger


def _memmap(file: Path, dtype: Any) -> Any:
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.empty(0, dtype)


@contextlib.contextmanager
def _temporary_folder(cache: Path, key: str) -> Iterator[Path]:
    """Yield a new folder to build in, and delete it if the build fails.

    Deletes leftovers of killed processes first. The caller holds the lock, so no other process is building.
    """
    for leftover in cache.glob(f".{key}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=cache))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
