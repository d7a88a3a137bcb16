"""The order of examples and how a step is cut: each example once, on any number of ranks."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_accel.batching.batch import Segments, StepBatch
from lora_accel.batching.batches import Batches, BatchOptions, step_batch
from lora_accel.batching.grouping import group_packed, group_padded
from lora_accel.batching.order import epoch_order, source_count
from lora_accel.batching.packing import empty_example, pack, pad
from lora_accel.config.plan import make_plan
from lora_accel.config.schema import RunConfig, TrainingSection
from lora_accel.data.chat import Example
from lora_accel.data.dataset import Dataset, Source
from lora_accel.data.store import Examples
from lora_accel.labels import IGNORE_INDEX
from lora_accel.randomness import permutation
from lora_accel.setup.data import prepare_data, print_data
from tests.conftest import chat_rows, write_jsonl

PAD = 999


def examples_of(lengths: list[int], first: int = 0) -> list[Example]:
    """Examples whose tokens are all their number; every third token is not supervised."""
    made = []
    for number, length in enumerate(lengths, start=first):
        labels = [IGNORE_INDEX if i % 3 == 0 else number for i in range(length)]
        made.append(Example([number] * length, labels))
    return made


UNEVEN = [3, 50, 7, 7, 22, 1, 9, 30, 2, 15, 4, 4, 90, 11]


def seen(batch: StepBatch) -> list[int]:
    """The numbers of the examples of a rank's micro-batches, in order."""
    numbers = []
    for micro_batch in batch.micro_batches:
        for row, mask in zip(micro_batch.input_ids, micro_batch.attention_mask, strict=True):
            if mask.any() and row[0] != PAD:
                numbers.append(int(row[0]))
    return numbers


# Order.


@pytest.mark.parametrize("count", [0, 1, 2, 10, 1000])
@pytest.mark.parametrize("key", [(0,), (0, 1), (7, 1, 2)])
def test_a_permutation_holds_each_once(count: int, key: tuple[int, ...]) -> None:
    assert sorted(permutation(count, *key).tolist()) == list(range(count))


def test_a_permutation_never_changes() -> None:
    # Written down, since every run that was ever resumed relies on it.
    assert permutation(10, 0, 0, 0).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    assert permutation(10, 7, 1, 2).tolist() == [3, 4, 7, 6, 9, 1, 5, 8, 2, 0]


def test_an_epoch_never_changes() -> None:
    assert epoch_order([3, 4], [1, 0.5], 5, 0).tolist() == [3, 1, 2, 0, 5]
    assert epoch_order([3, 4], [1, 0.5], 5, 1).tolist() == [2, 4, 0, 6, 1]


