"""The order of examples in an epoch, as a function of (seed, epoch). Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_accel.randomness import Order, permutation


def epoch_order(sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> Order:
    """Return the indices of an epoch's examples in training order, [num_examples].

    A source of weight 2 is used twice per epoch; of a source of weight 0.25, each epoch uses the next quarter.

    Args:
        sizes, weights: number of examples and weight of each source. Indices count through the sources in order.
    """
    chosen, first = [], 0
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        count = source_count(size, weight)
        # Each source is an endless sequence of permutations; the epoch takes the next `count` entries of it.
        rounds = range(epoch * count // size, -(-(epoch + 1) * count // size))
        sequence = np.concatenate([permutation(size, seed, number, round_) for round_ in rounds])
        start = epoch * count - rounds.start * size
        chosen.append(first + sequence[start : start + count])
        first += size
    order = np.concatenate(chosen)
    return order[permutation(len(order), seed, len(sizes), epoch)]


def group_order(order: Order, ranks: Order, batch_size: int, seed: int, epoch: int) -> Order:
    """Return an epoch's order in which the examples of a step have near ranks (`data.group_by_prefix`).

    The examples are sorted by rank, equal ones as in `order`, and divided into steps, which are shuffled. Each epoch
    divides them at other examples. The last step, which may be short, stays the last one.

    Args:
        order: from `epoch_order`.
        ranks: of all examples, from `prefixes.prefix_ranks`.
    """
    shift = int(permutation(batch_size, seed, epoch, len(order))[0])
    grouped = np.roll(order[np.argsort(ranks[order], kind="stable")], shift)
    num_full = len(order) // batch_size
    steps = grouped[: num_full * batch_size].reshape(num_full, batch_size)
    return np.concatenate([steps[permutation(num_full, seed, epoch, batch_size)].ravel(), grouped[steps.size :]])


def source_count(size: int, weight: float) -> int:
    """Return how many examples of a source an epoch uses: at least one, unless there are none."""
    return max(1, round(size * weight)) if size else 0
