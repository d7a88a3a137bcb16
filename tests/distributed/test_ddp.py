"""Two real processes: the number of processes changes the speed and nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import Accelerator
from safetensors.torch import load_file

from lora_accel import run_training
from lora_accel.config.schema import RunConfig
from lora_accel.errors import ConfigError
from lora_accel.train import refuse_launch
from tests.conftest import ROOT, read_metrics

pytestmark = pytest.mark.distributed


def launch(config: Path, *overrides: str, preset: str = "cpu_ddp") -> subprocess.CompletedProcess[str]:
    """Run the training command under `accelerate launch` with a preset."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "accelerate_configs" / f"{preset}.yaml"),
    ]
    return subprocess.run(
        [
            sys.executable,
            *launcher,
            "--main_process_port",
            port,
            "-m",
            "lora_accel.train",
            "--config",
            config,
            *overrides,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        check=False,
    )


def numbers(folder: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in read_metrics(folder)]


def test_two_processes_make_the_same_steps_as_one(
    make_config: Callable[..., RunConfig], config_file: Callable[[RunConfig], Path], tmp_path: Path
) -> None:
    """Uneven lengths, a short last step, dropout 0.1, an odd number of micro-batches: an empty one among them."""
    training = {"micro_batch_tokens": 100, "learning_rate": 1e-3}
    config = make_config(output_dir=str(tmp_path / "one"), training=training, data={"eval_fraction": 0.2})
    run_training(config)
    ran = launch(config_file(config), f"output_dir={tmp_path / 'two'}")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("adapter: ") == 1, "only the main process tells"

    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert len(one) == 5
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    evaluations = [read_metrics(tmp_path / name, "eval")[-1] for name in ("one", "two")]
    assert evaluations[0]["eval_tokens"] == evaluations[1]["eval_tokens"]
    assert evaluations[1]["eval_loss"] == pytest.approx(evaluations[0]["eval_loss"], rel=1e-5)
    weights = load_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors")
    for name, expected in load_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors").items():
        assert (weights[name] - expected).norm() < 1e-4 * expected.norm(), name


def test_a_run_of_two_processes_goes_on_in_one(
    make_config: Callable[..., RunConfig], config_file: Callable[[RunConfig], Path], tmp_path: Path
) -> None:
    config = make_config(output_dir=str(tmp_path / "one"), training={"learning_rate": 1e-3})
    run_training(config)
    ran = launch(config_file(config), f"output_dir={tmp_path / 'both'}")
    assert ran.returncode == 0, ran.stderr
    subprocess.run(["rm", "-r", tmp_path / "both/checkpoints/step-00000006", tmp_path / "both/adapter"], check=True)
    run_training(RunConfig.model_validate(config.model_dump() | {"output_dir": str(tmp_path / "both")}))
    assert [line["step"] for line in read_metrics(tmp_path / "both", "event")] == [0, 4, 6]
    for expected, found in zip(numbers(tmp_path / "one"), numbers(tmp_path / "both"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_processes_that_do_not_see_each_other_are_stopped() -> None:
    alone = Accelerator(cpu=True)
    refuse_launch(alone, 1)
    with pytest.raises(ConfigError, match="started 2 processes, but this one sees 1"):
        refuse_launch(alone, 2)


def test_deepspeed_is_refused_by_name_until_it_is_proven(
    make_config: Callable[..., RunConfig], config_file: Callable[[RunConfig], Path], tmp_path: Path
) -> None:
    config = make_config()
    preset = tmp_path / "zero.yaml"
    preset.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_processes: 1\nnum_machines: 1\n"
        "machine_rank: 0\nuse_cpu: true\nmixed_precision: 'no'\ndeepspeed_config: {zero_stage: 2}\n"
    )
    ran = launch(config_file(config), preset=str(preset.with_suffix("")))
    assert ran.returncode != 0
    assert "DEEPSPEED, which is not supported yet" in ran.stderr
    assert not Path(config.output_dir).exists()