def test_another_key_is_another_permutation() -> None:
    keys = [(seed, number, epoch) for seed in range(4) for number in range(3) for epoch in range(1, 4)]
    assert len({tuple(permutation(50, *key).tolist()) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    ("weight", "epochs", "times"),
    [(1, 1, 1), (1, 3, 3), (2, 1, 2), (2, 2, 4), (0.25, 4, 1), (0.25, 8, 2), (0.5, 2, 1), (1.5, 2, 3)],
)
def test_a_weight_is_how_often_each_is_seen(weight: float, epochs: int, times: int) -> None:
    orders = [epoch_order([20], [weight], 3, epoch).tolist() for epoch in range(epochs)]
    assert {len(order) for order in orders} == {round(20 * weight)}
    assert Counter(itertools.chain(*orders)) == dict.fromkeys(range(20), times)


def test_weights_hold_for_each_source_by_itself() -> None:
    sizes, weights = [8, 1, 12], [2, 1, 0.25]
    total: Counter[int] = Counter()
    for epoch in range(4):
        order = epoch_order(sizes, weights, 11, epoch).tolist()
        counts = Counter(order)
        assert len(order) == 16 + 1 + 3
        assert all(counts[i] == 2 for i in range(8))
        assert counts[8] == 1
        total += Counter({i: count for i, count in counts.items() if i >= 9})
    assert total == dict.fromkeys(range(9, 21), 1)


def test_sources_are_mixed() -> None:
    order = epoch_order([50, 50], [1, 1], 0, 0)
    assert 15 < int((order[:50] < 50).sum()) < 35


def test_epochs_and_seeds_differ_and_repeat() -> None:
    orders = {(seed, epoch): epoch_order([40], [1], seed, epoch).tolist() for seed in range(3) for epoch in range(3)}
    assert len({tuple(order) for order in orders.values()}) == 9
    assert epoch_order([40], [1], 1, 2).tolist() == orders[1, 2]


@pytest.mark.parametrize(("size", "weight", "count"), [(10, 1, 10), (10, 0.25, 2), (3, 0.01, 1), (7, 3, 21)])
def test_a_source_gives_at_least_one(size: int, weight: float, count: int) -> None:
    assert source_count(size, weight) == count == len(epoch_order([size], [weight], 0, 5))


# Steps.


def batches_of(rank: int = 0, num_ranks: int = 1, **training: Any) -> tuple[Batches, int, int]:
    lengths = UNEVEN + [5] * 7
    config = RunConfig.model_validate(
        {
            "output_dir": "run",
            "model": {"name_or_path": "m"},
            "data": {"train": [{"path": "x"}]},
            "training": {"batch_size": 4, "micro_batch_tokens": 64, "epochs": 3, **training},
        }
    )
    plan = make_plan(config, num_ranks=num_ranks, num_examples=21, num_tokens=1, num_supervised_tokens=1)
    dataset = Dataset(
        [Source(Examples.of(examples_of(part, first)), 1.0) for part, first in ((lengths[:15], 0), (lengths[15:], 15))],
        [],
    )
    batches = Batches(
        dataset,
        plan,
        BatchOptions.from_config(config.training, rank=rank, num_ranks=plan.num_ranks, pad_id=PAD),
        seed=5,
    )
    return batches, plan.steps_per_epoch, plan.total_steps


def test_an_epoch_sees_each_example_once_and_ends_with_a_short_step() -> None:
    batches, per_epoch, total = batches_of()
    assert (per_epoch, total) == (6, 18)
    steps = [batches.step(step) for step in range(total)]
    for epoch in range(3):
        of_epoch = steps[epoch * 6 : epoch * 6 + 6]
        assert [batch.num_examples for batch in of_epoch] == [4, 4, 4, 4, 4, 1]
        assert sorted(itertools.chain(*map(seen, of_epoch))) == list(range(21))
    assert seen(steps[0]) != seen(steps[6])


def test_a_step_does_not_depend_on_the_steps_before_it() -> None:
    straight = batches_of()[0]
    all_steps = [seen(straight.step(step)) for step in range(18)]
    for step in (17, 3, 9, 3):
        assert seen(batches_of()[0].step(step)) == all_steps[step] == seen(straight.step(step))


@pytest.mark.parametrize("training", [{}, {"micro_batch_tokens": 8}, {"micro_batch_tokens": 10_000}])
@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_ranks_share_a_step_of_the_same_examples(num_ranks: int, training: dict[str, Any]) -> None:
    alone = batches_of(**training)[0]
    ranks = [batches_of(rank, num_ranks, **training)[0] for rank in range(num_ranks)]
    for step in range(18):
        shares = [rank.step(step) for rank in ranks]
        whole = alone.step(step)
        assert sorted(itertools.chain(*map(seen, shares))) == sorted(seen(whole))
        assert len({len(share.micro_batches) for share in shares}) == 1
        for share in shares:
            assert (share.num_examples, share.num_tokens, share.num_supervised_tokens) == (
                whole.num_examples,
                whole.num_tokens,
                whole.num_supervised_tokens,
            )
        assert whole.num_supervised_tokens == sum(
            int((micro_batch.targets != IGNORE_INDEX).sum()) for share in shares for micro_batch in share.micro_batches
        )
        assert whole.num_tokens == sum(
            int(micro_batch.attention_mask.sum())
            for share in shares
            for micro_batch in share.micro_batches
            if (micro_batch.targets != IGNORE_INDEX).any() or micro_batch.input_ids[0, 0] != PAD
        )


@pytest.mark.parametrize("limits", [{"micro_batch_tokens": 60}, {"micro_batch_size": 2}, {"micro_batch_tokens": 1}])
def test_three_ranks_together_hold_every_example_once(limits: dict[str, Any]) -> None:
    examples = examples_of(UNEVEN)
    training = TrainingSection.model_validate(limits)
    shares = [
        step_batch(examples, BatchOptions.from_config(training, rank=rank, num_ranks=3, pad_id=PAD))
        for rank in range(3)
    ]
    assert sorted(itertools.chain(*map(seen, shares))) == list(range(len(UNEVEN)))
    assert len({len(share.micro_batches) for share in shares}) == 1
    assert all(share.num_tokens == sum(UNEVEN) for share in shares)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("limits", [{"micro_batch_tokens": 100_000}, {"micro_batch_tokens": 30}])
def test_ranks_get_as_much_work_as_each_other(num_ranks: int, limits: dict[str, int]) -> None:
    """Also of a step that would fit into one micro-batch: else one rank would work while the others wait."""
    training = TrainingSection.model_validate(limits)
    for lengths in ([7] * 16, [3 + 5 * (i % 9) for i in range(16)], [40, *[5] * 15]):
        examples = examples_of(lengths)
        loads = []
        for rank in range(num_ranks):
            share = step_batch(examples, BatchOptions.from_config(training, rank=rank, num_ranks=num_ranks, pad_id=PAD))
            loads.append(sum(lengths[number] for number in seen(share)))
        assert max(loads) <= max(max(lengths), 4 / 3 * sum(lengths) / num_ranks)


def test_who_counts_examples_a_device_gets_as_many_on_each() -> None:
    training = TrainingSection.model_validate({"micro_batch_size": 2, "gradient_accumulation_steps": 2})
    for rank in range(2):
        share = step_batch(
            examples_of([50, *[5] * 7]), BatchOptions.from_config(training, rank=rank, num_ranks=2, pad_id=PAD)
        )
        assert [len(micro_batch.input_ids) for micro_batch in share.micro_batches] == [2, 2]


def test_a_rank_without_examples_gets_micro_batches_without_targets() -> None:
    training = TrainingSection(micro_batch_tokens=1000)
    shares = [
        step_batch(examples_of([5]), BatchOptions.from_config(training, rank=rank, num_ranks=3, pad_id=PAD))
        for rank in range(3)
    ]
    assert [len(share.micro_batches) for share in shares] == [1, 1, 1]
    assert [int((share.micro_batches[0].targets != IGNORE_INDEX).sum()) for share in shares] == [3, 0, 0]


# Cutting.


@pytest.mark.parametrize("most_tokens", [1, 10, 30, 64, 90, 200, 10_000])
def test_no_group_is_wider_than_the_limit_in_tokens(most_tokens: int) -> None:
    examples = examples_of(UNEVEN)
    groups = group_padded(examples, most_tokens, None)
    assert sorted(example for group in groups for example in group) == sorted(examples)
    for group in groups:
        padded = len(group) * max(len(example.input_ids) for example in group)
        assert padded <= most_tokens or len(group) == 1


@pytest.mark.parametrize("most_examples", [1, 2, 5, 14, 100])
def test_no_group_has_more_examples_than_the_limit(most_examples: int) -> None:
    groups = group_padded(examples_of(UNEVEN), 1, most_examples)
    assert sorted(example.input_ids[0] for group in groups for example in group) == list(range(len(UNEVEN)))
    assert [len(group) for group in groups[:-1]] == [most_examples] * (len(groups) - 1)
    assert 1 <= len(groups[-1]) <= most_examples


def test_a_long_example_is_a_group_of_its_own() -> None:
    groups = group_padded(examples_of([4, 300, 4, 4]), 12, None)
    assert [[len(example.input_ids) for example in group] for group in groups] == [[300], [4, 4, 4]]


def test_groups_hold_examples_of_like_length() -> None:
    lengths = [[len(example.input_ids) for example in group] for group in group_padded(examples_of(UNEVEN), 100, None)]
    flat = list(itertools.chain(*lengths))
    assert flat == sorted(UNEVEN, reverse=True)


def test_groups_do_not_depend_on_the_order_of_a_step_but_for_ties() -> None:
    distinct = examples_of([3, 50, 7, 22, 1, 9, 30, 2, 15])
    shuffled = [distinct[i] for i in permutation(len(distinct), 1)]
    assert group_padded(distinct, 64, None) == group_padded(shuffled, 64, None)


def test_nothing_is_cut_into_nothing() -> None:
    assert group_padded([], 10, None) == []


# Tensors.


def supervised_anywhere(length: int, number: int, key: int) -> Example:
    chosen = np.random.Philox(np.random.SeedSequence((key, number))).random_raw(length) % 2
    tokens = [100 * number + i for i in range(length)]
    return Example(
        tokens, [IGNORE_INDEX, *(t if c else IGNORE_INDEX for t, c in zip(tokens[1:], chosen[1:], strict=True))]
    )


@pytest.mark.parametrize("key", range(6))
@pytest.mark.parametrize("lengths", [[5], [1], [1, 1], [7, 3, 2], [20, 20, 1]])
def test_tensors_are_what_a_loop_would_write(lengths: list[int], key: int) -> None:
    examples = [supervised_anywhere(length, number, key) for number, length in enumerate(lengths)]
    batch = pad(examples, PAD)
    width = max(lengths)

    target = {}  # (row, position) -> the token that is to be predicted from there
    for row, example in enumerate(examples):
        for position in range(width):
            real = position < lengths[row]
            assert batch.input_ids[row, position] == (example.input_ids[position] if real else PAD)
            assert batch.attention_mask[row, position] == int(real)
            if position + 1 < lengths[row] and example.labels[position + 1] != IGNORE_INDEX:
                target[row, position] = example.input_ids[position + 1]

    columns = sorted({position for _, position in target}) or [0]
    assert batch.logit_positions.tolist() == columns
    assert batch.targets.tolist() == [
        [target.get((row, position), IGNORE_INDEX) for position in columns] for row in range(len(examples))
    ]
    assert batch.input_ids.shape == batch.attention_mask.shape == (len(examples), width)
    assert {
        tensor.dtype for tensor in (batch.input_ids, batch.attention_mask, batch.logit_positions, batch.targets)
    } == {torch.int64}


def test_no_example_is_one_token_without_a_target() -> None:
    batch = pad([empty_example(PAD)], PAD)
    assert batch.input_ids.tolist() == [[PAD]]
    assert batch.attention_mask.tolist() == [[1]]
    assert batch.logit_positions.tolist() == [0]
    assert batch.targets.tolist() == [[IGNORE_INDEX]]


def test_a_pad_token_within_an_example_is_a_token_like_any_other() -> None:
    batch = pad([Example([1, PAD, 2, PAD], [IGNORE_INDEX, PAD, 2, PAD]), Example([1, 2], [IGNORE_INDEX, 2])], PAD)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.targets.tolist() == [[PAD, 2, PAD], [2, IGNORE_INDEX, IGNORE_INDEX]]


def test_moving_a_batch_changes_nothing() -> None:
    batch = pad(examples_of([3, 2]), PAD)
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.targets, batch.targets)
    assert torch.equal(moved.input_ids, batch.input_ids)


