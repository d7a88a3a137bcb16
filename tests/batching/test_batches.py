"""The order of examples, and how a step is divided into ranks and micro-batches."""

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
from lora_accel.setup.data import log_data, prepare_data
from tests.conftest import chat_rows, write_jsonl

PAD = 999


def examples_of(lengths: list[int], first: int = 0) -> list[Example]:
    """Return examples whose tokens are all their own number; every third token is not supervised."""
    examples = []
    for number, length in enumerate(lengths, start=first):
        labels = [IGNORE_INDEX if i % 3 == 0 else number for i in range(length)]
        examples.append(Example([number] * length, labels))
    return examples


UNEVEN = [3, 50, 7, 7, 22, 1, 9, 30, 2, 15, 4, 4, 90, 11]


def example_numbers(batch: StepBatch) -> list[int]:
    """Return the numbers of the examples in a rank's micro-batches, in order."""
    numbers = []
    for micro_batch in batch.micro_batches:
        for row, mask in zip(micro_batch.input_ids, micro_batch.attention_mask, strict=True):
            if mask.any() and row[0] != PAD:
                numbers.append(int(row[0]))
    return numbers


# Order.


@pytest.mark.parametrize("count", [0, 1, 2, 10, 1000])
@pytest.mark.parametrize("key", [(0,), (0, 1), (7, 1, 2)])
def test_permutation_contains_each_index_once(count: int, key: tuple[int, ...]) -> None:
    assert sorted(permutation(count, *key).tolist()) == list(range(count))


def test_permutation_is_stable() -> None:
    # Golden values: resumed runs need the same order.
    assert permutation(10, 0, 0, 0).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    assert permutation(10, 7, 1, 2).tolist() == [3, 4, 7, 6, 9, 1, 5, 8, 2, 0]


def test_epoch_order_is_stable() -> None:
    assert epoch_order([3, 4], [1, 0.5], 5, 0).tolist() == [3, 1, 2, 0, 5]
    assert epoch_order([3, 4], [1, 0.5], 5, 1).tolist() == [2, 4, 0, 6, 1]


