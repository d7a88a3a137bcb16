"""`lora-accel plan`: what it prints, as JSON and as tables, and what it proposes when memory is short."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_accel.batching.batch import MicroBatch
from lora_accel.batching.packing import pack
from lora_accel.config.schema import RunConfig
from lora_accel.data.chat import Example
from lora_accel.planning import estimate, report
from lora_accel.planning.measure import Measurement
from lora_accel.planning.memory import Usage
from lora_accel.planning.remedies import find_remedies
from lora_accel.planning.skeleton import build_skeleton
from lora_accel.planning.tables import estimate_tables
from lora_accel.setup.data import prepare_data
from lora_accel.training.memory import HEADROOM, LOGITS, MAX_TOKENS, MIN_TOKENS
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


def test_micro_batches_on_a_gpu_fill_its_memory(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(training={"micro_batch_tokens": "auto"}, data={"max_length": 512})
    data, free = prepare_data(config), 300_000_000
    available = estimate.Available("cuda", 1, free, host_bytes=10**9, framework=0)
    skeleton = build_skeleton(config, "no", torch.device("cpu"))
    limit = estimate._token_limit(config, data, skeleton, available, 1)
    assert MIN_TOKENS < limit < MAX_TOKENS
    ids = [1 + i % 90 for i in range(500)]
    batch = pack([Example(ids, ids)] * (limit // 500))
    skeleton = build_skeleton(config, "no", torch.device("cpu"))
    saved = estimate.trace_usage(skeleton, batch, config).activations
    assert HEADROOM * saved + LOGITS == pytest.approx(0.9 * free, rel=0.1)


def test_plan_as_tables(
    command: Command, make_config: Callable[..., RunConfig], config_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measurement(10**6, 10**5, [200, 100], [2.0, 1.0], "cpu", 10**7)
    monkeypatch.setattr(report, "measure_in_child", lambda *_: measured)
    result = command("plan", "--config", config_file(make_config()), "--measure")
    assert result.returncode == 0, result.stderr
    for text in ("q_proj: LoRA A", "temporaries", "one device", "not supported", "100 tokens/s", "time of the run"):
        assert text in result.stdout


@pytest.fixture
def _untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the trace, which takes seconds, by a rule."""

    def usage(_: Any, batch: MicroBatch, config: RunConfig) -> Usage:
        per_token = 10 if config.training.activation_checkpointing is True else 100
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


@pytest.mark.usefixtures("_untraced")
@pytest.mark.parametrize(("option", "recomputes"), [("auto", True), ("false", False)])
def test_auto_is_planned_with_recomputed_activations_if_they_do_not_fit(
    command: Command,
    make_config: Callable[..., RunConfig],
    config_file: Any,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    recomputes: bool,
) -> None:
    small = dataclasses.replace(estimate.find_available(), bytes=1000, framework=0)
    monkeypatch.setattr(estimate, "find_available", lambda: small)
    override = f"training.activation_checkpointing={option}"
    result = command("plan", "--config", config_file(make_config()), "--json", override)
    memory = json.loads(result.stdout)["memory"]
    assert memory["recomputes_activations"] is recomputes
    tokens = memory["micro_batch"]["rows"] * memory["micro_batch"]["tokens"]
    assert memory["options"][0]["parts"]["activations"] == (10 if recomputes else 100) * tokens


@pytest.mark.usefixtures("_untraced")
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_spare_memory_of_a_remedy(make_config: Callable[..., RunConfig], kind: str) -> None:
    """On a CPU the heap doubles the tensors, unless training returns freed memory."""
    config = make_config()
    data = prepare_data(config)
    available = estimate.Available(kind, 1, bytes=10**9, host_bytes=10**9, framework=10**6)
    current = dataclasses.replace(estimate.make_estimate(config, data, "no", 4), available=available)
    smaller, recompute, four_bits = find_remedies(config, data, "no", current)
    assert smaller.spare == 10**9 - 10**6 - (2 if kind == "cpu" else 1) * smaller.total
    for remedy in (recompute, four_bits):
        assert "training.activation_checkpointing=true" in remedy.overrides
        assert remedy.spare == 10**9 - 10**6 - remedy.total
    assert four_bits.total < recompute.total < smaller.total

    first, ranks = current.options[0], next(x for x in current.options if x.layout.name == "DDP x 4")
    tensors = [option.memory.total for option in (first, ranks) if option.memory is not None]
    expected = {"cuda": [10**6 + x for x in tensors], "cpu": [10**6 + 2 * tensors[0], 4 * (10**6 + 2 * tensors[1])]}
    assert [current.needed_bytes(option) for option in (first, ranks)] == expected[kind]


@pytest.mark.usefixtures("_untraced")
@pytest.mark.parametrize(
    ("kind", "num_devices", "num_ranks", "note"),
    [
        ("cpu", 1, 1, None),
        ("cpu", 1, 2, "note: fits assumes that all 2 ranks run on this machine and share its memory"),
        ("cuda", 8, 8, "note: fits assumes one device for each of the 8 ranks"),
        (
            "cuda",
            2,
            8,
            "note: fits assumes one device for each of the 8 ranks, but this machine has 2 (visible cuda devices): the "
            "others must be on other machines. Ranks that share a device need the memory of each",
        ),
    ],
)
def test_the_devices_of_the_ranks_are_named(
    make_config: Callable[..., RunConfig], kind: str, num_devices: int, num_ranks: int, note: str | None
) -> None:
    config = make_config()
    current = estimate.make_estimate(config, prepare_data(config), "no", num_ranks, has_4_bits=False)
    available = dataclasses.replace(current.available, kind=kind, num_devices=num_devices)
    tables = estimate_tables(dataclasses.replace(current, available=available))
    assert [text for text in tables if text.startswith("note:")] == ([] if note is None else [note])


def test_the_throughput_of_the_run_folder_is_the_median_of_its_last_steps(tmp_path: Path) -> None:
    assert report._recorded_throughput(tmp_path) is None
    lines = [{"kind": "train", "step": 1, "tokens_per_second": rate} for rate in (1.0, 100.0, 300.0)]
    write_jsonl(tmp_path / "metrics.jsonl", [*lines, {"kind": "eval", "step": 1, "eval_loss": 1.0}])
    assert report._recorded_throughput(tmp_path) == 100.0
    (tmp_path / "metrics.jsonl").write_text('{"kind": "tr')
    assert report._recorded_throughput(tmp_path) is None
