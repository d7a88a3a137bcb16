"""Tokenize sources into examples: in several processes, cached by content, with every row in the ledger."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from lora_accel.config.schema import DataSection, SourceSection
from lora_accel.console import Stage, short_names
from lora_accel.data.audit import DROPPED, USED, SourceLedger
from lora_accel.data.cache import DamagedEntry, Entry, load_or_build
from lora_accel.data.chat import Example, encode_record
from lora_accel.data.files import file_type
from lora_accel.data.formats import check_format, detect_format, parse_row
from lora_accel.data.nulls import NULLS_LEFT_OUT, drop_null_members
from lora_accel.data.overlong import TooLong, apply_overlong
from lora_accel.data.records import Completion, MalformedRow, PlainText, Row, UnusableRow
from lora_accel.data.rows import Chunk, Input, find_input
from lora_accel.data.store import LEDGER, Examples, SerializedExamples, Writer, read_examples
from lora_accel.data.template import ChatTemplate
from lora_accel.errors import DataError
from lora_accel.processes import end_with_parent

INLINE_CHUNKS = 4
"""Chunks that the main process tokenizes before it starts workers: starting them takes longer than a small file."""


class Recipe(NamedTuple):
    """The tokenizer and chat template of a dataset."""

    fingerprint: str
    """Hash of tokenizer and template."""
    template: Callable[[], ChatTemplate]
    """Loads both. Not called if everything is in the cache."""


class Source(NamedTuple):
    """The examples of one source, and how often an epoch repeats them."""

    examples: Examples
    weight: float
    path: str = ""


class Dataset(NamedTuple):
    """Tokenized sources with their ledgers."""

    sources: list[Source]
    ledgers: list[SourceLedger]

    @property
    def examples(self) -> list[Example]:
        """Load all examples into memory."""
        return [example for source in self.sources for example in source.examples]

    @property
    def num_examples(self) -> int:
        """Return the number of examples of all sources."""
        return sum(len(source.examples) for source in self.sources)

    def example(self, number: int) -> Example:
        """Return an example by its index over all sources."""
        for source in self.sources:
            if number < len(source.examples):
                return source.examples[number]
            number -= len(source.examples)
        raise IndexError(number)

    def check(self, max_dropped: float) -> None:
        """Check that enough rows of each source are usable.

        Args:
            max_dropped: largest allowed fraction of dropped rows (`data.max_dropped`).

        Raises:
            DataError: a source has no usable row, or too many are dropped.
        """
        for ledger in self.ledgers:
            ledger.check(max_dropped)


def load_dataset(sources: Sequence[SourceSection], recipe: Recipe, options: DataSection) -> Dataset:
    """Read and tokenize sources, or load them from the cache.

    Raises:
        DataError: a file is missing or corrupt, or a row is malformed. The message names file and row.
        ConfigError: the cache cannot be written to.
    """
    loaded, ledgers = [], []
    for section in sources:
        check_format(section.format, f"format of {section.path}")
    for section in sources:
        source = find_input(section)
        build = functools.partial(_build, source=source, section=section, recipe=recipe, options=options)
        read = functools.partial(_read, source=source, section=section)
        examples, ledger = load_or_build(cache_folder(options), _key(section, source, recipe, options), build, read)
        loaded.append(Source(examples, section.weight, section.path))
        ledgers.append(ledger)
    return Dataset(loaded, ledgers)


def _read(entry: Entry, *, source: Input, section: SourceSection) -> tuple[Examples, SourceLedger]:
    """Return the examples and the ledger of a cache entry, with the names that the files have now."""
    examples, values = read_examples(entry, list(source.hashes))
    try:
        return examples, SourceLedger.from_dict(values, section.path, source.hashes)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise DamagedEntry(f"{LEDGER} cannot be read") from None


def find_rows(section: SourceSection, rows: Collection[tuple[str, int]]) -> Iterator[Chunk]:
    """Yield rows of a source by (file, number), each as a chunk of its own, in file order."""
    remaining = len(rows)
    for chunk in find_input(section).chunks(section.limit) if rows else ():
        for i, number in enumerate(chunk.numbers):
            if (chunk.file, number) in rows:
                yield chunk._replace(numbers=[number], rows=chunk.rows[i : i + 1])
                remaining -= 1
        if not remaining:
            return


def cache_folder(options: DataSection) -> Path:
    """Return the folder of the data cache: `data.cache_dir`, or `lora_accel` in HF_HOME."""
    if options.cache_dir is not None:
        return Path(options.cache_dir)
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "lora_accel"


def _key(section: SourceSection, source: Input, recipe: Recipe, options: DataSection) -> str:
    """Return the hash of everything that a source's examples depend on: bytes, tokenizer, template, options, code."""
    inputs = {
        "data": [[Path(name).suffixes[-2:], sha256] for name, sha256 in source.hashes.items()],
        "recipe": recipe.fingerprint,
        "section": section.model_dump(include={"format", "columns", "limit"}),
        "options": options.model_dump(include={"max_length", "overlong", "loss_on", "parse_special_tokens"}),
        "code": _code_hash(),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:40]


