"""Training matches Hugging Face Trainer + PEFT on the same rows, with other micro-batches."""

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
        reason="the Trainer of this version of transformers always shuffles",
    ),
]
ALPACA = SHARED_DATA / "alpaca_en_demo.json"
needs_alpaca = pytest.mark.skipif(not ALPACA.exists(), reason="alpaca_en_demo.json is not in ../shared/data")


@pytest.mark.parametrize(
    ("source", "rows"),
    [("synthetic", 64), ("synthetic", 59), pytest.param("alpaca", 64, marks=needs_alpaca)],
    ids=["synthetic", "short-last-step", "alpaca"],
)
def test_losses_norms_and_adapter_match_the_trainer(
    tiny_model: Callable[..., Path], tmp_path: Path, source: str, rows: int
) -> None:
    file = ALPACA if source == "alpaca" else write_jsonl(tmp_path / "rows.jsonl", chat_rows(rows))
    config = comparison_config(tiny_model(), file, tmp_path / "run", rows=rows, learning_rate=1e-2, alpha=64)
    actual = train_with_lora_accel(config)
    expected = train_with_trainer(config, tmp_path / "trainer")

    assert len(actual.steps) == 8
    for step, expected_step in zip(actual.steps, expected.steps, strict=True):
        assert step.loss == pytest.approx(expected_step.loss, rel=1e-4)
        assert step.grad_norm == pytest.approx(expected_step.grad_norm, rel=1e-4)
    differences = adapter_differences(actual.adapter, expected.adapter)
    assert max(differences.values()) < 1e-4, differences

    # The comparison means something only if the loss fell and gradients were clipped.
    assert actual.steps[-1].loss < 0.99 * actual.steps[0].loss
    assert any(step.grad_norm > 1 for step in actual.steps)
    assert all(tensor.norm() > 0 for name, tensor in actual.adapter.items() if "lora_B" in name)


def test_another_learning_rate_is_detected(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", chat_rows(64))
    actual = train_with_lora_accel(comparison_config(tiny_model(), file, tmp_path / "run", learning_rate=1e-2))
    other_config = comparison_config(tiny_model(), file, tmp_path / "run", learning_rate=1.01e-2)
    expected = train_with_trainer(other_config, tmp_path / "trainer")
    assert actual.steps[0] == pytest.approx(expected.steps[0], rel=1e-5)  # warm-up: its learning rate is 0
    assert max(adapter_differences(actual.adapter, expected.adapter).values()) > 1e-3
    assert not torch.equal(*(next(iter(run.adapter.values())) for run in (actual, expected)))
