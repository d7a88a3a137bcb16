"""float16 on every backend: one loss scale with one rule, part of each checkpoint, and exact when a run resumes."""

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
OVERFLOWS = {"OVERFLOW_STEPS": "6,7,30"}
"""Steps whose loss is multiplied out of float16's range in backward: the scale is too large there, on every backend."""


@pytest.fixture
def fp16_runs(forks: Forks, make_config: Callable[..., RunConfig], tmp_path: Path) -> Runs:
    """40 steps of a tiny llama in float16, dropout included."""
    rows = write_jsonl(tmp_path / "rows.jsonl", chat_rows(24))
    config = make_config(
        data={"train": [{"path": str(rows)}]},
        training={"mixed_precision": "fp16", "max_steps": 40, "learning_rate": 1e-3, "micro_batch_tokens": 150},
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


def test_forty_steps_on_every_backend(fp16_runs: Runs) -> None:
    """Losses agree with one process, overflows are skipped at the same steps and leave the same scale."""
    runs, found = fp16_runs, {}
    for preset in BACKENDS:
        shutil.rmtree(runs.output, ignore_errors=True)
        assert set(runs.train(preset, SABOTAGE="overflows", **OVERFLOWS)) == {0}, runs.forks.log()
        found[preset] = losses(runs.output)
        first = [step for step, _ in overflows(runs.output)]
        assert [step for step in first if step in (6, 7, 30)] == [6, 7, 30]
        state = state_after(runs.output, 40)
        assert state["overflowed"] == len(first)
        assert state["skipped"] == 0
        assert state["loss_scale"]["value"] == 2.0 ** (16 - len(first))
        assert state["loss_scale"]["good_steps"] == 10
        assert all(math.isfinite(loss) for loss in found[preset].values())
    table = {preset: max(abs(found[preset][s] - found["cpu"][s]) for s in found["cpu"]) for preset in BACKENDS}
    print(f"\nlargest difference of a loss from one process: {table}; overflows {overflows(runs.output)}")
    for preset in BACKENDS[1:]:
        assert found[preset].keys() == found["cpu"].keys()
        assert table[preset] <= 1e-3, table


@pytest.mark.parametrize("preset", BACKENDS)
def test_killed_and_resumed_bit_for_bit(fp16_runs: Runs, preset: str) -> None:
    runs = fp16_runs
    straight = runs.straight(preset)
    runs.train(preset, LORA_ACCEL_FAULT="step.begin@24=kill")
    runs.resumes_to(straight, preset)
    assert [line["step"] for line in read_metrics(runs.output, "event") if line["event"] == "resume"] == [20]


def test_resumed_on_another_backend(fp16_runs: Runs, tmp_path: Path) -> None:
    """One loop through all backends: each takes over the checkpoint, and the scale, of the one before."""
    runs = fp16_runs
    runs.straight("cpu")
    assert runs.train("cpu") == [0]
    straight = losses(runs.output)
    for origin, destination in zip(BACKENDS, (*BACKENDS[1:], BACKENDS[0]), strict=True):
        shutil.rmtree(runs.output)
        runs.train(origin, LORA_ACCEL_FAULT="step.begin@24=kill")
        before = state_after(runs.output, 20)["loss_scale"]
        assert set(runs.train(destination)) == {0}, runs.forks.log()
        resumed = losses(runs.output)
        after = state_after(runs.output, 25)["loss_scale"]
        assert after["value"] * 2 ** (sum(20 < step <= 25 for step, _ in overflows(runs.output))) == before["value"]
        worst = max(abs(resumed[step] - straight[step]) for step in straight.keys() & resumed.keys())
        print(f"{origin} -> {destination}: largest difference of a loss {worst:.1e}")
        assert worst <= 1e-3
