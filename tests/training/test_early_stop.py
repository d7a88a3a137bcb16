"""The best checkpoint is kept and exported, and a run stops early: also after it was killed, and on several ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_accel import faults
from lora_accel.config.schema import RunConfig
from lora_accel.errors import ConfigError, TrainingError
from lora_accel.train import run_training
from lora_accel.training import loop
from tests.conftest import CommandResult, read_metrics, write_jsonl


@pytest.fixture
def overfitting(make_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a function that makes a config whose evaluation loss is best after step 4 and worse after steps 6 and 8.

    The answers of the evaluation begin as those of training, and end otherwise.
    """
    train = [{"prompt": f"repeat {name}", "completion": f"{name} alpha"} for name in ("alpha", "bravo", "charlie")]
    held_out = [{"prompt": f"repeat {name}", "completion": f"{name} bravo"} for name in ("alpha", "bravo", "charlie")]
    sources = {
        "train": [{"path": str(write_jsonl(tmp_path / "train.jsonl", train))}],
        "eval": [{"path": str(write_jsonl(tmp_path / "held_out.jsonl", held_out))}],
    }

    def make(name: str = "run", **changes: Any) -> RunConfig:
        values: dict[str, Any] = {
            "data": sources,
            "adapter": {"target_modules": "all-linear"},
            "evaluation": {"every_steps": 2, "patience": 2, "at_start": False},
            "checkpoint": {"every_steps": 100, "keep_last": 1, "export": "best"},
            "training": {"max_steps": 20, "batch_size": 3, "learning_rate": 5e-2, "scheduler": "constant"},
        }
        values = {section: values.get(section, {}) | changes.get(section, {}) for section in values | changes}
        return make_config(output_dir=str(tmp_path / name), **values)

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def checkpoint_names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["eval_loss"]) for line in read_metrics(run, "eval")]


def assert_same_weights(one: Path, other: Path) -> None:
    expected = weights(other)
    assert weights(one).keys() == expected.keys()
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, expected[name]), name


def test_run_stops_early_and_exports_the_best(
    overfitting: Callable[..., RunConfig], tmp_path: Path, command: Callable[..., CommandResult], caplog: Any
) -> None:
    run, config = tmp_path / "run", overfitting()
    run_training(config)
    (_, after_2), (_, best), (_, after_6), (last, after_8) = losses(run)
    assert last == 8
    assert best < min(after_2, after_6, after_8)
    assert checkpoint_names(run) == ["step-00000004", "step-00000008"]
    assert_same_weights(run / "adapter", run / "checkpoints" / "step-00000004")
    exported = json.loads((run / "adapter" / "provenance.json").read_text())["exported"]
    assert exported == {"step": 4, "selected": "best", "metric": "eval_loss", "value": best}
    assert (
        f"Trained for 4 steps (of 20; eval_loss was best there: {best:.4g})" in (run / "adapter/README.md").read_text()
    )
    assert "finished: 8 steps" in caplog.text
    assert "stopped early (of 20 steps)" in caplog.text
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["total_steps"]) == ("done", 8, 20)
    (event,) = [line for line in read_metrics(run, "event") if line["event"] == "early_stop"]
    assert (event["step"], event["metric"], event["best_step"]) == (8, "eval_loss", 4)

    listed = json.loads(command("checkpoints", run, "--json").stdout)
    assert [(x["step"], x["marks"], x["metrics"]["eval_loss"]) for x in listed] == [
        (4, ["best", "exported"], best),
        (8, ["newest"], after_8),
    ]
    table = command("checkpoints", run).stdout
    assert all(text in table for text in ("eval_loss", f"{best:.4f}", "best", "exported", "newest"))
    caplog.clear()
    run_training(config)
    assert "finished after step 8, stopped early (of 20 steps); nothing to do" in caplog.text


