"""Sources to examples: tokenised once, by several processes, cached by content, every row in the ledger."""

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
from lora_accel.data.chat import ChatTemplate, Example, encode_record
from lora_accel.data.formats import MalformedRow, Record, Row, UnusableRow, check_format, detect_format, parse_row
from lora_accel.data.overlong import TooLong, shorten
from lora_accel.data.rows import Chunk, Input, find_input
from lora_accel.data.store import Examples, Packed, Writer, open_examples, stored
from lora_accel.errors import DataError
from lora_accel.processes import end_with_parent

ALONE = 4
"""So many chunks are worked on before other processes are begun, which takes longer than a small file."""


class Recipe(NamedTuple):
    """What turns rows into tokens."""

    fingerprint: str
    """Changes whenever the tokenizer or the template does."""
    template: Callable[[], ChatTemplate]
    """Loads them; not called when all is in the cache."""


class Source(NamedTuple):
    """The examples of one source, and how often they are seen."""

    examples: Examples
    weight: float
    path: str = ""


class Dataset(NamedTuple):
    """Tokenised sources with their ledgers."""

    sources: list[Source]
    ledgers: list[SourceLedger]

    @property
    def examples(self) -> list[Example]:
        """Return all examples, in memory."""
        return [example for source in self.sources for example in source.examples]

    @property
    def num_examples(self) -> int:
        """Return the number of examples of all sources."""
        return sum(len(source.examples) for source in self.sources)

    def example(self, number: int) -> Example:
        """Return one of all examples, counted through the sources."""
        for source in self.sources:
            if number < len(source.examples):
                return source.examples[number]
            number -= len(source.examples)
        raise IndexError(number)

    def check(self, max_dropped: float) -> None:
        """Refuse sources of which too much cannot be used.

        Raises:
            DataError: a source has no usable row, or more than this share of its rows are unusable.
        """
        for ledger in self.ledgers:
            ledger.check(max_dropped)


def load_dataset(sources: Sequence[SourceSection], recipe: Recipe, options: DataSection) -> Dataset:
    """Read and tokenise sources, or find them in the cache.

    Raises:
        DataError: a file is missing or broken, or a row is malformed. The message names file and row.
        ConfigError: the cache cannot be written to.
    """
    loaded, ledgers = [], []
    for section in sources:
        check_format(section.format, f"format of {section.path}")
    for section in sources:
        source = find_input(section)
        build = functools.partial(_build, source=source, section=section, recipe=recipe, options=options)
        folder = stored(cache_folder(options), _key(section, source, recipe, options), build)
        examples, told = open_examples(folder, list(source.hashes))
        loaded.append(Source(examples, section.weight, section.path))
        ledgers.append(SourceLedger.from_dict(told, section.path, source.hashes))
    return Dataset(loaded, ledgers)


def read_records(
    section: SourceSection, data_format: str | None, rows: Collection[tuple[str, int]]
) -> Iterator[Record]:
    """Read some rows of a source again, in file order.

    Args:
        data_format: as found on the first row of the source.
        rows: file and number of each; all of them can be used.
    """
    for chunk in find_rows(section, rows):
        for number, row in chunk.parsed():
            with _named(chunk.file, number):
                assert data_format is not None  # a row could be used, so its format is known
                yield parse_row(_renamed(row, section.columns), data_format)


def find_rows(section: SourceSection, rows: Collection[tuple[str, int]]) -> Iterator[Chunk]:
    """Find rows of a source by file and number; yield each by itself, in file order."""
    left = len(rows)
    for chunk in find_input(section).chunks(section.limit) if rows else ():
        for place, number in enumerate(chunk.numbers):
            if (chunk.file, number) in rows:
                yield Chunk(chunk.file, [number], chunk.rows[place : place + 1])
                left -= 1
        if not left:
            return


def cache_folder(options: DataSection) -> Path:
    """Return where tokenised data are kept: `data.cache_dir`, else beside the Hub's cache, which HF_HOME moves."""
    if options.cache_dir is not None:
        return Path(options.cache_dir)
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "lora_accel"


def _key(section: SourceSection, source: Input, recipe: Recipe, options: DataSection) -> str:
    """Return the hash of all that the examples of a source follow from: bytes, tokenizer, template, options, code."""
    described = {
        "data": [[Path(name).suffixes[-2:], sha256] for name, sha256 in source.hashes.items()],
        "recipe": recipe.fingerprint,
        "section": section.model_dump(include={"format", "columns", "limit"}),
        "options": options.model_dump(include={"max_length", "overlong", "loss_on", "parse_special_tokens"}),
        "code": _code(),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:40]


