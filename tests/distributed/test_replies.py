"""Replies to prompts in the precision of training, on every backend; a failed reply does not stop the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_accel.config.files import config_to_yaml
from lora_accel.config.schema import RunConfig
from tests.conftest import read_metrics
from tests.distributed.forked import Forks

pytestmark = pytest.mark.distributed

BACKENDS = ("cpu", "cpu_ddp", "cpu_zero2", "cpu_zero3", "cpu 4-bit", "cpu_ddp 4-bit", "cpu_zero2 4-bit")
CASES = [(backend, precision) for precision in ("no", "bf16", "fp16") for backend in BACKENDS]
PROMPTS = ["repeat alpha", "repeat bravo and more than that"]


@pytest.mark.sample(10)
@pytest.mark.parametrize(("backend", "precision"), CASES)
def test_replies_during_training(
    forks: Forks,
    make_config: Callable[..., RunConfig],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    backend: str,
    precision: str,
) -> None:
    preset, *bits = backend.split()
    config = make_config(
        evaluation={"prompts": PROMPTS, "max_new_tokens": 3, "every_steps": 1},
        training={"max_steps": 2, "mixed_precision": precision},
        quantization={"bits": 4 if bits else None},
    )
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config), encoding="utf-8")
    assert set(forks.run(preset, ["--config", str(file)])) == {0}, forks.log()
    folder = Path(config.output_dir)
    events = read_metrics(folder, "event")
    assert [line["prompt"] for line in events if line["event"] == "reply"] == PROMPTS * 2, events
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("preset", ["cpu", "cpu_ddp"])
def test_failed_reply_is_logged(
    forks: Forks, make_config: Callable[..., RunConfig], tmp_path: Path, preset: str
) -> None:
    """The second prompt raises after the last step: the adapter is written, and a restart repeats the replies."""
    config = make_config(evaluation={"prompts": PROMPTS, "max_new_tokens": 3}, training={"max_steps": 2})
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config), encoding="utf-8")
    assert set(forks.run(preset, ["--config", str(file)], SABOTAGE="second reply fails")) == {0}, forks.log()
    folder = Path(config.output_dir)
    events = read_metrics(folder, "event")
    assert [line["prompt"] for line in events if line["event"] == "reply"] == PROMPTS[:1]
    (failed,) = [line for line in events if line["event"] == "reply_failed"]
    assert (failed["prompt"], failed["error"]) == (PROMPTS[1], "RuntimeError: out of luck")
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    shutil.rmtree(folder / "adapter")
    assert set(forks.run(preset, ["--config", str(file)])) == {0}, forks.log()
    events = read_metrics(folder, "event")
    assert [line["prompt"] for line in events if line["event"] == "reply"] == PROMPTS
    assert not [line for line in events if line["event"] == "reply_failed"]
