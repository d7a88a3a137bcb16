"""Assign a step's examples to ranks and micro-batches. The assignment does not change the loss."""

from __future__ import annotations

from collections.abc import Sequence

from lora_accel.batching.prefixes import added_tokens, num_computed, shared_nodes, sorted_by_prefix
from lora_accel.data.chat import Example


def balance_by_tokens(examples: Sequence[Example], num_shares: int, max_examples: int) -> list[list[Example]]:
    """Divide examples into shares of about as many tokens each, with at most `max_examples` in a share.

    Longest first, each into the share with the fewest tokens so far. Where `max_examples` does not bind, no share has
    more than 4/3 of the optimum (Graham, Bounds on multiprocessing timing anomalies, 1969).
    """
    shares: list[list[Example]] = [[] for _ in range(num_shares)]
    tokens = [0] * num_shares
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        share = min((share for share in range(num_shares) if len(shares[share]) < max_examples), key=tokens.__getitem__)
        shares[share].append(example)
        tokens[share] += len(example.input_ids)
    return shares


def keep_prefixes_together(examples: Sequence[Example], num_shares: int, max_examples: int) -> list[list[Example]]:
    """Divide examples into shares that compute about as many tokens each, if those they share are computed once.

    In the order of their prefixes, they are cut into consecutive shares, the largest of which is as small as possible.

    Args:
        max_examples: limit of a share's examples; `num_shares` times it is at least the number of examples.
    """
    if not examples:
        return [[] for _ in range(num_shares)]
    order = sorted_by_prefix(examples)
    added, lengths = added_tokens(examples, order), [len(examples[number].input_ids) for number in order]
    low, high = max(lengths), sum(lengths)
    while low < high:  # the smallest limit with which the shares suffice
        limit = (low + high) // 2
        if len(_cut(added, lengths, limit, max_examples)) <= num_shares:
            high = limit
        else:
            low = limit + 1
    starts = _cut(added, lengths, low, max_examples)
    shares = [
        [examples[number] for number in order[a:b]] for a, b in zip(starts, [*starts[1:], len(order)], strict=True)
    ]
    return shares + [[] for _ in range(num_shares - len(shares))]


def _cut(added: Sequence[int], lengths: Sequence[int], limit: int, max_examples: int) -> list[int]:
    """Return where shares of at most `limit` computed tokens begin, each as long as possible."""
    starts: list[int] = []
    tokens = size = 0
    for position, (more, length) in enumerate(zip(added, lengths, strict=True)):
        if starts and tokens + more <= limit and size < max_examples:
            tokens, size = tokens + more, size + 1
        else:
            starts.append(position)
            tokens, size = length, 1
    return starts


def group_shared(examples: Sequence[Example], max_tokens: int, max_examples: int | None) -> list[list[Example]]:
    """Group examples into as few packed micro-batches as possible, in which shared tokens are computed once.

    Args:
        max_tokens, max_examples: see `group_packed`. Tokens are those that are computed.
    """
    if not examples:
        return []
    if max_examples is not None:
        return [
            group
            for group in keep_prefixes_together(examples, -(-len(examples) // max_examples), max_examples)
            if group
        ]
    order, limit = sorted_by_prefix(examples), max(max_tokens, longest(examples))
    lengths = [len(examples[number].input_ids) for number in order]
    count = len(_cut(added_tokens(examples, order), lengths, limit, len(examples)))
    groups = keep_prefixes_together(examples, count, len(examples))
    return [part for group in groups if group for part in _divided(group, limit)]


def _divided(group: Sequence[Example], limit: int) -> list[list[Example]]:
    """Halve a group in the order of prefixes until each part has at most `limit` computed tokens.

    Rarely needed: `added_tokens` counts too few where prefixes continue others by less than a shared node's tokens.
    """
    if len(group) == 1 or num_computed(shared_nodes(group)) <= limit:
        return [list(group)]
    half = len(group) // 2
    return _divided(group[:half], limit) + _divided(group[half:], limit)


def group_packed(examples: Sequence[Example], max_tokens: int, max_examples: int | None) -> list[list[Example]]:
    """Group examples into as few packed micro-batches as possible, of about as many tokens each.

    Args:
        max_tokens: limit of a group's tokens. If a single example is longer, its length is the limit.
        max_examples: limit of a group's examples instead; None = `max_tokens` applies.
    """
    if max_examples is not None:
        return balance_by_tokens(examples, -(-len(examples) // max_examples), max_examples)
    total = sum(len(example.input_ids) for example in examples)
    limit = max(max_tokens, longest(examples))
    for count in range(min(-(-total // max_tokens), len(examples)), len(examples) + 1):
        groups = balance_by_tokens(examples, count, len(examples))
        if max((sum(len(x.input_ids) for x in group) for group in groups), default=0) <= limit:
            return groups
    return []


def group_padded(examples: Sequence[Example], max_tokens: int, max_examples: int | None) -> list[list[Example]]:
    """Group examples of similar length into padded micro-batches.

    Args:
        max_tokens: limit of a group's tokens, padding included. A longer example is a group of its own.
        max_examples: limit of a group's examples instead; None = `max_tokens` applies.
    """
    groups: list[list[Example]] = []
    width = 0
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        size = len(groups[-1]) + 1 if groups else 0
        fits = size <= max_examples if max_examples is not None else size * width <= max_tokens
        if groups and fits:
            groups[-1].append(example)
        else:
            groups.append([example])
            width = len(example.input_ids)
    return groups


def longest(examples: Sequence[Example]) -> int:
    """Return the length in tokens of the longest example, 0 if there is none."""
    return max((len(example.input_ids) for example in examples), default=0)
