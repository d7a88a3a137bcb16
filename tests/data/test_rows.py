"""Files of every type, compressed or not, give the same rows."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

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
