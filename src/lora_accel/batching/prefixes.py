"""Find the tokens with which examples begin alike, so that each is computed once.

Examples of a micro-batch form a trie: a node holds tokens that all examples below it share, a leaf the rest of one
example. Only tokens before an example's first supervised one are shared.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lora_accel.data.chat import Example
from lora_accel.labels import IGNORE_INDEX
from lora_accel.randomness import prefix_hashes

MIN_SHARED = 16
"""Tokens of a shared node, at least: attention has to look up their keys elsewhere."""

HASH_LEVELS = 16
"""Lengths at which prefixes are compared to order examples, up to 2^19 tokens."""

Prefix = npt.NDArray[np.int64]


class Node(NamedTuple):
    """Tokens [first, last) of an example, which all examples below the node share."""

    example: int
    first: int
    last: int
    parent: int | None
    """Index of the node that holds the tokens before them; None = they begin an example."""


def separate_nodes(examples: Sequence[Example]) -> list[Node]:
    """Return a node for each example: nothing is shared."""
    return [Node(number, 0, len(example.input_ids), None) for number, example in enumerate(examples)]


def shared_nodes(examples: Sequence[Example], min_shared: int = MIN_SHARED) -> list[Node]:
    """Return the trie of examples in the order in which its nodes are packed: each parent before its children.

    Each example has one leaf, which holds at least its last token.

    Args:
        min_shared: tokens of a node that is no leaf, at least.
    """
    prefixes = [_prefix(example) for example in examples]
    nodes: list[Node] = []

    def add(group: Sequence[int], start: int, parent: int | None) -> None:
        """Add examples whose prefixes are equal before `start`; the group is sorted by prefix."""
        if len(group) == 1:
            nodes.append(Node(group[0], start, len(examples[group[0]].input_ids), parent))
            return
        common = _common_length(prefixes[group[0]], prefixes[group[-1]])
        if common - start >= min_shared:
            nodes.append(Node(group[0], start, common, parent))
            start, parent = common, len(nodes) - 1
        for run in _runs(group, [prefixes[number][common : common + 1] for number in group]):
            add(run, start, parent)

    if examples:
        add(sorted_by_prefix(examples), 0, None)
    return nodes


def sorted_by_prefix(examples: Sequence[Example]) -> list[int]:
    """Return the numbers of examples in the order of their unsupervised beginnings: neighbors share the most tokens."""
    keys = [_prefix(example).astype(">u4").tobytes() for example in examples]  # sorts as the tokens do
    return sorted(range(len(examples)), key=lambda number: (keys[number], number))


def prefix_ranks(examples: Iterable[Example]) -> npt.NDArray[np.int64]:
    """Return a number for each example, such that examples of near numbers begin with the same unsupervised tokens.

    They are the ranks of the hashes of the first 16, 32, 64, … tokens, so that no prefix has to be kept in memory.
    Equal numbers mean equal prefixes.
    """
    hashes = []
    for example in examples:
        chain = prefix_hashes(0, _prefix(example))
        ends = [min(MIN_SHARED << level, len(chain)) for level in range(HASH_LEVELS)]
        hashes.append(chain[np.array(ends) - 1] if len(chain) else np.zeros(HASH_LEVELS, np.uint64))
    _, ranks = np.unique(np.array(hashes).reshape(-1, HASH_LEVELS), axis=0, return_inverse=True)
    return ranks.reshape(-1).astype(np.int64)


def num_computed(nodes: Sequence[Node]) -> int:
    """Return the tokens of a packed row."""
    return sum(node.last - node.first for node in nodes)


def added_tokens(examples: Sequence[Example], order: Sequence[int]) -> list[int]:
    """Return for each example of an order how many tokens a row gets if it follows the one before."""
    prefixes = [_prefix(examples[number]) for number in order]
    shared = [0, *(_common_length(*pair) for pair in itertools.pairwise(prefixes))]
    return [
        len(examples[number].input_ids) - (common if common >= MIN_SHARED else 0)
        for number, common in zip(order, shared, strict=True)
    ]


def _prefix(example: Example) -> Prefix:
    """Return the tokens before the first supervised one; without one, all but the last."""
    first = next((i for i, label in enumerate(example.labels) if label != IGNORE_INDEX), len(example.labels))
    return np.asarray(example.input_ids[: min(first, len(example.input_ids) - 1)], dtype=np.int64)


def _common_length(left: Prefix, right: Prefix) -> int:
    length = min(len(left), len(right))
    differs = np.flatnonzero(left[:length] != right[:length])
    return int(differs[0]) if len(differs) else length


def _runs(group: Sequence[int], next_tokens: Sequence[Prefix]) -> list[list[int]]:
    """Divide a sorted group by the token that follows; an example whose prefix ends there is alone."""
    runs: list[list[int]] = []
    previous: int | None = None
    for number, token in zip(group, (int(x[0]) if len(x) else None for x in next_tokens), strict=True):
        if token is not None and token == previous:
            runs[-1].append(number)
        else:
            runs.append([number])
        previous = token
    return runs
