"""Read rows from files and Hub datasets. Strict: no row is skipped silently, and errors name file and line.

JSONL, parquet and arrow files are streamed; json, csv and txt files are loaded into memory.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lora_accel.config.schema import SourceSection
from lora_accel.data.decompression import Expansion, decompressed, read_all
from lora_accel.data.files import file_type, find_files
from lora_accel.data.formats import detect_format, parse_row
from lora_accel.data.records import MalformedRow, Row, UnusableRow
from lora_accel.data.regular import HashedFile, Stamp, changed, stamp_and_hash
from lora_accel.errors import DataError, first_line
from lora_accel.json_text import first_duplicate, parse_strictly

Line = TypeVar("Line", str, bytes)
TABLES = (".parquet", ".arrow")
MAX_FIELD = 2**31 - 1  # characters in a CSV field; the csv module's default of 131,072 is too short for documents
MAX_CHUNK_ROWS, MAX_CHUNK_BYTES = 500, 1 << 20
MAX_ROW_BYTES = 1 << 24
"""Bytes of a line, or characters of a row: about four million tokens. Tokenizing takes 200 times as much memory."""
MAX_EMPTY_LINES = 1_000_000
"""Limit of empty lines between two rows. Reading so many takes a second."""
BATCH_ROWS = 50
"""Rows of a table that are in memory at once."""


class Chunk(NamedTuple):
    """Rows of one file that are tokenized together: parsed, or as lines of JSON."""

    file: str
    numbers: list[int]
    """The number of each row: its line in a JSONL file, else its 1-based position."""
    rows: list[bytes] | list[Row]
    from_table: bool = False
    """Whether the rows come from a table, which fills in null for keys that a row does not have."""

    def parsed(self) -> Iterator[tuple[int, Row]]:
        """Yield (number, row), parsing lines of JSON.

        Raises:
            DataError: a line is not valid JSON, or a row is not an object.
        """
        for number, row in zip(self.numbers, self.rows, strict=True):
            if isinstance(row, bytes):
                row = _json_line(row, f"{self.file}, line {number}")
            else:
                _check_size(row, f"{self.file}, row {number}")
            if not isinstance(row, dict):
                kind = "null" if row is None else f"a {type(row).__name__}"
                hint = "; for one list of all rows, name the file .json" if isinstance(row, list) else ""
                raise DataError(f"{self.file}, row {number}: should be an object, not {kind}{hint}")
            yield number, row


class Input(NamedTuple):
    """The files of a source, or its Hub dataset."""

    files: list[Path]
    """Local files, in order; empty for a Hub dataset."""
    hashes: dict[str, str]
    """Name (path or URL) -> SHA-256 of the bytes of each file, in order (for a Hub dataset, its fingerprint)."""
    hub: Any = None
    """An open Hub dataset."""
    stamps: Sequence[Stamp] = ()
    """One for each file: its status when it was hashed."""

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
                yield chunk._replace(numbers=chunk.numbers[:remaining], rows=chunk.rows[:remaining])
                return
            remaining -= len(chunk.numbers)
            yield chunk

    def _all_chunks(self) -> Iterator[Chunk]:
        if self.hub is not None:
            (name,) = self.hashes
            yield from _group_rows(name, enumerate(self.hub, start=1), from_table=True)
        for file, (name, sha256) in zip(self.files, self.hashes.items(), strict=False):
            yield from _file_chunks(file, name, sha256)

    def check_unchanged(self) -> None:
        """Check that each file is still the one that was hashed, or has the same bytes.

        Raises:
            DataError: it was changed, replaced or removed.
        """
        for file, name, stamp in zip(self.files, self.hashes, self.stamps, strict=False):
            try:
                is_same = Stamp.of(file.stat()) == stamp or stamp_and_hash(file, name)[1] == self.hashes[name]
            except FileNotFoundError:
                is_same = False
            except OSError as error:
                raise DataError(f"{name}: cannot be read: {error.strerror}") from None
            if not is_same:
                raise changed(name)

    def check_files(self, chunks: Iterable[Chunk], data_format: str, rename: Callable[[Row], Row]) -> Iterator[Chunk]:
        """Yield chunks, and check that the first row of each file has the format of the first file.

        Args:
            chunks: chunks of this input.
            data_format: format of the first row.
            rename: gives the keys of a row their names in the format.

        Raises:
            DataError: a file is not like the others. The message names the one that differs from most.
        """
        file = None
        for chunk in chunks:
            if chunk.file != file:
                file = chunk.file
                _, row = next(chunk.parsed())
                try:
                    parse_row(rename(row), data_format)
                except MalformedRow:
                    self._check_formats(rename)
                except UnusableRow:
                    pass
            yield chunk

    def _check_formats(self, rename: Callable[[Row], Row]) -> None:
        """Check that the first rows of all files have one format."""
        formats: dict[str, str] = {}
        for file, (name, sha256) in zip(self.files, self.hashes.items(), strict=False):
            chunk = next(_file_chunks(file, name, sha256), None)
            for number, row in itertools.islice(chunk.parsed(), 1) if chunk else ():
                try:
                    formats[name] = detect_format(rename(row))
                except MalformedRow as error:
                    raise DataError(f"{name}, row {number}: {error}") from None
        counts = Counter(formats.values())
        # Of two files, a .txt file is the odd one: its row has no keys of its own.
        with_keys = {known for name, known in formats.items() if file_type(name) != ".txt"}
        usual = max(counts, key=lambda known: (counts[known], known in with_keys))
        like = next(name for name, known in formats.items() if known == usual)
        for name, known in formats.items():
            if known != usual:
                raise DataError(
                    f"{name}: its rows are of format {known!r}, and those of {like} are {usual!r}; "
                    "move it to another folder, or list the files as separate sources"
                )


def _file_chunks(file: Path, name: str, sha256: str) -> Iterator[Chunk]:
    """Yield the rows of a file. Those of each chunk are read from bytes with the file's hash."""
    try:
        with HashedFile(file, name, sha256) as opened:
            try:
                for chunk in _group_rows(name, _read_rows(opened), from_table=file_type(file.name) in TABLES):
                    opened.check()
                    yield chunk
            except DataError:
                opened.check()  # if the file is being written to, that is the reason
                raise
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None