@pytest.mark.sample(2)
@pytest.mark.parametrize("fault", ["evaluate.begin@2", "step.begin@6", "evaluate.begin@4", "export.mid@1"])
def test_resumed_run_stops_at_the_same_step_with_the_same_weights(
    overfitting: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Each fault is in another process than the first, so the resumed run knows only what its checkpoint has."""
    run_training(overfitting("uninterrupted"))
    name, _, count = fault.partition("@")
    crash = faults.Fault(name, int(count), "enospc", None)
    monkeypatch.setattr(faults, "active_fault", lambda: crash)
    with pytest.raises((OSError, TrainingError)):
        run_training(overfitting())
    run_training(overfitting())
    run, expected = tmp_path / "run", tmp_path / "uninterrupted"
    assert losses(run) == losses(expected)
    assert checkpoint_names(run) == checkpoint_names(expected)
    assert_same_weights(run / "adapter", expected / "adapter")
    state, expected_state = (
        json.loads((folder / "checkpoints" / "step-00000008" / "state.json").read_text()) for folder in (run, expected)
    )
    assert state["evaluations"] == expected_state["evaluations"]
    assert [entry["step"] for entry in state["evaluations"]] == [2, 4, 6]


def test_export_last_after_an_early_stop(overfitting: Callable[..., RunConfig], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_training(overfitting(checkpoint={"export": "last"}))
    assert checkpoint_names(run) == ["step-00000008"]
    assert_same_weights(run / "adapter", run / "checkpoints" / "step-00000008")
    assert "Trained for 8 steps (stopped early, of 20)" in (run / "adapter/README.md").read_text()


def test_longer_patience_continues_the_run(overfitting: Callable[..., RunConfig], tmp_path: Path) -> None:
    run_training(overfitting())
    run_training(overfitting(evaluation={"patience": 3}, training={"max_steps": 20}))
    assert [step for step, _ in losses(tmp_path / "run")][:5] == [2, 4, 6, 8, 10]


def test_best_is_selected_from_when_it_is_kept(
    overfitting: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best step until then was evaluated, but its checkpoint was not kept."""
    crash = faults.Fault("step.begin", 7, "enospc", None)
    monkeypatch.setattr(faults, "active_fault", lambda: crash)
    with pytest.raises(OSError, match="injected"):
        run_training(overfitting(checkpoint={"export": "last", "every_steps": 3}, evaluation={"patience": None}))
    run_training(overfitting(checkpoint={"every_steps": 3}, evaluation={"patience": None}, training={"max_steps": 20}))
    exported = json.loads((tmp_path / "run" / "adapter" / "provenance.json").read_text())["exported"]
    assert exported["selected"] == "best"
    assert exported["step"] >= 6


def test_keep_best_of_a_value_that_no_function_returns(overfitting: Callable[..., RunConfig]) -> None:
    evaluation = {"metrics": [f"{__name__}:half"], "max_new_tokens": 2}
    checkpoint = {"keep_best": "eval_halve", "best_is": "max"}
    with pytest.raises(ConfigError, match=r"returns eval_halve \(did you mean eval_half"):
        run_training(overfitting(evaluation=evaluation, checkpoint=checkpoint))


def half(prompts: list[str], replies: list[str], references: list[str]) -> float:
    """Return a metric of a user."""
    return 0.5


def many(prompts: list[str], replies: list[str], references: list[str]) -> dict[str, float]:
    """Return many metrics of a user."""
    return {f"part_{number}": float(number) for number in range(50)}


def test_of_many_values_a_checkpoint_records_those_that_may_select(
    overfitting: Callable[..., RunConfig], tmp_path: Path
) -> None:
    evaluation = {"metrics": [f"{__name__}:many"], "max_new_tokens": 1, "patience": None}
    checkpoint = {"keep_best": "eval_part_7", "best_is": "max"}
    run_training(overfitting(evaluation=evaluation, checkpoint=checkpoint, training={"max_steps": 4, "batch_size": 3}))
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json").read_text())
    (recorded,) = state["evaluations"]
    names = {"step", "fingerprint", "eval_loss", "eval_perplexity", "eval_tokens", "eval_part_7"}
    assert recorded.keys() == names
    assert read_metrics(tmp_path / "run", "eval")[0]["fingerprint"] == recorded["fingerprint"]


def test_evaluations_of_other_rows_are_not_compared(
    overfitting: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., CommandResult],
) -> None:
    """The new rows have as many tokens. No step has a loss on them as good as step 4 had on the first rows."""
    run, no_patience = tmp_path / "run", {"evaluation": {"patience": None}}
    with monkeypatch.context() as patch:
        crash = faults.Fault("step.begin", 7, "enospc", None)
        patch.setattr(faults, "active_fault", lambda: crash)
        with pytest.raises(OSError, match="injected"):
            run_training(overfitting(**no_patience))
    before = read_metrics(run, "eval")
    others = {"alpha": "bravo", "bravo": "charlie", "charlie": "alpha"}
    rows = [{"prompt": f"repeat {name}", "completion": f"{other} bravo"} for name, other in others.items()]
    write_jsonl(tmp_path / "held_out.jsonl", rows)
    run_training(overfitting(training={"max_steps": 10}, checkpoint={"allow_changes": ["training"]}, **no_patience))
    after = [line for line in read_metrics(run, "eval") if line["step"] >= 6]
    assert len({line["eval_tokens"] for line in before + after}) == 1
    best = min(after, key=lambda line: line["eval_loss"])
    assert best["eval_loss"] > min(line["eval_loss"] for line in before)
    exported = json.loads((run / "adapter" / "provenance.json").read_text())["exported"]
    assert (exported["step"], exported["value"]) == (best["step"], best["eval_loss"])
    marks = {x["step"]: x["marks"] for x in json.loads(command("checkpoints", run, "--json").stdout)}
    assert [step for step, own in marks.items() if "best" in own] == [best["step"]]


