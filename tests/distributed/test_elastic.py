"""Checkpoints are independent of the backend: a run resumes on any other, and on the same one bit for bit.

`-s` prints the table of docs/checkpoints.md. Without `--faults` only a sample of the matrix runs.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
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
    """Return a function that makes a run of 12 steps, two epochs, that keeps every checkpoint."""

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
"""Each backend once as origin and once as destination. Another test covers the diagonal bit for bit."""


@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param(NEIGHBORS, id="sample"),
        pytest.param(list(itertools.product(NAMES, NAMES)), id="all", marks=pytest.mark.slow),
    ],
)
def test_run_resumes_on_any_backend(
    make_runs: Callable[..., Runs], tmp_path: Path, pairs: list[tuple[str, str]]
) -> None:
    """Killed in step 5 on one backend, resumed on another, compared with an uninterrupted run on one process."""
    runs = make_runs()
    assert runs.train("cpu") == [0]
    metrics, adapter = read_metrics(runs.output), load_file(runs.output / "adapter" / "adapter_model.safetensors")
    differences: dict[tuple[str, str], float] = {}
    for origin in BACKENDS:
        shutil.rmtree(runs.output)
        runs.train(origin, LORA_ACCEL_FAULT="step.begin@5=kill")
        newest = runs.output / "checkpoints" / "step-00000004"
        numel = sum(tensor.numel() for tensor in load_file(newest / "adapter_model.safetensors").values())
        assert sum(file.stat().st_size for file in newest.iterdir()) <= 3.1 * 4 * numel + 100_000
        interrupted = tmp_path / f"interrupted-{origin}"
        shutil.copytree(runs.output, interrupted)
        for destination in (destination for start, destination in pairs if start == origin):
            shutil.rmtree(runs.output)
            shutil.copytree(interrupted, runs.output)
            assert set(runs.train(destination)) == {0}, runs.forks.log()
            assert f"resuming after step 4 from {runs.output}" in runs.forks.log()
            differences[origin, destination] = largest_difference(metrics, read_metrics(runs.output))
            state = load_file(runs.output / "adapter" / "adapter_model.safetensors")
            assert state.keys() == adapter.keys()
            for name, tensor in state.items():
                assert (tensor - adapter[name]).norm() <= 1e-4 * adapter[name].norm(), name

    print(f"\n| started under ↓, resumed under → | {' | '.join(BACKENDS.values())} |\n|{' --- |' * 6}")
    for origin, name in BACKENDS.items():
        row = (f"{differences.get((origin, destination), nan):.1e}" for destination in BACKENDS)
        print(f"| {name} | {' | '.join(row)} |")
    assert max(differences.values()) < 1e-5, differences


CASES = list(itertools.product(BACKENDS, ("no", "bf16"), (False, True)))
SAMPLE = [("cpu", "bf16", True), ("cpu_zero3", "bf16", True)]
"""test_kills.py and test_deepspeed.py resume on DDP and ZeRO-2 too."""


@pytest.mark.parametrize(
    ("preset", "precision", "checkpointing"),
    [pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.slow) for case in CASES],
)
def test_run_resumes_on_the_same_backend_bit_for_bit(
    make_runs: Callable[..., Runs], preset: str, precision: str, checkpointing: bool
) -> None:
    """Killed within an epoch, and between two."""
    runs = make_runs(mixed_precision=precision, activation_checkpointing=checkpointing)
    expected = runs.uninterrupted(preset)
    for steps_done in (3, 6):
        shutil.rmtree(runs.output, ignore_errors=True)
        runs.train(preset, LORA_ACCEL_FAULT=f"step.begin@{steps_done + 1}=kill")
        runs.check_resumed(expected, preset)
        assert f"resuming after step {steps_done} from" in runs.forks.log()


@pytest.mark.parametrize("destination", ["cpu_zero2", pytest.param("cpu_zero3", marks=pytest.mark.slow)])
def test_initial_values_are_subtracted_unchanged_by_the_next_backend(
    forks: Forks, make_config: Callable[..., RunConfig], tmp_path: Path, destination: str
) -> None:
    """PiSSA in bf16: DeepSpeed keeps what is frozen in bf16, and what is trained in float32."""
    config = make_config(
        adapter={"init_lora_weights": "pissa", "target_modules": ["q_proj"], "dropout": 0.0},
        training={"max_steps": 4, "mixed_precision": "bf16"},
        checkpoint={"every_steps": 1, "keep_last": 9},
    )
    runs = Runs(forks, config, tmp_path)
    runs.train("cpu_ddp", LORA_ACCEL_FAULT="step.begin@3=kill")
    before, after = runs.output / "checkpoints" / "step-00000002", runs.output / "adapter"
    first = load_file(before / "adapter_model.safetensors")
    assert set(runs.train(destination)) == {0}, forks.log()
    for name, tensor in load_file(after / "adapter_model.safetensors").items():
        trained, subtracted = tensor.chunk(2, dim=0 if "lora_A" in name else 1)
        trained_before, subtracted_before = first[name].chunk(2, dim=0 if "lora_A" in name else 1)
        assert torch.equal(subtracted, subtracted_before), name
        assert not torch.equal(trained, trained_before), name
