"""float16 on every backend: the same loss scale, saved in checkpoints and restored exactly."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_accel.config.schema import RunConfig
from tests.conftest import chat_rows, read_metrics, write_jsonl
from tests.distributed.disturbed import Runs
from tests.distributed.forked import Forks

pytestmark = pytest.mark.distributed

BACKENDS = ("cpu", "cpu_ddp", "cpu_zero2", "cpu_zero3")
OVERFLOWS = {"OVERFLOW_STEPS": "6,7,15"}
"""Steps whose gradients overflow float16 on every backend."""


@pytest.fixture
def fp16_runs(forks: Forks, make_config: Callable[..., RunConfig], tmp_path: Path) -> Runs:
    """Return a run of 20 steps of a tiny llama in float16, with dropout."""
    rows = write_jsonl(tmp_path / "rows.jsonl", chat_rows(24))
    config = make_config(
        data={"train": [{"path": str(rows)}]},
        training={"mixed_precision": "fp16", "max_steps": 20, "learning_rate": 1e-3, "micro_batch_tokens": 150},
        checkpoint={"every_steps": 5, "keep_last": 20},
    )
    return Runs(forks, config, tmp_path)


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(folder)}


def overflows(folder: Path) -> list[tuple[int, float]]:
    events = read_metrics(folder, "event")
    return [(line["step"], line["loss_scale"]) for line in events if line["event"] == "overflow"]


def state_after(folder: Path, step: int) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())
    return state


def test_losses_and_scales_match_on_every_backend(fp16_runs: Runs) -> None:
    """Losses match one process; overflows are skipped at the same steps and result in the same scale."""
    runs, results = fp16_runs, {}
    for preset in BACKENDS:
        shutil.rmtree(runs.output, ignore_errors=True)
        assert set(runs.train(preset, SABOTAGE="overflows", **OVERFLOWS)) == {0}, runs.forks.log()
        results[preset] = losses(runs.output)
        steps = [step for step, _ in overflows(runs.output)]
        assert [step for step in steps if step in (6, 7, 15)] == [6, 7, 15]
        state = state_after(runs.output, 20)
        assert state["overflowed"] == len(steps)
        assert state["skipped"] == 0
        assert state["loss_scale"]["value"] == 2.0 ** (16 - len(steps))
        assert state["loss_scale"]["good_steps"] == 5
        assert all(math.isfinite(loss) for loss in results[preset].values())
    table = {preset: max(abs(results[preset][s] - results["cpu"][s]) for s in results["cpu"]) for preset in BACKENDS}
    print(f"\nlargest difference of a loss from one process: {table}; overflows {overflows(runs.output)}")
    for preset in BACKENDS[1:]:
        assert results[preset].keys() == results["cpu"].keys()
        assert table[preset] <= 1e-3, table


@pytest.mark.sample(1)
@pytest.mark.parametrize("preset", BACKENDS)
def test_killed_run_resumes_bit_for_bit(fp16_runs: Runs, preset: str) -> None:
    runs = fp16_runs
    expected = runs.uninterrupted(preset)
    runs.train(preset, LORA_ACCEL_FAULT="step.begin@12=kill")
    runs.check_resumed(expected, preset)
    assert [line["step"] for line in read_metrics(runs.output, "event") if line["event"] == "resume"] == [10]


@pytest.mark.parametrize(
    "circle", [("cpu", "cpu_zero3"), pytest.param(BACKENDS, marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_resumed_on_another_backend(fp16_runs: Runs, tmp_path: Path, circle: tuple[str, ...]) -> None:
    """Through backends in a circle: each resumes from the checkpoint, and the scale, of the previous one."""
    runs = fp16_runs
    assert runs.train("cpu") == [0]
    expected = losses(runs.output)
    for origin, destination in zip(circle, (*circle[1:], circle[0]), strict=True):
        shutil.rmtree(runs.output)
        runs.train(origin, LORA_ACCEL_FAULT="step.begin@12=kill")
        before = state_after(runs.output, 10)["loss_scale"]
        assert set(runs.train(destination)) == {0}, runs.forks.log()
        resumed = losses(runs.output)
        after = state_after(runs.output, 15)["loss_scale"]
        assert after["value"] * 2 ** (sum(10 < step <= 15 for step, _ in overflows(runs.output))) == before["value"]
        worst = max(abs(resumed[step] - expected[step]) for step in expected.keys() & resumed.keys())
        print(f"{origin} -> {destination}: largest difference of a loss {worst:.1e}")
        assert worst <= 1e-3
