"""Split the data into training and evaluation examples: the same split in training, `evaluate` and `inspect`."""

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
"""Name of the evaluation examples held out from the training sources."""
EVAL_SPLIT = 0x5EED
"""Key of the permutation that selects held-out examples. Differs from the keys that order epochs."""


class EvalSource(NamedTuple):
    """The evaluation examples of one source."""

    name: str
    """The name under which their loss is reported: the path, or `data.eval_fraction`."""
    section: SourceSection
    ledger: SourceLedger
    examples: Examples
    trained: Examples | None = None
    """The training examples of the same source, if these are held out from it."""

    def records(self) -> Iterator[Record]:
        """Yield the records of the evaluation rows, in file order.

        A row that `data.overlong: split` divided into several examples is skipped if one of them is trained on.
        """
        trained = self.trained.row_ids if self.trained is not None else set()
        return read_records(self.section, self.ledger.format, self.examples.row_ids - trained)


class Splits(NamedTuple):
    """All examples of a run."""

    train: Dataset
    """The training examples. A source that is held out completely is removed; its ledger is kept."""
    evaluation: list[EvalSource]
    eval_ledgers: list[SourceLedger]
    """The ledgers of data.eval. Held-out rows are counted in the training ledgers."""


def load_splits(data: DataSection, seed: int, recipe: Recipe) -> Splits:
    """Load the training and the evaluation examples.

    Raises:
        DataError: a file or a row cannot be used, too many rows are unusable, or no training example is left.
    """
    all_train = _load_checked(data.train, recipe, data)
    all_eval = _load_checked(data.eval, recipe, data)
    evaluation = [
        EvalSource(section.path, section, ledger, source.examples)
        for section, source, ledger in zip(data.eval, *all_eval, strict=True)
    ]
    train, held = split_train(all_train, data, seed)
    if held is not None:
        evaluation += [
            EvalSource(HELD_OUT, section, ledger, source.examples, trained=rest.examples)
            for section, ledger, source, rest in zip(
                data.train, all_train.ledgers, held.sources, train.sources, strict=True
            )
        ]
    not_empty = [source for source in train.sources if len(source.examples)]
    return Splits(train._replace(sources=not_empty), evaluation, all_eval.ledgers)


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

    Returns:
        Both, with one source for each of the dataset's. The second is None if `data.eval_fraction` is 0 or there are no
        examples (the ledgers have the reasons).

    Raises:
        DataError: no training example is left.
    """
    if not data.eval_fraction or not dataset.num_examples:
        return dataset, None
    order = permutation(dataset.num_examples, seed, EVAL_SPLIT).tolist()
    return hold_out(dataset, data.eval_fraction, order)


def hold_out(dataset: Dataset, fraction: float, order: Sequence[int]) -> tuple[Dataset, Dataset]:
    """Hold out a fraction of the examples: at least one, never all.

    Args:
        order: a permutation of all examples. The first ones are held out.

    Returns:
        The remaining and the held-out examples, both with one source (it may be empty) for each of the dataset's.

    Raises:
        DataError: no training example is left.
    """
    count = max(1, round(fraction * len(order)))
    if count >= len(order):
        raise DataError(f"data.eval_fraction={fraction} leaves no training example of {len(order)}; lower it")
    is_held = np.zeros(len(order), np.bool_)
    is_held[list(order[:count])] = True
    remaining, held, first = [], [], 0
    for source in dataset.sources:
        mask = is_held[first : first + len(source.examples)]
        first += len(source.examples)
        remaining.append(source._replace(examples=source.examples.take(np.flatnonzero(~mask))))
        held.append(source._replace(examples=source.examples.take(np.flatnonzero(mask))))
    return dataset._replace(sources=remaining), dataset._replace(sources=held)


def _load_checked(sources: Sequence[SourceSection], recipe: Recipe, data: DataSection) -> Dataset:
    dataset = load_dataset(sources, recipe, data)
    dataset.check(data.max_dropped)
    return dataset
