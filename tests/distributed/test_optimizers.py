"""Optimizers, rates and noise under DDP and ZeRO: the losses of one process, and exact resumes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_accel import run_training
from lora_accel.config.optimizers import OPTIMIZERS
from lora_accel.config.schema import RunConfig
from tests.conftest import read_metrics
from tests.distributed.disturbed import Runs
from tests.distributed.forked import Forks
from tests.training.test_every_optimizer import KNOBS, KNOBS_OF_ADAPTER

pytestmark = pytest.mark.distributed


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in read_metrics(folder)]


def check_against_one_process(runs: Runs, config: RunConfig, preset: str, folder: Path, rel: float) -> None:
    """Compare with one process, then resume after step 2, bit for bit."""
    alone = RunConfig.model_validate(config.model_dump() | {"output_dir": str(folder)})
    run_training(alone)
    expected = runs.uninterrupted(preset)
    for one, several in zip(losses(folder), expected.lines, strict=True):
        assert (float.fromhex(several[1]), float.fromhex(several[2])) == pytest.approx(one, rel=rel)
    shutil.rmtree(runs.output, ignore_errors=True)
    runs.kill_and_resume(preset, "step.begin", 3)
    assert f"resuming after step 2 from {runs.output}" in runs.forks.log()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["cpu_ddp", "zero1", "cpu_zero2", "cpu_zero3"])
def test_all_knobs_at_once(forks: Forks, make_config: Callable[..., RunConfig], tmp_path: Path, preset: str) -> None:
    config = make_config(adapter=KNOBS_OF_ADAPTER, training=KNOBS, checkpoint={"every_steps": 1, "keep_last": 9})
    check_against_one_process(Runs(forks, config, tmp_path), config, preset, tmp_path / "alone", rel=1e-5)


CASES = [("cpu_ddp", name) for name in OPTIMIZERS if name != "adamw"]
CASES += [(p, name) for p in ("cpu_zero2", "cpu_zero3") for name in OPTIMIZERS if not OPTIMIZERS[name].zero_problem]
SAMPLE = [("cpu_ddp", "adamw_8bit"), ("cpu_zero2", "lion")]


@pytest.mark.parametrize(
    ("preset", "optimizer"),
    [pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.slow) for case in CASES],
)
def test_every_optimizer(
    forks: Forks, make_config: Callable[..., RunConfig], tmp_path: Path, preset: str, optimizer: str
) -> None:
    """Rounding of the gradient's sum may change a sign (lion), a code (8 bits), or a bfloat16 matrix (muon)."""
    training: dict[str, Any] = {"optimizer": optimizer, "max_steps": 4, "learning_rate": 1e-3}
    config = make_config(
        adapter={"r": 128, "target_modules": ["q_proj", "v_proj"]},
        training=training | {"scheduler": "cosine_with_min", "weight_decay": 0.1},
        checkpoint={"every_steps": 1, "keep_last": 9},
    )
    check_against_one_process(Runs(forks, config, tmp_path), config, preset, tmp_path / "alone", rel=1e-4)


def test_betas_reach_the_optimizer_of_deepspeed(
    forks: Forks, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """With offload, DeepSpeed replaces the optimizer by its own."""
    options = {"optimizer_options": {"betas": [0.5, 0.7], "eps": 1e-3}, "learning_rate": 1e-2, "max_steps": 4}
    config = make_config(output_dir=str(tmp_path / "one"), training=options)
    run_training(config)
    offloaded = RunConfig.model_validate(config.model_dump() | {"output_dir": str(tmp_path / "two")})
    runs = Runs(forks, offloaded, tmp_path)
    result = forks.launch(
        "--num_processes", "2", "--mixed_precision", "no", "-m", "lora_accel.train", *runs.args, preset="zero2_offload"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-5)
