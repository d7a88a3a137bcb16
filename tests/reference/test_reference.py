"""Compare losses with stored ones: a refactor must not change them.

If a change is supposed to change them, write the file again and give the reason in the commit:

    python -m pytest tests/reference --write-reference
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from scripts.compare_losses import LossFileError, read_losses, worst_step

from lora_accel import RunConfig, run_training
from tests.conftest import ROOT

REFERENCE = Path(__file__).parent / "tiny_llama_float32.txt"
HEAD = """\
# Loss (mean per supervised token) of 12 steps of tests/conftest.py's tiny llama: float32, dropout 0.1, one process.
# Written by: python -m pytest tests/reference --write-reference
"""
RELATIVE_TOLERANCE = 1e-6  # another CPU, or another number of threads, sums in another order


def test_losses_match_the_reference(make_config: Callable[..., RunConfig], request: pytest.FixtureRequest) -> None:
    config = make_config(
        model={"dtype": "float32"},
        training={
            "epochs": 2,
            "warmup_steps": 2,
            "warmup_from_zero": True,
            "learning_rate": 5e-3,
            "mixed_precision": "no",
        },
    )
    metrics = run_training(config).parent / "metrics.jsonl"
    losses = read_losses(metrics)
    assert list(losses) == list(range(1, 13))
    if request.config.getoption("--write-reference"):
        text = HEAD + "".join(f"{step} {loss!r}\n" for step, loss in losses.items())
        REFERENCE.write_text(text, encoding="utf-8")
        pytest.skip(f"wrote {REFERENCE.name}")
    step, difference = worst_step(read_losses(REFERENCE), losses)
    assert difference <= RELATIVE_TOLERANCE, f"step {step} differs by {difference:.2e}; see scripts/compare_losses.py"


def test_the_reference_loss_falls() -> None:
    losses = read_losses(REFERENCE)
    assert list(losses) == list(range(1, 13))
    assert losses[12] < 0.98 * losses[1]


def compare(old: Path, new: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts" / "compare_losses.py", old, new]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def write_losses(path: Path, losses: list[float]) -> Path:
    path.write_text("".join(f"{step} {loss!r}\n" for step, loss in enumerate(losses, start=1)))
    return path


def write_metrics(path: Path, losses: list[float]) -> Path:
    events: list[dict[str, object]] = [{"kind": "event", "event": "start", "step": 0}]
    events += [{"kind": "train", "step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    events += [{"kind": "eval", "step": 2, "eval_loss": 9.0}]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def test_compare_losses_of_equal_losses_in_both_formats(tmp_path: Path) -> None:
    result = compare(write_losses(tmp_path / "a.txt", [0.1, 1 / 3]), write_metrics(tmp_path / "b.jsonl", [0.1, 1 / 3]))
    assert (result.returncode, result.stdout) == (0, "identical: 2 steps\n")


def test_compare_losses_names_the_step_that_differs_most(tmp_path: Path) -> None:
    old = write_losses(tmp_path / "old.txt", [4.0, 2.0, 1.0])
    result = compare(old, write_metrics(tmp_path / "new.jsonl", [4.0, 2.5, 1.0000001]))
    assert result.returncode == 1
    assert "3 steps, most at step 2: 2.0 -> 2.5 (relative 2.50e-01)" in result.stdout


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("1 0.5\n2 0.4\n", "1 0.5\n", "such as step 2"),
        ("1 0.5\n1 0.5\n", "1 0.5\n", "step 1 occurs twice"),
        ("1 0.5 0.6\n", "1 0.5\n", "line 1: neither"),
        ("# nothing\n", "1 0.5\n", "contains no loss"),
    ],
)
def test_compare_losses_rejects_files_that_cannot_be_compared(tmp_path: Path, old: str, new: str, reason: str) -> None:
    (tmp_path / "old").write_text(old)
    (tmp_path / "new").write_text(new)
    result = compare(tmp_path / "old", tmp_path / "new")
    assert result.returncode == 2
    assert reason in result.stderr
    assert "Traceback" not in result.stderr


def test_nan_equals_nothing(tmp_path: Path) -> None:
    old, new = (write_losses(tmp_path / name, [1.0, float("nan")]) for name in ("old", "new"))
    assert worst_step(read_losses(old), read_losses(new)) == (2, float("inf"))
    with pytest.raises(LossFileError, match="cannot be read"):
        read_losses(tmp_path / "absent")
