"""Files to examples: every file type, every option of `data.overlong`, and the ledger of each row."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from lora_accel.config.schema import DataSection, SourceSection
from lora_accel.data.audit import SourceLedger, ledger_lines
from lora_accel.data.chat import Example
from lora_accel.data.dataset import Dataset, Recipe, find_rows, load_dataset
from lora_accel.data.nulls import NULLS_LEFT_OUT
from lora_accel.data.template import ChatTemplate
from lora_accel.errors import DataError
from lora_accel.labels import IGNORE_INDEX
from tests.conftest import CHATML, chat_rows, write_jsonl

TEXTS = ["alpha", "bravo, charlie", 'delta "echo"', "fox\ntrot", "golf é 😀\u2028hotel"]
ROWS = [{"text": text} for text in TEXTS]

Load = Callable[..., Dataset]


@pytest.fixture
def template(tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    """The tiny tokenizer's own template."""
    return ChatTemplate(tokenizer)


@pytest.fixture
def load(template: ChatTemplate) -> Load:
    """Load one source; keyword arguments set its options and those of the data section."""

    def read(path: Path | str, **options: Any) -> Dataset:
        source = {name: options.pop(name) for name in set(options) & set(SourceSection.model_fields)}
        section = DataSection.model_validate({"train": [{"path": str(path), **source}], "max_dropped": 1.0, **options})
        return load_dataset(section.train, Recipe("tiny", lambda: template), section)

    return read


def texts(dataset: Dataset, template: ChatTemplate) -> list[str]:
    decoded = [template.tokenizer.decode(example.input_ids) for example in dataset.examples]
    assert all(text.endswith("<|im_end|>") for text in decoded)
    return [text.removesuffix("<|im_end|>") for text in decoded]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the format of the file's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.name == "wrapped.json":
        path.write_text(json.dumps({"version": 1, "data": rows}), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# Reading.


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "wrapped.json", "a.csv", "a.parquet"])
def test_every_file_type_gives_the_same_rows(tmp_path: Path, load: Load, template: ChatTemplate, name: str) -> None:
    dataset = load(write(tmp_path / name, ROWS))
    assert texts(dataset, template) == TEXTS
    assert dataset.ledgers[0].format == "text"
    assert [len(sha) for sha in dataset.ledgers[0].sha256.values()] == [64]


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.json", "chats.parquet"])
def test_conversations_are_read_from_nested_file_types(tmp_path: Path, load: Load, name: str) -> None:
    rows = chat_rows(7)
    examples = load(write(tmp_path / name, rows)).examples
    same = load(write_jsonl(tmp_path / "same.jsonl", rows)).examples
    assert [(x.input_ids, x.labels, x.row[1]) for x in examples] == [(x.input_ids, x.labels, x.row[1]) for x in same]
    assert sorted(x.row for x in examples) == [(str(tmp_path / name), number) for number in range(1, 8)]


