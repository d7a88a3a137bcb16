"""Data files that change, and files that are not what they seem: noticed, bounded, one message."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from lora_accel.config.schema import DataSection, SourceSection
from lora_accel.data import dataset as dataset_module
from lora_accel.data import decompression
from lora_accel.data import rows as rows_module
from lora_accel.data.dataset import Dataset, Recipe, load_dataset
from lora_accel.data.rows import MAX_ROW_BYTES, Input, find_input
from lora_accel.data.template import ChatTemplate
from lora_accel.errors import DataError

NAMES = ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.csv", "a.parquet", "a.arrow")
CHANGED = r"was written to or replaced while it was read; run again once the file no longer changes$"

Load = Callable[..., Dataset]


@pytest.fixture
def load(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Load:
    """Load a file through a cache in tmp_path."""
    template = ChatTemplate(tokenizer)

    def load(path: Path, **options: Any) -> Dataset:
        values = {"train": [{"path": str(path)}], "cache_dir": str(tmp_path / "cache"), "num_workers": 1} | options
        section = DataSection.model_validate(values)
        return load_dataset(section.train, Recipe("tiny", lambda: template), section)

    return load


def write(path: Path, texts: list[str]) -> Path:
    """Write rows of text in the format of the file's name."""
    rows = [{"text": text} for text in texts]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in texts)])
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines, mtime=0))
    elif path.suffix == ".zst":
        path.write_bytes(pa.compress(lines, "zstd", asbytes=True))
    else:
        path.write_bytes(lines)
    return path


def rename_over(path: Path, texts: list[str]) -> None:
    write(path.with_name(f"new-{path.name}"), texts).replace(path)


def write_in_place(path: Path, texts: list[str]) -> None:
    """Change the bytes and set the time of the last change back."""
    before, new = path.stat(), write(path.with_name(f"new-{path.name}"), texts)
    with path.open("r+b") as file:
        file.write(new.read_bytes())
        file.truncate()
    new.unlink()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = (rename_over, write_in_place)


