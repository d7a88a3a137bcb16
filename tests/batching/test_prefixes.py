"""Shared prefixes: the trie of examples, how they are grouped, and what a row then holds."""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_accel.batching.batches import BatchOptions, step_batch
from lora_accel.batching.grouping import group_shared, keep_prefixes_together
from lora_accel.batching.order import epoch_order, group_order
from lora_accel.batching.packing import pack
from lora_accel.batching.prefixes import (
    MIN_SHARED,
    Node,
    Prefix,
    PrefixedExample,
    num_computed,
    prefix_ranks,
    shared_nodes,
)
from lora_accel.data.chat import Example
from lora_accel.labels import IGNORE_INDEX


def example(prompt: list[int], answer: list[int], key: int = 0) -> Example:
    return Example(prompt + answer, [IGNORE_INDEX] * len(prompt) + answer, key)


@st.composite
def families(draw: st.DrawFn) -> list[Example]:
    """Examples that begin with few different parts, with answers that are supervised, or none."""
    parts = st.lists(st.sampled_from([[1] * 3, [1, 2, 1], [2] * 5, [1] * 20, [3]]), min_size=1, max_size=4)
    prompts = draw(st.lists(parts.map(lambda chosen: [token for part in chosen for token in part]), max_size=8))
    return [example(prompt, draw(st.lists(st.integers(1, 3), max_size=4))) for prompt in prompts]


def chain(nodes: list[Node], index: int) -> list[Node]:
    parent = nodes[index].parent
    return [*(chain(nodes, parent) if parent is not None else []), nodes[index]]


def test_ranks_put_examples_that_begin_alike_beside_each_other() -> None:
    begin, doc_a, doc_b = list(range(100, 140)), list(range(200, 240)), list(range(300, 340))
    prefixes = [begin + doc_a, [9] * 40, begin + doc_b, begin + doc_a, [9] * 40, begin + doc_b, begin + doc_a]
    ranks = prefix_ranks(example(prefix, [7 + number]) for number, prefix in enumerate(prefixes))
    equal = [np.flatnonzero(ranks == rank).tolist() for rank in dict.fromkeys(ranks.tolist())]
    assert equal == [[0, 3, 6], [1, 4], [2, 5]]
    assert abs(int(ranks[0]) - int(ranks[2])) == 1, "the same instruction, and another document"
    assert prefix_ranks([Example([5], [5])]).tolist() == [0], "nothing is unsupervised"


@pytest.mark.parametrize("count", [1, 3, 4, 21])
def test_group_order_contains_each_example_once_and_keeps_prefixes_together(count: int) -> None:
    ranks = np.arange(count) % 3
    orders = [group_order(epoch_order([count], [1.0], 0, epoch), ranks, 4, 0, epoch) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(count)) for order in orders)
    if count == 21:
        kinds = [len(set(ranks[order[start : start + 4]].tolist())) for order in orders for start in range(0, 20, 4)]
        assert max(kinds) <= 2, "neighbors in rank"
        assert orders[0].tolist() != orders[1].tolist() != orders[2].tolist()


@given(families(), st.integers(1, 8))
def test_each_example_is_a_chain_of_nodes(examples: list[Example], min_shared: int) -> None:
    nodes = shared_nodes(examples, min_shared)
    parents = {node.parent for node in nodes}
    leaves = [index for index in range(len(nodes)) if index not in parents]
    assert sorted(nodes[leaf].example for leaf in leaves) == list(range(len(examples)))
    for leaf in leaves:
        path = chain(nodes, leaf)
        number = nodes[leaf].example
        tokens = [token for node in path for token in examples[node.example].input_ids[node.first : node.last]]
        assert tokens == examples[number].input_ids
        assert [node.first for node in path] == [0, *(node.last for node in path[:-1])]
        for node in path[:-1]:
            assert node.last - node.first >= min_shared
            assert set(examples[number].labels[node.first : node.last]) == {IGNORE_INDEX}, "no answer is shared"
    assert all(node.parent is None or node.parent < index for index, node in enumerate(nodes))


def test_more_than_one_level() -> None:
    instruction, documents = [1] * 20, ([2] * 20, [3] * 20)
    examples = [example([*instruction, *document, 9, n], [5]) for document in documents for n in (4, 6, 7)]
    nodes = shared_nodes(examples)
    assert [(node.last - node.first, node.parent) for node in nodes] == [
        (20, None),
        *((21, 0), (2, 1), (2, 1), (2, 1)),
        *((21, 0), (2, 5), (2, 5), (2, 5)),
    ]
    assert num_computed(nodes) == 20 + 2 * 21 + 6 * 2


