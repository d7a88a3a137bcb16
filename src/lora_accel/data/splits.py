"""What a run trains on and what it is evaluated on: one split, the same in training, `evaluate` and `inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lora_accel.config.schema import DataSection, SourceSection
from lora_accel.data.audit import SourceLedger
from lora_accel.data.chat import Example
from lora_accel.data.dataset import Dataset, Recipe, load_dataset, read_records
from lora_accel.data.formats import Record
from lora_accel.data.store import Examples
from lora_accel.errors import DataError
from lora_accel.randomness import permutation

HELD_OUT = "data.eval_fraction"
"""Name of the evaluation source that is held out of the training sources."""
EVAL_SPLIT = 0x5EED
"""Keeps the permutation that chooses held-out examples apart from those that order epochs."""


class EvalSource(NamedTuple):
    """The evaluation examples of one source."""

    name: str
    """What their loss is reported under: the path, or `data.eval_fraction`."""
    section: SourceSection
    ledger: SourceLedger
    examples: Examples
    trained: Examples | None = None
    """The examples of the same source that are trained on, where these are held out of it."""

    def records(self) -> Iterator[Record]:
        """Yield the records of the rows that are evaluated, in file order.

        A row of which `data.overlong: split` made several examples is skipped if one of them is trained on.
        """
        trained = self.trained.row_ids if self.trained is not None else set()
        return read_records(self.section, self.ledger.format, self.examples.row_ids - trained)


class Splits(NamedTuple):
    """All examples of a run."""

    train: Dataset
    """What is trained on. A source that is held out completely is left out; its ledger stays."""
    evaluation: list[EvalSource]
    eval_ledgers: list[SourceLedger]
    """Of data.eval. Rows that are held out are counted in the ledgers of training."""


def load_splits(data: DataSection, seed: int, recipe: Recipe) -> Splits:
    """Load what is trained on and what is evaluated.

    Raises:
        DataError: a file or a row cannot be used, too many rows are unusable, or nothing is left to train on.
    """
    whole = _load_checked(data.train, recipe, data)
    given = _load_checked(data.eval, recipe, data)
    evaluation = [
        EvalSource(section.path, section, ledger, source.examples)
        for section, source, ledger in zip(data.eval, *given, strict=True)
    ]
    train, held = split_train(whole, data, seed)
    if held is not None:
        evaluation += [
            EvalSource(HELD_OUT, section, ledger, out.examples, trained=left.examples)
            for section, ledger, out, left in zip(data.train, whole.ledgers, held.sources, train.sources, strict=True)
        ]
    left_over = [source for source in train.sources if len(source.examples)]
    return Splits(train._replace(sources=left_over), evaluation, given.ledgers)


def load_evaluation(data: DataSection, seed: int, recipe: Recipe) -> list[EvalSource]:
    """Load what a run evaluates; the training rows are read only if it is held out of them.

    Raises:
        DataError: see `load_splits`.
    """
    needed = data if data.eval_fraction else data.model_copy(update={"train": []})
    return load_splits(needed, seed, recipe).evaluation


def examples_by_name(sources: Sequence[EvalSource]) -> dict[str, list[Example]]:
    """Return evaluation examples under the names that their losses are reported under."""
    named: dict[str, list[Example]] = {}
    for source in sources:
        named.setdefault(source.name, []).extend(source.examples)
    return named


def split_train(dataset: Dataset, data: DataSection, seed: int) -> tuple[Dataset, Dataset | None]:
    """Split the training examples into those that are trained on and those that are held out for evaluation.

    Returns:
        Both with a source for each of the dataset's; None if `data.eval_fraction` holds nothing out, or there is
        nothing to hold out (the ledgers say why).

    Raises:
        DataError: nothing is left to train on.
    """
    if not data.eval_fraction or not dataset.num_examples:
        return dataset, None
    order = permutation(dataset.num_examples, seed, EVAL_SPLIT).tolist()
    return hold_out(dataset, data.eval_fraction, order)


def hold_out(dataset: Dataset, fraction: float, order: Sequence[int]) -> tuple[Dataset, Dataset]:
    """Split off a share of the examples.

    Args:
        order: a permutation of all examples; the first of it are held out, at least one, never all.

    Returns:
        What is left and what is held out, both with a source (maybe empty) for each of the dataset's.
    """
    count = max(1, round(fraction * len(order)))
    if count >= len(order):
        raise DataError(f"data.eval_fraction={fraction} leaves no training example of {len(order)}; lower it")
    is_held = np.zeros(len(order), np.bool_)
    is_held[list(order[:count])] = True
    left, held, first = [], [], 0
    for source in dataset.sources:
        mine = is_held[first : first + len(source.examples)]
        first += len(source.examples)
        left.append(source._replace(examples=source.examples.take(np.flatnonzero(~mine))))
        held.append(source._replace(examples=source.examples.take(np.flatnonzero(mine))))
    return dataset._replace(sources=left), dataset._replace(sources=held)


def _load_checked(sources: Sequence[SourceSection], recipe: Recipe, data: DataSection) -> Dataset:
    dataset = load_dataset(sources, recipe, data)
    dataset.check(data.max_dropped)
    return dataset
