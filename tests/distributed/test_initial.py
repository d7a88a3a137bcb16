"""A run that begins with an adapter has the same losses on one process and on two under each backend."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_accel import RunConfig, run_training
from lora_accel.saving.discovery import WEIGHTS
from tests.conftest import read_metrics
from tests.distributed.forked import Forks

pytestmark = pytest.mark.distributed


@pytest.mark.sample(1)
@pytest.mark.parametrize("preset", ["cpu_zero3", "cpu_zero2", "cpu_ddp"])
def test_two_processes_begin_with_the_adapter(
    forks: Forks, make_config: Callable[..., RunConfig], tiny_model: Callable[..., Path], tmp_path: Path, preset: str
) -> None:
    """Biases of the base are part of the adapter: under ZeRO-3 they are sharded when they are written."""
    model, training = {"name_or_path": str(tiny_model("qwen2"))}, {"max_steps": 2}
    adapter = {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": "all-linear", "bias": "all"}
    first = make_config(output_dir=str(tmp_path / "first"), model=model, adapter=adapter, training=training)
    run_training(first)
    values = first.model_dump(exclude_unset=True)
    values["adapter"] = {"dropout": 0.1, "init_from": str(tmp_path / "first" / "adapter")}
    run_training(RunConfig.model_validate(values | {"output_dir": str(tmp_path / "one")}))
    config = tmp_path / "two.yaml"
    config.write_text(json.dumps(values | {"output_dir": str(tmp_path / "two")}), encoding="utf-8")
    result = forks.launch("-m", "lora_accel.train", "--config", config, preset=preset)
    assert result.returncode == 0, result.stderr[-4000:]
    one, two = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)
    assert one[0] != pytest.approx(read_metrics(tmp_path / "first")[0]["loss"], rel=1e-2), "not a new adapter"
    tensors, expected = (load_file(tmp_path / name / "adapter" / WEIGHTS) for name in ("two", "one"))
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
