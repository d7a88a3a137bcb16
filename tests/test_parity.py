"""The same rows give the same training as Hugging Face Trainer + PEFT, however differently a step is cut."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scripts.compare_with_trainer import (
    adapter_differences,
    comparison_config,
    train_with_lora_accel,
    train_with_trainer,
)
from transformers import TrainingArguments

from tests.conftest import SHARED_DATA, chat_rows, write_jsonl

pytestmark = [
    pytest.mark.launch,  # trains for seconds
    pytest.mark.skipif(
        "train_sampling_strategy" not in inspect.signature(TrainingArguments).parameters,
        reason="the Trainer of this transformers cannot read rows in their order",
    ),
]
ALPACA = SHARED_DATA / "alpaca_en_demo.json"
needs_alpaca = pytest.mark.skipif(not ALPACA.exists(), reason="alpaca_en_demo.json is not in ../shared/data")


@pytest.mark.parametrize(
    ("source", "rows"),
    [("synthetic", 64), ("synthetic", 59), pytest.param("alpaca", 64, marks=needs_alpaca)],
    ids=["synthetic", "short-last-step", "alpaca"],
)
def test_losses_norms_and_adapter_are_those_of_the_trainer(
    tiny_model: Callable[..., Path], tmp_path: Path, source: str, rows: int
) -> None:
    file = ALPACA if source == "alpaca" else write_jsonl(tmp_path / "rows.jsonl", chat_rows(rows))
    config = comparison_config(tiny_model(), file, tmp_path / "run", rows=rows, learning_rate=1e-2, alpha=64)
    ours = train_with_lora_accel(config)
    theirs = train_with_trainer(config, tmp_path / "trainer")

    assert len(ours.steps) == 8
    for mine, other in zip(ours.steps, theirs.steps, strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=1e-4)
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    differences = adapter_differences(ours.adapter, theirs.adapter)
    assert max(differences.values()) < 1e-4, differences

    # What was compared has learned, and clipping was at work: else agreement would say little.
    assert ours.steps[-1].loss < 0.99 * ours.steps[0].loss
    assert any(step.grad_norm > 1 for step in ours.steps)
    assert all(tensor.norm() > 0 for name, tensor in ours.adapter.items() if "lora_B" in name)


def test_another_learning_rate_is_told_apart(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", chat_rows(64))
    ours = train_with_lora_accel(comparison_config(tiny_model(), file, tmp_path / "run", learning_rate=1e-2))
    other = comparison_config(tiny_model(), file, tmp_path / "run", learning_rate=1.01e-2)
    theirs = train_with_trainer(other, tmp_path / "trainer")
    assert ours.steps[0] == pytest.approx(theirs.steps[0], rel=1e-5)  # the step of learning rate 0
    assert max(adapter_differences(ours.adapter, theirs.adapter).values()) > 1e-3
    assert not torch.equal(*(next(iter(run.adapter.values())) for run in (ours, theirs)))