def find_input(source: SourceSection) -> Input:
    """Find the files of a source and hash them, or open its Hub dataset.

    Raises:
        DataError: there is no such file, folder, pattern or dataset, or it cannot be read.
    """
    files = find_files(source)
    if not files:
        return _open_hub_dataset(source)
    hashed = {name: stamp_and_hash(file, name) for name, file in files.items()}
    hashes = {name: sha256 for name, (_, sha256) in hashed.items()}
    return Input(list(files.values()), hashes, stamps=[stamp for stamp, _ in hashed.values()])


def _open_hub_dataset(source: SourceSection) -> Input:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(
            source.path, source.name, split=source.split, revision=source.revision, streaming=source.streaming
        )
        fingerprint = rows._fingerprint if not source.streaming else _hub_commit(source)
    except Exception as error:
        raise DataError(_explain_hub_error(source, error)) from None
    return Input([], {source.path: fingerprint}, rows)


def _explain_hub_error(source: SourceSection, error: Exception) -> str:
    """Return a message with the way out: datasets' own message lists the configurations, or the splits."""
    reason, text = first_line(error), str(error)
    if "Config name is missing" in text or "BuilderConfig" in text:
        what = "has several configurations" if source.name is None else f"has no configuration {source.name!r}"
        known = re.search(r"\[.*?\]", text)
        return f"{source.path}: {what}; set name to one of {known[0]}" if known else f"{source.path}: {what}: {reason}"
    if reason.startswith(("Unknown split", "Bad split")):
        return f"{source.path}: split: {reason}"
    return f"{source.path}: no such file or folder, and not available as a dataset on the Hub: {reason}"


def _hub_commit(source: SourceSection) -> str:
    from huggingface_hub import HfApi

    commit = HfApi().dataset_info(source.path, revision=source.revision).sha
    return " ".join([str(commit), *([source.name] if source.name else []), source.split])


def _group_rows(file: str, rows: Iterable[tuple[int, bytes | Row]], *, from_table: bool) -> Iterator[Chunk]:
    """Group rows into chunks of limited number and, for rows that are still bytes, limited size."""
    numbers: list[int] = []
    group: list[Any] = []
    size = 0
    for number, row in rows:
        numbers.append(number)
        group.append(row)
        size += len(row) if isinstance(row, bytes) else 0
        if len(group) == MAX_CHUNK_ROWS or size >= MAX_CHUNK_BYTES:
            yield Chunk(file, numbers, group, from_table)
            numbers, group, size = [], [], 0
    if group:
        yield Chunk(file, numbers, group, from_table)


def _read_rows(opened: HashedFile) -> Iterator[tuple[int, bytes | Row]]:
    """Yield (number, row) of a file. Empty lines are counted, but not yielded."""
    import pyarrow as pa

    name, kind = opened.name, file_type(opened.file.name)
    try:
        if kind in (".jsonl", ".ndjson"):
            # Lines end at "\n" only: U+2028, at which str.splitlines splits, is valid in a JSON string.
            stream = decompressed(opened)
            yield from _json_lines(iter(functools.partial(stream.readline, MAX_ROW_BYTES + 1), b""), name)
        elif kind in TABLES:
            yield from enumerate(_table_rows(opened, kind), start=1)
        elif kind == ".txt":
            document = decompressed(opened).read(MAX_ROW_BYTES + 1)
            if len(document) > MAX_ROW_BYTES:
                raise DataError(f"{name}: is longer than {MAX_ROW_BYTES:,} bytes; divide it into several files")
            yield 1, {"text": _decode(document, name)}
        else:
            text = _decode(read_all(opened), name)
            if kind == ".json":
                yield from _json_rows(name, text)
            else:
                yield from enumerate(_csv_rows(name, text, "\t" if kind == ".tsv" else ","), start=1)
    except MemoryError:
        raise DataError(f"{name}: does not fit into memory; save it as .jsonl, which is read row by row") from None
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise DataError(f"{name}: not a {kind[1:]} file: {first_line(error)}") from None


