"""Split the data into training and evaluation examples: the same split in training, `evaluate` and `inspect`.

Rows are held out, not examples: a row may have several, and a model trained on one of them knows part of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lora_accel.config.schema import DataSection, SourceSection
from lora_accel.data.audit import SourceLedger
from lora_accel.data.chat import Example
from lora_accel.data.dataset import Dataset, Recipe, load_dataset
from lora_accel.data.store import Examples
from lora_accel.errors import DataError
from lora_accel.randomness import permutation

HELD_OUT = "data.eval_fraction"
"""Name of the evaluation examples held out from the training sources."""
EVAL_SPLIT = 0x5EED
"""Key of the permutation that selects held-out examples. Differs from the keys that order epochs."""


class EvalSource(NamedTuple):
    """The evaluation examples of one source."""

    name: str
    """The name under which their loss is reported: the path, or `data.eval_fraction`."""
    examples: Examples


class Splits(NamedTuple):
    """All examples of a run."""

    train: Dataset
    """The training examples, one source for each of data.train; it has no examples if all its rows are held out."""
    evaluation: list[EvalSource]
    eval_ledgers: list[SourceLedger]
    """The ledgers of data.eval. Held-out rows are counted in the training ledgers."""


def load_splits(data: DataSection, seed: int, recipe: Recipe) -> Splits:
    """Load the training and the evaluation examples.

    Raises:
        DataError: a file or a row cannot be used, too many rows are unusable, or no training row is left.
    """
    all_train = _load_checked(data.train, recipe, data)
    all_eval = _load_checked(data.eval, recipe, data)
    evaluation = [
        EvalSource(section.path, source.examples) for section, source in zip(data.eval, all_eval.sources, strict=True)
    ]
    train, held = split_train(all_train, data, seed)
    if held is not None:
        evaluation += [EvalSource(HELD_OUT, source.examples) for source in held.sources]
    return Splits(train, evaluation, all_eval.ledgers)


def load_evaluation(data: DataSection, seed: int, recipe: Recipe) -> list[EvalSource]:
    """Load the evaluation examples. Training rows are read only if some of them are held out.

    Raises:
        DataError: see `load_splits`.
    """
    needed = data if data.eval_fraction else data.model_copy(update={"train": []})
    return load_splits(needed, seed, recipe).evaluation


def examples_by_name(sources: Sequence[EvalSource]) -> dict[str, list[Example]]:
    """Return the evaluation examples by the name under which their loss is reported."""
    named: dict[str, list[Example]] = {}
    for source in sources:
        named.setdefault(source.name, []).extend(source.examples)
    return named


def split_train(dataset: Dataset, data: DataSection, seed: int) -> tuple[Dataset, Dataset | None]:
    """Split the training examples into those to train on and those held out for evaluation.

    `data.eval_fraction` of the rows are held out, at least one and never all, each with all of its examples. A row that
    two sources share, of one file, is one row.

    Returns:
        Both, with one source for each of the dataset's. The second is None if `data.eval_fraction` is 0 or there are no
        examples (the ledgers have the reasons).

    Raises:
        DataError: no training row is left.
    """
    if not data.eval_fraction or not dataset.num_examples:
        return dataset, None
    rows, num_rows = _number_rows(dataset)
    count = max(1, round(data.eval_fraction * num_rows))
    if count >= num_rows:
        raise DataError(f"data.eval_fraction={data.eval_fraction} leaves no training row of {num_rows}; lower it")
    is_held = np.zeros(num_rows, np.bool_)
    is_held[permutation(num_rows, seed, EVAL_SPLIT)[:count]] = True
    remaining, held, first = [], [], 0
    for source in dataset.sources:
        mask = is_held[rows[first : first + len(source.examples)]]
        first += len(source.examples)
        remaining.append(source._replace(examples=source.examples.take(np.flatnonzero(~mask))))
        held.append(source._replace(examples=source.examples.take(np.flatnonzero(mask))))
    return dataset._replace(sources=remaining), dataset._replace(sources=held)


def _number_rows(dataset: Dataset) -> tuple[npt.NDArray[np.intp], int]:
    """Return the number of each example's row, [num_examples], in order of first appearance, and how many there are."""
    numbers: dict[str, int] = {}
    keys = []
    for source in dataset.sources:
        files = np.array([numbers.setdefault(name, len(numbers)) for name in source.examples.files], np.int64)
        file, row = source.examples.rows.T
        keys.append(files[file] << 40 | row)  # one integer for each row, since comparing pairs is slower
    _, first, inverse = np.unique(np.concatenate(keys), return_index=True, return_inverse=True)
    position = np.empty(len(first), np.intp)
    position[np.argsort(first)] = np.arange(len(first))
    return position[inverse], len(first)


def _load_checked(sources: Sequence[SourceSection], recipe: Recipe, data: DataSection) -> Dataset:
    dataset = load_dataset(sources, recipe, data)
    dataset.check(data.max_dropped)
    return dataset
