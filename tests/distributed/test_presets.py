"""Every file of accelerate_configs/ that runs without a GPU trains an adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from lora_accel.config.schema import RunConfig
from tests.conftest import read_metrics
from tests.distributed.forked import Forks
from tests.distributed.launching import PRESETS, TRAIN, finish, free_port, start

pytestmark = pytest.mark.distributed

TESTED_ELSEWHERE = {"cpu", "cpu_ddp", "cpu_zero2", "cpu_zero3", "zero1", "multi_node_zero3"}
"""Covered by other tests."""
NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))


@pytest.fixture
def config(make_config: Callable[..., RunConfig]) -> RunConfig:
    """Return a run of two steps."""
    return make_config(training={"max_steps": 2, "warmup_steps": 0, "learning_rate": 1e-3})


def last_loss(config: RunConfig) -> float:
    """Check that the adapter is complete, and return the loss of the last step."""
    adapter = load_file(Path(config.output_dir) / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 28
    assert all(tensor.numel() and tensor.abs().max() > 0 for tensor in adapter.values())
    return float(read_metrics(Path(config.output_dir))[-1]["loss"])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TESTED_ELSEWHERE])
def test_preset_trains(forks: Forks, config: RunConfig, config_file: Callable[[RunConfig], Path], name: str) -> None:
    processes = "1" if name == "single_gpu" else "2"
    result = forks.launch("--num_processes", processes, *TRAIN, config_file(config), preset=name)
    assert result.returncode == 0, result.stderr[-3000:]
    assert 5 < last_loss(config) < 6


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed_config_file_follows_the_run_config(
    forks: Forks, config: RunConfig, config_file: Callable[[RunConfig], Path], name: str
) -> None:
    """With `accelerate launch --use_deepspeed` instead of a YAML file."""
    file = PRESETS / "deepspeed" / f"{name}.json"
    options = ("--use_deepspeed", "--num_processes", "2", "--deepspeed_config_file", file, "--mixed_precision", "bf16")
    result = forks.launch(*options, *TRAIN, config_file(config), "training.max_grad_norm=0.5", preset="cpu")
    assert result.returncode == 0, result.stderr[-3000:]
    assert 5 < last_loss(config) < 6


def test_conflicting_deepspeed_config_file_raises(
    forks: Forks, config: RunConfig, config_file: Callable[[RunConfig], Path], tmp_path: Path
) -> None:
    text = (PRESETS / "deepspeed" / "zero2.json").read_text(encoding="utf-8")
    text = text.replace('"gradient_clipping": "auto"', '"gradient_clipping": 0.3')
    file = tmp_path / "mine.json"
    file.write_text(text.replace('"gradient_accumulation_steps": "auto"', '"gradient_accumulation_steps": 8'))
    options = ("--use_deepspeed", "--num_processes", "2", "--deepspeed_config_file", file)
    result = forks.launch(*options, *TRAIN, config_file(config), preset="cpu")
    assert result.returncode != 0
    assert f"error: {file}: gradient_accumulation_steps is 8" in result.stderr
    assert f"{file}: gradient_clipping is 0.3, but training.max_grad_norm is 1.0" in result.stderr
    assert not Path(config.output_dir).exists()


def test_two_machines_train_together(
    forks: Forks, config: RunConfig, config_file: Callable[[RunConfig], Path], tmp_path: Path
) -> None:
    """Two launchers on loopback with ZeRO-3: one adapter, and the losses of two processes on one machine."""
    file, port = config_file(config), free_port()
    result = forks.launch(*TRAIN, file, f"output_dir={tmp_path / 'one-machine'}", preset="cpu_zero3")
    assert result.returncode == 0, result.stderr[-3000:]
    options = [
        "--num_machines",
        "2",
        "--num_processes",
        "2",
        "--mixed_precision",
        "no",
        "--main_process_ip",
        "127.0.0.1",
    ]
    options += ["--main_process_port", port]
    preset = tmp_path / "machines.yaml"
    text = (PRESETS / "multi_node_zero3.yaml").read_text(encoding="utf-8")
    preset.write_text(text.replace("use_cpu: false", "use_cpu: true"), encoding="utf-8")
    name = str(preset.with_suffix(""))
    machines = [start(*options, "--machine_rank", rank, *TRAIN, file, preset=name) for rank in ("0", "1")]
    results = [finish(machine) for machine in machines]
    assert [result.returncode for result in results] == [0, 0], "".join(result.stderr[-3000:] for result in results)
    assert [result.stdout.count("adapter: ") for result in results] == [1, 0]
    last_loss(config)
    single, multi = (read_metrics(folder) for folder in (tmp_path / "one-machine", Path(config.output_dir)))
    assert [line["loss"] for line in multi] == [line["loss"] for line in single]


@pytest.mark.parametrize("name", NAMES)
def test_preset_starts_with_a_comment_and_has_the_required_keys(name: str) -> None:
    text = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    keys = yaml.safe_load(text)
    assert {"compute_environment", "distributed_type", "num_machines", "num_processes"} <= keys.keys()
    assert "mixed_precision" not in keys, "the device determines it"
