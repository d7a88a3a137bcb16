"""Held-out examples, and the rows that are evaluated by exact match."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lora_accel.config.schema import DataSection, SourceSection
from lora_accel.data.chat import ChatTemplate, Example
from lora_accel.data.dataset import Dataset, Recipe, Source, load_dataset
from lora_accel.data.formats import Conversation
from lora_accel.data.splits import HELD_OUT, Splits, examples_by_name, hold_out, load_evaluation, load_splits
from lora_accel.data.store import Examples
from lora_accel.errors import DataError
from lora_accel.labels import IGNORE_INDEX
from tests.conftest import chat_rows, write_jsonl


def numbered(*sizes: int) -> Dataset:
    sources, first = [], 0
    for size in sizes:
        examples = [Example([i, i], [IGNORE_INDEX, i]) for i in range(first, first + size)]
        sources.append(Source(Examples.of(examples), weight=float(size)))
        first += size
    return Dataset(sources, [])


@pytest.mark.parametrize(("fraction", "count"), [(0.001, 1), (0.1, 1), (0.34, 3), (0.5, 5), (0.9, 9)])
def test_holding_out_splits_the_examples(fraction: float, count: int) -> None:
    dataset = numbered(4, 6)
    order = [7, 2, 9, 0, 5, 1, 8, 3, 6, 4]
    train, held = hold_out(dataset, fraction, order)
    assert [example.input_ids[0] for example in held.examples] == sorted(order[:count])
    assert sorted(train.examples + held.examples) == sorted(dataset.examples)
    for source in (*train.sources, *held.sources):
        assert all((example.input_ids[0] < 4) == (source.weight == 4) for example in source.examples)


@pytest.mark.parametrize(("size", "fraction"), [(1, 0.1), (2, 0.9), (10, 0.96)])
def test_holding_out_everything_is_an_error(size: int, fraction: float) -> None:
    with pytest.raises(DataError, match=rf"data.eval_fraction={fraction} leaves no training example of {size}"):
        hold_out(numbered(size), fraction, list(range(size)))


Load = Callable[..., Splits]


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerFast) -> Load:
    def read(seed: int = 0, **data: Any) -> Splits:
        section = DataSection.model_validate({"max_dropped": 1.0} | data)
        return load_splits(section, seed, Recipe("tiny", lambda: ChatTemplate(tokenizer)))

    return read


def rows_of(examples: list[Example]) -> list[int]:
    return [example.row[1] for example in examples]


def test_a_source_that_is_held_out_completely_is_removed_but_keeps_its_ledger(tmp_path: Path, load: Load) -> None:
    one, many = write_jsonl(tmp_path / "one.jsonl", chat_rows(1)), write_jsonl(tmp_path / "many.jsonl", chat_rows(9))
    data = {"train": [{"path": str(one)}, {"path": str(many), "weight": 2.0}], "eval_fraction": 0.1}
    held = {}
    for seed in range(40):
        splits = load(seed=seed, **data)
        held[splits.evaluation[0].examples.row_ids != set()] = splits
    assert [(source.path, source.weight) for source in held[True].train.sources] == [(str(many), 2.0)]
    assert [source.path for source in held[False].train.sources] == [str(one), str(many)]
    assert [ledger.path for ledger in held[True].train.ledgers] == [str(one), str(many)]


def test_the_rows_that_a_seed_holds_out_never_change(tmp_path: Path, load: Load) -> None:
    """Otherwise, a resumed run would train on its evaluation rows."""
    rows = write_jsonl(tmp_path / "rows.jsonl", chat_rows(20))
    held = {}
    for seed in (0, 1):
        splits = load(seed=seed, train=[{"path": str(rows)}], eval_fraction=0.25)
        held[seed] = rows_of(examples_by_name(splits.evaluation)[HELD_OUT])
    assert held == {0: [1, 4, 12, 17, 20], 1: [5, 8, 9, 15, 16]}


def test_load_evaluation_gives_the_examples_of_load_splits(
    tmp_path: Path, load: Load, tokenizer: PreTrainedTokenizerFast
) -> None:
    """With data.eval, the training rows are not read."""
    rows = write_jsonl(tmp_path / "rows.jsonl", chat_rows(20))
    recipe = Recipe("tiny", lambda: ChatTemplate(tokenizer))
    for data in (
        {"train": [{"path": str(rows)}], "eval_fraction": 0.25},
        {"train": [{"path": str(tmp_path / "absent.jsonl")}], "eval": [{"path": str(rows)}, {"path": str(rows)}]},
    ):
        evaluation = examples_by_name(load_evaluation(DataSection.model_validate(data), 3, recipe))
        assert list(evaluation) == ([HELD_OUT] if "eval_fraction" in data else [str(rows)])
        expected = load(seed=3, **(data | {"train": [{"path": str(rows)}]}))
        assert evaluation == examples_by_name(expected.evaluation)
        assert {name: len(examples) for name, examples in evaluation.items()} in ({HELD_OUT: 5}, {str(rows): 40})


def uneven(count: int, tag: str) -> list[dict[str, Any]]:
    """Return rows with unique answers: every fifth is unusable, every third has several rounds."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        rounds = 4 if i % 3 == 0 else 1
        turns = [
            {"role": role, "content": f"{tag} {i} round {k} {role} one two three"}
            for k in range(rounds)
            for role in ("user", "assistant")
        ]
        rows.append({"messages": [] if i % 5 == 4 else turns})
    return rows


