"""Each rule of advice, with a case where it speaks and one just beside it where it is silent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from lora_accel.config.plan import Plan, make_plan
from lora_accel.config.schema import RunConfig
from lora_accel.data.audit import TRUNCATED, USED, SourceLedger
from lora_accel.planning.advice import LONG_RUN_STEPS, MAX_WEIGHTS_PER_TOKEN, advise


def config_of(**training: Any) -> RunConfig:
    values = {"output_dir": "run", "model": {"name_or_path": "base"}, "data": {"train": [{"path": "rows.jsonl"}]}}
    return RunConfig.model_validate(values | {"training": training})


def plan_of(**changes: Any) -> Plan:
    plan = make_plan(
        config_of(), num_ranks=1, num_examples=800, num_tokens=80_000, num_supervised_tokens=40_000, num_eval_examples=8
    )
    return dataclasses.replace(plan, **changes)


def ledger_of(num_used: int, num_truncated: int) -> SourceLedger:
    rows = [("rows.jsonl", number) for number in range(num_used + num_truncated)]
    return SourceLedger("rows.jsonl", buckets={USED: rows[:num_used], TRUNCATED: rows[num_used:]})


def test_an_ordinary_run_gets_no_advice() -> None:
    assert advise(config_of(), plan_of(), [ledger_of(800, 0)], 1_000_000) == []


@pytest.mark.parametrize(
    ("change", "silent", "speaks", "text"),
    [
        (lambda steps: {"warmup_steps": steps}, 149, 150, "training.warmup_ratio"),
        (lambda steps: {"batch_size": steps}, 800, 801, "the dataset has 800"),
        (
            lambda every: {"save_every": every, "total_steps": LONG_RUN_STEPS},
            LONG_RUN_STEPS - 1,
            LONG_RUN_STEPS,
            "checkpoint.every_steps",
        ),
        (
            lambda total: {"save_every": 10**6, "total_steps": total},
            LONG_RUN_STEPS - 1,
            LONG_RUN_STEPS,
            "only checkpoi",
        ),
    ],
)
def test_advice_on_a_plan(change: Callable[[int], dict[str, int]], silent: int, speaks: int, text: str) -> None:
    assert plan_of().total_steps == 150
    assert advise(config_of(), plan_of(**change(silent)), []) == []
    (advice,) = advise(config_of(), plan_of(**change(speaks)), [])
    assert text in advice


@pytest.mark.parametrize(
    ("evaluation", "every", "text"),
    [
        ({"every_steps": 151}, 151, "evaluation.every_steps=151 is never reached"),
        ({"every_epochs": 3.02}, 151.0, "evaluation.every_epochs=3.02 is never reached"),
    ],
)
def test_advice_on_evaluations_that_never_happen(evaluation: dict[str, Any], every: float, text: str) -> None:
    config = config_of()
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=evaluation)})
    (advice,) = advise(config, plan_of(evaluate_every=every), [])
    assert text in advice
    assert advise(config, plan_of(evaluate_every=150), []) == []


def test_a_run_that_saves_each_evaluated_step_has_checkpoints() -> None:
    values = {"save_every": 10**6, "total_steps": LONG_RUN_STEPS, "evaluates": True, "evaluate_every": 100}
    assert len(advise(config_of(), plan_of(**values), [])) == 1
    assert advise(config_of(), plan_of(**values, saves_evaluated=True), []) == []


def test_rates_of_other_optimizers_get_no_advice() -> None:
    assert len(advise(config_of(learning_rate=0.1), plan_of(), [])) == 1
    assert advise(config_of(learning_rate=0.1, optimizer="sgd"), plan_of(), []) == []


@pytest.mark.parametrize(("silent", "speaks", "text"), [(1e-5, 9e-6, "hardly change"), (5e-3, 6e-3, "diverge")])
def test_advice_on_the_learning_rate(silent: float, speaks: float, text: str) -> None:
    assert advise(config_of(learning_rate=silent), plan_of(), []) == []
    (advice,) = advise(config_of(learning_rate=speaks), plan_of(), [])
    assert f"training.learning_rate={speaks:g}" in advice
    assert text in advice


def test_advice_on_truncation_counts_the_rows_of_all_sources() -> None:
    assert advise(config_of(), plan_of(), [ledger_of(0, 50), ledger_of(50, 0)]) == []
    (advice,) = advise(config_of(), plan_of(), [ledger_of(0, 51), ledger_of(50, 0)])
    assert "51 of 101 rows are truncated" in advice


def test_advice_on_capacity() -> None:
    most = MAX_WEIGHTS_PER_TOKEN * 40_000
    assert advise(config_of(), plan_of(), [], most) == []
    (advice,) = advise(config_of(), plan_of(), [], most + 1)
    assert "adapter.r" in advice
    assert "checkpoint.keep_best" in advice
    assert "data.eval_fraction" not in advice, "there are evaluation rows"
    (advice,) = advise(config_of(), plan_of(num_eval_examples=0), [], most + 1)
    assert "Hold out rows (data.eval_fraction)" in advice
    assert advise(config_of(), plan_of(), [], None) == []
