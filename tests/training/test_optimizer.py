"""Every step has a useful learning rate, or that of transformers; weight decay applies to matrices only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from lora_accel import RunConfig
from lora_accel.config.plan import Plan, make_plan
from lora_accel.config.schedules import learning_rate
from lora_accel.config.schema import TrainingSection
from lora_accel.training.optimizer import make_optimizer, set_learning_rate

TRANSFORMERS_SCHEDULES: dict[str, Callable[..., Any]] = {
    "cosine": get_cosine_schedule_with_warmup,
    "linear": get_linear_schedule_with_warmup,
    "constant": lambda optimizer, warmup, total: get_constant_schedule_with_warmup(optimizer, warmup),
}
PEAK = 3e-4


def rate(step: int, training: TrainingSection, plan: Plan) -> float:
    return learning_rate(
        step,
        peak=training.learning_rate,
        scheduler=training.scheduler,
        warmup_steps=plan.warmup_steps,
        total_steps=plan.total_steps,
        from_zero=training.warmup_from_zero,
    )


def plan_of(
    total_steps: int, warmup_steps: int | None, scheduler: str = "cosine", *, from_zero: bool = False
) -> tuple[TrainingSection, Plan]:
    training = {"max_steps": total_steps, "warmup_steps": warmup_steps, "scheduler": scheduler, "learning_rate": PEAK}
    training |= {"warmup_from_zero": from_zero}
    config = RunConfig.model_validate(
        {"output_dir": "x", "model": {"name_or_path": "x"}, "data": {"train": [{"path": "x"}]}, "training": training}
    )
    plan = make_plan(config, num_ranks=1, num_examples=100, num_tokens=1000, num_supervised_tokens=500)
    return config.training, plan


def rates_of(total: int, warmup: int | None, scheduler: str = "cosine", *, from_zero: bool = False) -> list[float]:
    training, plan = plan_of(total, warmup, scheduler, from_zero=from_zero)
    return [rate(step, training, plan) for step in range(total)]


def rates_of_transformers(total: int, warmup: int, scheduler: str) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = TRANSFORMERS_SCHEDULES[scheduler](optimizer, warmup, total)
    rates = []
    for _ in range(total):
        rates.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return rates


LENGTHS = [(1, 0), (1, 1), (2, 1), (2, 2), (3, 1), (10, 0), (10, 3), (100, 7), (97, 97), (1000, 30), (4, 9)]
"""(steps, warm-up steps)"""


@pytest.mark.parametrize(("total", "warmup"), LENGTHS)
@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
def test_schedule_from_zero_equals_that_of_transformers(scheduler: str, total: int, warmup: int) -> None:
    rates = rates_of(total, warmup, scheduler, from_zero=True)
    assert rates == pytest.approx(rates_of_transformers(total, warmup, scheduler), rel=1e-12, abs=1e-18)


@pytest.mark.parametrize(("total", "warmup"), LENGTHS)
@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
def test_schedule_is_that_of_transformers_without_its_step_at_zero(scheduler: str, total: int, warmup: int) -> None:
    longer = rates_of_transformers(total + 1, warmup, scheduler)[1:] if warmup else None
    expected = longer or rates_of_transformers(total, warmup, scheduler)
    assert rates_of(total, warmup, scheduler) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3, 4, 10, 97])
def test_every_step_has_a_useful_learning_rate(scheduler: str, total: int) -> None:
    """Also with as many warm-up steps as steps, with more, and with the default ratio."""
    for warmup in (None, *range(total + 3), 10 * total):
        rates = rates_of(total, warmup, scheduler)
        # The smallest one is the last of a cosine: it would reach 0 one step later.
        assert min(rates) > PEAK / (3 * max(total, warmup or 0) ** 2)
        top = rates.index(max(rates))
        assert rates[: top + 1] == sorted(rates[: top + 1])
        assert rates[top:] == sorted(rates[top:], reverse=True)
        num_warmup = plan_of(total, warmup)[1].warmup_steps
        if num_warmup <= total:
            assert max(rates) == PEAK, "the peak is reached"
            assert top == max(num_warmup - 1, 0)
        else:
            assert rates == pytest.approx([PEAK * (step + 1) / num_warmup for step in range(total)])


@pytest.mark.parametrize(
    ("total", "warmup", "scheduler", "expected"),
    [
        (1, 1, "cosine", [1.0]),
        (2, 1, "cosine", [1.0, 0.5]),
        (2, 2, "linear", [0.5, 1.0]),
        (3, 2, "linear", [0.5, 1.0, 0.5]),
        (4, 0, "linear", [1.0, 0.75, 0.5, 0.25]),
        (4, 2, "constant", [0.5, 1.0, 1.0, 1.0]),
        (2, 4, "cosine", [0.25, 0.5]),
    ],
)
def test_values_of_short_runs(total: int, warmup: int, scheduler: str, expected: list[float]) -> None:
    assert rates_of(total, warmup, scheduler) == pytest.approx([PEAK * factor for factor in expected])


def parameters() -> list[torch.nn.Parameter]:
    layer = torch.nn.Linear(3, 4)
    return [layer.weight, layer.bias, torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(2, 3, 4))]


def test_weight_decay_excludes_biases_and_norms() -> None:
    weight, bias, norm, kernel = parameters()
    optimizer = make_optimizer([weight, bias, norm, kernel], plan_of(10, 0)[0].model_copy(update={"weight_decay": 0.1}))
    assert isinstance(optimizer, torch.optim.AdamW)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in (weight, bias, norm, kernel)] == [0.1, 0.0, 0.0, 0.1]


def test_zero_gradients_shrink_only_matrices() -> None:
    all_parameters = parameters()
    before = [parameter.detach().clone() for parameter in all_parameters]
    optimizer = make_optimizer(all_parameters, plan_of(10, 0)[0].model_copy(update={"weight_decay": 0.1}))
    set_learning_rate(optimizer, 0.5)
    for parameter in all_parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, old in zip(all_parameters, before, strict=True):
        expected = old * (1 - 0.5 * 0.1) if parameter.ndim >= 2 else old
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("kept", [slice(0, 1), slice(1, 3)], ids=["matrices only", "vectors only"])
def test_empty_parameter_group_is_omitted(kept: slice) -> None:
    selected = parameters()[kept]
    optimizer = make_optimizer(iter(selected), plan_of(10, 0)[0])
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(selected)]


def test_set_learning_rate_updates_every_group() -> None:
    optimizer = make_optimizer(parameters(), plan_of(10, 0)[0])
    assert len(optimizer.param_groups) == 2
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
