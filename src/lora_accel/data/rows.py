"""Files and Hub data sets to rows. Strict: a line that is not JSON names itself, a row never vanishes.

JSONL, parquet and arrow files are read as a stream, whatever their size; json and csv files are held in memory once.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lora_accel.config.schema import SourceSection
from lora_accel.data.formats import Row
from lora_accel.errors import DataError

FILE_TYPES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
COMPRESSED = (".gz", ".zst")
MAX_FIELD = 2**31 - 1  # characters in a CSV field; the library's own 131,072 is less than a long document
MAX_CHUNK_ROWS, MAX_CHUNK_BYTES = 500, 1 << 20


class Chunk(NamedTuple):
    """Rows of one file that are worked on together: parsed, or as lines of JSON."""

    file: str
    numbers: list[int]
    """Of each row: the line of a JSONL file, else its place, from 1."""
    rows: list[bytes] | list[Row]

    def parsed(self) -> Iterator[tuple[int, Row]]:
        """Yield (number, row).

        Raises:
            DataError: a line is no JSON, or a row no object.
        """
        for number, row in zip(self.numbers, self.rows, strict=True):
            if isinstance(row, bytes):
                row = _json_line(row, f"{self.file}, line {number}")
            if not isinstance(row, dict):
                kind = "null" if row is None else f"a {type(row).__name__}"
                raise DataError(f"{self.file}, row {number}: should be an object, not {kind}")
            yield number, row


class Input(NamedTuple):
    """What a source means: its files, or a data set of the Hub."""

    files: list[Path]
    """Sorted; none for the Hub."""
    hashes: dict[str, str]
    """SHA-256 of the bytes of each file (of a Hub data set, its fingerprint), by name, in order."""
    hub: Any = None
    """An open data set of the Hub."""

    def chunks(self, limit: int | None) -> Iterator[Chunk]:
        """Yield the rows, at most so many."""
        left = limit
        for chunk in self._all():
            if left is None:
                yield chunk
                continue
            if len(chunk.numbers) >= left:
                yield Chunk(chunk.file, chunk.numbers[:left], chunk.rows[:left])
                return
            left -= len(chunk.numbers)
            yield chunk

    def _all(self) -> Iterator[Chunk]:
        if self.hub is not None:
            (name,) = self.hashes
            yield from _chunks(name, enumerate(self.hub, start=1))
        for file in self.files:
            try:
                yield from _chunks(str(file), _numbered(file))
            except OSError as error:
                raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None


def find_input(source: SourceSection) -> Input:
    """Find the files of a source and read their bytes once, for the hashes by which data are known.

    Raises:
        DataError: there is no such file, folder, pattern or data set, or it cannot be read.
    """
    files = _files(source.path)
    if not files:
        return _hub(source)
    return Input(files, {str(file): _sha256(file) for file in files})


def _hub(source: SourceSection) -> Input:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(
            source.path, split=source.split, revision=source.revision, streaming=source.streaming
        )
        fingerprint = rows._fingerprint if not source.streaming else _commit(source)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{source.path}: no such file or folder, and not to be had as a data set of the Hub: {reason}"
        ) from None
    return Input([], {source.path: fingerprint}, rows)


def _commit(source: SourceSection) -> str:
    from huggingface_hub import HfApi

    return f"{HfApi().dataset_info(source.path, revision=source.revision).sha} {source.split}"


def _files(path: str) -> list[Path]:
    """Return the data files that a path means, sorted; none if it can only be a Hub id.

    Raises:
        DataError: the path is neither there nor a possible Hub id, or holds no data file.
    """
    here = Path(path)
    try:
        here.exists()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if here.is_file():
        if _kind(here) not in FILE_TYPES:
            known = f"{', '.join(FILE_TYPES)}, each with {' or '.join(COMPRESSED)}"
            raise DataError(f"{path}: unknown file type {here.suffix!r}; known are {known}")
        return [here]
    if here.is_dir():
        found = sorted(file for file in here.rglob("*") if _kind(file) in FILE_TYPES and file.is_file())
    elif glob.has_magic(path):
        found = sorted(Path(name) for name in glob.glob(path, recursive=True) if _kind(Path(name)) in FILE_TYPES)
    else:
        looks_like_hub_id = path.count("/") <= 1 and not path.startswith((".", "/", "~")) and not here.suffix
        if looks_like_hub_id:
            return []
        raise DataError(f"{path}: no such file; paths are taken from the folder the command runs in")
    if not found:
        where = "in this folder" if here.is_dir() else "matches this pattern"
        raise DataError(f"{path}: no {', '.join(FILE_TYPES)} file {where}")
    return found


def _kind(file: Path) -> str:
    """Return what a file holds, by its name: `.jsonl` of `rows.jsonl.gz`."""
    return (file.with_suffix("") if file.suffix in COMPRESSED else file).suffix


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


def _chunks(file: str, rows: Iterable[tuple[int, bytes | Row]]) -> Iterator[Chunk]:
    """Group rows, by number and, where they are still bytes, by size."""
    numbers: list[int] = []
    group: list[Any] = []
    size = 0
    for number, row in rows:
        numbers.append(number)
        group.append(row)
        size += len(row) if isinstance(row, bytes) else 0
        if len(group) == MAX_CHUNK_ROWS or size >= MAX_CHUNK_BYTES:
            yield Chunk(file, numbers, group)
            numbers, group, size = [], [], 0
    if group:
        yield Chunk(file, numbers, group)


def _numbered(file: Path) -> Iterator[tuple[int, bytes | Row]]:
    """Yield (number, row) of a file; empty lines count and are left out."""
    import pyarrow as pa

    kind = _kind(file)
    try:
        if kind in (".jsonl", ".ndjson"):
            # Lines end at "\n" alone: U+2028, at which str.splitlines cuts, may stand within a JSON string.
            with _opened(file) as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield number, line.rstrip(b"\r\n")
        elif kind in (".parquet", ".arrow"):
            yield from enumerate(_table_rows(file, kind), start=1)
        else:
            with _opened(file) as opened:
                text = _decoded(opened.read(), file)
            if kind == ".json":
                yield from enumerate(_json_rows(file, text), start=1)
            elif kind == ".txt":
                yield 1, {"text": text}
            else:
                yield from enumerate(_csv_rows(file, text, "\t" if kind == ".tsv" else ","), start=1)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file}: not a {kind[1:]} file: {str(error).splitlines()[0]}") from None


def _opened(file: Path) -> io.BufferedReader:
    """Open a file for reading, unpacked."""
    if file.suffix not in COMPRESSED:
        return file.open("rb")
    import pyarrow as pa

    packed: Any = pa.input_stream(str(file), compression={".gz": "gzip", ".zst": "zstd"}[file.suffix])
    return io.BufferedReader(packed)


def _table_rows(file: Path, kind: str) -> Iterator[Row]:
    """Yield the rows of a parquet or arrow file, some thousand at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == ".parquet":
        batches = pq.ParquetFile(file).iter_batches(batch_size=1000)
    else:
        with pa.memory_map(str(file)) as source:
            try:
                opened = pa.ipc.open_file(source)
                batches = map(opened.get_batch, range(opened.num_record_batches))
            except pa.ArrowInvalid:  # the other of arrow's two file formats
                source.seek(0)
                batches = iter(pa.ipc.open_stream(source))
            yield from itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            return
    yield from itertools.chain.from_iterable(batch.to_pylist() for batch in batches)


