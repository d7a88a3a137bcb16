"""Store tokenized examples on disk, under a hash of everything they depend on, and read them through memory maps.

    CACHE/KEY/  input_ids.int32  supervised.bool  table.int64  ledger.json  entry.json

`cache.py` builds an entry, and checks its files when it is opened.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from lora_accel.data.cache import DamagedEntry, Entry, write_errors
from lora_accel.data.chat import Example
from lora_accel.labels import IGNORE_INDEX

INPUT_IDS, SUPERVISED, TABLE, LEDGER = "input_ids.int32", "supervised.bool", "table.int64", "ledger.json"
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
    """Writes examples to the folder of a new entry, chunk by chunk.

    Raises:
        CacheError: the disk is full or fails.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._table, self._end = folder, array("q"), 0
        self._digest = hashlib.sha256()
        with write_errors(folder.parent):
            self._input_ids, self._supervised = ((folder / name).open("wb") for name in (INPUT_IDS, SUPERVISED))

    def add(self, examples: SerializedExamples, file: int) -> None:
        """Append examples of one file, given by its index."""
        with write_errors(self._folder.parent):
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
        """Write the table, and the ledger with the hash of all tokens and masks."""
        ledger = ledger | {"tokens_sha256": self._digest.hexdigest()}
        with write_errors(self._folder.parent):
            self._input_ids.close()
            self._supervised.close()
            (self._folder / TABLE).write_bytes(self._table.tobytes())
            (self._folder / LEDGER).write_text(json.dumps(ledger), encoding="utf-8")


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


def read_examples(entry: Entry, files: Sequence[str]) -> tuple[Examples, dict[str, Any]]:
    """Return the examples of an entry, and their ledger as plain values.

    Args:
        files: names of the data files, in the order of their hashes. They may have moved since the entry was written.

    Raises:
        DamagedEntry: the files do not fit together.
    """
    try:
        table = np.frombuffer(entry.read(TABLE), np.int64).reshape(-1, FIELDS)
        examples = Examples(entry.map(INPUT_IDS, np.int32), entry.map(SUPERVISED, np.bool_), table, files)
        ledger = json.loads(entry.read(LEDGER))
        counts = tuple(ledger[name] for name in ("num_examples", "num_tokens", "num_supervised_tokens", "longest"))
    except (ValueError, LookupError, TypeError, RecursionError):
        raise DamagedEntry(f"{TABLE} or {LEDGER} cannot be read") from None
    if not _is_consistent(examples) or counts != _counts(examples):
        raise DamagedEntry("its counts contradict each other")
    return examples, ledger


def _counts(examples: Examples) -> tuple[int, int, int, int]:
    lengths = examples.lengths
    return len(examples), len(examples.input_ids), int(examples.num_supervised.sum()), int(lengths.max(initial=0))


def _is_consistent(examples: Examples) -> bool:
    """Whether the table describes the arrays: no position or file of it is out of range."""
    table, lengths, num_tokens = examples.table, examples.lengths, len(examples.input_ids)
    end = int(table[-1, 0]) if len(table) else 0
    answers = table[:, 4:6]
    return bool(
        end == num_tokens == len(examples.supervised)
        and (lengths >= 0).all()
        and examples.num_supervised.sum() == np.count_nonzero(examples.supervised)
        and ((table[:, 2] >= 0) & (table[:, 2] < len(examples.files))).all()
        and ((answers[:, 0] >= 0) & (answers[:, 0] <= answers[:, 1]) & (answers[:, 1] <= lengths)).all()
    )
