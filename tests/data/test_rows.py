"""Files of every type, compressed or not, give the same rows."""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from lora_accel.config.schema import SourceSection
from lora_accel.data import rows as rows_module
from lora_accel.data.rows import find_input
from lora_accel.errors import DataError

ROWS = [{"text": "one, 'two'"}, {"text": 'three\t"four"'}, {"text": "fünf\u2028😀"}]
LINES = "".join(f'{{"text": "{text}"}}\n' for text in ("one", "two", "three"))


def read(path: Path, **options: Any) -> list[tuple[str, int, Any]]:
    section = SourceSection.model_validate({"path": str(path), **options})
    return [
        (chunk.file, number, row)
        for chunk in find_input(section).chunks(section.limit)
        for number, row in chunk.parsed()
    ]


def write_compressed(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pa.compress(data, "zstd", asbytes=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "data", "texts"),
    [
        ("a.jsonl", LINES, ["one", "two", "three"]),
        ("a.ndjson", LINES, ["one", "two", "three"]),
        ("a.json", '[{"text": "one"}, {"text": "two"}]', ["one", "two"]),
        ("a.csv", 'text,n\n"one, two",1\nthree,2\n', ["one, two", "three"]),
        ("a.tsv", 'text\tn\n"one\ttwo"\t1\nthree, four\t2\n', ["one\ttwo", "three, four"]),
        ("a.txt", "one\n\ntwo\n", ["one\n\ntwo\n"]),
    ],
)
def test_a_file_is_read_compressed_or_not(tmp_path: Path, suffix: str, name: str, data: str, texts: list[str]) -> None:
    rows = read(write_compressed(tmp_path / f"{name}{suffix}", data.encode()))
    assert [row["text"] for _, _, row in rows] == texts
    assert [number for _, number, _ in rows] == list(range(1, len(texts) + 1))


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_both_arrow_file_formats_are_read(tmp_path: Path, kind: str) -> None:
    table = pa.Table.from_pylist(ROWS)
    path = tmp_path / "a.arrow"
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert [row for _, _, row in read(path)] == ROWS


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_corrupt_table_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not a table")
    with pytest.raises(DataError, match=f"{name}: not a {name[2:]} file"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_truncated_compressed_file_is_an_error(tmp_path: Path, name: str) -> None:
    path = write_compressed(tmp_path / name, (LINES * 2000).encode())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=name):
        read(path)


def test_chunks_contain_every_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_CHUNK_ROWS", 4)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("".join(f'{{"n": {i}}}\n\n' for i in range(10)))
    all_rows = read(tmp_path)
    assert [row["n"] for _, _, row in all_rows] == [*range(10), *range(10)]
    assert [number for _, number, _ in all_rows] == [*range(1, 20, 2)] * 2
    for limit in range(1, 21):
        assert read(tmp_path, limit=limit) == all_rows[:limit]


def test_an_invalid_line_in_a_later_chunk_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n' * 700 + '{"n": \n' + '{"n": 1}\n' * 700)
    with pytest.raises(DataError, match=r"a\.jsonl, line 701: not valid JSON"):
        read(tmp_path / "a.jsonl")


# JSON


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_json_lines_in_a_json_file_are_read_as_lines(tmp_path: Path, end: str) -> None:
    lines = ["\ufeff", '{"text": "one\u2028"}', "", '{"text": "two"}', '  {"text": {"data": []}} ']
    (tmp_path / "a.json").write_bytes(end.join(lines).encode())
    rows = [(number, row["text"]) for _, number, row in read(tmp_path / "a.json")]
    assert rows == [(2, "one\u2028"), (4, "two"), (5, {"data": []})]


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_one_json_line_in_a_json_file_is_a_row(tmp_path: Path, end: str) -> None:
    (tmp_path / "a.json").write_text('{"text": "one"}' + end)
    assert read(tmp_path / "a.json") == [(str(tmp_path / "a.json"), 1, {"text": "one"})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "one"}\n{"text": ', "line 2: not valid JSON: Expecting value at column 10"),
        ('{"text": "one"}\n{"text": "a", "text": "b"}', "line 2: key 'text' appears twice in one object"),
        ('{"text": "a", "text": "b"}\n{"text": "one"}', "line 1: key 'text' appears twice in one object"),
        ('{"text": "one"}\n["two"]', "row 2: should be an object, not a list; for one list of all rows, name the file"),
        ('{"text": \n{"text": "one"}', "a.json, line 2: not valid JSON: "),
        ('[{"text": "one"},\n {"text": }]', "a.json, line 2: not valid JSON: Expecting value"),
        ('[{"text": "one"}] more', "a.json: not valid JSON: Extra data at column 19"),
        ('{\n"text": "one"\n}', "a.json: should be a list of rows, or one object per line"),
        ('{"data": {"text": "one"}}', "a.json: should be a list of rows"),
        ('"text"', "a.json: should be a list of rows, or one object per line"),
        ("", "a.json: not valid JSON: "),
    ],
)
def test_a_broken_json_file_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError) as caught:
        read(tmp_path / "a.json")
    assert message in str(caught.value)


