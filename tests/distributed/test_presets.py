"""Every file of accelerate_configs/ that a machine without a GPU can start is started, and leaves an adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from lora_accel.config.schema import RunConfig
from tests.conftest import read_metrics
from tests.distributed.forked import Forks
from tests.distributed.launching import PRESETS, TRAIN, finish, free_port, launch, start

pytestmark = pytest.mark.distributed

ELSEWHERE = {"cpu", "cpu_ddp", "cpu_zero2", "cpu_zero3", "zero1", "multi_node_zero3"}
"""Started by the other tests here."""
NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))


@pytest.fixture
def config(make_config: Callable[..., RunConfig]) -> RunConfig:
    """Two steps."""
    return make_config(training={"max_steps": 2, "warmup_steps": 0, "learning_rate": 1e-3})


def loss_of_a_good_run(config: RunConfig) -> float:
    """Return the loss of the last step, once the adapter is found whole."""
    adapter = load_file(Path(config.output_dir) / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 28
    assert all(tensor.numel() and tensor.abs().max() > 0 for tensor in adapter.values())
    return float(read_metrics(Path(config.output_dir))[-1]["loss"])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ELSEWHERE])
def test_a_preset_trains(config: RunConfig, config_file: Callable[[RunConfig], Path], name: str) -> None:
    processes = "1" if name == "single_gpu" else "2"
    ran = launch("--num_processes", processes, *TRAIN, config_file(config), preset=name)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert 5 < loss_of_a_good_run(config) < 6


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_deepspeed_file_follows_the_run_config(
    config: RunConfig, config_file: Callable[[RunConfig], Path], name: str
) -> None:
    """Started as `accelerate launch --use_deepspeed` does, without a YAML of its own."""
    file = PRESETS / "deepspeed" / f"{name}.json"
    options = ("--use_deepspeed", "--num_processes", "2", "--deepspeed_config_file", file, "--mixed_precision", "bf16")
    ran = launch(*options, *TRAIN, config_file(config), "training.max_grad_norm=0.5", preset="cpu")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert 5 < loss_of_a_good_run(config) < 6


def test_a_deepspeed_file_that_disagrees_is_refused(
    config: RunConfig, config_file: Callable[[RunConfig], Path], tmp_path: Path
) -> None:
    text = (PRESETS / "deepspeed" / "zero2.json").read_text(encoding="utf-8")
    text = text.replace('"gradient_clipping": "auto"', '"gradient_clipping": 0.3')
    file = tmp_path / "mine.json"
    file.write_text(text.replace('"gradient_accumulation_steps": "auto"', '"gradient_accumulation_steps": 8'))
    options = ("--use_deepspeed", "--num_processes", "2", "--deepspeed_config_file", file)
    ran = launch(*options, *TRAIN, config_file(config), preset="cpu")
    assert ran.returncode != 0
    assert f"error: {file}: gradient_accumulation_steps is 8" in ran.stderr
    assert f"{file}: gradient_clipping is 0.3, but training.max_grad_norm is 1.0" in ran.stderr
    assert not Path(config.output_dir).exists()


def test_two_machines_make_one_run(
    forks: Forks, config: RunConfig, config_file: Callable[[RunConfig], Path], tmp_path: Path
) -> None:
    """Two launchers on loopback, ZeRO-3: one run, one adapter, the losses of two processes of one machine."""
    file, port = config_file(config), free_port()
    ran = forks.launch(*TRAIN, file, f"output_dir={tmp_path / 'near'}", preset="cpu_zero3")
    assert ran.returncode == 0, ran.stderr[-3000:]
    words = ["--num_machines", "2", "--num_processes", "2", "--mixed_precision", "no", "--main_process_ip", "127.0.0.1"]
    words += ["--main_process_port", port]
    machines = [start(*words, "--machine_rank", rank, *TRAIN, file, preset="multi_node_zero3") for rank in ("0", "1")]
    done = [finish(machine) for machine in machines]
    assert [machine.returncode for machine in done] == [0, 0], done[0].stderr[-3000:] + done[1].stderr[-3000:]
    assert [machine.stdout.count("adapter: ") for machine in done] == [1, 0]
    loss_of_a_good_run(config)
    near, far = (read_metrics(folder) for folder in (tmp_path / "near", Path(config.output_dir)))
    assert [line["loss"] for line in far] == [line["loss"] for line in near]


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_says_what_it_is_for(name: str) -> None:
    text = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    keys = yaml.safe_load(text)
    assert {
        "compute_environment",
        "distributed_type",
        "num_machines",
        "num_processes",
    } <= keys.keys()
    assert "mixed_precision" not in keys, "the device decides"
