"""A checkpoint knows no topology: begun on any backend, a run goes on under any other; under its own, bit for bit.

With `-s` the table of docs/checkpoints.md is printed. The ordinary run holds a sample; `--faults` runs all cells.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lora_accel.config.schema import RunConfig
from tests.conftest import chat_rows, read_metrics, write_jsonl
from tests.distributed.disturbed import Runs
from tests.distributed.forked import Forks

pytestmark = pytest.mark.distributed

BACKENDS = {"cpu": "1 process", "cpu_ddp": "DDP x 2", "zero1": "ZeRO-1 x 2", "cpu_zero2": "ZeRO-2 x 2"}
BACKENDS |= {"cpu_zero3": "ZeRO-3 x 2"}


@pytest.fixture
def make_runs(forks: Forks, make_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., Runs]:
    """A run of twelve steps, two epochs, that keeps each checkpoint; with dropout, and biases in a second group."""

    def make(**changes: Any) -> Runs:
        rows = write_jsonl(tmp_path / "rows.jsonl", chat_rows(21))
        training = {"epochs": 2, "learning_rate": 1e-3, "micro_batch_tokens": 150, "weight_decay": 0.1}
        config = make_config(
            data={"train": [{"path": str(rows)}]},
            training=training | changes,
            checkpoint={"every_steps": 1, "keep_last": 20},
        )
        return Runs(forks, config, tmp_path)

    return make


def largest_difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """Return the largest relative difference of a loss or a gradient norm."""
    return max(
        abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(one, other, strict=True) for key in ("loss", "grad_norm")
    )


NAMES = list(BACKENDS)
NEIGHBORS = [(origin, NAMES[(number + 2) % len(NAMES)]) for number, origin in enumerate(NAMES)]
"""Each backend once as the origin and once as the destination; the diagonal is the other test, bit for bit."""


@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param(NEIGHBORS, id="sample"),
        pytest.param(list(itertools.product(NAMES, NAMES)), id="all", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_under_any_backend(
    make_runs: Callable[..., Runs], tmp_path: Path, pairs: list[tuple[str, str]]
) -> None:
    """Killed in the fifth step under one, on under the other, against one process straight through."""
    runs = make_runs()
    runs.straight("cpu")
    assert runs.train("cpu") == [0]
    straight, adapter = read_metrics(runs.output), load_file(runs.output / "adapter" / "adapter_model.safetensors")
    found: dict[tuple[str, str], float] = {}
    for origin in BACKENDS:
        shutil.rmtree(runs.output)
        runs.train(origin, LORA_ACCEL_FAULT="step.begin@5=kill")
        newest = runs.output / "checkpoints" / "step-00000004"
        values = sum(tensor.numel() for tensor in load_file(newest / "adapter_model.safetensors").values())
        assert sum(file.stat().st_size for file in newest.iterdir()) <= 3.1 * 4 * values + 100_000
        begun = tmp_path / f"begun-{origin}"
        shutil.copytree(runs.output, begun)
        for destination in (destination for start, destination in pairs if start == origin):
            shutil.rmtree(runs.output)
            shutil.copytree(begun, runs.output)
            assert set(runs.train(destination)) == {0}, runs.forks.log()
            assert f"resuming after step 4 from {runs.output}" in runs.forks.log()
            found[origin, destination] = largest_difference(straight, read_metrics(runs.output))
            state = load_file(runs.output / "adapter" / "adapter_model.safetensors")
            assert state.keys() == adapter.keys()
            for name, tensor in state.items():
                assert (tensor - adapter[name]).norm() <= 1e-4 * adapter[name].norm(), name

    print(f"\n| begun under ↓, on under → | {' | '.join(BACKENDS.values())} |\n|{' --- |' * 6}")
    for origin, name in BACKENDS.items():
        print(f"| {name} | {' | '.join(f'{found.get((origin, destination), nan):.1e}' for destination in BACKENDS)} |")
    worst = max(found.values())
    assert worst < 1e-5, found


CASES = list(itertools.product(BACKENDS, ("no", "bf16"), (False, True)))
SAMPLE = [("cpu", "bf16", True), ("cpu_ddp", "no", False), ("cpu_zero2", "bf16", False), ("cpu_zero3", "bf16", True)]


@pytest.mark.parametrize(
    ("preset", "precision", "checkpointing"),
    [pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.slow) for case in CASES],
)
def test_under_its_own_backend_it_goes_on_bit_for_bit(
    make_runs: Callable[..., Runs], preset: str, precision: str, checkpointing: bool
) -> None:
    """Killed within an epoch, and between two."""
    runs = make_runs(mixed_precision=precision, activation_checkpointing=checkpointing)
    straight = runs.straight(preset)
    for steps_done in (3, 6):
        shutil.rmtree(runs.output, ignore_errors=True)
        runs.train(preset, LORA_ACCEL_FAULT=f"step.begin@{steps_done + 1}=kill")
        runs.resumes_to(straight, preset)
        assert f"resuming after step {steps_done} from" in runs.forks.log()
