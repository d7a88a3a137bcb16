"""Find the tokens with which examples begin alike, so that each is computed once.

Examples of a micro-batch form a trie: a node holds tokens that all examples below it share, a leaf the rest of one
example. Only tokens before an example's first supervised one are shared.
"""

from __future__ import annotations

import functools
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


class PrefixedExample(Example):
    """An example that keeps its prefix: grouping and packing compare it several times."""

    @functools.cached_property
    def prefix(self) -> Prefix:
        """The tokens before the first supervised one; without one, all but the last."""
        first = next((i for i, label in enumerate(self.labels) if label != IGNORE_INDEX), len(self.labels))
        return np.asarray(self.input_ids[: min(first, len(self.input_ids) - 1)], dtype=np.int64)

    @functools.cached_property
    def sort_key(self) -> bytes:
        """Sorts as the tokens of the prefix do."""
        return self.prefix.astype(">u4").tobytes()


def separate_nodes(examples: Sequence[Example]) -> list[Node]:
    """Return a node for each example: nothing is shared."""
    return [Node(number, 0, len(example.input_ids), None) for number, example in enumerate(examples)]


def shared_nodes(examples: Sequence[Example], min_shared: int = MIN_SHARED) -> list[Node]:
    """Return the trie of examples in the order in which its nodes are packed: each node before all that are below it.

    Each example has one leaf, which holds at least its last token.

    Args:
        min_shared: tokens of a node that is no leaf, at least.
    """
    order = sorted_by_prefix(examples)
    common = np.array(_common_lengths(examples, order), dtype=np.int64)
    nodes: list[Node] = []
    groups: list[tuple[int, int, int, int | None]] = [(0, len(order), 0, None)] if order else []
    while groups:  # a stack, since a trie may be deeper than Python's calls
        first, end, start, parent = groups.pop()  # order[first:end] are equal before `start`
        if end - first == 1:
            nodes.append(Node(order[first], start, len(examples[order[first]].input_ids), parent))
            continue
        inner = common[first + 1 : end]
        depth = int(inner.min())
        if depth - start >= min_shared:
            nodes.append(Node(order[first], start, depth, parent))
            start, parent = depth, len(nodes) - 1
        bounds = [first, *(np.flatnonzero(inner == depth) + first + 1).tolist(), end]
        groups += [(a, b, start, parent) for a, b in itertools.pairwise(bounds)][::-1]
    return nodes


def sorted_by_prefix(examples: Sequence[Example]) -> list[int]:
    """Return the numbers of examples in the order of their unsupervised beginnings: neighbors share the most tokens."""
    keys = [_prefixed(example).sort_key for example in examples]
    return sorted(range(len(examples)), key=lambda number: (keys[number], number))


def prefix_ranks(examples: Iterable[Example]) -> npt.NDArray[np.int64]:
    """Return a number for each example, such that examples of near numbers begin with the same unsupervised tokens.

    They are the ranks of the hashes of the first 16, 32, 64, … tokens, so that no prefix has to be kept in memory.
    Equal numbers mean equal prefixes.
    """
    hashes = []
    for example in examples:
        chain = prefix_hashes(0, _prefixed(example).prefix)
        ends = [min(MIN_SHARED << level, len(chain)) for level in range(HASH_LEVELS)]
        hashes.append(chain[np.array(ends) - 1] if len(chain) else np.zeros(HASH_LEVELS, np.uint64))
    _, ranks = np.unique(np.array(hashes).reshape(-1, HASH_LEVELS), axis=0, return_inverse=True)
    return ranks.reshape(-1).astype(np.int64)


def num_computed(nodes: Sequence[Node]) -> int:
    """Return the tokens of a packed row."""
    return sum(node.last - node.first for node in nodes)


def added_tokens(examples: Sequence[Example], order: Sequence[int]) -> list[int]:
    """Return for each example of an order how many tokens a row gets if it follows the one before, at least."""
    return [
        len(examples[number].input_ids) - (common if common >= MIN_SHARED else 0)
        for number, common in zip(order, _common_lengths(examples, order), strict=True)
    ]


def _common_lengths(examples: Sequence[Example], order: Sequence[int]) -> list[int]:
    """Return with how many equal tokens the prefixes of each example of an order and of the one before begin."""
    prefixes = [_prefixed(examples[number]).prefix for number in order]
    return [0, *(_common_length(*pair) for pair in itertools.pairwise(prefixes))][: len(order)]


def _common_length(left: Prefix, right: Prefix) -> int:
    length = min(len(left), len(right))
    differs = np.flatnonzero(left[:length] != right[:length])
    return int(differs[0]) if len(differs) else length


def _prefixed(example: Example) -> PrefixedExample:
    return example if isinstance(example, PrefixedExample) else PrefixedExample(*example)
