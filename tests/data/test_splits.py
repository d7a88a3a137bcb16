"""Rows held out for evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lora_accel.config.schema import DataSection
from lora_accel.data.audit import DROPPED
from lora_accel.data.chat import Example
from lora_accel.data.dataset import Dataset, Recipe, Source
from lora_accel.data.splits import (
    EVAL_SPLIT,
    HELD_OUT,
    Splits,
    examples_by_name,
    load_evaluation,
    load_splits,
    split_train,
)
from lora_accel.data.store import Examples
from lora_accel.data.template import ChatTemplate
from lora_accel.errors import DataError
from lora_accel.labels import IGNORE_INDEX
from lora_accel.randomness import permutation
from tests.conftest import chat_rows, write_jsonl


def numbered(*sizes: int, examples_per_row: int = 1) -> Dataset:
    """Return sources of these numbers of rows. The tokens of an example are the number of its row, from 0."""
    sources, first = [], 0
    for number, size in enumerate(sizes):
        examples = [
            Example([row] * 2, [IGNORE_INDEX, row], row=(f"{number}.jsonl", row - first + 1))
            for row in range(first, first + size)
            for _ in range(examples_per_row)
        ]
        sources.append(Source(Examples.of(examples), weight=float(size)))
        first += size
    return Dataset(sources, [])


def hold_out(dataset: Dataset, fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    data = DataSection.model_validate({"train": [{"path": "rows.jsonl"}], "eval_fraction": fraction})
    train, held = split_train(dataset, data, seed)
    assert held is not None
    return train, held


@pytest.mark.parametrize("examples_per_row", [1, 3])
@pytest.mark.parametrize(("fraction", "count"), [(0.001, 1), (0.1, 1), (0.34, 3), (0.5, 5), (0.9, 9)])
def test_holding_out_splits_the_rows(fraction: float, count: int, examples_per_row: int) -> None:
    """The same rows as if each had one example."""
    dataset = numbered(4, 6, examples_per_row=examples_per_row)
    for seed in range(5):
        train, held = hold_out(dataset, fraction, seed)
        rows = [example.input_ids[0] for example in held.examples]
        expected = sorted(permutation(10, seed, EVAL_SPLIT)[:count].tolist())
        assert rows == [row for row in expected for _ in range(examples_per_row)]
        assert sorted(train.examples + held.examples) == sorted(dataset.examples)
        for source in (*train.sources, *held.sources):
            assert all((example.input_ids[0] < 4) == (source.weight == 4) for example in source.examples)


def test_a_row_that_two_sources_share_is_held_out_of_both() -> None:
    """The same file with another weight or limit."""
    (source,) = numbered(10).sources
    shared = Dataset([source, source._replace(weight=2.0), *numbered(10, 10).sources[1:]], [])
    for seed in range(10):
        train, held = hold_out(shared, 0.3, seed)
        assert {example.row for example in train.examples}.isdisjoint(example.row for example in held.examples)
        assert len({example.row for example in held.examples}) == 6, "of 20 rows"


@pytest.mark.parametrize(("size", "fraction"), [(1, 0.1), (2, 0.9), (10, 0.96)])
def test_holding_out_everything_is_an_error(size: int, fraction: float) -> None:
    message = rf"data.eval_fraction={fraction} leaves no training row of {size}; lower it"
    with pytest.raises(DataError, match=message):
        hold_out(numbered(size, examples_per_row=2), fraction)


Load = Callable[..., Splits]


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerFast) -> Load:
    def read(seed: int = 0, **data: Any) -> Splits:
        section = DataSection.model_validate({"max_dropped": 1.0} | data)
        return load_splits(section, seed, Recipe("tiny", lambda: ChatTemplate(tokenizer)))

    return read


def rows_of(examples: list[Example]) -> list[int]:
    return [example.row[1] for example in examples]


def test_a_source_that_is_held_out_completely_has_no_examples_but_a_ledger(tmp_path: Path, load: Load) -> None:
    one, many = write_jsonl(tmp_path / "one.jsonl", chat_rows(1)), write_jsonl(tmp_path / "many.jsonl", chat_rows(9))
    data = {"train": [{"path": str(one)}, {"path": str(many), "weight": 2.0}], "eval_fraction": 0.1}
    held = {}
    for seed in range(40):
        splits = load(seed=seed, **data)
        held[len(splits.evaluation[0].examples) > 0] = splits
    for is_held, splits in held.items():
        sources = [(source.path, source.weight, len(source.examples) > 0) for source in splits.train.sources]
        assert sources == [(str(one), 1.0, not is_held), (str(many), 2.0, True)]
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
def test_no_row_is_both_trained_on_and_held_out(tmp_path: Path, load: Load, overlong: str, seed: int) -> None:
    """With rows dropped, truncated or split, and with several sources, weights and limits."""
    files = {
        name: str(write_jsonl(tmp_path / f"{name}.jsonl", uneven(size, name)))
        for name, size in {"a": 30, "b": 40, "[c]": 12}.items()
    }
    train = [
        {"path": files["a"], "limit": 17, "weight": 2.0},
        {"path": files["b"], "weight": 0.25},
        {"path": files["a"], "limit": 8},  # the same rows as another source
        {"path": files["[c]"]},
    ]
    splits = load(seed=seed, train=train, eval_fraction=0.5, overlong=overlong, max_length=90)
    trained = [example for source in splits.train.sources for example in source.examples]
    held = [example for source in splits.evaluation for example in source.examples]
    assert {example.row for example in trained}.isdisjoint(example.row for example in held)
    buckets = [item for ledger in splits.train.ledgers for item in ledger.buckets.items()]
    usable = {row for bucket, rows in buckets for row in rows if not bucket.startswith(DROPPED)}
    assert len({example.row for example in held}) == round(0.5 * len(usable))
    assert len(trained) + len(held) == sum(ledger.num_examples for ledger in splits.train.ledgers)
    num_split = sum(count > 1 for count in Counter(example.row for example in held).values())
    if overlong == "split":
        assert num_split > 0, "a row of several examples is held out"