def _decoded(data: bytes, file: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        broken = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}, line {broken}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


def _json_line(line: bytes, where: str) -> Any:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start} of the line; save it as UTF-8") from None
    return _json(text, where)


def _json_rows(file: Path, text: str) -> list[Any]:
    rows = _json(text, str(file))
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        raise DataError(f"{file}: should be a list of rows; one object a line belongs into a .jsonl file")
    return rows


def _csv_rows(file: Path, text: str, delimiter: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(MAX_FIELD)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    number = 0
    try:
        heading = list(reader.fieldnames or [])
        if len(set(heading)) < len(heading):
            raise DataError(f"{file}: column {_repeated(heading)!r} stands twice in the heading; keep one")
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                raise DataError(
                    f"{file}, row {number}: has not as many fields as the heading; "
                    "put quotes around a field that holds a comma or a line break"
                )
            yield row
    except csv.Error as error:
        raise DataError(f"{file}, row {number + 1}: not valid CSV: {error}; is a quote left open?") from None


def _json(text: str, where: str) -> Any:
    """Parse JSON as it was meant: a repeated key or a lone surrogate is an error, not a loss."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise DataError(f"{where}{line}: not valid JSON: {error.msg} at column {error.colno}") from None
    except UnicodeEncodeError:
        raise DataError(f"{where}: holds half of a surrogate pair, which is no character; leave it out") from None
    except RecursionError:
        raise DataError(f"{where}: nested too deep for a row") from None
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"key {_repeated([key for key, _ in pairs])!r} stands twice in one object; keep one")
    return row


def _repeated(names: list[str]) -> str:
    return next(name for name in names if names.count(name) > 1)
