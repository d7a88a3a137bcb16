"""Read rows from files and Hub datasets. Strict: no row is skipped silently, and errors name file and line.

JSONL, parquet and arrow files are streamed; json, csv and txt files are loaded into memory.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lora_accel.config.schema import SourceSection
from lora_accel.data.formats import Row
from lora_accel.errors import DataError, first_line

FILE_TYPES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
COMPRESSED = (".gz", ".zst")
MAX_FIELD = 2**31 - 1  # characters in a CSV field; the csv module's default of 131,072 is too short for documents
MAX_CHUNK_ROWS, MAX_CHUNK_BYTES = 500, 1 << 20


class Chunk(NamedTuple):
    """Rows of one file that are tokenized together: parsed, or as lines of JSON."""

    file: str
    numbers: list[int]
    """The number of each row: its line in a JSONL file, else its 1-based position."""
    rows: list[bytes] | list[Row]

    def parsed(self) -> Iterator[tuple[int, Row]]:
        """Yield (number, row), parsing lines of JSON.

        Raises:
            DataError: a line is not valid JSON, or a row is not an object.
        """
        for number, row in zip(self.numbers, self.rows, strict=True):
            if isinstance(row, bytes):
                row = _json_line(row, f"{self.file}, line {number}")
            if not isinstance(row, dict):
                kind = "null" if row is None else f"a {type(row).__name__}"
                raise DataError(f"{self.file}, row {number}: should be an object, not {kind}")
            yield number, row


class Input(NamedTuple):
    """The files of a source, or its Hub dataset."""

    files: list[Path]
    """Sorted; empty for a Hub dataset."""
    hashes: dict[str, str]
    """Name -> SHA-256 of the bytes of each file, in order (for a Hub dataset, its fingerprint)."""
    hub: Any = None
    """An open Hub dataset."""

    def chunks(self, limit: int | None) -> Iterator[Chunk]:
        """Yield the rows in chunks.

        Args:
            limit: number of rows to read; None = all.
        """
        remaining = limit
        for chunk in self._all_chunks():
            if remaining is None:
                yield chunk
                continue
            if len(chunk.numbers) >= remaining:
                yield Chunk(chunk.file, chunk.numbers[:remaining], chunk.rows[:remaining])
                return
            remaining -= len(chunk.numbers)
            yield chunk

    def _all_chunks(self) -> Iterator[Chunk]:
        if self.hub is not None:
            (name,) = self.hashes
            yield from _group_rows(name, enumerate(self.hub, start=1))
        for file in self.files:
            try:
                yield from _group_rows(str(file), _read_rows(file))
            except OSError as error:
                raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None


def find_input(source: SourceSection) -> Input:
    """Find the files of a source and hash them, or open its Hub dataset.

    Raises:
        DataError: there is no such file, folder, pattern or dataset, or it cannot be read.
    """
    files = _find_files(source.path)
    if not files:
        return _open_hub_dataset(source)
    return Input(files, {str(file): _sha256(file) for file in files})


def _open_hub_dataset(source: SourceSection) -> Input:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(
            source.path, split=source.split, revision=source.revision, streaming=source.streaming
        )
        fingerprint = rows._fingerprint if not source.streaming else _hub_commit(source)
    except Exception as error:
        reason = first_line(error)
        raise DataError(
            f"{source.path}: no such file or folder, and not available as a dataset on the Hub: {reason}"
        ) from None
    return Input([], {source.path: fingerprint}, rows)


def _hub_commit(source: SourceSection) -> str:
    from huggingface_hub import HfApi

    return f"{HfApi().dataset_info(source.path, revision=source.revision).sha} {source.split}"


def _find_files(pattern: str) -> list[Path]:
    """Return the data files of a file, folder or glob pattern, sorted; none if it can only be a Hub id.

    Raises:
        DataError: the path does not exist and is not a possible Hub id, or there is no data file in it.
    """
    path = Path(pattern)
    try:
        path.exists()
    except OSError as error:
        raise DataError(f"{pattern}: cannot be read: {error.strerror}") from None
    if path.is_file():
        if _file_type(path) not in FILE_TYPES:
            known = f"{', '.join(FILE_TYPES)}, each with {' or '.join(COMPRESSED)}"
            raise DataError(f"{pattern}: unknown file type {path.suffix!r}; known are {known}")
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _file_type(file) in FILE_TYPES and file.is_file())
    elif glob.has_magic(pattern):
        matches = map(Path, glob.glob(pattern, recursive=True))
        files = sorted(file for file in matches if _file_type(file) in FILE_TYPES)
    else:
        looks_like_hub_id = pattern.count("/") <= 1 and not pattern.startswith((".", "/", "~")) and not path.suffix
        if looks_like_hub_id:
            return []
        raise DataError(f"{pattern}: no such file; paths are relative to the working directory")
    if not files:
        where = "in this folder" if path.is_dir() else "matches this pattern"
        raise DataError(f"{pattern}: no {', '.join(FILE_TYPES)} file {where}")
    return files


def _file_type(file: Path) -> str:
    """Return the ending of a file's name without compression: `.jsonl` for `rows.jsonl.gz`."""
    return (file.with_suffix("") if file.suffix in COMPRESSED else file).suffix


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


