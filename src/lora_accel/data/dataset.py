"""Files and Hub data sets to examples. Strict: a line that is not JSON names itself, a row never vanishes."""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_accel.config.schema import DataSection, SourceSection
from lora_accel.data.audit import DROPPED, SPLIT, TRUNCATED, USED, SourceLedger
from lora_accel.data.chat import IGNORED, ChatTemplate, Example, encode_record
from lora_accel.data.formats import (
    Conversation,
    MalformedRow,
    Message,
    PlainText,
    Record,
    Row,
    UnusableRow,
    detect_format,
    parse_row,
)
from lora_accel.errors import DataError

FILE_TYPES = (".json", ".jsonl", ".ndjson", ".csv", ".parquet")
BLANK = object()
"""Stands for an empty line."""
MAX_FIELD = 2**31 - 1  # characters in a CSV field; the library's own 131,072 is less than a long document


class Source(NamedTuple):
    """The examples of one source, and how often they are seen."""

    examples: list[Example]
    weight: float


class Dataset(NamedTuple):
    """Tokenised sources with their ledgers."""

    sources: list[Source]
    ledgers: list[SourceLedger]

    @property
    def examples(self) -> list[Example]:
        """Return the examples of all sources, one after the other."""
        return [example for source in self.sources for example in source.examples]


def load_dataset(sources: Sequence[SourceSection], template: ChatTemplate, options: DataSection) -> Dataset:
    """Read and tokenise sources.

    Raises:
        DataError: a file is missing or broken, a row is malformed, or too many rows are unusable.
            The message names file and row.
    """
    loaded, ledgers = [], []
    for source in sources:
        ledger = SourceLedger(source.path, source.format)
        examples = [
            example for row in _rows(source, ledger) for example in _examples(row, ledger, source, template, options)
        ]
        ledger.check(options.max_dropped)
        loaded.append(Source(examples, source.weight))
        ledgers.append(ledger)
    return Dataset(loaded, ledgers)


def load_records(source: SourceSection) -> Iterator[Record]:
    """Read a source and leave out the rows that are unusable, as `load_dataset` does."""
    ledger = SourceLedger(source.path, source.format)
    for row in _rows(source, ledger):
        with contextlib.suppress(UnusableRow):
            yield _record(row, source, ledger)


def hold_out(dataset: Dataset, fraction: float, order: Sequence[int]) -> tuple[Dataset, list[Example]]:
    """Split off a share of the examples.

    Args:
        order: a permutation of all examples; the first of it are held out, at least one, never all.
    """
    count = max(1, round(fraction * len(order)))
    if count >= len(order):
        raise DataError(f"data.eval_fraction={fraction} leaves no training example of {len(order)}; lower it")
    held = set(order[:count])
    sources, first = [], 0
    for source in dataset.sources:
        kept = [example for i, example in enumerate(source.examples, start=first) if i not in held]
        first += len(source.examples)
        if kept:
            sources.append(source._replace(examples=kept))
    everything = dataset.examples
    return dataset._replace(sources=sources), [everything[i] for i in sorted(held)]


def _examples(
    row: tuple[str, int, Row],
    ledger: SourceLedger,
    source: SourceSection,
    template: ChatTemplate,
    options: DataSection,
) -> list[Example]:
    """Turn one row into examples, and count it in the ledger."""
    file, number, _ = row
    bucket = USED
    try:
        record = _record(row, source, ledger)
        whole = encode_record(record, template, options.loss_on)
        if not whole.num_supervised:
            raise UnusableRow("no supervised token")
        examples = [whole]
        if len(whole.input_ids) > options.max_length:
            bucket, examples = _shorten(record, whole, template, options)
    except _TooLong:
        raise DataError(
            f"{file}, row {number}: {len(whole.input_ids):,} tokens, over data.max_length={options.max_length}; "
            "raise it, or set data.overlong to truncate, drop or split"
        ) from None
    except UnusableRow as error:
        bucket, examples = f"{DROPPED}{error}", []
    lengths, supervised = [len(x.input_ids) for x in examples], [x.num_supervised for x in examples]
    ledger.count((file, number), bucket, lengths, supervised)
    return [example._replace(row=(file, number)) for example in examples]


def _record(row: tuple[str, int, Row], source: SourceSection, ledger: SourceLedger) -> Record:
    """Parse one row; a source has one format, found on its first row unless the config names it."""
    file, number, values = row
    try:
        values = _renamed(values, source.columns)
        if ledger.format is None:
            ledger.format = detect_format(values)
        return parse_row(values, ledger.format)
    except MalformedRow as error:
        raise DataError(f"{file}, row {number}: {error}") from None


class _TooLong(ValueError):
    """A row over max_length where the config says error."""


def _shorten(record: Record, whole: Example, template: ChatTemplate, options: DataSection) -> tuple[str, list[Example]]:
    """Do what `data.overlong` says with an example that is too long; return its bucket and what is left."""
    if options.overlong == "error":
        raise _TooLong
    if options.overlong == "drop":
        raise UnusableRow("longer than data.max_length")
    if options.overlong == "split":
        pieces = list(_split(record, whole, template, options))
    else:
        pieces = [_cut(whole, options.max_length)]
    kept = [piece for piece in pieces if piece.num_supervised]
    if not kept:
        raise UnusableRow("no supervised token within data.max_length")
    return (SPLIT if len(pieces) > 1 else TRUNCATED), kept