@functools.cache
def _code() -> str:
    """Return the hash of this package's code, and the versions of others', that make tokens of rows."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    for name in ("tokenizers", "transformers", "jinja2"):
        digest.update(metadata.version(name).encode())
    return digest.hexdigest()


# From rows to a folder of the cache.


class Prepared(NamedTuple):
    """What became of a chunk."""

    file: str
    rows: list[tuple[int, str, list[int], list[int]]]
    """Of each row: number, bucket, and of each of its examples the tokens and the supervised tokens."""
    examples: Packed
    num_ended: int
    num_cut_tokens: int
    notes: Counter[str]


def _build(folder: Path, *, source: Input, section: SourceSection, recipe: Recipe, options: DataSection) -> None:
    """Tokenise a source into a folder."""
    ledger = SourceLedger(section.path, section.format, dict(source.hashes))
    chunks = source.chunks(section.limit)
    first = next(chunks, None)
    if first is not None and ledger.format is None:
        number, row = next(first.parsed())
        with _named(first.file, number):
            ledger.format = detect_format(_renamed(row, section.columns))
    named = section.model_copy(update={"format": ledger.format})
    work = functools.partial(prepare, template=recipe.template(), section=named, options=options)
    writer, files = Writer(folder), list(source.hashes)
    stamps = [(file, file.stat()) for file in source.files]
    with Stage(f"tokenizing {short_names([section.path])[0]}") as stage:
        for done in _in_order(work, itertools.chain([first] if first else [], chunks), options.num_workers):
            for number, bucket, lengths, supervised in done.rows:
                ledger.count((done.file, number), bucket, lengths, supervised)
            ledger.num_ended += done.num_ended
            ledger.num_cut_tokens += done.num_cut_tokens
            ledger.note(done.notes)
            writer.add(done.examples, files.index(done.file))
            stage.note(f"{ledger.num_rows:,} rows")
    for file, stamp in stamps:
        now = file.stat()
        if (now.st_size, now.st_mtime_ns) != (stamp.st_size, stamp.st_mtime_ns):
            raise DataError(f"{file}: was written to while it was read; start again once it stands still")
    writer.close(ledger.as_dict())


def _in_order(
    work: Callable[[Chunk], Prepared], chunks: Iterator[Chunk], num_workers: int | None
) -> Iterator[Prepared]:
    """Yield what becomes of each chunk, in order, so that the number of workers changes nothing."""
    yield from map(work, itertools.islice(chunks, ALONE))
    most = num_workers or _cores()
    following = next(chunks, None)
    if following is None or most == 1:
        yield from map(work, itertools.chain([following] if following else [], chunks))
        return
    # A fork needs no import of what this process has, and does nothing but render and tokenise.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    waiting: deque[Future[Prepared]] = deque()
    with ProcessPoolExecutor(most, context, initializer=_begin, initargs=(os.getpid(), work)) as pool:
        try:
            for chunk in itertools.chain([following], chunks):
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) > 3 * most:  # so that memory does not grow with the file
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a process that tokenises was killed, for want of memory perhaps; try data.num_workers=1"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_task: Callable[[Chunk], Prepared]
"""What this process does with a chunk, if it is a worker: handed over once, since it holds a tokenizer."""


def _begin(parent: int, task: Callable[[Chunk], Prepared]) -> None:
    """Begin as a worker: Ctrl-C is the parent's affair, and so is its death."""
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    end_with_parent(parent)


def _work(chunk: Chunk) -> Prepared:
    return _task(chunk)


def prepare(chunk: Chunk, *, template: ChatTemplate, section: SourceSection, options: DataSection) -> Prepared:
    """Tokenise a chunk."""
    rows: list[tuple[int, str, list[int], list[int]]] = []
    examples: list[Example] = []
    notes: Counter[str] = Counter()
    num_cut, ends = 0, template.end_ids
    for number, row in chunk.parsed():
        with _named(chunk.file, number):
            bucket, made, cut = _examples(row, section, template, options)
        rows.append((number, bucket, [len(x.input_ids) for x in made], [x.num_supervised for x in made]))
        num_cut += cut
        notes.update({note for example in made for note in example.notes})
        examples += [example._replace(row=(chunk.file, number)) for example in made]
    num_ended = sum(not ends.isdisjoint(example.labels) for example in examples)
    return Prepared(chunk.file, rows, Packed.of(examples), num_ended, num_cut, notes)


@contextlib.contextmanager
def _named(file: str, number: int) -> Iterator[None]:
    """Say of a malformed row where it stands."""
    try:
        yield
    except (MalformedRow, TooLong) as error:
        raise DataError(f"{file}, row {number}: {error}") from None


def _examples(
    row: Row, section: SourceSection, template: ChatTemplate, options: DataSection
) -> tuple[str, list[Example], int]:
    """Turn one row into examples; return its bucket, them, and how many tokens were cut off."""
    assert section.format is not None  # found on the first row
    try:
        record = parse_row(_renamed(row, section.columns), section.format)
        whole = encode_record(record, template, options.loss_on)
        if not whole.num_supervised:
            raise UnusableRow("no supervised token")
        if len(whole.input_ids) <= options.max_length:
            return USED, [whole], 0
        return shorten(record, whole, template, options)
    except UnusableRow as error:
        return f"{DROPPED}{error}", [], 0


def _renamed(row: Row, columns: dict[str, str]) -> Row:
    if not columns:
        return row
    for known, theirs in columns.items():
        if theirs not in row:
            raise MalformedRow(f"columns maps {known!r} to {theirs!r}, which the row has not; it has {sorted(row)}")
    taken = set(columns.values())
    kept = {key: value for key, value in row.items() if key not in taken}
    return kept | {known: row[theirs] for known, theirs in columns.items()}