# Several sources.


@pytest.fixture
def three_sources(make_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    """12 rows seen twice, 9 once, 20 a quarter of them: 24 + 9 + 5 examples an epoch."""
    parts = {"twice": (12, 2.0), "once": (9, 1.0), "quarter": (20, 0.25)}
    sources = [
        {"path": str(write_jsonl(tmp_path / f"{name}.jsonl", chat_rows(rows))), "weight": weight}
        for name, (rows, weight) in parts.items()
    ]

    def make(**data: Any) -> RunConfig:
        return make_config(data={"train": sources} | data, training={"epochs": 4, "batch_size": 5})

    return make


def order_of(config: RunConfig, num_ranks: int) -> list[list[tuple[str, int]]]:
    """The rows of each epoch, as the steps take them, agreed upon by all ranks; each taken by one of them."""
    data = prepare_data(config, num_ranks)
    ranks = [
        Batches(
            data.dataset,
            data.plan,
            BatchOptions.from_config(config.training, rank=rank, num_ranks=data.plan.num_ranks, pad_id=PAD),
            seed=config.seed,
        )
        for rank in range(num_ranks)
    ]
    epochs: list[list[tuple[str, int]]] = [[] for _ in range(4)]
    for step in range(data.plan.total_steps):
        shares = [batches.step(step) for batches in ranks]
        (rows,) = {tuple((Path(file).stem, row) for file, row in (x.row for x in s.examples)) for s in shares}
        taken = sum(int(m.attention_mask.any(dim=1).sum()) for s in shares for m in s.micro_batches)
        padding = sum(m.input_ids.numel() == 1 for s in shares for m in s.micro_batches)
        assert taken - padding == len(rows)
        epochs[data.plan.position(step)[0]] += rows
    return epochs


def test_three_weighted_sources_give_what_is_stated_in_the_same_order_on_any_number_of_processes(
    three_sources: Callable[..., RunConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    epochs = order_of(three_sources(num_workers=1, cache_dir=str(tmp_path / "1")), num_ranks=1)
    assert epochs == order_of(three_sources(num_workers=1, cache_dir=str(tmp_path / "1")), num_ranks=2)
    assert epochs == order_of(three_sources(num_workers=2, cache_dir=str(tmp_path / "2")), num_ranks=2)
    for epoch in epochs:
        assert Counter(name for name, _ in epoch) == {"twice": 24, "once": 9, "quarter": 5}
        assert set(Counter(row for row in epoch if row[0] == "twice").values()) == {2}
    quarters = [row for epoch in epochs for row in epoch if row[0] == "quarter"]
    assert len(set(quarters)) == 20, "four epochs see all of it once"
    assert len({tuple(epoch) for epoch in epochs}) == 4

    monkeypatch.setenv("COLUMNS", "1000")  # a narrow table breaks words
    print_data(prepare_data(three_sources(), 1))
    told = capsys.readouterr().out
    assert "24 of 12 examples (weight 2)" in told
    assert "5 of 20 examples (weight 0.25)" in told


@pytest.mark.parametrize("most_tokens", [1, 12, 64, 299, 300, 10_000])
def test_packed_groups_hold_each_example_once_and_keep_the_limit(most_tokens: int) -> None:
    examples = examples_of([4, 300, 4, 60, 7, 7, 31])
    groups = group_packed(examples, most_tokens, None)
    assert sorted(map(id, examples)) == sorted(id(example) for group in groups for example in group)
    sizes = [sum(len(example.input_ids) for example in group) for group in groups]
    assert max(sizes) <= max(most_tokens, 300)
    assert sorted(len(group) for group in group_packed(examples, most_tokens, 3)) == [1, 3, 3]
    assert group_packed([], most_tokens, None) == []


def test_packed_examples_lie_end_to_end() -> None:
    first, second = Example([5, 6, 7], [IGNORE_INDEX, 6, 7], key=3), Example([8, 9], [IGNORE_INDEX, 9], key=4)
    batch = pack([first, second])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch.segments == Segments((3, 2))
    assert batch.logit_positions.tolist() == [0, 1, 3], "an example's last token predicts nothing of the next"
    assert batch.targets.tolist() == [[6, 7, 9]]
    assert batch.token_keys[0, :3].tolist() == pad([first], PAD).token_keys[0].tolist()
    assert batch.token_keys[0, 3:].tolist() == pad([second], PAD).token_keys[0].tolist()
