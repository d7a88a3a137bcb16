"""Two processes under DDP match one process; a wrong launch raises."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora_accel import run_training
from lora_accel.config.schema import RunConfig
from tests.conftest import chat_rows, read_metrics, write_jsonl
from tests.distributed.forked import Forks
from tests.distributed.launching import TRAIN, launch

pytestmark = pytest.mark.distributed


def numbers(folder: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in read_metrics(folder)]


def test_two_processes_match_one(
    make_config: Callable[..., RunConfig],
    config_file: Callable[[RunConfig], Path],
    rows_file: Path,
    tmp_path: Path,
) -> None:
    """Uneven lengths, a short last step, dropout 0.1, an odd number of micro-batches, two evaluation sources."""
    training = {"micro_batch_tokens": 100, "learning_rate": 1e-3}
    more = write_jsonl(tmp_path / "more.jsonl", chat_rows(5))
    data = {"eval": [{"path": str(rows_file), "limit": 7}, {"path": str(more)}]}
    config = make_config(output_dir=str(tmp_path / "one"), training=training, data=data)
    run_training(config)
    result = launch(*TRAIN, config_file(config), f"output_dir={tmp_path / 'two'}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("adapter: ") == 1, "only the main process prints"

    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert len(one) == 6
    for expected, actual in zip(one, two, strict=True):
        assert actual == pytest.approx(expected, rel=1e-5)
    rates = [[line["learning_rate"] for line in read_metrics(tmp_path / name)] for name in ("one", "two")]
    assert rates[0] == rates[1], "the schedule advances once per step, whatever the number of ranks"
    weights = load_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors")
    for name, expected in load_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors").items():
        assert (weights[name] - expected).norm() < 1e-4 * expected.norm(), name

    evaluations = [read_metrics(tmp_path / name, "eval")[-1] for name in ("one", "two")]
    for key in ("eval_loss", "eval_perplexity", "eval_tokens"):
        assert evaluations[1][key] == pytest.approx(evaluations[0][key], rel=1e-5)
    assert evaluations[0]["sources"].keys() == {str(rows_file), str(more)}
    for source, expected in evaluations[0]["sources"].items():
        assert evaluations[1]["sources"][source] == pytest.approx(expected, rel=1e-5)


def test_run_of_two_processes_resumes_in_one(
    forks: Forks, make_config: Callable[..., RunConfig], config_file: Callable[[RunConfig], Path], tmp_path: Path
) -> None:
    config = make_config(output_dir=str(tmp_path / "one"), training={"learning_rate": 1e-3})
    run_training(config)
    result = forks.launch(*TRAIN, config_file(config), f"output_dir={tmp_path / 'both'}")
    assert result.returncode == 0, result.stderr
    for folder in ("checkpoints/step-00000006", "adapter"):
        shutil.rmtree(tmp_path / "both" / folder)
    run_training(RunConfig.model_validate(config.model_dump() | {"output_dir": str(tmp_path / "both")}))
    assert [line["step"] for line in read_metrics(tmp_path / "both", "event")] == [0, 4, 6]
    for expected, actual in zip(numbers(tmp_path / "one"), numbers(tmp_path / "both"), strict=True):
        assert actual == pytest.approx(expected, rel=1e-5)


def test_cpu_launch_with_too_few_processes_raises(
    make_config: Callable[..., RunConfig], config_file: Callable[[RunConfig], Path]
) -> None:
    config = make_config()
    result = launch("--cpu", "--num_processes", "2", *TRAIN, config_file(config), preset="cpu")
    assert result.returncode != 0
    assert "several processes were requested and one was started" in result.stderr
    assert not Path(config.output_dir).exists()