def test_a_short_common_beginning_is_not_shared_and_a_longer_one_below_it_is() -> None:
    examples = [example([1] * 5 + [2] * 30, [7]), example([1] * 5 + [2] * 30, [8]), example([1] * 5 + [3] * 30, [9])]
    assert [(node.first, node.last, node.parent) for node in shared_nodes(examples)] == [
        (0, 35, None),
        (35, 36, 0),
        (35, 36, 0),
        (0, 36, None),
    ]


@given(families())
def test_a_row_predicts_the_supervised_tokens_of_each_example(examples: list[Example]) -> None:
    if not examples:
        return
    nodes = shared_nodes(examples, 2)
    batch = pack(examples, nodes)
    assert batch.input_ids.shape[1] == num_computed(nodes)
    assert batch.segments is not None
    assert batch.segments.num_tokens == sum(len(one.input_ids) for one in examples)
    row = batch.input_ids[0].tolist()
    predicted = Counter(
        (row[column], target)
        for column, target in zip(batch.logit_positions.tolist(), batch.targets[0].tolist(), strict=True)
        if target != IGNORE_INDEX
    )
    expected = Counter(
        (one.input_ids[i - 1], label) for one in examples for i, label in enumerate(one.labels) if label != IGNORE_INDEX
    )
    assert predicted == expected


def test_equal_beginnings_have_equal_dropout_keys_in_any_batch() -> None:
    prompt = list(range(1, 40))
    alone = pack([example(prompt, [5, 6], key=7)]).token_keys[0]
    together = pack([example(prompt, [5, 6], key=7), example(prompt, [8], key=7)])
    assert together.token_keys[0, :41].tolist() == alone.tolist()
    assert together.token_keys[0, 41:80].tolist() == alone[:39].tolist()
    assert together.token_keys[0, 80] != alone[39], "another token"
    assert pack([example(prompt, [5, 6], key=8)]).token_keys[0, 0] != alone[0], "another step"


