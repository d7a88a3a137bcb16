"""Launchers other than `accelerate launch`, and DeepSpeed JSONs that other trainers publish, really run."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_accel.config.schema import RunConfig
from tests.config.test_deepspeed_json import FILES
from tests.conftest import PATIENCE_SECONDS, read_metrics
from tests.distributed.forked import Forks, build_ops
from tests.distributed.launching import TRAIN, _environment, free_port

pytestmark = pytest.mark.distributed


@pytest.fixture
def config(make_config: Callable[..., RunConfig]) -> RunConfig:
    """Return a run of two steps."""
    return make_config(training={"max_steps": 2, "warmup_steps": 0, "learning_rate": 1e-3})


def test_deepspeed_launcher_with_a_json_of_transformers(
    config: RunConfig, config_file: Callable[[RunConfig], Path], tmp_path: Path
) -> None:
    """It passes --local_rank. The JSON has an optimizer and a scheduler, and sizes that are auto."""
    build_ops()
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(FILES["transformers zero3"]), encoding="utf-8")
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    options = [f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={free_port()}", "--module"]
    command = ["-m", "deepspeed.launcher.launch", *options, "lora_accel.train", "--deepspeed", str(file)]
    environment = {name: value for name, value in _environment().items() if not name.startswith("ACCELERATE")}
    result = subprocess.run(
        [sys.executable, *command, "--config", str(config_file(config))],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    table = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if line.count("│") == 4}
    assert [cell.strip() for cell in table["processes"].split("│")[2:4]] == ["2", "deepspeed"]
    assert "DeepSpeed ZeRO-3" in table["backend"]
    assert "run config" in table["optimizer"]
    assert 5 < read_metrics(Path(config.output_dir))[-1]["loss"] < 6


def test_json_of_fastchat_with_offload(
    forks: Forks, config: RunConfig, config_file: Callable[[RunConfig], Path], tmp_path: Path
) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(FILES["fastchat s2"]), encoding="utf-8")
    options = ("--use_deepspeed", "--num_processes", "2", "--deepspeed_config_file", file)
    result = forks.launch(*options, *TRAIN, config_file(config), preset="cpu")
    assert result.returncode == 0, result.stderr[-3000:]
    assert 5 < read_metrics(Path(config.output_dir))[-1]["loss"] < 6


@pytest.mark.parametrize("option", ["--local_rank=0", "--local-rank=0"])
def test_local_rank_is_accepted(
    forks: Forks, config: RunConfig, config_file: Callable[[RunConfig], Path], option: str
) -> None:
    (process,) = forks.start("cpu", [option, "--config", str(config_file(config)), "training.max_steps=1"])
    assert forks.finish([process]) == [0], forks.log([process])
    assert os.path.isdir(Path(config.output_dir) / "adapter")