def _group_rows(file: str, rows: Iterable[tuple[int, bytes | Row]]) -> Iterator[Chunk]:
    """Group rows into chunks of limited number and, for rows that are still bytes, limited size."""
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


def _read_rows(file: Path) -> Iterator[tuple[int, bytes | Row]]:
    """Yield (number, row) of a file. Empty lines are counted, but not yielded."""
    import pyarrow as pa

    file_type = _file_type(file)
    try:
        if file_type in (".jsonl", ".ndjson"):
            # Lines end at "\n" only: U+2028, at which str.splitlines splits, is valid in a JSON string.
            with _open(file) as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield number, line.rstrip(b"\r\n")
        elif file_type in (".parquet", ".arrow"):
            yield from enumerate(_table_rows(file, file_type), start=1)
        else:
            with _open(file) as stream:
                text = _decode(stream.read(), file)
            if file_type == ".json":
                yield from enumerate(_json_rows(file, text), start=1)
            elif file_type == ".txt":
                yield 1, {"text": text}
            else:
                yield from enumerate(_csv_rows(file, text, "\t" if file_type == ".tsv" else ","), start=1)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file}: not a {file_type[1:]} file: {first_line(error)}") from None


def _open(file: Path) -> io.BufferedReader:
    """Open a file for reading, decompressing it if necessary."""
    if file.suffix not in COMPRESSED:
        return file.open("rb")
    import pyarrow as pa

    stream: Any = pa.input_stream(str(file), compression={".gz": "gzip", ".zst": "zstd"}[file.suffix])
    return io.BufferedReader(stream)


def _table_rows(file: Path, file_type: str) -> Iterator[Row]:
    """Yield the rows of a parquet or arrow file, one record batch in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file_type == ".parquet":
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1000):
            yield from batch.to_pylist()
        return
    with pa.memory_map(str(file)) as source:
        try:
            reader = pa.ipc.open_file(source)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        except pa.ArrowInvalid:  # the streaming format
            source.seek(0)
            batches = iter(pa.ipc.open_stream(source))
        for batch in batches:
            yield from batch.to_pylist()


def _decode(data: bytes, file: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}, line {line}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


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
        raise DataError(f"{file}: should be a list of rows; for one object per line, name the file .jsonl")
    return rows


def _csv_rows(file: Path, text: str, delimiter: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(MAX_FIELD)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    number = 0
    try:
        header = list(reader.fieldnames or [])
        if len(set(header)) < len(header):
            raise DataError(f"{file}: column {_first_duplicate(header)!r} appears twice in the header; keep one")
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                raise DataError(
                    f"{file}, row {number}: the number of fields differs from the header; "
                    "put quotes around a field that contains a comma or a line break"
                )
            yield row
    except csv.Error as error:
        raise DataError(f"{file}, row {number + 1}: not valid CSV: {error}; check for an unclosed quote") from None


def _json(text: str, where: str) -> Any:
    """Parse JSON strictly: a repeated key or a lone surrogate is an error, since it would lose data."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise DataError(f"{where}{line}: not valid JSON: {error.msg} at column {error.colno}") from None
    except UnicodeEncodeError:
        raise DataError(f"{where}: contains an unpaired surrogate, which is not a character; remove it") from None
    except RecursionError:
        raise DataError(f"{where}: nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"key {_first_duplicate([key for key, _ in pairs])!r} appears twice in one object; keep one")
    return row


def _first_duplicate(names: list[str]) -> str:
    return next(name for name in names if names.count(name) > 1)