def after_hashing(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Change something once, after the files are hashed and before they are read."""

    def find(section: SourceSection) -> Input:
        found = find_input(section)
        monkeypatch.setattr(dataset_module, "find_input", find_input)
        change()
        return found

    monkeypatch.setattr(dataset_module, "find_input", find)


def while_reading(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object], after: int = 1) -> None:
    """Change something once, after some chunks of one row each are read."""
    original = Input._all_chunks

    def chunks(self: Input) -> Any:
        for number, chunk in enumerate(original(self)):
            if number == after:
                monkeypatch.setattr(Input, "_all_chunks", original)
                change()
            yield chunk

    monkeypatch.setattr(rows_module, "MAX_CHUNK_ROWS", 1)
    monkeypatch.setattr(Input, "_all_chunks", chunks)


def has_entry(tmp_path: Path) -> bool:
    return any(path.suffix != ".lock" for path in (tmp_path / "cache").iterdir())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_after_it_was_hashed_is_an_error(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None], name: str
) -> None:
    path = write(tmp_path / name, ["one", "two"])
    after_hashing(monkeypatch, lambda: change(path, ["six", "ten"]))
    with pytest.raises(DataError, match=f"{name}: {CHANGED}"):
        load(path)
    assert not has_entry(tmp_path)
    assert load(path).num_examples == 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_read_is_an_error(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None], name: str
) -> None:
    path = write(tmp_path / name, ["one", "two", "three"])
    while_reading(monkeypatch, lambda: change(path, ["six", "ten", "seven"]))
    with pytest.raises(DataError, match=f"{name}: {CHANGED}"):
        load(path)
    assert not has_entry(tmp_path)


def test_the_last_rows_of_a_file_count_too(tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", ["one", "two"])
    while_reading(monkeypatch, path.unlink)
    with pytest.raises(DataError, match=CHANGED):
        load(path)
    assert not has_entry(tmp_path)


def test_rows_before_a_limit_of_a_file_that_changes_are_an_error(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", ["one", "two", "three"])
    while_reading(monkeypatch, lambda: write_in_place(path, ["six", "ten", "seven"]))
    with pytest.raises(DataError, match=CHANGED):
        load(path, train=[{"path": str(path), "limit": 2}])


@pytest.mark.parametrize("change", ["touched", "copied over", "renamed back"])
def test_a_file_with_the_same_bytes_has_not_changed(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = write(tmp_path / "a.jsonl", ["one", "two"])

    def apply() -> None:
        if change == "touched":
            path.touch()
            path.chmod(0o600)
        elif change == "copied over":
            rename_over(path, ["one", "two"])
        else:
            path.rename(tmp_path / "b.jsonl").rename(path)

    while_reading(monkeypatch, apply)
    assert load(path).num_examples == 2


def test_a_file_that_is_replaced_while_another_process_tokenizes_it(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", ["one", "two"])
    others = []

    def replace_and_load() -> None:
        rename_over(path, ["six", "ten", "nine"])
        others.append(load(path))

    while_reading(monkeypatch, replace_and_load)
    with pytest.raises(DataError, match=CHANGED):
        load(path)
    assert [other.num_examples for other in others] == [3]
    assert load(path).num_examples == 3


def test_a_pipe_in_place_of_a_file_is_an_error_at_once(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", ["one", "two"])

    def replace() -> None:
        path.unlink()
        os.mkfifo(path)

    after_hashing(monkeypatch, replace)
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: not an ordinary file"):
        load(path)
    with pytest.raises(DataError, match=r"a\.jsonl: is not an ordinary file"):
        load(path)


# Long rows.


def write_long(path: Path, length: int) -> Path:
    if path.name == "a.txt":
        path.write_bytes(b"a" * length)
        return path
    return write(path, ["short", "a" * length])


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("a.jsonl", "a.jsonl, line 2"),
        ("a.jsonl.gz", "a.jsonl.gz, line 2"),
        ("a.jsonl.zst", "a.jsonl.zst, line 2"),
        ("a.json", "a.json, row 2"),
        ("a.csv", "a.csv, row 2"),
        ("a.parquet", "a.parquet, row 2"),
        ("a.arrow", "a.arrow, row 2"),
        ("a.txt", "a.txt"),
    ],
)
def test_a_row_over_the_limit_is_an_error(tmp_path: Path, load: Load, name: str, where: str) -> None:
    path = write_long(tmp_path / name, 50_000_000 if name == "a.jsonl" else MAX_ROW_BYTES + 1)
    with pytest.raises(DataError, match=rf"{where}: is longer than {MAX_ROW_BYTES:,} (bytes|characters); divide"):
        load(path)
    assert not has_entry(tmp_path)


def test_the_lines_of_a_json_file_have_the_same_limit(tmp_path: Path, load: Load) -> None:
    path = write_long(tmp_path / "a.jsonl", MAX_ROW_BYTES).rename(tmp_path / "a.json")
    with pytest.raises(DataError, match=r"a\.json, line 2: is longer than"):
        load(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.txt"])
def test_a_row_below_the_limit_is_read(tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(rows_module, "MAX_ROW_BYTES", 5000)
    assert load(write_long(tmp_path / name, 4900)).num_examples in (2, 3)  # a document is split
    with pytest.raises(DataError, match="is longer than"):
        load(write_long(tmp_path / name, 5001))


@pytest.mark.parametrize("character", ["a", " ", "é"])
def test_a_prompt_of_a_million_characters_is_one_row_of_the_ledger(tmp_path: Path, load: Load, character: str) -> None:
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]}
        for text in ("hello", f"x{character * 1_000_000}x")
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load(path, max_dropped=1.0)
    assert dataset.num_examples == 1
    assert list(dataset.ledgers[0].dropped.values()) == [[(str(path), 2)]]


# Compressed files.


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.csv.gz", "a.txt.zst"])
@pytest.mark.parametrize("byte", [b"\0", b" ", b"\n"])
def test_a_bomb_is_an_error_before_it_fills_memory(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch, name: str, byte: bytes
) -> None:
    monkeypatch.setattr(decompression, "MIN_EXPANDED_BYTES", 1 << 20)
    data, path = byte * (40 << 20), tmp_path / name
    path.write_bytes(gzip.compress(data, 9) if path.suffix == ".gz" else bytes(pa.compress(data, "zstd", asbytes=True)))
    message = rf"{name}(: expands to more than 200 times its size; .*without compression|, line 1: over .* empty lines)"
    with pytest.raises(DataError, match=message):
        load(path)
    assert not has_entry(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv"])
def test_too_many_empty_lines_are_an_error(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(rows_module, "MAX_EMPTY_LINES", 10)
    first, row = (b"text\n", b"hello world\n") if name == "a.csv" else (b"", b'{"text": "hello world"}\n')
    path, compress = tmp_path / name, gzip.compress if name.endswith("gz") else bytes
    path.write_bytes(compress(first + row + b"\n" * 10 + row + b"\n" * 10))
    assert load(path).num_examples == 2
    path.write_bytes(compress(first + row + row + b"\n" * 11 + row))
    with pytest.raises(DataError, match=rf"{name}, line [34]: over 10 empty lines follow each other; remove them"):
        load(path)


def test_a_bomb_of_valid_rows_is_an_error(tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompression, "MIN_EXPANDED_BYTES", 1 << 17)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": ""}\n' * 50_000, 9))
    with pytest.raises(DataError, match="expands to more than"):
        load(path)


def test_a_table_of_one_repeated_value_is_a_bomb(tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompression, "MIN_EXPANDED_BYTES", 1 << 20)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a " * 500] * 5000}), path)
    assert path.stat().st_size < 20_000
    with pytest.raises(DataError, match=r"a\.parquet: expands to more than"):
        load(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_dictionary_that_all_batches_share_is_no_bomb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As pandas stores a category: counted with each batch, its values would be 30 times the size of the file."""
    monkeypatch.setattr(decompression, "MIN_EXPANDED_BYTES", 1 << 18)
    monkeypatch.setattr(decompression, "MAX_RATIO", 10)
    values = ["".join(random.Random(n).choices("abcdefgh", k=100)) for n in range(1000)]
    texts, path = values * 2, tmp_path / name
    table = pa.table({"text": pa.array(texts).dictionary_encode()})
    if name == "a.parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=50)
    chunks = find_input(SourceSection(path=str(path))).chunks(None)
    assert [row["text"] for chunk in chunks for _, row in chunk.parsed()] == texts


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.json.gz", "a.tsv.zst"])
def test_a_file_that_does_not_fit_into_memory_is_an_error(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = write(tmp_path / name.replace("tsv", "csv"), ["one two"] * 1000).rename(tmp_path / name)
    memory = namedtuple("memory", ["available"])
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory(1000))
    with pytest.raises(DataError, match=rf"{name}: does not fit into memory; save it as \.jsonl"):
        load(path)


def test_a_sparse_file_is_an_error_before_it_is_read(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(1 << 29)
    memory = namedtuple("memory", ["available"])
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory(1 << 29))
    with pytest.raises(DataError, match=r"a\.json: does not fit into memory"):
        load(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_rows_that_repeat_themselves_are_no_bomb(tmp_path: Path, load: Load, name: str) -> None:
    """A small file may expand as far as it likes."""
    path = write(tmp_path / name, ["a long system message " * 20] * 2000)
    assert path.stat().st_size * 20 < 2000 * 440
    assert load(path).num_examples == 2000


@pytest.mark.parametrize("name", ["a.jsonl.xz", "a.jsonl.bz2", "a.jsonl.lzma"])
def test_other_compressions_are_not_supported(tmp_path: Path, load: Load, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"unknown file type '\.\w+'; known are .*each with \.gz or \.zst"):
        load(tmp_path / name)


# Damaged files.


@pytest.mark.parametrize("name", [*NAMES, "a.csv.gz", "a.json.zst", "a.txt"])
def test_a_damaged_file_is_read_or_an_error(tmp_path: Path, load: Load, name: str) -> None:
    rng = random.Random(name)
    original = (write_long if name == "a.txt" else write)(
        tmp_path / name, 300 if name == "a.txt" else ["one", "two é", "three " * 40]
    ).read_bytes()
    errors = []
    for number in range(60):
        data = bytearray(original)
        for _ in range(rng.choice((1, 1, 3, 30))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path = tmp_path / f"{number}-{name}"
        path.write_bytes(data[: rng.randrange(1, len(data))] if number % 5 == 0 else data)
        try:
            load(path, max_dropped=1.0)
        except DataError as error:
            errors.append(str(error))
    assert all(str(tmp_path) in error for error in errors)
    assert errors
