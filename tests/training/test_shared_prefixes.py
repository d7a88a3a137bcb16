"""Runs whose examples share the tokens with which they begin give the results of runs in which none do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lora_accel import RunConfig, run_training
from lora_accel.batching.batch import MicroBatch
from lora_accel.inference.evaluation import evaluate
from lora_accel.model.attention import TILE
from lora_accel.training import evaluator, step
from tests.conftest import chat_rows, read_metrics, write_jsonl

Make = Callable[..., RunConfig]


@pytest.fixture
def make(make_config: Make, tmp_path: Path) -> Make:
    """Return a function that makes a run config with rows of one instruction and two documents."""
    rows = []
    for number, row in enumerate(chat_rows(21)):
        content = f"Answer in one word, and in that of the document. The document is number {number % 2} of two."
        rows.append({"messages": [{"role": "system", "content": content}, *row["messages"]]})
    train, held_out = write_jsonl(tmp_path / "train.jsonl", rows[:16]), write_jsonl(tmp_path / "eval.jsonl", rows[16:])
    data = {"train": [{"path": str(train)}], "eval": [{"path": str(held_out)}], "max_length": 300}

    def make(name: str, **changes: Any) -> RunConfig:
        return make_config(output_dir=str(tmp_path / name), data=data, **changes)

    return make


def losses(folder: str) -> list[float]:
    return [value for line in read_metrics(Path(folder)) for value in (line["loss"], line["grad_norm"])]


def check_equal(config: RunConfig, other: RunConfig) -> None:
    """Check that losses, gradient norms and adapters of two runs are equal, apart from rounding."""
    folder, reference = config.output_dir, other.output_dir
    assert losses(folder) == pytest.approx(losses(reference), rel=1e-6)
    expected = load_file(Path(reference) / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(Path(folder) / "adapter" / "adapter_model.safetensors").items():
        assert (tensor - expected[name]).norm() <= 1e-5 * expected[name].norm()


OPTIONS: dict[str, dict[str, Any]] = {
    "recomputed": {"training": {"activation_checkpointing": True}},
    "by examples": {"training": {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "batch_size": None}},
    "shorter than an example": {"training": {"micro_batch_tokens": 16}},
    "clipped and smoothed": {"training": {"max_grad_norm": 0.01, "label_smoothing": 0.2}},
    "trained head": {"adapter": {"modules_to_save": ["lm_head", "embed_tokens"]}},
    "added tokens": {"model": {"add_tokens": ["word"]}},
    "DoRA": {"adapter": {"use_dora": True, "use_rslora": True}},
    "biases": {"adapter": {"bias": "all"}},
    "quantized": {"quantization": {"bits": 4}},
}


@pytest.mark.parametrize("options", [pytest.param(value, id=name) for name, value in OPTIONS.items()])
def test_options_do_not_depend_on_sharing(make: Make, options: dict[str, Any]) -> None:
    configs = []
    for shared in (True, False):
        training = {"max_steps": 2, "learning_rate": 1e-3} | options.get("training", {}) | {"share_prefixes": shared}
        config = make(str(shared), **options | {"training": training})
        run_training(config)
        configs.append(config)
    if options.get("training", {}).get("micro_batch_tokens") != 16:
        assert all(line["computed_tokens"] < line["tokens"] for line in read_metrics(Path(configs[0].output_dir)))
    assert all(line["computed_tokens"] == line["tokens"] for line in read_metrics(Path(configs[1].output_dir)))
    check_equal(*configs)


@pytest.mark.parametrize("shared", [True, False])
def test_a_run_resumes_with_sharing_on_or_off(make: Make, *, shared: bool) -> None:
    """After step 2 of 4, with the other value."""
    options = {"max_steps": 4, "learning_rate": 1e-3}
    straight = make("straight", training=options | {"share_prefixes": shared})
    run_training(straight)
    changed = make("changed", training=options | {"share_prefixes": shared})
    run_training(changed)
    shutil.rmtree(Path(changed.output_dir) / "checkpoints" / "step-00000004")
    shutil.rmtree(Path(changed.output_dir) / "adapter")
    resumed = make("changed", training=options | {"share_prefixes": not shared})
    run_training(resumed)
    lines = read_metrics(Path(resumed.output_dir))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["computed_tokens"] < line["tokens"] for line in lines] == [shared, shared, not shared, not shared]
    check_equal(resumed, straight)


def test_evaluation_shares(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a run and in the command; without sharing its loss is the same."""
    original, tokens = evaluator.summed_token_loss, []

    def record(model: Any, batch: MicroBatch) -> Any:
        assert batch.segments is not None
        tokens.append((batch.segments.num_tokens, batch.input_ids.numel()))
        return original(model, batch)

    monkeypatch.setattr(evaluator, "summed_token_loss", record)
    results = []
    for shared in ("auto", False):
        training = {"max_steps": 1, "micro_batch_tokens": 1000, "share_prefixes": shared}
        config = make(f"run {shared}", training=training, evaluation={"at_start": True})
        tokens.clear()
        run_training(config)
        assert all((computed < total) is (shared == "auto") for total, computed in tokens)
        eval_losses = [line["eval_loss"] for line in read_metrics(Path(config.output_dir), "eval")]
        assert len(tokens) == len(eval_losses) == 2
        tokens.clear()
        scores = evaluate(config, adapters=[Path(config.output_dir) / "adapter"], max_new_tokens=1)
        assert all((computed < total) is (shared == "auto") for total, computed in tokens)
        assert len(tokens) == 2
        results.append([*eval_losses, *(score.eval_loss for score in scores)])
    assert results[0] == pytest.approx(results[1], rel=1e-6)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("no", "float32")])
def test_rows_are_padded_to_tiles_in_16_bits(
    make: Make, monkeypatch: pytest.MonkeyPatch, precision: str, dtype: str
) -> None:
    """Each length of a row and each number of logits would take memory, which oneDNN keeps."""
    sizes: list[int] = []

    def record(original: Any) -> Any:
        def recorded(model: Any, batch: MicroBatch, *args: Any) -> Any:
            sizes.extend((batch.input_ids.numel(), batch.targets.numel()))
            return original(model, batch, *args)

        return recorded

    for module in (evaluator, step):
        monkeypatch.setattr(module, "summed_token_loss", record(module.summed_token_loss))
    training = {"max_steps": 2, "mixed_precision": precision}
    config = make(precision, training=training, model={"dtype": dtype}, evaluation={"at_start": True})
    run_training(config)
    evaluate(config, adapters=[Path(config.output_dir) / "adapter"], max_new_tokens=1)
    assert all(size % TILE == 0 for size in sizes) is (dtype == "bfloat16")
    counts = [line[name] for line in read_metrics(Path(config.output_dir)) for name in ("tokens", "computed_tokens")]
    assert all(count % TILE for count in counts), "padding does not count"