@given(families(), st.integers(1, 4))
def test_shares_hold_each_example_once(examples: list[Example], num_shares: int) -> None:
    most = -(-len(examples) // num_shares)
    shares = keep_prefixes_together(examples, num_shares, max(most, 1))
    assert len(shares) == num_shares
    assert Counter(id(x) for share in shares for x in share) == Counter(map(id, examples))
    assert all(len(share) <= max(most, 1) for share in shares)


def test_examples_of_one_prefix_are_grouped_together() -> None:
    prompts = ([1] * 50, [2] * 50)
    examples = [example([*prompts[i % 2], 10 + i], [5]) for i in range(8)]
    assert {frozenset(x.input_ids[0] for x in share) for share in keep_prefixes_together(examples, 2, 8)} == {
        frozenset({1}),
        frozenset({2}),
    }
    groups = group_shared(examples, 60, None)
    assert [num_computed(shared_nodes(group)) for group in groups] == [58, 58]
    assert len(group_shared(examples, 1000, None)) == 1
    assert sorted(len(group) for group in group_shared(examples, 60, 3)) == [2, 3, 3]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_steps_count_what_is_computed(num_ranks: int) -> None:
    examples = [example([1] * 100 + [i], [5, 6]) for i in range(12)]

    def batches(min_saving: float | None) -> list[int]:
        options = [BatchOptions(0, True, 4096, None, min_saving, rank, num_ranks) for rank in range(num_ranks)]
        steps = [step_batch(examples, option) for option in options]
        assert len({step.num_computed_tokens for step in steps}) == 1, "ranks agree"
        computed = sum(batch.input_ids.numel() for step in steps for batch in step.micro_batches)
        assert {step.num_tokens for step in steps} == {12 * 103}
        return [steps[0].num_computed_tokens, computed]

    assert batches(None) == [12 * 103] * 2
    assert batches(0.0) == [100 * num_ranks + 12 * 3] * 2
    assert batches(0.95) == [12 * 103] * 2, "it saves less"


@pytest.mark.parametrize("step", [1, 17])
def test_prefixes_of_any_depth(step: int) -> None:
    """More levels than Python's calls may be nested."""
    examples = [example([1] * (20 + step * i), [2]) for i in range(1200)]
    nodes = shared_nodes(examples)
    assert sorted(node.example for index, node in enumerate(nodes) if index not in {n.parent for n in nodes}) == list(
        range(1200)
    )
    depths: list[int] = []
    for node in nodes:
        depths.append(0 if node.parent is None else depths[node.parent] + 1)
    assert max(depths) == (1199 * step + 4) // 16 if step == 1 else 1200


@given(families(), st.integers(1, 60), st.sampled_from([0.0, 0.25, 0.6]))
def test_no_micro_batch_exceeds_the_limit(examples: list[Example], max_tokens: int, min_saving: float) -> None:
    """Neither where prefixes continue others by few tokens, nor where examples save too little to share any."""
    if not examples:
        return
    step = step_batch(examples, BatchOptions(0, True, max_tokens, None, min_saving))
    limit = max(max_tokens, *(len(one.input_ids) for one in examples))
    assert all(batch.input_ids.numel() <= limit for batch in step.micro_batches)
    assert sum(batch.segments.num_tokens for batch in step.micro_batches if batch.segments) == step.num_tokens
    assert sum(batch.input_ids.numel() for batch in step.micro_batches) == step.num_computed_tokens


@pytest.mark.parametrize(
    ("examples", "min_saving"),
    [
        ([example([1] * (20 + 5 * (i % 4)) + [2 + i], [9]) for i in range(40)], 0.0),
        ([example([1] * 20 + [i] * 80, [9]) for i in range(2, 42)], 0.25),
    ],
    ids=["few more tokens", "too little saved"],
)
def test_what_is_not_shared_after_all_counts_for_the_limit(examples: list[Example], min_saving: float) -> None:
    step = step_batch(examples, BatchOptions(0, True, 300, None, min_saving))
    assert max(batch.input_ids.numel() for batch in step.micro_batches) <= 300


def test_examples_are_read_once_for_their_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step of long examples this is most of the time of building it."""
    read = Counter[int]()
    original = PrefixedExample.prefix.func

    def prefix(one: PrefixedExample) -> Prefix:
        read[one.input_ids[-1]] += 1
        return original(one)

    cached = functools.cached_property(prefix)
    cached.__set_name__(PrefixedExample, "prefix")
    monkeypatch.setattr(PrefixedExample, "prefix", cached)
    examples = [example([1] * 50 + [i % 5], [100 + i]) for i in range(40)]
    step_batch(examples, BatchOptions(0, True, 200, None, 0.0, 0, 2))
    assert read == Counter(range(100, 140))


EDGES = {
    "one token": [example([1], []), example([1], [])],
    "supervised from the first token": [example([], [1] * 30), example([], [1] * 30)],
    "nothing is supervised": [example([1] * 30, []), example([1] * 30, []), example([1] * 40, [])],
    "identical": [example([1] * 30, [2, 3])] * 3,
    "one is a prefix of another": [example([1] * 30, [2]), example([1] * 50, [2])],
    "several answers": [Example([1] * 20 + [2, 3] + [1] * 20 + [4], [-100] * 20 + [2, -100] + [-100] * 20 + [4])] * 2,
    "one example": [example([1] * 30, [2])],
}


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("one token", 2),
        ("supervised from the first token", 60),
        ("nothing is supervised", 29 + 1 + 1 + 11),
        ("identical", 30 + 3 * 2),
        ("one is a prefix of another", 30 + 1 + 21),
        ("several answers", 20 + 2 * 23),
        ("one example", 31),
    ],
)
def test_unusual_examples(name: str, tokens: int) -> None:
    examples = EDGES[name]
    batch = pack(examples, shared_nodes(examples))
    assert batch.input_ids.numel() == tokens
    assert int((batch.targets != IGNORE_INDEX).sum()) == sum(
        label != IGNORE_INDEX for one in examples for label in one.labels[1:]
    )


@pytest.mark.parametrize(("common", "tokens"), [(MIN_SHARED - 1, 2 * (MIN_SHARED + 1)), (MIN_SHARED, MIN_SHARED + 4)])
def test_the_fewest_tokens_that_are_shared(common: int, tokens: int) -> None:
    examples = [example([1] * common + [2 + i], [9]) for i in range(2)]
    assert num_computed(shared_nodes(examples)) == tokens
