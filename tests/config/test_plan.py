"""The plan of a run."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest

from lora_accel.config.counts import scale
from lora_accel.config.plan import Plan, is_due, make_plan
from lora_accel.config.schema import RunConfig


def plan_of(num_examples: int = 21, num_ranks: int = 1, num_eval_examples: int = 0, **sections: Any) -> Plan:
    config = RunConfig.model_validate(
        {
            "output_dir": "run",
            "model": {"name_or_path": "model"},
            "data": {"train": [{"path": "rows.jsonl"}], "eval": [{"path": "held.jsonl"}]},
            **sections,
        }
    )
    return make_plan(
        config,
        num_ranks=num_ranks,
        num_examples=num_examples,
        num_tokens=1000,
        num_supervised_tokens=250,
        num_eval_examples=num_eval_examples,
    )


@pytest.mark.parametrize(
    ("training", "num_ranks", "batch_size", "per_epoch", "total"),
    [
        ({"batch_size": 4, "epochs": 1}, 1, 4, 6, 6),
        ({"batch_size": 4, "epochs": 1}, 8, 4, 6, 6),  # the number of ranks changes nothing
        ({"batch_size": 7, "epochs": 2}, 1, 7, 3, 6),
        ({"batch_size": 21, "epochs": 2}, 1, 21, 1, 2),
        ({"batch_size": 100, "epochs": 3}, 1, 100, 1, 3),
        ({"batch_size": 4, "epochs": 0.5}, 1, 4, 6, 3),
        ({"batch_size": 4, "epochs": 0.01}, 1, 4, 6, 1),
        ({"batch_size": 4, "epochs": 1.5}, 1, 4, 6, 9),
        ({"batch_size": 4, "epochs": 1.51}, 1, 4, 6, 10),  # rounded up
        ({"batch_size": 4, "epochs": 3, "max_steps": 5}, 1, 4, 6, 5),  # max_steps wins
        ({"batch_size": 4, "epochs": 1, "max_steps": 100}, 1, 4, 6, 100),
        ({"micro_batch_size": 2, "epochs": 1}, 1, 2, 11, 11),
        ({"micro_batch_size": 2, "epochs": 1}, 3, 6, 4, 4),
        ({"micro_batch_size": 2, "gradient_accumulation_steps": 4, "epochs": 1}, 1, 8, 3, 3),
        ({"micro_batch_size": 2, "gradient_accumulation_steps": 4, "epochs": 1}, 2, 16, 2, 2),
    ],
)
def test_steps(training: dict[str, Any], num_ranks: int, batch_size: int, per_epoch: int, total: int) -> None:
    plan = plan_of(num_ranks=num_ranks, training=training)
    assert (plan.batch_size, plan.steps_per_epoch, plan.total_steps) == (batch_size, per_epoch, total)


@pytest.mark.parametrize(
    ("warmup", "total", "steps"),
    [
        ({"warmup_ratio": 0.0}, 100, 0),
        ({"warmup_ratio": 0.03}, 100, 3),
        ({"warmup_ratio": 0.03}, 101, 4),  # rounded up
        ({"warmup_ratio": 0.03}, 1, 1),
        ({"warmup_ratio": 1.0}, 10, 10),
        ({"warmup_steps": 0}, 100, 0),
        ({"warmup_steps": 7, "warmup_ratio": 0.5}, 100, 7),  # steps win
    ],
)
def test_warm_up(warmup: dict[str, Any], total: int, steps: int) -> None:
    assert plan_of(training={"max_steps": total, **warmup}).warmup_steps == steps


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "total"), [(1.1, 100, 110), (1.1, 10, 11), (2.2, 100, 220), (1.101, 100, 111)]
)
def test_part_of_an_epoch_is_not_rounded_up_by_a_float(epochs: float, per_epoch: int, total: int) -> None:
    """1.1 * 100 is 110.00000000000001 in floats."""
    assert plan_of(per_epoch, training={"batch_size": 1, "epochs": epochs}).total_steps == total


@pytest.mark.parametrize(
    ("ratio", "total", "steps"), [(0.07, 100, 7), (0.07, 101, 8), (0.14, 50, 7), (0.29, 100, 29), (0.55, 100, 55)]
)
def test_warm_up_is_not_rounded_up_by_a_float(ratio: float, total: int, steps: int) -> None:
    """0.07 * 100 is 7.000000000000001 in floats."""
    assert plan_of(training={"max_steps": total, "warmup_ratio": ratio}).warmup_steps == steps


def test_table_shows_a_warm_up_longer_than_the_run() -> None:
    table = dict(plan_of(training={"batch_size": 4, "max_steps": 3, "warmup_steps": 10}).table())
    assert table["steps"].endswith("10 warm-up steps, so the learning rate does not reach its peak")


@pytest.mark.parametrize(
    ("step", "position", "examples"),
    [
        (0, (0, 0), 0),
        (1, (0, 1), 4),
        (5, (0, 5), 20),
        (6, (1, 0), 21),  # the last step of an epoch is short: one example
        (7, (1, 1), 25),
        (11, (1, 5), 41),
        (12, (2, 0), 42),
        (13, (2, 1), 46),
    ],
)
def test_position_of_a_step(step: int, position: tuple[int, int], examples: int) -> None:
    plan = plan_of(training={"batch_size": 4, "epochs": 3})
    assert plan.position(step) == position
    assert plan.examples_after(step) == examples


@pytest.mark.parametrize("num_examples", [1, 7, 8, 9, 64])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_each_step_adds_a_batch_or_the_rest_of_the_epoch(num_examples: int, batch_size: int) -> None:
    plan = plan_of(num_examples, training={"batch_size": batch_size, "epochs": 4})
    counts = [plan.examples_after(step) for step in range(plan.total_steps + 1)]
    increments = [later - earlier for earlier, later in itertools.pairwise(counts)]
    one_epoch = [min(batch_size, num_examples - start) for start in range(0, num_examples, batch_size)]
    assert increments == one_epoch * 4
    assert counts[-1] == 4 * num_examples


def steps_with(condition: Any, total: int) -> list[int]:
    return [step for step in range(1, total + 1) if condition(step)]


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (9, [5])])
def test_logs_and_saves_at_intervals_and_after_the_last_step(every: int, steps: list[int]) -> None:
    plan = plan_of(training={"max_steps": 5}, logging={"every_steps": every}, checkpoint={"every_steps": 1})
    assert steps_with(plan.logs_after, 5) == steps
    assert steps_with(plan.saves_after, 5) == [1, 2, 3, 4, 5]
    plan = plan_of(training={"max_steps": 5}, logging={"every_steps": 1}, checkpoint={"every_steps": every})
    assert steps_with(plan.saves_after, 5) == steps
    assert steps_with(plan.logs_after, 5) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("evaluation", "num_eval_examples", "steps"),
    [
        ({}, 3, [5]),
        ({"every_steps": 2}, 3, [2, 4, 5]),
        ({"every_steps": 9}, 3, [5]),
        ({}, 0, []),
        ({"prompts": ["hello"]}, 0, [5]),
        ({"prompts": ["hello"], "every_steps": 3}, 0, [3, 5]),
    ],
)
def test_evaluates_only_with_examples_or_prompts(
    evaluation: dict[str, Any], num_eval_examples: int, steps: list[int]
) -> None:
    plan = plan_of(num_eval_examples=num_eval_examples, training={"max_steps": 5}, evaluation=evaluation)
    assert steps_with(plan.evaluates_after, 5) == steps


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        (1 / 3, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        (1, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        (3, [3, 6, 9, 12]),
        (3.5, [4, 7, 11]),
        (2.1, [3, 5, 7, 9, 11]),
        (None, []),
    ],
)
def test_is_due_after_the_first_step_that_is_not_before_a_multiple(every: float | None, steps: list[int]) -> None:
    assert [step for step in range(13) if is_due(step, every)] == steps


@pytest.mark.parametrize("epochs", [0.1, 0.3, 0.5, 0.7, 1.1, 1.5, 3.0])
@pytest.mark.parametrize("steps_per_epoch", [1, 7, 10, 1001])
def test_is_due_as_often_as_the_decimals_of_the_interval_require(epochs: float, steps_per_epoch: int) -> None:
    total = 33 * steps_per_epoch
    every = Fraction(str(epochs)) * steps_per_epoch
    due = {math.ceil(k * every) for k in range(1, math.ceil(total / every) + 1)}
    assert {s for s in range(total + 1) if is_due(s, scale(epochs, steps_per_epoch))} == {s for s in due if s <= total}


def test_intervals_in_epochs_become_steps() -> None:
    values = {"checkpoint": {"every_epochs": 0.5}, "evaluation": {"every_epochs": 1.0}, "training": {"batch_size": 3}}
    plan = plan_of(num_eval_examples=2, **values)  # 7 steps per epoch
    assert (plan.save_every, plan.evaluate_every) == (3.5, 7)
    assert steps_with(plan.saves_after, 21) == [4, 7, 11, 14, 18, 21]
    assert steps_with(plan.evaluates_after, 21) == [7, 14, 21]


@pytest.mark.parametrize(
    "changes",
    [{"checkpoint": {"keep_best": "eval_loss"}}, {"checkpoint": {"export": "best"}}, {"evaluation": {"patience": 3}}],
)
def test_evaluated_steps_are_saved_if_one_is_selected(changes: dict[str, Any]) -> None:
    values = {"evaluation": {"every_steps": 2}, "training": {"max_steps": 5}}
    assert steps_with(plan_of(num_eval_examples=2, **values).saves_after, 5) == [5]
    values = {key: values.get(key, {}) | changes.get(key, {}) for key in values | changes}
    plan = plan_of(num_eval_examples=2, **values)
    assert steps_with(plan.saves_after, 5) == [2, 4, 5]
    assert not plan.saves_after(0)


@pytest.mark.parametrize(("at_start", "num", "expected"), [(True, 2, True), (False, 2, False), (True, 0, False)])
def test_evaluates_before_the_first_step(at_start: bool, num: int, expected: bool) -> None:
    plan = plan_of(num_eval_examples=num, evaluation={"at_start": at_start})
    assert plan.evaluates_after(0) is expected


def test_table_shows_the_numbers() -> None:
    table = dict(plan_of(num_eval_examples=2, training={"batch_size": 4, "epochs": 2}).table())
    assert table["examples"] == "21 per epoch, 2 for evaluation"
    assert table["tokens"] == "1,000 per epoch, 25.0% supervised"
    assert table["steps"] == "12 = 2 epoch(s) of 6 steps; 1 warm-up step(s)"
    assert table["evaluation"] == "before the first step and after the last step"
    evaluation = {"at_start": False, "every_epochs": 0.25}
    table = dict(plan_of(num_eval_examples=2, training={"batch_size": 4}, evaluation=evaluation).table())
    assert table["evaluation"] == "every 1.5 steps and after the last step"


def test_as_dict_rebuilds_the_plan() -> None:
    plan = plan_of()
    assert Plan(**plan.as_dict()) == plan
