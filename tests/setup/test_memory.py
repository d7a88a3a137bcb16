"""The tokens of a micro-batch that a run chooses and keeps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_accel import RunConfig, run_training
from lora_accel.batching.token_limit import CANDIDATES
from lora_accel.errors import ArtifactError
from tests.conftest import read_metrics, write_jsonl

MakeConfig = Callable[..., RunConfig]


def recorded_limit(config: RunConfig) -> object:
    provenance = json.loads((Path(config.output_dir) / "provenance.json").read_text(encoding="utf-8"))
    return provenance["config"]["training"]["micro_batch_tokens"]


def test_the_chosen_limit_is_recorded_and_logged(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(training={"micro_batch_tokens": "auto"})
    run_training(config)
    assert recorded_limit(config) == CANDIDATES[0]
    assert "micro-batches: at most 1,024 tokens" in capsys.readouterr().out


def test_a_resumed_run_keeps_the_limit_of_its_checkpoint(make_config: MakeConfig) -> None:
    config = make_config(training={"micro_batch_tokens": 64})
    run_training(config)
    folder = Path(config.output_dir)
    expected = [(line["step"], line["loss"]) for line in read_metrics(folder)]
    shutil.rmtree(folder / "adapter")
    for checkpoint in sorted((folder / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    config = make_config(training={"micro_batch_tokens": "auto"})
    run_training(config)
    assert recorded_limit(config) == 64
    assert [(line["step"], line["loss"]) for line in read_metrics(folder)] == expected, "rounded alike"


def test_a_finished_run_with_auto_is_found_finished(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(training={"micro_batch_tokens": "auto"})
    run_training(config)
    capsys.readouterr()
    run_training(config)
    assert "nothing to do" in capsys.readouterr().out


def test_steps_of_examples_that_begin_alike_compute_fewer_tokens(make_config: MakeConfig, tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"one two three {number % 5} " * 8},
                {"role": "assistant", "content": f"the answer is {number}"},
            ]
        }
        for number in range(40)
    ]
    path = write_jsonl(tmp_path / "families.jsonl", rows)
    computed = {}
    for grouped in (False, True):
        config = make_config(
            data={"train": [{"path": str(path)}], "group_by_prefix": grouped}, training={"batch_size": 8}
        )
        config = config.model_copy(update={"output_dir": str(tmp_path / str(grouped))})
        run_training(config)
        lines = read_metrics(Path(config.output_dir))
        computed[grouped] = sum(line["computed_tokens"] for line in lines) / sum(line["tokens"] for line in lines)
    assert computed[True] < 0.6 < computed[False] + 0.1
    changed = config.model_copy(update={"data": config.data.model_copy(update={"group_by_prefix": False})})
    with pytest.raises(ArtifactError, match=r"data\.group_by_prefix: True -> False"):
        run_training(changed)


def test_examples_that_are_counted_need_no_limit(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run_training(make_config(training={"micro_batch_tokens": "auto", "micro_batch_size": 2, "batch_size": None}))
    assert "micro-batches: at most" not in capsys.readouterr().out
