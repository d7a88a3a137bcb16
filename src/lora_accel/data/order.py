"""(seed, epoch) to the order in which examples are seen. Pure; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Order = npt.NDArray[np.intp]


def permutation(count: int, *key: int) -> Order:
    """Return a permutation of range(count) that is a function of the key.

    It sorts raw Philox output, the one part of numpy's generators whose values are promised never to change.
    """
    return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(count), kind="stable")


def epoch_order(sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> Order:
    """Return the examples of an epoch, in the order they are seen.

    A source of weight 2 is seen twice; of weight 0.25, another quarter of it each epoch, all of it in four.

    Args:
        sizes, weights: number of examples and weight of each source; an example's index counts through all.
    """
    chosen, first = [], 0
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        count = source_count(size, weight)
        # One endless tape of permutations for each source; the epoch takes the next `count` of it.
        rounds = range(epoch * count // size, -(-(epoch + 1) * count // size))
        tape = np.concatenate([permutation(size, seed, number, round_) for round_ in rounds])
        start = epoch * count - rounds.start * size
        chosen.append(first + tape[start : start + count])
        first += size
    order = np.concatenate(chosen)
    return order[permutation(len(order), seed, len(sizes), epoch)]


def source_count(size: int, weight: float) -> int:
    """Return how many examples a source gives to an epoch: at least one."""
    return max(1, round(size * weight))