def test_a_byte_order_mark_and_windows_line_ends_are_supported(
    tmp_path: Path, load: Load, template: ChatTemplate
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    dataset = load(file)
    assert texts(dataset, template) == ["one", "two"]
    assert dataset.ledgers[0].as_dict()["buckets"]["used"]["rows"] == {str(file): "1 3"}


def test_a_csv_field_may_be_as_long_as_a_document(tmp_path: Path, load: Load) -> None:
    long = "word " * 40_000
    dataset = load(write(tmp_path / "a.csv", [{"text": long}]), max_length=500_000)
    assert dataset.ledgers[0].longest > 40_000


def test_all_data_files_of_a_folder_are_read_in_order(tmp_path: Path, load: Load, template: ChatTemplate) -> None:
    for name, row in zip(("b.jsonl", "a.csv", "sub/c.parquet"), ROWS, strict=False):
        write(tmp_path / "all" / name, [row])
    (tmp_path / "all" / "README.md").write_text("not a row")
    dataset = load(tmp_path / "all")
    assert texts(dataset, template) == [TEXTS[1], TEXTS[0], TEXTS[2]]
    assert [Path(name).name for name in dataset.ledgers[0].sha256] == ["a.csv", "b.jsonl", "c.parquet"]


def test_a_glob_reads_matching_files(tmp_path: Path, load: Load, template: ChatTemplate) -> None:
    for name, row in zip(("x1.jsonl", "x2.jsonl", "y.jsonl", "x3.md"), ROWS, strict=False):
        write(tmp_path / name, [row])
    assert texts(load(tmp_path / "x*"), template) == TEXTS[:2]
    assert texts(load(tmp_path / "**" / "y.*"), template) == [TEXTS[2]]


@pytest.mark.parametrize("limit", [1, 3, 5, 100])
def test_a_limit_counts_rows_over_all_files(tmp_path: Path, load: Load, template: ChatTemplate, limit: int) -> None:
    write(tmp_path / "all" / "a.jsonl", ROWS[:2])
    write(tmp_path / "all" / "b.jsonl", ROWS[2:])
    assert texts(load(tmp_path / "all", limit=limit), template) == TEXTS[:limit]


def test_rows_after_the_limit_are_not_read(tmp_path: Path, load: Load) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\nnot json\n', encoding="utf-8")
    assert len(load(file, limit=1).examples) == 1
    with pytest.raises(DataError, match="line 2"):
        load(file, limit=2)


def test_columns_rename_keys(tmp_path: Path, load: Load, template: ChatTemplate) -> None:
    rows = [{"question": "q", "answer": "a", "prompt": "not this"}]
    dataset = load(write(tmp_path / "a.jsonl", rows), columns={"prompt": "question", "completion": "answer"})
    assert texts(dataset, template) == ["qa"]
    other = write(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "q"}])
    swapped = load(other, columns={"prompt": "completion", "completion": "prompt"})
    assert texts(swapped, template) == ["qa"]


def test_a_renamed_column_no_longer_has_its_old_name(tmp_path: Path, load: Load, template: ChatTemplate) -> None:
    dataset = load(write(tmp_path / "a.jsonl", [{"messages": "only text"}]), columns={"text": "messages"})
    assert texts(dataset, template) == ["only text"]


def test_an_explicit_format_is_not_detected(tmp_path: Path, load: Load, template: ChatTemplate) -> None:
    rows = [{"prompt": "p", "completion": "c", "text": "t"}]
    assert texts(load(write(tmp_path / "a.jsonl", rows)), template) == ["pc"]
    assert texts(load(tmp_path / "a.jsonl", format="text"), template) == ["t"]


def test_every_row_is_read_in_the_format_of_the_first_one(tmp_path: Path, load: Load, template: ChatTemplate) -> None:
    """Another row may have the keys of several formats."""
    rows = [{"text": "one"}, {"text": " "}, {"text": "two", "prompt": "p", "completion": "c"}, {"text": "three"}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    dataset = load(file, limit=3)
    assert texts(dataset, template) == ["one", "two"]
    assert [example.row for example in dataset.examples] == [(str(file), 1), (str(file), 3)]
    assert dataset.ledgers[0].dropped == {"empty text": [(str(file), 2)]}


def test_rows_are_found_by_file_and_number(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": " "}, {"text": "two"}, {"text": "three"}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    section = SourceSection(path=str(file), limit=3)
    chunks = list(find_rows(section, {(str(file), number) for number in (1, 3, 4)}))
    assert [row for chunk in chunks for row in chunk.parsed()] == [(1, rows[0]), (3, rows[2])]
    assert list(find_rows(section, ())) == []


# data.overlong.


def uneven(tmp_path: Path) -> Path:
    """Write twelve rows: short, long, without an answer, empty."""
    rows: list[dict[str, Any]] = chat_rows(9)
    rows[4:4] = [{"messages": []}, {"messages": [{"role": "user", "content": "q"}]}]
    rows.append({"messages": [{"role": "user", "content": "q " * 300}, {"role": "assistant", "content": "a"}]})
    return write_jsonl(tmp_path / "rows.jsonl", rows)


@pytest.mark.parametrize("overlong", ["truncate", "drop", "split"])
@pytest.mark.parametrize("max_length", [40, 45, 60, 10_000])
def test_each_row_is_in_exactly_one_bucket(tmp_path: Path, load: Load, overlong: str, max_length: int) -> None:
    dataset = load(uneven(tmp_path), overlong=overlong, max_length=max_length)
    ledger = dataset.ledgers[0]
    rows = [number for bucket in ledger.buckets.values() for _, number in bucket]
    assert sorted(rows) == list(range(1, 13))
    assert ledger.num_rows == 12
    assert ledger.num_examples == len(dataset.examples)
    assert ledger.num_tokens == sum(len(example.input_ids) for example in dataset.examples)
    assert ledger.num_supervised_tokens == sum(example.num_supervised for example in dataset.examples)
    assert ledger.longest == max((len(example.input_ids) for example in dataset.examples), default=0) <= max_length
    assert all(example.num_supervised for example in dataset.examples)
    assert ledger.dropped["empty conversation"] == [(ledger.path, 5)]
    assert ledger.dropped["no assistant turn"] == [(ledger.path, 6)]
    if overlong == "drop" and max_length < 10_000:
        assert (ledger.path, 12) in ledger.dropped["longer than data.max_length"]
    if overlong == "truncate" and max_length < 10_000:
        assert ledger.dropped["no supervised token within data.max_length"][-1] == (ledger.path, 12)
    if max_length == 10_000:
        assert set(ledger.buckets) == {"used", "dropped:empty conversation", "dropped:no assistant turn"}


@pytest.fixture
def two_rounds(tmp_path: Path) -> Path:
    """A file with one row: a system text and two rounds of the same length."""
    turns = [("system", "S"), ("user", "QQQQ"), ("assistant", "XXXX"), ("user", "WWWW"), ("assistant", "YYYY")]
    messages = [{"role": role, "content": content} for role, content in turns]
    return write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}])