BEST_IS_GONE = "step-00000004 has the best eval_loss so far, but cannot be used: manifest.json is missing"


def test_damaged_best_checkpoint_is_reported_at_the_start(
    overfitting: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Once, and the run continues, since a later step may be better. Saves compare no hashes, so they do not see it."""
    with monkeypatch.context() as patch:
        crash = faults.Fault("step.begin", 7, "enospc", None)
        patch.setattr(faults, "active_fault", lambda: crash)
        with pytest.raises(OSError, match="injected"):
            run_training(overfitting())
    assert "so far" not in caplog.text
    file = tmp_path / "run" / "checkpoints" / "step-00000004" / "adapter_model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(TrainingError, match="cannot be used"):
        run_training(overfitting())
    assert caplog.text.count("the best eval_loss so far, but cannot be used: adapter_model.safetensors is corrupt") == 1
    assert "continue with checkpoint.export=last" in caplog.text
    assert checkpoint_names(tmp_path / "run")[-1] == "step-00000008"


def test_best_checkpoint_that_is_deleted_during_the_run_is_reported_at_the_next_save(
    overfitting: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    best, train_step = tmp_path / "run" / "checkpoints" / "step-00000004", loop.train_step

    def step_and_delete(run: Any, step: int) -> Any:
        if step == 4:
            shutil.rmtree(best)
        if step == 6:
            assert BEST_IS_GONE in caplog.text
        return train_step(run, step)

    monkeypatch.setattr(loop, "train_step", step_and_delete)
    run_training(overfitting(checkpoint={"export": "last", "keep_best": "eval_loss"}))
    assert caplog.text.count(BEST_IS_GONE) == 1
    assert "export=last" not in caplog.text
    assert (tmp_path / "run" / "adapter").is_dir()


@pytest.mark.parametrize("damage", ["deleted", "changed"])
def test_best_checkpoint_that_cannot_be_exported(
    overfitting: Callable[..., RunConfig], tmp_path: Path, damage: str
) -> None:
    run, config = tmp_path / "run", overfitting()
    run_training(config)
    shutil.rmtree(run / "adapter")
    best = run / "checkpoints" / "step-00000004"
    if damage == "deleted":
        shutil.rmtree(best)
    else:
        (best / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(TrainingError, match=r"step-00000004 has the best eval_loss, but cannot be used: .*export=last"):
        run_training(config)
    assert not (run / "adapter").exists()
    run_training(overfitting(checkpoint={"export": "last"}))
    assert_same_weights(run / "adapter", run / "checkpoints" / "step-00000008")


def test_run_that_begins_from_another_run_selects_among_its_own(
    overfitting: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """The best checkpoint of the other run is not in this one."""
    run_training(overfitting("other"))
    newest = tmp_path / "other" / "checkpoints" / "step-00000008"
    run_training(overfitting(checkpoint={"resume": str(newest)}, evaluation={"patience": 100}))
    exported = json.loads((tmp_path / "run" / "adapter" / "provenance.json").read_text())["exported"]
    assert exported["step"] >= 8
    assert_same_weights(tmp_path / "run" / "adapter", tmp_path / "run" / "checkpoints" / f"step-{exported['step']:08d}")


def test_evaluation_before_the_first_step_is_that_of_the_base(
    overfitting: Callable[..., RunConfig], tmp_path: Path, command: Callable[..., CommandResult]
) -> None:
    changes = {"evaluation": {"at_start": True, "prompts": ["repeat alpha"], "max_new_tokens": 2, "patience": None}}
    config = overfitting(training={"max_steps": 2}, **changes)
    run_training(config)
    run = tmp_path / "run"
    assert [step for step, _ in losses(run)] == [0, 2]
    replies = [line["step"] for line in read_metrics(run, "event") if line["event"] == "reply"]
    assert replies == [0, 2]
    scores = json.loads(command("evaluate", "--config", run / "config.yaml", "--json").stdout)
    assert losses(run)[0][1] == pytest.approx(scores[0]["eval_loss"], rel=1e-6)
