"""`lora-accel plan`: what it prints, as JSON and as tables, and what it proposes when memory is short."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_accel.batching.batch import MicroBatch
from lora_accel.config.schema import RunConfig
from lora_accel.planning import estimate, report
from lora_accel.planning.measure import Measurement
from lora_accel.planning.memory import Usage
from tests.conftest import CommandResult, write_jsonl

Command = Callable[..., CommandResult]


def test_plan_as_json(command: Command, make_config: Callable[..., RunConfig], config_file: Any) -> None:
    config = make_config(training={"warmup_steps": 50})
    result = command("plan", "--config", config_file(config), "--ranks", "2", "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["num_ranks"] == 2
    options = {(option["layout"], option["bits"]): option for option in values["memory"]["options"]}
    assert options["ZeRO-3 x 2", 4]["is_supported"] is False
    single = options["one device", None]
    assert single["total_bytes"] == sum(single["parts"].values())
    assert single["fits"] is True
    assert options["one device", 4]["parts"]["base"] < single["parts"]["base"]
    trained = sum(kind["numel"] for kind in values["parameters"]["kinds"] if kind["is_trained"])
    assert values["parameters"]["trained"] == trained > 0
    assert single["parts"]["moments"] == 2 * 4 * trained
    assert values["time"] == {"tokens_per_second": None, "seconds": None}
    assert any("warm-up" in text for text in values["advice"])
    assert not Path(config.output_dir).exists(), "planning writes nothing"


def test_plan_as_tables(
    command: Command, make_config: Callable[..., RunConfig], config_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measurement(10**6, 10**5, [200, 100], [2.0, 1.0], "cpu")
    monkeypatch.setattr(report, "measure_in_child", lambda *_: measured)
    result = command("plan", "--config", config_file(make_config()), "--measure")
    assert result.returncode == 0, result.stderr
    for text in ("q_proj: LoRA A", "temporaries", "one device", "not supported", "100 tokens/s", "time of the run"):
        assert text in result.stdout


@pytest.fixture
def _untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the trace, which takes seconds, by a rule."""

    def usage(_: Any, batch: MicroBatch, config: RunConfig) -> Usage:
        per_token = 10 if config.training.activation_checkpointing else 100
        return Usage(per_token * batch.input_ids.numel(), 0, 0)

    monkeypatch.setattr(estimate, "trace_usage", usage)


@pytest.mark.usefixtures("_untraced")
def test_when_memory_runs_out_the_options_that_would_fit_are_named(
    command: Command, make_config: Callable[..., RunConfig], config_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "measure_in_child", lambda *_: None)
    config = make_config(training={"micro_batch_tokens": 4096, "batch_size": 21})
    result = command("plan", "--config", config_file(config), "--measure")
    assert result.returncode == 1
    assert "--measure: not enough memory" in result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("with ")]
    assert [line.split(":")[0] for line in lines] == [
        "with training.micro_batch_tokens=1024",
        "with training.micro_batch_tokens=1024 training.activation_checkpointing=true",
        "with training.micro_batch_tokens=1024 training.activation_checkpointing=true quantization.bits=4",
    ]
    assert all("to spare" in line for line in lines)


@pytest.mark.usefixtures("_untraced")
def test_if_nothing_fits_the_smallest_option_names_what_it_lacks(
    command: Command, make_config: Callable[..., RunConfig], config_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = dataclasses.replace(estimate.find_available(), bytes=1000, framework=0)
    monkeypatch.setattr(estimate, "find_available", lambda: small)
    result = command("plan", "--config", config_file(make_config()))
    assert result.returncode == 0
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("with ")]
    assert "quantization.bits=4" in line
    assert "lacks" in line


def test_the_throughput_of_the_run_folder_is_the_median_of_its_last_steps(tmp_path: Path) -> None:
    assert report._recorded_throughput(tmp_path) is None
    lines = [{"kind": "train", "step": 1, "tokens_per_second": rate} for rate in (1.0, 100.0, 300.0)]
    write_jsonl(tmp_path / "metrics.jsonl", [*lines, {"kind": "eval", "step": 1, "eval_loss": 1.0}])
    assert report._recorded_throughput(tmp_path) == 100.0
    (tmp_path / "metrics.jsonl").write_text('{"kind": "tr')
    assert report._recorded_throughput(tmp_path) is None