@functools.cache
def _code_hash() -> str:
    """Return the hash of the code that tokenizes rows: this package's files, and the versions of its dependencies."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    for name in ("tokenizers", "transformers", "jinja2"):
        digest.update(metadata.version(name).encode())
    return digest.hexdigest()


# Tokenize rows into a cache folder.


class TokenizedChunk(NamedTuple):
    """The examples of a chunk, and its counts for the ledger."""

    file: str
    rows: list[tuple[int, str, list[int], list[int]]]
    """(number, bucket, lengths, supervised) per row: both lists count tokens of each of its examples."""
    examples: SerializedExamples
    num_ended: int
    num_raw: int
    """Examples to which no chat template is applied."""
    num_cut_tokens: int
    notes: Counter[str]


def _build(folder: Path, *, source: Input, section: SourceSection, recipe: Recipe, options: DataSection) -> None:
    """Tokenize a source into a cache folder."""
    ledger = SourceLedger(section.path, section.format, dict(source.hashes))
    chunks = source.chunks(section.limit)
    first = next(chunks, None)
    if first is not None and ledger.format is None:
        number, row = next(first.parsed())
        with _locate_errors(first.file, number):
            ledger.format = detect_format(rename_columns(row, section.columns))
        rename = functools.partial(rename_columns, columns=section.columns)
        chunks = source.check_files(itertools.chain([first], chunks), ledger.format, rename)
    elif first is not None:
        chunks = itertools.chain([first], chunks)
    section = section.model_copy(update={"format": ledger.format})
    task = functools.partial(tokenize_chunk, template=recipe.template(), section=section, options=options)
    writer, files = Writer(folder), list(source.hashes)
    with Stage(f"tokenizing {short_names([section.path])[0]}") as stage:
        for chunk in _map_in_order(task, chunks, options.num_workers):
            for number, bucket, lengths, supervised in chunk.rows:
                ledger.count((chunk.file, number), bucket, lengths, supervised)
            ledger.num_ended += chunk.num_ended
            ledger.num_raw += chunk.num_raw
            ledger.num_cut_tokens += chunk.num_cut_tokens
            ledger.note(chunk.notes)
            writer.add(chunk.examples, files.index(chunk.file))
            stage.note(f"{ledger.num_rows:,} rows")
    source.check_unchanged()
    writer.close(ledger.as_dict())


def _map_in_order(
    task: Callable[[Chunk], TokenizedChunk], chunks: Iterator[Chunk], num_workers: int | None
) -> Iterator[TokenizedChunk]:
    """Apply a task to chunks, in several processes; yield results in order, whatever the number of workers."""
    yield from map(task, itertools.islice(chunks, INLINE_CHUNKS))
    num_workers = num_workers or _num_cores()
    following = next(chunks, None)
    if following is None or num_workers == 1:
        yield from map(task, itertools.chain([following] if following else [], chunks))
        return
    # A forked worker imports nothing again. It only renders and tokenizes.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pending: deque[Future[TokenizedChunk]] = deque()
    with ProcessPoolExecutor(num_workers, context, initializer=_init_worker, initargs=(os.getpid(), task)) as pool:
        try:
            for chunk in itertools.chain([following], chunks):
                pending.append(pool.submit(_run_task, chunk))
                if len(pending) > 3 * num_workers:  # bounds memory for files of any size
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a tokenization worker was killed, possibly out of memory; try data.num_workers=1"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_task: Callable[[Chunk], TokenizedChunk]
"""The function that a worker applies to each chunk. Sent once per worker, since it contains a tokenizer."""


def _init_worker(parent: int, task: Callable[[Chunk], TokenizedChunk]) -> None:
    """Set up a worker: ignore Ctrl-C and Ctrl-\\, which the parent handles, and exit when the parent dies."""
    global _task
    _task = task
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    end_with_parent(parent)


def _run_task(chunk: Chunk) -> TokenizedChunk:
    return _task(chunk)


def tokenize_chunk(
    chunk: Chunk, *, template: ChatTemplate, section: SourceSection, options: DataSection
) -> TokenizedChunk:
    """Tokenize the rows of a chunk.

    Args:
        section: the source, with its format set.

    Raises:
        DataError: a row is malformed, or too long with `data.overlong: error`.
    """
    rows: list[tuple[int, str, list[int], list[int]]] = []
    examples: list[Example] = []
    notes: Counter[str] = Counter()
    num_cut_tokens, num_raw = 0, 0
    if options.overlong == "auto":  # a .txt file is a document, not one row of many
        is_document = file_type(chunk.file) == ".txt"
        options = options.model_copy(update={"overlong": "split" if is_document else "truncate"})
    for number, row in chunk.parsed():
        with _locate_errors(chunk.file, number):
            row, is_cut = drop_null_members(row) if chunk.from_table else (row, False)
            bucket, encoded, num_cut, is_raw = _encode_row(row, section, template, options)
        notes[NULLS_LEFT_OUT] += is_cut
        num_raw += len(encoded) if is_raw else 0
        rows.append((number, bucket, [len(x.input_ids) for x in encoded], [x.num_supervised for x in encoded]))
        num_cut_tokens += num_cut
        notes.update({note for example in encoded for note in example.notes})
        examples += [example._replace(row=(chunk.file, number)) for example in encoded]
    end_ids = template.end_ids
    num_ended = sum(not end_ids.isdisjoint(example.labels) for example in examples)
    serialized = SerializedExamples.of(examples)
    return TokenizedChunk(chunk.file, rows, serialized, num_ended, num_raw, num_cut_tokens, +notes)


@contextlib.contextmanager
def _locate_errors(file: str, number: int) -> Iterator[None]:
    """Add file and row to the message of a row's error."""
    try:
        yield
    except (MalformedRow, TooLong) as error:
        raise DataError(f"{file}, row {number}: {error}") from None


