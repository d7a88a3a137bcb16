"""Which evaluation is the best, and when a run stops early."""

from __future__ import annotations

import json
import math
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from lora_accel.config.schema import RunConfig
from lora_accel.config.selection import MAX_RECORDED, Selection
from lora_accel.saving.checkpoint import METADATA_BYTES


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


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ({"eval_tokens": 50}, {"eval_tokens": 60}),
        ({"eval_tokens": 50, "fingerprint": 1}, {"eval_tokens": 50, "fingerprint": 2}),
        ({"eval_tokens": 50}, {"eval_tokens": 60, "fingerprint": 2}),  # recorded by an earlier version
    ],
)
def test_evaluations_of_other_data_do_not_count(first: dict[str, float], last: dict[str, float]) -> None:
    """A resumed run may have other evaluation rows or settings, whose values cannot be compared."""
    before, after = evaluations(1.0, 1.1, **first), evaluations(9.0, 8.0, **last)
    best = selection().best(before + after)
    assert best is not None
    assert best["eval_loss"] == 8.0
    assert not selection().has_stalled(before + after)


def test_evaluations_of_the_same_data_count() -> None:
    first: dict[str, float] = {"step": 2, "eval_loss": 1.0, "eval_tokens": 5}
    last: dict[str, float] = {"step": 4, "eval_loss": 2.0, "eval_tokens": 5, "fingerprint": 1}
    for both in ([first | {"fingerprint": 1}, last], [first, last]):  # recorded by an earlier version
        best = selection(patience=1).best(both)
        assert best is not None
        assert best["step"] == 2
        assert selection(patience=1).has_stalled(both)


@hypothesis.settings(derandomize=True, deadline=None, max_examples=200)
@hypothesis.given(
    limit=st.sampled_from([1, 3]),
    values=st.lists(st.sampled_from([None, math.nan, 1.0, 1.1, 1.2, 2.0, 3.0]), max_size=30),
    changed_at=st.integers(1, 40),
    is_larger_better=st.booleans(),
    patience=st.sampled_from([None, 1, 2, 5]),
    min_delta=st.sampled_from([0.0, 0.15, 0.5]),
)
def test_shortened_evaluations_select_the_same(
    limit: int,
    values: list[float | None],
    changed_at: int,
    is_larger_better: bool,
    patience: int | None,
    min_delta: float,
) -> None:
    """A run records few evaluations, and decides after each one as if it had all. None = the replies failed."""
    select = selection(metric="eval_f", is_larger_better=is_larger_better, patience=patience, min_delta=min_delta)
    complete: list[dict[str, float]] = []
    short: list[dict[str, float]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_accel.config.selection.MAX_RECORDED", limit)
        for step, value in enumerate(values, start=1):
            entry: dict[str, float] = {"step": step, "eval_loss": 1.0, "fingerprint": int(step >= changed_at)}
            entry |= {} if value is None else {"eval_f": value}
            complete.append(entry)
            short = select.shorten([*short, entry])
            assert len(short) <= max(limit, patience or 0) + 3
            assert select.best(short) == select.best(complete)
            assert select.has_stalled(short) is select.has_stalled(complete)


def test_many_evaluations_fit_into_the_state_of_a_checkpoint() -> None:
    entries = evaluations(
        *(1 / number for number in range(1, MAX_RECORDED + 100)), eval_tokens=10**9, fingerprint=2**48
    )
    short: list[dict[str, float]] = []
    for entry in entries:
        short = selection(min_delta=1e-3).shorten([*short, entry | {"eval_perplexity": math.exp(entry["eval_loss"])}])
    assert len(short) <= MAX_RECORDED + 2
    assert len(json.dumps(short, indent=2)) < METADATA_BYTES