def test_truncating_keeps_the_start(load: Load, two_rounds: Path) -> None:
    full = load(two_rounds).examples[0]
    length = len(full.input_ids) - 3
    dataset = load(two_rounds, max_length=length, overlong="truncate")
    assert dataset.examples == [Example(full.input_ids[:length], full.labels[:length], row=(str(two_rounds), 1))]
    assert list(dataset.ledgers[0].buckets) == ["truncated"]


def test_a_row_of_exactly_max_length_is_used(load: Load, two_rounds: Path) -> None:
    length = len(load(two_rounds).examples[0].input_ids)
    for overlong in ("truncate", "drop", "split", "error"):
        assert list(load(two_rounds, max_length=length, overlong=overlong).ledgers[0].buckets) == ["used"]


def test_a_conversation_is_split_at_user_messages_and_repeats_its_system_text(
    load: Load, two_rounds: Path, template: ChatTemplate
) -> None:
    length = len(load(two_rounds).examples[0].input_ids) - 1
    dataset = load(two_rounds, max_length=length, overlong="split")
    head = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n"
    assert [template.tokenizer.decode(example.input_ids) for example in dataset.examples] == [
        f"{head}QQQQ<|im_end|>\n<|im_start|>assistant\nXXXX<|im_end|>\n",
        f"{head}WWWW<|im_end|>\n<|im_start|>assistant\nYYYY<|im_end|>\n",
    ]
    assert list(dataset.ledgers[0].buckets) == ["split"]


def test_text_is_split_into_blocks_that_lose_no_token(tmp_path: Path, load: Load) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "alpha bravo charlie delta echo foxtrot " * 5}])
    full = load(file, max_length=10_000).examples[0]
    blocks = load(file, max_length=16, overlong="split").examples
    assert [token for block in blocks for token in block.input_ids] == full.input_ids
    assert {len(block.input_ids) for block in blocks[:-1]} == {16}
    # No token precedes the first one of a block, so nothing predicts it.
    assert all(block.labels == [IGNORE_INDEX, *block.input_ids[1:]] for block in blocks)


def test_documents_are_split_and_rows_truncated_by_default(tmp_path: Path, load: Load) -> None:
    text = "hello world the answer is " * 20
    (tmp_path / "a.txt").write_text(text)
    rows = write(tmp_path / "a.jsonl", [{"text": text}])
    document, row = load(tmp_path / "a.txt", max_length=20), load(rows, max_length=20)
    assert list(document.ledgers[0].buckets) == ["split"]
    assert list(row.ledgers[0].buckets) == ["truncated"]
    assert document.ledgers[0].num_cut_tokens == 0
    assert [example.input_ids for example in row.examples] == [document.examples[0].input_ids]