def _encode_row(
    row: Row, section: SourceSection, template: ChatTemplate, options: DataSection
) -> tuple[str, list[Example], int, bool]:
    """Return a row's bucket, its examples, the number of tokens cut off, and whether no chat template is applied."""
    assert section.format is not None  # detected from the first row
    try:
        record = parse_row(rename_columns(row, section.columns), section.format)
        is_raw = isinstance(record, (Completion, PlainText))
        examples = encode_record(record, template, options.loss_on)
        if not examples:
            raise UnusableRow("no supervised token")
        if max(len(example.input_ids) for example in examples) <= options.max_length:
            return USED, examples, 0, is_raw
        return *apply_overlong(record, examples, template, options), is_raw
    except UnusableRow as error:
        return f"{DROPPED}{error}", [], 0, False


def rename_columns(row: Row, columns: dict[str, str]) -> Row:
    """Return a row with the key names of its format.

    Args:
        columns: name in the format -> name in the file.
    """
    if not columns:
        return row
    for key, column in columns.items():
        if column not in row:
            raise MalformedRow(f"columns maps {key!r} to {column!r}, which is missing; the row has {sorted(row)}")
    renamed = set(columns.values())
    others = {key: value for key, value in row.items() if key not in renamed}
    return others | {key: row[column] for key, column in columns.items()}