def _table_rows(opened: HashedFile, kind: str) -> Iterator[Row]:
    """Yield the rows of a parquet or arrow file, one record batch in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source, expansion = pa.PythonFile(opened.reader(), mode="r"), Expansion(opened.name, lambda: opened.size)
    if kind == ".parquet":
        table = pq.ParquetFile(source)
        yield from _batch_rows(table.schema_arrow, table.iter_batches(batch_size=BATCH_ROWS), expansion)
        return
    try:
        reader = pa.ipc.open_file(source)
        batches = map(reader.get_batch, range(reader.num_record_batches))
    except pa.ArrowInvalid:  # the streaming format
        source.seek(0)
        batches = reader = pa.ipc.open_stream(source)
    yield from _batch_rows(reader.schema, batches, expansion)


def _batch_rows(schema: Any, batches: Iterable[Any], expansion: Expansion) -> Iterator[Row]:
    """Yield the rows of record batches. JSON text that the `datasets` library stored for a `Json` feature is parsed."""
    decode: Callable[[Row], Row] | None = None
    if b'"_type": "Json"' in (schema.metadata or {}).get(b"huggingface", b""):
        import datasets

        decode = datasets.Features.from_arrow_schema(schema).decode_example
    for batch in batches:
        expansion.add(sum(map(_num_bytes, batch.columns)))
        batch.validate(full=True)  # a damaged file may hold offsets beyond its data
        for start in range(0, len(batch), BATCH_ROWS):
            rows = batch.slice(start, BATCH_ROWS).to_pylist()
            yield from map(decode, rows) if decode else rows


def _num_bytes(column: Any) -> int:
    """Return the size of a column. In a column with a dictionary, which all batches share, each row has one value."""
    import pyarrow as pa

    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    per_row = column.dictionary.nbytes // max(1, len(column.dictionary))
    return int(column.indices.nbytes + len(column) * per_row)


def _check_size(row: Any, where: str) -> None:
    """Check that a parsed row is not too long."""
    remaining, size = [row], 0
    while remaining:
        value = remaining.pop()
        if isinstance(value, dict):
            remaining += value.values()
        elif isinstance(value, list):
            remaining += value
        else:
            size += len(value) if isinstance(value, (str, bytes)) else 1
    if size > MAX_ROW_BYTES:
        raise DataError(f"{where}: is longer than {MAX_ROW_BYTES:,} characters; divide it into several rows")


def _decode(data: bytes | bytearray, file: str) -> str:
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


def _json_lines(lines: Iterable[bytes], file: str) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(_limit_empty_lines(lines, file), start=1):
        if len(line) > MAX_ROW_BYTES:
            raise DataError(
                f"{file}, line {number}: is longer than {MAX_ROW_BYTES:,} bytes; divide the row into several, or "
                "remove it"
            )
        if line.strip():
            yield number, line.rstrip(b"\r\n")


def _limit_empty_lines(lines: Iterable[Line], file: str) -> Iterator[Line]:
    """Yield lines; raise if too many empty ones follow each other, which would take minutes without a single row."""
    num_empty = 0
    for number, line in enumerate(lines, start=1):
        num_empty = 0 if line.strip() else num_empty + 1
        if num_empty > MAX_EMPTY_LINES:
            first = number - MAX_EMPTY_LINES
            raise DataError(
                f"{file}, line {first}: over {MAX_EMPTY_LINES:,} empty lines follow each other; remove them"
            )
        yield line


def _json_rows(file: str, text: str) -> Iterator[tuple[int, bytes | Row]]:
    """Yield the rows of a .json file: a list of rows, also as the value of `data`, or JSON lines."""
    first, _, others = text.strip().partition("\n")
    if others and _is_json_object(first):  # then all of the text is not one JSON value
        yield from _json_lines((line.encode() for line in text.removesuffix("\n").split("\n")), file)
        return
    rows = _json(text, file)
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    elif isinstance(rows, dict) and "data" not in rows and not others:  # JSON lines, of one line
        rows = [rows]
    if not isinstance(rows, list):
        raise DataError(f"{file}: should be a list of rows, or one object per line")
    yield from enumerate(rows, start=1)


def _is_json_object(text: str) -> bool:
    try:
        return text.startswith("{") and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _csv_rows(file: str, text: str, delimiter: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(MAX_FIELD)
    reader = csv.DictReader(_limit_empty_lines(io.StringIO(text, newline=""), file), strict=True, delimiter=delimiter)
    number = 0
    try:
        header = list(reader.fieldnames or [])
        if len(set(header)) < len(header):
            raise DataError(f"{file}: column {first_duplicate(header)!r} appears twice in the header; keep one")
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
    try:
        return parse_strictly(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise DataError(f"{where}{line}: not valid JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
