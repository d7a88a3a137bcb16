"""Tokenised examples on disk: written once, under the hash of all that they follow from, and read by mapping them.

    CACHE/KEY/  input_ids.int32  supervised.bool  table.npy  ledger.json

A folder appears whole: it is written beside its place and renamed. Processes that want the same wait on a file lock, so
one of them does the work.
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
FIELDS = 4
"""Numbers in the table for each example: end of its tokens, supervised tokens, file, row."""


@dataclasses.dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """Examples as flat arrays, of which only what is asked for need be in memory. N tokens, E examples."""

    input_ids: npt.NDArray[np.int32]
    """[N]"""
    supervised: npt.NDArray[np.bool_]
    """[N]"""
    table: npt.NDArray[np.int64]
    """[E, 4]: where the example's tokens end, how many are supervised, number of its file, number of its row."""
    files: Sequence[str]
    chosen: npt.NDArray[np.intp] | None = None
    """Which examples these are, of all; None = all."""

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Examples:
        """Return examples that are in memory."""
        files = list(dict.fromkeys(example.row[0] for example in examples))
        arrays = _Arrays()
        for example in examples:
            arrays.add(example, files.index(example.row[0]))
        table = np.asarray(arrays.table, np.int64).reshape(-1, FIELDS)
        return cls(np.asarray(arrays.input_ids, np.int32), np.frombuffer(arrays.supervised, np.bool_), table, files)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each example."""
        return self._of_chosen(np.diff(self.table[:, 0], prepend=0))

    @property
    def num_supervised(self) -> npt.NDArray[np.int64]:
        """Return the number of supervised tokens of each example."""
        return self._of_chosen(self.table[:, 1])

    @property
    def row_ids(self) -> set[tuple[str, int]]:
        """Return file and number of the rows that these examples come from."""
        table = self.table if self.chosen is None else self.table[self.chosen]
        return {(self.files[file], row) for file, row in table[:, 2:].tolist()}

    def take(self, places: npt.NDArray[np.intp]) -> Examples:
        """Return some of these examples."""
        return dataclasses.replace(self, chosen=places if self.chosen is None else self.chosen[places])

    def __len__(self) -> int:
        return len(self.table if self.chosen is None else self.chosen)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        number = range(len(self))[place]  # IndexError beyond the end
        number = number if self.chosen is None else int(self.chosen[number])
        end, _, file, row = self.table[number].tolist()
        start = int(self.table[number - 1, 0]) if number else 0
        tokens = self.input_ids[start:end]
        labels = np.where(self.supervised[start:end], tokens, IGNORE_INDEX)
        return Example(tokens.tolist(), labels.tolist(), row=(self.files[file], row))

    def _of_chosen(self, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return values if self.chosen is None else values[self.chosen]


class _Arrays:
    """Examples, one after the other."""

    def __init__(self) -> None:
        self.input_ids, self.supervised, self.table = array("i"), bytearray(), array("q")
        self._end = 0

    def add(self, example: Example, file: int) -> None:
        # Through arrays, since these take a list whole: a third of the time of a comprehension.
        supervised = np.frombuffer(array("i", example.labels), np.int32) != IGNORE_INDEX
        self.input_ids += array("i", example.input_ids)
        self.supervised += supervised.tobytes()
        self._end += len(supervised)
        self.table.extend((self._end, int(supervised.sum()), file, example.row[1]))


class Writer:
    """Examples to a folder, some at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._table, self._end = folder, array("q"), 0
        self._input_ids, self._supervised = (folder / INPUT_IDS).open("wb"), (folder / SUPERVISED).open("wb")
        self._digest = hashlib.sha256()

    def add(self, part: Packed, file: int) -> None:
        """Append examples of one file."""
        self._input_ids.write(part.input_ids)
        self._supervised.write(part.supervised)
        table = np.frombuffer(part.table, np.int64).reshape(-1, FIELDS).copy()
        table[:, 0] += self._end
        table[:, 2] = file
        self._table.frombytes(table.tobytes())
        self._end += len(part.supervised)
        self._digest.update(part.input_ids + part.supervised + part.table)

    def close(self, ledger: dict[str, Any]) -> None:
        """Write the rest, the ledger with the hash of all tokens and masks, and sync all."""
        ledger = ledger | {"tokens_sha256": self._digest.hexdigest()}
        table = np.asarray(self._table, np.int64).reshape(-1, FIELDS)
        with (self._folder / TABLE).open("wb") as file, (self._folder / LEDGER).open("w", encoding="utf-8") as text:
            np.save(file, table)
            json.dump(ledger, text)
            for written in (self._input_ids, self._supervised, file, text):
                written.flush()
                os.fsync(written.fileno())
        self._input_ids.close()
        self._supervised.close()


@dataclasses.dataclass(frozen=True)
class Packed:
    """Examples on their way from one process to another."""

    input_ids: bytes
    supervised: bytes
    table: bytes

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Packed:
        """Pack."""
        arrays = _Arrays()
        for example in examples:
            arrays.add(example, 0)
        return cls(arrays.input_ids.tobytes(), bytes(arrays.supervised), arrays.table.tobytes())


def stored(cache: Path, key: str, build: Callable[[Path], None]) -> Path:
    """Return the folder of a key, and let `build` fill it first if it is not there; one process at a time.

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
        raise ConfigError(f"data.cache_dir: {cache} cannot be written to: {error.strerror}; name another") from None
    try:
        if not final.is_dir():  # it may have come while this process waited
            with _beside(cache, key) as temporary:
                build(temporary)
                temporary.rename(final)
    finally:
        lock.release()
    return final


def open_examples(folder: Path, files: Sequence[str]) -> tuple[Examples, dict[str, Any]]:
    """Return the examples of a folder, and their ledger.

    Args:
        files: names of the files in the order of the data's hashes; they may lie elsewhere than when it was written.
    """
    table = np.load(folder / TABLE)
    input_ids, supervised = (_mapped(folder / n, t) for n, t in ((INPUT_IDS, np.int32), (SUPERVISED, np.bool_)))
    ledger = json.loads((folder / LEDGER).read_text(encoding="utf-8"))
    return Examples(input_ids, supervised, table, files), ledger


def _mapped(file: Path, dtype: Any) -> Any:
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.empty(0, dtype)


@contextlib.contextmanager
def _beside(cache: Path, key: str) -> Iterator[Path]:
    """Give a folder to fill, and clear away those of processes that died: the lock is held, so none is at work."""
    for left in cache.glob(f".{key}.*"):
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=cache))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