@pytest.mark.parametrize("overlong", ["truncate", "drop", "split"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_records_are_the_rows_of_which_nothing_is_trained_on(
    tmp_path: Path, load: Load, tokenizer: PreTrainedTokenizerFast, overlong: str, seed: int
) -> None:
    """With rows dropped, truncated or split, and with several sources, weights and limits."""
    contents = {name: uneven(size, name) for name, size in {"a": 30, "b": 40, "c": 12}.items()}
    files = {name: write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in contents.items()}
    train = [
        {"path": str(files["a"]), "limit": 17, "weight": 2.0},
        {"path": str(files["b"]), "weight": 0.25},
        {"path": str(files["a"]), "limit": 8},  # the same rows as another source
        {"path": str(tmp_path / "[c].jsonl")},
    ]
    data: dict[str, Any] = {"train": train, "eval_fraction": 0.5, "overlong": overlong, "max_length": 90}
    splits = load(seed=seed, **data)
    num_evaluated = num_skipped = 0
    for number, source in enumerate(splits.evaluation):
        name = "abac"[number]
        # The examples of this source by row, as without holding out.
        options = DataSection.model_validate(data | {"eval_fraction": 0.0, "train": [train[number]]})
        recipe = Recipe("tiny", lambda: ChatTemplate(tokenizer))
        (alone,) = load_dataset([SourceSection.model_validate(train[number])], recipe, options).sources
        full: dict[int, list[Example]] = {}
        held: dict[int, list[Example]] = {}
        for by_row, examples in ((full, alone.examples), (held, source.examples)):
            for example in examples:
                by_row.setdefault(example.row[1], []).append(example)
        assert all(example in full[row] for row, examples in held.items() for example in examples)
        expected = [row for row, examples in sorted(held.items()) if len(examples) == len(full[row])]
        records = list(source.records())
        assert all(isinstance(record, Conversation) for record in records)
        assert [record.messages[-1].content for record in records if isinstance(record, Conversation)] == [
            contents[name][row - 1]["messages"][-1]["content"] for row in expected
        ]
        num_evaluated += len(expected)
        num_skipped += len(held) - len(expected)
    assert num_evaluated > 10
    assert (num_skipped > 0) == (overlong == "split"), "a row is skipped if a part of it is trained on"
    kept = sum(len(source.examples) for source in splits.train.sources)
    assert kept + sum(len(source.examples) for source in splits.evaluation) == sum(
        x.num_examples for x in splits.train.ledgers
    )


def test_records_of_evaluation_rows_are_all_that_are_usable(tmp_path: Path, load: Load) -> None:
    rows = uneven(10, "a")
    files = [write_jsonl(tmp_path / "rows.jsonl", rows), write_jsonl(tmp_path / "train.jsonl", chat_rows(2))]
    splits = load(train=[{"path": str(files[1])}], eval=[{"path": str(files[0])}], overlong="split", max_length=90)
    (source,) = splits.evaluation
    usable = [row for row in rows if row["messages"]]
    contents = [[m.content for m in record.messages] for record in source.records() if isinstance(record, Conversation)]
    assert contents == [[turn["content"] for turn in row["messages"]] for row in usable]
    assert len(source.examples) > len(usable), "some rows were split"
    assert json.loads(files[0].read_text().splitlines()[0]) == rows[0]