def test_keys_give_different_permutations() -> None:
    keys = [(seed, number, epoch) for seed in range(4) for number in range(3) for epoch in range(1, 4)]
    assert len({tuple(permutation(50, *key).tolist()) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    ("weight", "epochs", "count"),
    [(1, 1, 1), (1, 3, 3), (2, 1, 2), (2, 2, 4), (0.25, 4, 1), (0.25, 8, 2), (0.5, 2, 1), (1.5, 2, 3)],
)
def test_weight_is_the_number_of_uses_per_epoch(weight: float, epochs: int, count: int) -> None:
    orders = [epoch_order([20], [weight], 3, epoch).tolist() for epoch in range(epochs)]
    assert {len(order) for order in orders} == {round(20 * weight)}
    assert Counter(itertools.chain(*orders)) == dict.fromkeys(range(20), count)


def test_weights_apply_per_source() -> None:
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


def test_epochs_and_seeds_differ_and_are_reproducible() -> None:
    orders = {(seed, epoch): epoch_order([40], [1], seed, epoch).tolist() for seed in range(3) for epoch in range(3)}
    assert len({tuple(order) for order in orders.values()}) == 9
    assert epoch_order([40], [1], 1, 2).tolist() == orders[1, 2]


@pytest.mark.parametrize(("size", "weight", "count"), [(10, 1, 10), (10, 0.25, 2), (3, 0.01, 1), (7, 3, 21)])
def test_source_gives_at_least_one_example(size: int, weight: float, count: int) -> None:
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


def test_epoch_contains_each_example_once_and_ends_with_a_short_step() -> None:
    batches, steps_per_epoch, total_steps = batches_of()
    assert (steps_per_epoch, total_steps) == (6, 18)
    steps = [batches.step(step) for step in range(total_steps)]
    for epoch in range(3):
        epoch_steps = steps[epoch * 6 : epoch * 6 + 6]
        assert [batch.num_examples for batch in epoch_steps] == [4, 4, 4, 4, 4, 1]
        assert sorted(itertools.chain(*map(example_numbers, epoch_steps))) == list(range(21))
    assert example_numbers(steps[0]) != example_numbers(steps[6])


def test_step_does_not_depend_on_earlier_steps() -> None:
    batches = batches_of()[0]
    all_steps = [example_numbers(batches.step(step)) for step in range(18)]
    for step in (17, 3, 9, 3):
        assert example_numbers(batches_of()[0].step(step)) == all_steps[step] == example_numbers(batches.step(step))


def test_a_prepared_batch_is_the_batch_of_its_step() -> None:
    expected = [example_numbers(batches_of()[0].step(step)) for step in range(18)]
    batches = batches_of()[0]
    batches.prepare(0)
    for step in range(18):
        batch = batches.step(step)
        batches.prepare(step + 1)  # of the next epoch after steps 5 and 11; after the last step there is none
        assert example_numbers(batch) == expected[step]
    batches.prepare(3)
    assert example_numbers(batches.step(9)) == expected[9], "another step than the prepared one"


def test_a_prepared_batch_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = batches_of()[0]
    batches.prepare(1)
    monkeypatch.setattr(batches, "_build", lambda step: pytest.fail(f"built for step {step}"))
    assert batches.step(1).num_examples == 4
    batches.prepare(18)  # the run has 18 steps, from 0


def test_an_error_in_preparing_is_raised_by_the_step_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = batches_of()[0]
    with monkeypatch.context() as patched:
        patched.setattr(Dataset, "example", lambda *_: 1 // 0)
        batches.prepare(1)
        with pytest.raises(ZeroDivisionError):
            batches.step(1)
    assert batches.step(1).num_examples == 4


@pytest.mark.parametrize("training", [{}, {"micro_batch_tokens": 8}, {"micro_batch_tokens": 10_000}])
@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_ranks_divide_the_examples_of_a_step(num_ranks: int, training: dict[str, Any]) -> None:
    single = batches_of(**training)[0]
    ranks = [batches_of(rank, num_ranks, **training)[0] for rank in range(num_ranks)]
    for step in range(18):
        shares = [rank.step(step) for rank in ranks]
        full = single.step(step)
        assert sorted(itertools.chain(*map(example_numbers, shares))) == sorted(example_numbers(full))
        assert len({len(share.micro_batches) for share in shares}) == 1
        for share in shares:
            assert (share.num_examples, share.num_tokens, share.num_supervised_tokens) == (
                full.num_examples,
                full.num_tokens,
                full.num_supervised_tokens,
            )
        assert full.num_supervised_tokens == sum(
            int((micro_batch.targets != IGNORE_INDEX).sum()) for share in shares for micro_batch in share.micro_batches
        )
        assert full.num_tokens == sum(
            int(micro_batch.attention_mask.sum())
            for share in shares
            for micro_batch in share.micro_batches
            if (micro_batch.targets != IGNORE_INDEX).any() or micro_batch.input_ids[0, 0] != PAD
        )


@pytest.mark.parametrize("limits", [{"micro_batch_tokens": 60}, {"micro_batch_size": 2}, {"micro_batch_tokens": 1}])
def test_three_ranks_contain_every_example_once(limits: dict[str, Any]) -> None:
    examples = examples_of(UNEVEN)
    training = TrainingSection.model_validate(limits)
    shares = [
        step_batch(examples, BatchOptions.from_config(training, rank=rank, num_ranks=3, pad_id=PAD))
        for rank in range(3)
    ]
    assert sorted(itertools.chain(*map(example_numbers, shares))) == list(range(len(UNEVEN)))
    assert len({len(share.micro_batches) for share in shares}) == 1
    assert all(share.num_tokens == sum(UNEVEN) for share in shares)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("limits", [{"micro_batch_tokens": 100_000}, {"micro_batch_tokens": 30}])
def test_ranks_get_about_equally_many_tokens(num_ranks: int, limits: dict[str, int]) -> None:
    """Even if the step fits into one micro-batch: otherwise one rank would compute while the others wait."""
    training = TrainingSection.model_validate(limits)
    for lengths in ([7] * 16, [3 + 5 * (i % 9) for i in range(16)], [40, *[5] * 15]):
        examples = examples_of(lengths)
        loads = []
        for rank in range(num_ranks):
            share = step_batch(examples, BatchOptions.from_config(training, rank=rank, num_ranks=num_ranks, pad_id=PAD))
            loads.append(sum(lengths[number] for number in example_numbers(share)))
        assert max(loads) <= max(max(lengths), 4 / 3 * sum(lengths) / num_ranks)


def test_per_device_batch_size_gives_each_rank_equally_many_examples() -> None:
    training = TrainingSection.model_validate({"micro_batch_size": 2, "gradient_accumulation_steps": 2})
    for rank in range(2):
        share = step_batch(
            examples_of([50, *[5] * 7]), BatchOptions.from_config(training, rank=rank, num_ranks=2, pad_id=PAD)
        )
        assert [len(micro_batch.input_ids) for micro_batch in share.micro_batches] == [2, 2]


def test_rank_without_examples_gets_micro_batches_without_targets() -> None:
    training = TrainingSection(micro_batch_tokens=1000)
    shares = [
        step_batch(examples_of([5]), BatchOptions.from_config(training, rank=rank, num_ranks=3, pad_id=PAD))
        for rank in range(3)
    ]
    assert [len(share.micro_batches) for share in shares] == [1, 1, 1]
    assert [int((share.micro_batches[0].targets != IGNORE_INDEX).sum()) for share in shares] == [3, 0, 0]


# Grouping.


@pytest.mark.parametrize("max_tokens", [1, 10, 30, 64, 90, 200, 10_000])
def test_groups_respect_the_token_limit(max_tokens: int) -> None:
    examples = examples_of(UNEVEN)
    groups = group_padded(examples, max_tokens, None)
    assert sorted(example for group in groups for example in group) == sorted(examples)
    for group in groups:
        padded = len(group) * max(len(example.input_ids) for example in group)
        assert padded <= max_tokens or len(group) == 1


@pytest.mark.parametrize("max_examples", [1, 2, 5, 14, 100])
def test_groups_respect_the_example_limit(max_examples: int) -> None:
    groups = group_padded(examples_of(UNEVEN), 1, max_examples)
    assert sorted(example.input_ids[0] for group in groups for example in group) == list(range(len(UNEVEN)))
    assert [len(group) for group in groups[:-1]] == [max_examples] * (len(groups) - 1)
    assert 1 <= len(groups[-1]) <= max_examples


def test_long_example_is_its_own_group() -> None:
    groups = group_padded(examples_of([4, 300, 4, 4]), 12, None)
    assert [[len(example.input_ids) for example in group] for group in groups] == [[300], [4, 4, 4]]


def test_groups_are_sorted_by_length() -> None:
    lengths = [[len(example.input_ids) for example in group] for group in group_padded(examples_of(UNEVEN), 100, None)]
    flat = list(itertools.chain(*lengths))
    assert flat == sorted(UNEVEN, reverse=True)


def test_groups_do_not_depend_on_the_example_order() -> None:
    distinct = examples_of([3, 50, 7, 22, 1, 9, 30, 2, 15])
    shuffled = [distinct[i] for i in permutation(len(distinct), 1)]
    assert group_padded(distinct, 64, None) == group_padded(shuffled, 64, None)


def test_no_examples_give_no_groups() -> None:
    assert group_padded([], 10, None) == []


# Tensors.


def supervised_anywhere(length: int, number: int, key: int) -> Example:
    supervised = np.random.Philox(np.random.SeedSequence((key, number))).random_raw(length) % 2
    tokens = [100 * number + i for i in range(length)]
    return Example(
        tokens, [IGNORE_INDEX, *(t if s else IGNORE_INDEX for t, s in zip(tokens[1:], supervised[1:], strict=True))]
    )


@pytest.mark.parametrize("key", range(6))
@pytest.mark.parametrize("lengths", [[5], [1], [1, 1], [7, 3, 2], [20, 20, 1]])
def test_padded_tensors_equal_those_of_a_simple_loop(lengths: list[int], key: int) -> None:
    examples = [supervised_anywhere(length, number, key) for number, length in enumerate(lengths)]
    batch = pad(examples, PAD)
    width = max(lengths)

    target = {}  # (row, position) -> token to predict
    for row, example in enumerate(examples):
        for position in range(width):
            is_real = position < lengths[row]
            assert batch.input_ids[row, position] == (example.input_ids[position] if is_real else PAD)
            assert batch.attention_mask[row, position] == int(is_real)
            if position + 1 < lengths[row] and example.labels[position + 1] != IGNORE_INDEX:
                target[row, position] = example.input_ids[position + 1]

    positions = sorted({position for _, position in target}) or [0]
    assert batch.logit_positions.tolist() == positions
    assert batch.targets.tolist() == [
        [target.get((row, position), IGNORE_INDEX) for position in positions] for row in range(len(examples))
    ]
    assert batch.input_ids.shape == batch.attention_mask.shape == (len(examples), width)
    assert {
        tensor.dtype for tensor in (batch.input_ids, batch.attention_mask, batch.logit_positions, batch.targets)
    } == {torch.int64}


def test_empty_example_is_one_token_without_a_target() -> None:
    batch = pad([empty_example(PAD)], PAD)
    assert batch.input_ids.tolist() == [[PAD]]
    assert batch.attention_mask.tolist() == [[1]]
    assert batch.logit_positions.tolist() == [0]
    assert batch.targets.tolist() == [[IGNORE_INDEX]]


def test_pad_token_within_an_example_is_a_real_token() -> None:
    batch = pad([Example([1, PAD, 2, PAD], [IGNORE_INDEX, PAD, 2, PAD]), Example([1, 2], [IGNORE_INDEX, 2])], PAD)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.targets.tolist() == [[PAD, 2, PAD], [2, IGNORE_INDEX, IGNORE_INDEX]]


def test_moving_a_batch_keeps_its_values() -> None:
    batch = pad(examples_of([3, 2]), PAD)
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.targets, batch.targets)
    assert torch.equal(moved.input_ids, batch.input_ids)


# Several sources.


@pytest.fixture
def three_sources(make_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a function that makes a config with three sources.

    12 rows of weight 2, 9 of weight 1, and 20 of weight 0.25: 24 + 9 + 5 examples per epoch.
    """
    parts = {"twice": (12, 2.0), "once": (9, 1.0), "quarter": (20, 0.25)}
    sources = [
        {"path": str(write_jsonl(tmp_path / f"{name}.jsonl", chat_rows(rows))), "weight": weight}
        for name, (rows, weight) in parts.items()
    ]

    def make(**data: Any) -> RunConfig:
        return make_config(data={"train": sources} | data, training={"epochs": 4, "batch_size": 5})

    return make


def order_of(config: RunConfig, num_ranks: int) -> list[list[tuple[str, int]]]:
    """Return the rows of each epoch in the order of the steps. Check that ranks agree and each row is on one rank."""
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
        num_rows = sum(int(m.attention_mask.any(dim=1).sum()) for s in shares for m in s.micro_batches)
        num_empty = sum(m.input_ids.numel() == 1 for s in shares for m in s.micro_batches)
        assert num_rows - num_empty == len(rows)
        epochs[data.plan.position(step)[0]] += rows
    return epochs


def test_weighted_sources_have_the_same_order_on_any_number_of_processes(
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
    assert len(set(quarters)) == 20, "four epochs use each row once"
    assert len({tuple(epoch) for epoch in epochs}) == 4

    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks in the table
    log_data(three_sources(), prepare_data(three_sources(), 1))
    output = capsys.readouterr().out
    assert "24 of 12 examples (weight 2)" in output
    assert "5 of 20 examples (weight 0.25)" in output


@pytest.mark.parametrize("max_tokens", [1, 12, 64, 299, 300, 10_000])
def test_packed_groups_contain_each_example_once_and_respect_the_limit(max_tokens: int) -> None:
    examples = examples_of([4, 300, 4, 60, 7, 7, 31])
    groups = group_packed(examples, max_tokens, None)
    assert sorted(map(id, examples)) == sorted(id(example) for group in groups for example in group)
    sizes = [sum(len(example.input_ids) for example in group) for group in groups]
    assert max(sizes) <= max(max_tokens, 300)
    assert sorted(len(group) for group in group_packed(examples, max_tokens, 3)) == [1, 3, 3]
    assert group_packed([], max_tokens, None) == []


def test_packing_concatenates_examples() -> None:
    first, second = Example([5, 6, 7], [IGNORE_INDEX, 6, 7], key=3), Example([8, 9], [IGNORE_INDEX, 9], key=4)
    batch = pack([first, second])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch.segments == Segments((3, 2))
    assert batch.logit_positions.tolist() == [0, 1, 3], "an example's last token does not predict the next example"
    assert batch.targets.tolist() == [[6, 7, 9]]
    assert batch.token_keys[0, :3].tolist() == pad([first], PAD).token_keys[0].tolist()
    assert batch.token_keys[0, 3:].tolist() == pad([second], PAD).token_keys[0].tolist()


@pytest.mark.parametrize(("kind", "waits"), [("mps", True), ("xpu", True), ("cuda", False)])
def test_only_pinned_memory_is_copied_while_the_host_continues(
    monkeypatch: pytest.MonkeyPatch, kind: str, waits: bool
) -> None:
    copies: list[tuple[bool, bool]] = []
    pinned: set[int] = set()

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        pinned.add(id(copy))
        return copy

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        copies.append((id(tensor) in pinned, non_blocking))
        return tensor

    batch = pack(examples_of([3, 4]))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    batch.to(torch.device(kind))
    assert copies == [(not waits, not waits)] * 7
