"""Which evaluation is the best, and when a run stops early."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lora_accel.config.schema import RunConfig
from lora_accel.config.selection import Selection


def selection(**changes: Any) -> Selection:
    values = {"metric": "eval_loss", "is_larger_better": False, "keeps_best": True, "patience": 2, "min_delta": 0.0}
    return Selection(**(values | changes))


def evaluations(*values: float, **metrics: float) -> list[dict[str, float]]:
    return [{"step": 10 * number, "eval_loss": x, **metrics} for number, x in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("values", "is_larger_better", "step"),
    [
        ((3.0, 2.0, 2.5), False, 20),
        ((3.0, 2.0, 2.5), True, 10),
        ((2.0, 2.0, 2.0), False, 10),  # the earliest of equal ones
        ((2.0, 2.0, 3.0), True, 30),
        ((math.nan, 2.0, math.inf), False, 20),
        ((math.nan, -math.inf), False, None),
        ((), False, None),
    ],
)
def test_best(values: tuple[float, ...], is_larger_better: bool, step: int | None) -> None:
    best = selection(is_larger_better=is_larger_better).best(evaluations(*values))
    assert (best and best["step"]) == step
    assert selection(is_larger_better=is_larger_better).step_to_keep(evaluations(*values)) == step
    assert selection(keeps_best=False).step_to_keep(evaluations(*values)) is None


@pytest.mark.parametrize(
    ("values", "changes", "has_stalled"),
    [
        ((3.0, 2.0), {}, False),
        ((3.0, 3.0), {}, False),
        ((3.0, 3.0, 3.0), {}, True),
        ((3.0, 2.0, 2.5, 1.9), {}, False),  # an improvement starts the count again
        ((3.0, 2.0, 2.5, 1.9, 1.95), {}, False),
        ((3.0, 2.0, 2.5, 1.9, 1.95, 1.9), {}, True),
        ((3.0, 2.0, 2.5, 2.6), {"patience": None}, False),
        ((3.0, 2.9, 2.8), {"min_delta": 0.25}, True),
        ((3.0, 2.9, 2.7), {"min_delta": 0.25}, False),  # against the last improvement, not the last evaluation
        ((0.1, 0.2, 0.2), {"is_larger_better": True}, False),
        ((0.1, 0.2, 0.2, 0.2), {"is_larger_better": True}, True),
        ((3.0, math.nan, math.nan), {}, True),
        ((math.nan, math.nan), {}, True),
        ((3.0,), {"patience": 1}, False),
        ((3.0, 3.0), {"patience": 1}, True),
    ],
)
def test_has_stalled(values: tuple[float, ...], changes: dict[str, Any], has_stalled: bool) -> None:
    assert selection(**changes).has_stalled(evaluations(*values)) is has_stalled


@pytest.mark.parametrize(
    ("metrics", "checkpoint", "is_larger_better"),
    [
        ([], {"export": "best"}, False),
        ([], {"keep_best": "eval_perplexity"}, False),
        (["exact_match"], {"keep_best": "eval_exact_match"}, True),
        (["bits_per_byte"], {"keep_best": "eval_bits_per_byte"}, False),
        (["exact_match"], {"keep_best": "eval_exact_match", "best_is": "min"}, False),
        (["mine:cost"], {"keep_best": "eval_cost", "best_is": "min"}, False),
        (["mine:several"], {"keep_best": "eval_gain", "best_is": "max"}, True),
    ],
)
def test_direction_of_a_metric(metrics: list[str], checkpoint: dict[str, Any], is_larger_better: bool) -> None:
    config = RunConfig.model_validate(
        {
            "output_dir": "run",
            "model": {"name_or_path": "model"},
            "data": {"train": [{"path": "rows.jsonl"}], "eval_fraction": 0.1},
            "evaluation": {"every_steps": 5, "metrics": metrics},
            "checkpoint": checkpoint,
        }
    )
    assert Selection.from_config(config).is_larger_better is is_larger_better


def test_evaluations_of_other_data_do_not_count() -> None:
    """A resumed run may have other evaluation rows, whose loss cannot be compared."""
    before, after = evaluations(1.0, 1.1, eval_tokens=50), evaluations(9.0, 8.0, eval_tokens=60)
    best = selection().best(before + after)
    assert best is not None
    assert best["eval_loss"] == 8.0
    assert not selection().has_stalled(before + after)