def test_nulls_that_a_table_adds_are_left_out_with_a_note(
    tmp_path: Path, tokenizer_factory: Callable[..., PreTrainedTokenizerFast]
) -> None:
    tokenizer = tokenizer_factory(chat_template="{{ tools | tojson }}" + CHATML)
    rows = [chat_rows(1)[0] | {"tools": [{"name": "one", "parameters": {key: {"type": "number"}}}]} for key in "ab"]
    tokens = []
    for name in ("a.jsonl", "a.parquet"):
        section = DataSection.model_validate({"train": [{"path": str(write(tmp_path / name, rows))}]})
        dataset = load_dataset(section.train, Recipe("tools", lambda: ChatTemplate(tokenizer)), section)
        tokens.append([example.input_ids for example in dataset.examples])
        assert dataset.ledgers[0].notes == ({} if name == "a.jsonl" else {NULLS_LEFT_OUT: 2})
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 2


def test_the_summary_shows_that_answers_have_examples_of_their_own(
    tmp_path: Path, tokenizer_factory: Callable[..., PreTrainedTokenizerFast]
) -> None:
    rows = write(tmp_path / "a.jsonl", [{"messages": chat_rows(1)[0]["messages"] * 2}])
    summaries = []
    for content in ("{{ m['content'] }}", "{{ loop.revindex }} {{ m['content'] }}"):
        tokenizer = tokenizer_factory(chat_template=CHATML.replace("{{ m['content'] }}", content))
        section = DataSection.model_validate({"train": [{"path": str(rows)}]})
        recipe = Recipe(content, functools.partial(ChatTemplate, tokenizer))
        ((_, summary),) = ledger_lines(load_dataset(section.train, recipe, section).ledgers)
        summaries.append(summary)
    assert "; 1 examples, " in summaries[0]
    assert "; 4 examples (answers that the template renders differently in the row have their own), " in summaries[1]


def test_a_completion_that_cannot_be_split_is_dropped(tmp_path: Path, load: Load) -> None:
    file = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": "p " * 40, "completion": "c"}, {"prompt": "p", "completion": "c"}]
    )
    ledger = load(file, max_length=16, overlong="split").ledgers[0]
    assert list(ledger.dropped) == ["a completion longer than data.max_length cannot be split"]


# The ledger.


def test_the_ledger_lists_rows_as_ranges_by_file(tmp_path: Path, load: Load) -> None:
    write(tmp_path / "all" / "a.jsonl", [*ROWS[:3], {"text": ""}, ROWS[4]])
    write(tmp_path / "all" / "b.jsonl", ROWS[:1])
    ledger = load(tmp_path / "all").ledgers[0]
    a, b = (str(tmp_path / "all" / name) for name in ("a.jsonl", "b.jsonl"))
    assert ledger.as_dict()["buckets"] == {
        "used": {"num_rows": 5, "rows": {a: "1-3 5", b: "1"}},
        "dropped:empty text": {"num_rows": 1, "rows": {a: "4"}},
    }
    assert ledger.as_dict()["num_rows"] == 6
    [(path, summary)] = ledger_lines([ledger])
    assert path == "all"
    assert summary.startswith("text, 6 rows: 5 used, 1 dropped (empty text); ")


@pytest.mark.parametrize(
    ("dropped", "allowed", "is_error"),
    [(0, 0.0, False), (1, 0.1, False), (1, 0.09, True), (2, 0.1, True), (9, 1.0, False), (10, 1.0, True)],
)
def test_more_dropped_than_allowed_is_an_error(dropped: int, allowed: float, is_error: bool) -> None:
    ledger = SourceLedger("rows.jsonl", "text")
    for number in range(1, 11):
        bucket = "dropped:empty text" if number <= dropped else "used"
        ledger.count(("rows.jsonl", number), bucket, [], [])
    if not is_error:
        ledger.check(allowed)
        return
    with pytest.raises(DataError, match=rf"^rows.jsonl: {dropped} of 10 rows cannot be used.*\n  rows.jsonl, row"):
        ledger.check(allowed)


def test_the_hash_depends_on_the_bytes_only(tmp_path: Path, load: Load) -> None:
    hashes = []
    for name, rows in (("a.jsonl", ROWS), ("b.jsonl", ROWS), ("c.jsonl", ROWS[:4])):
        hashes += load(write(tmp_path / name, rows)).ledgers[0].sha256.values()
    assert hashes[0] == hashes[1] != hashes[2]