def test_a_repeated_key_of_a_large_object_is_found_in_time(tmp_path: Path) -> None:
    keys = ", ".join(f'"{n}": 0' for n in range(20_000))
    (tmp_path / "a.jsonl").write_text(f'{{{keys}, "19999": 1}}\n')
    start = time.process_time()
    with pytest.raises(DataError, match="key '19999' appears twice in one object"):
        read(tmp_path / "a.jsonl")
    assert time.process_time() - start < 2


# Tables


@pytest.mark.parametrize(
    ("name", "from_table"), [("a.parquet", True), ("a.arrow", True), ("a.jsonl", False), ("a.json", False)]
)
def test_chunks_of_tables_are_marked(tmp_path: Path, name: str, from_table: bool) -> None:
    rows = datasets.Dataset.from_list([{"text": str(i)} for i in range(3)])
    if name == "a.arrow":
        rows.save_to_disk(tmp_path)
    else:
        getattr(rows, {"a.parquet": "to_parquet"}.get(name, "to_json"))(tmp_path / name)
    for limit in (None, 2):
        source = find_input(SourceSection(path=str(tmp_path)))
        assert [chunk.from_table for chunk in source.chunks(limit)] == [from_table]


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this release of datasets has no Json")
def test_json_in_a_table_is_parsed(tmp_path: Path) -> None:
    """It holds values of several types, which Arrow itself cannot: here a text and a list of parts."""
    rows = [{"messages": [{"content": "a"}, {"content": [{"type": "text", "text": "b"}]}]}]
    table = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "a.parquet")
    for path in ("saved", "a.parquet"):
        assert [row for _, _, row in read(tmp_path / path)] == rows


# Files of one source that differ

TEXT, CHAT = {"text": "a"}, {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def check_files(folder: Path, first_format: str) -> list[str]:
    source = find_input(SourceSection(path=str(folder)))
    return [Path(chunk.file).name for chunk in source.check_files(source.chunks(None), first_format, dict)]


@pytest.mark.parametrize(
    ("files", "first_format", "odd"),
    [
        ({"a.txt": None, "b.jsonl": CHAT}, "text", "a.txt"),
        ({"a.jsonl": CHAT, "b.txt": None}, "messages", "b.txt"),
        ({"a.txt": None, "b.txt": None, "c.jsonl": CHAT}, "text", "c.jsonl"),
        ({"a.jsonl": TEXT, "b.jsonl": CHAT, "c.jsonl": CHAT}, "text", "a.jsonl"),
        ({"a.jsonl": CHAT, "b.jsonl": TEXT, "c.jsonl": CHAT}, "messages", "b.jsonl"),
        ({"a.jsonl": CHAT, "b.jsonl": TEXT}, "messages", "b.jsonl"),
        ({"a.jsonl": CHAT, "b.json": {"score": 1}, "c.jsonl": CHAT}, "messages", "b.json"),
    ],
)
def test_the_file_that_is_not_like_the_others_is_named(
    tmp_path: Path, files: dict[str, dict[str, Any] | None], first_format: str, odd: str
) -> None:
    for name, row in files.items():
        (tmp_path / name).write_text(f"{json.dumps(row)}\n" if row else "text")
    with pytest.raises(DataError, match=f"^{tmp_path / odd}[:,] .*(its rows are of format|no known format)"):
        check_files(tmp_path, first_format)


def test_files_that_all_have_the_format_are_not_compared(tmp_path: Path) -> None:
    """Other keys than those of the format may differ: the second file alone would be read as `messages`."""
    both = CHAT | TEXT
    for name, row in (("a.jsonl", TEXT), ("b.jsonl", both), ("c.jsonl", TEXT), ("empty.jsonl", None)):
        (tmp_path / name).write_text(f"{json.dumps(row)}\n" if row else "")
    (tmp_path / "d.txt").write_text("text")
    assert check_files(tmp_path, "text") == ["a.jsonl", "b.jsonl", "c.jsonl", "d.txt"]


# Datasets on the Hub: the library reads a local folder in the same way.


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Write a dataset with two configurations, as a repository on the Hub has them."""
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("chat", "math"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name in ("chat", "math"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
def test_a_configuration_of_a_hub_dataset_is_read(
    repository: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "find_files", lambda source: {})
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **kwargs: argparse.Namespace(sha="abc"))
    hashes = set()
    for name in ("chat", "math"):
        assert read(repository, name=name, streaming=streaming) == [(str(repository), 1, {"text": name})]
        source = find_input(SourceSection(path=str(repository), name=name, streaming=streaming))
        assert [chunk.from_table for chunk in source.chunks(None)] == [True]
        hashes |= set(source.hashes.values())
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"has several configurations; set name to one of \['chat', 'math'\]$"),
        ({"name": "code"}, r"has no configuration 'code'; set name to one of \['chat', 'math'\]$"),
        ({"name": "chat", "split": "test"}, r"split: Unknown split \"test\"\. Should be one of \['train'\]$"),
        ({"name": "chat", "split": "test", "streaming": True}, r"split: Bad split: test\. .*\['train'\]$"),
    ],
)
def test_a_configuration_or_split_that_is_missing_is_an_error_with_those_there_are(
    repository: Path, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "find_files", lambda source: {})
    with pytest.raises(DataError, match=f"^{repository}: {message}"):
        read(repository, **options)