def _split(record: Record, whole: Example, template: ChatTemplate, options: DataSection) -> Iterator[Example]:
    """Cut text into blocks, and a conversation at its turns; the system text is repeated in each piece."""
    length = options.max_length
    if isinstance(record, PlainText):
        for start in range(0, len(whole.input_ids), length):
            input_ids, labels = (
                whole.input_ids[start : start + length],
                whole.labels[start : start + length],
            )
            yield Example(input_ids, [IGNORED, *labels[1:]])
        return
    if not isinstance(record, Conversation):
        raise UnusableRow("a completion longer than data.max_length cannot be split")
    system = tuple(message for message in record.messages[:1] if message.role == "system")
    piece: tuple[Message, ...] = ()
    for round_ in _rounds(record.messages[len(system) :]):
        longer = encode_record(Conversation((*system, *piece, *round_)), template, options.loss_on)
        if piece and len(longer.input_ids) > length:
            yield _cut(encode_record(Conversation((*system, *piece)), template, options.loss_on), length)
            piece = ()
        piece += round_
    yield _cut(encode_record(Conversation((*system, *piece)), template, options.loss_on), length)


def _rounds(messages: tuple[Message, ...]) -> Iterator[tuple[Message, ...]]:
    """Cut a conversation before each user message."""
    starts = [i for i, message in enumerate(messages) if message.role == "user" or i == 0]
    for start, end in zip(starts, [*starts[1:], len(messages)], strict=True):
        yield messages[start:end]


def _cut(example: Example, length: int) -> Example:
    return Example(example.input_ids[:length], example.labels[:length])


def _renamed(row: Row, columns: dict[str, str]) -> Row:
    if not columns:
        return row
    for known, theirs in columns.items():
        if theirs not in row:
            raise MalformedRow(f"columns maps {known!r} to {theirs!r}, which the row has not; it has {sorted(row)}")
    taken = set(columns.values())
    kept = {key: value for key, value in row.items() if key not in taken}
    return kept | {known: row[theirs] for known, theirs in columns.items()}


def _rows(source: SourceSection, ledger: SourceLedger) -> Iterator[tuple[str, int, Row]]:
    """Yield (file, row number, row) of a source, at most `source.limit` of them."""
    files = _files(source.path)
    rows = _file_rows(files, ledger) if files else _hub_rows(source, ledger)
    yield from itertools.islice(rows, source.limit)


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
        if here.suffix not in FILE_TYPES:
            raise DataError(f"{path}: unknown file type {here.suffix!r}; known are {', '.join(FILE_TYPES)}")
        return [here]
    if here.is_dir():
        found = sorted(file for file in here.rglob("*") if file.suffix in FILE_TYPES and file.is_file())
    elif glob.has_magic(path):
        found = sorted(Path(name) for name in glob.glob(path, recursive=True) if Path(name).suffix in FILE_TYPES)
    else:
        looks_like_hub_id = path.count("/") <= 1 and not path.startswith((".", "/", "~")) and not here.suffix
        if looks_like_hub_id:
            return []
        raise DataError(f"{path}: no such file; paths are taken from the folder the command runs in")
    if not found:
        where = "in this folder" if here.is_dir() else "matches this pattern"
        raise DataError(f"{path}: no {', '.join(FILE_TYPES)} file {where}")
    return found


def _file_rows(files: list[Path], ledger: SourceLedger) -> Iterator[tuple[str, int, Row]]:
    for file in files:
        data = _read_bytes(file)
        ledger.add_file(str(file), hashlib.sha256(data).hexdigest())
        for number, row in enumerate(_parsed(file, data), start=1):
            if row is BLANK:
                continue
            if not isinstance(row, dict):
                kind = "null" if row is None else f"a {type(row).__name__}"
                raise DataError(f"{file}, row {number}: should be an object, not {kind}")
            yield str(file), number, row


def _parsed(file: Path, data: bytes) -> Iterator[Any]:
    """Yield the rows of one file; BLANK for an empty line, which keeps the count of lines."""
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            yield from pq.read_table(file).to_pylist()
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: not a parquet file: {error}") from None
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        broken = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}, line {broken}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    if file.suffix == ".csv":
        yield from _csv_rows(file, text)
    elif file.suffix == ".json":
        yield from _json_rows(file, text)
    else:
        # split("\n"), since splitlines() also cuts at U+2028, which JSON allows within a string.
        for number, line in enumerate(text.split("\n"), start=1):
            yield _json(line, f"{file}, line {number}") if line.strip() else BLANK


def _json_rows(file: Path, text: str) -> list[Any]:
    rows = _json(text, str(file))
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        raise DataError(f"{file}: should be a list of rows; one object a line belongs into a .jsonl file")
    return rows


def _csv_rows(file: Path, text: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(MAX_FIELD)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
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
        text.encode("utf-8")
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


def _hub_rows(source: SourceSection, ledger: SourceLedger) -> Iterator[tuple[str, int, Row]]:
    import datasets

    try:
        rows = datasets.load_dataset(source.path, split=source.split)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{source.path}: no such file or folder, and not to be had as a data set of the Hub: {reason}"
        ) from None
    ledger.add_file(source.path, getattr(rows, "_fingerprint", ""))
    for number, row in enumerate(rows, start=1):
        yield source.path, number, row


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
