"""Training a tiny model: the run folder, resuming, allowed changes, and crash recovery."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_accel import read_config, run_training
from lora_accel.batching.batch import MicroBatch, StepBatch
from lora_accel.batching.batches import Batches
from lora_accel.config.schema import RunConfig
from lora_accel.errors import ArtifactError, ConfigError, Interrupted, TrainingError
from lora_accel.model.recompute import decoder_layers
from lora_accel.saving.atomic import why_invalid
from lora_accel.saving.output_dir import check_output_folder
from lora_accel.setup.data import prepare_data
from lora_accel.summary import is_finished
from lora_accel.train import main
from lora_accel.training import step as step_module
from tests.conftest import chat_rows, read_metrics, run_module, write_jsonl

# Values that must be bitwise equal. The others of a line are times and memory.
EXACT = ("step", "epoch", "loss", "learning_rate", "grad_norm", "examples", "tokens", "computed_tokens")


def exact(folder: Path) -> list[tuple[object, ...]]:
    return [tuple(line[key] for key in EXACT) for line in read_metrics(folder)]


def test_run_folder_contents(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "eval.jsonl", chat_rows(5))
    config = make_config(
        data={"eval": [{"path": str(held_out)}]},
        evaluation={"every_steps": 3, "prompts": ["repeat alpha"], "max_new_tokens": 4},
        logging={"trackers": ["tensorboard"]},
    )
    folder = Path(config.output_dir)
    adapter = run_training(config)

    assert adapter == folder / "adapter"
    assert "is_local" not in json.loads((adapter / "tokenizer_config.json").read_text()), "see model/portable.py"
    assert read_config(folder / "config.yaml") == config
    plan = json.loads((folder / "plan.json").read_text())
    assert (plan["total_steps"], plan["steps_per_epoch"], plan["num_examples"]) == (6, 6, 21)
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"]) == ("done", 6)
    assert status["checkpoint"] == str(folder / "checkpoints" / "step-00000006")
    ledger = json.loads((folder / "data_ledger.json").read_text())
    assert ledger["train"][0]["buckets"]["used"]["num_rows"] == 21
    assert any((folder / "tensorboard").rglob("events.*"))

    steps = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert steps == ["step-00000004", "step-00000006"]
    for step in steps:
        assert why_invalid(folder / "checkpoints" / step) is None
        files = {path.name for path in (folder / "checkpoints" / step).iterdir()}
        assert files == {
            "adapter_model.safetensors",
            "adapter_config.json",
            "optimizer.safetensors",
            "state.json",
            "manifest.json",
        }

    train = read_metrics(folder)
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
    assert sum(line["examples"] for line in train) == 21
    others = {"kind", "supervised_tokens", "tokens_per_second", "elapsed_seconds"}
    others |= {"peak_memory_bytes", "peak_process_bytes"}
    assert set(EXACT) | others == set(train[0])
    assert train[-1]["loss"] < train[0]["loss"]
    evaluation = read_metrics(folder, "eval")
    assert [line["step"] for line in evaluation] == [0, 3, 6]
    assert evaluation[-1]["eval_perplexity"] == pytest.approx(math.exp(evaluation[-1]["eval_loss"]))
    replies = [line for line in read_metrics(folder, "event") if line["event"] == "reply"]
    assert [line["prompt"] for line in replies] == ["repeat alpha"] * 3


def test_adapter_and_checkpoints_load_with_peft(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    adapter = run_training(config)
    last = Path(config.output_dir) / "checkpoints" / "step-00000006"
    assert AutoTokenizer.from_pretrained(adapter).chat_template
    ids = torch.arange(5, 25)[None]
    logits = []
    for folder in (adapter, last):
        base = AutoModelForCausalLM.from_pretrained(config.model.name_or_path)
        plain = base(ids).logits
        logits.append(PeftModel.from_pretrained(base, folder)(ids).logits)
        assert not torch.allclose(plain, logits[-1])
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_run_is_bitwise_the_uninterrupted_run(
    make_config: Callable[..., RunConfig], tmp_path: Path, dtype: str
) -> None:
    uninterrupted = make_config(
        output_dir=str(tmp_path / "uninterrupted"), model={"dtype": dtype}, training={"epochs": 2}
    )
    run_training(uninterrupted)

    # Without its last checkpoint and its adapter it is a run that was stopped after step 10.
    config = make_config(output_dir=str(tmp_path / "stopped"), model={"dtype": dtype}, training={"epochs": 2})
    run_training(config)
    stopped = Path(config.output_dir)
    for name in ("checkpoints/step-00000012", "adapter"):
        shutil.rmtree(stopped / name)
    run_training(config)

    assert [line["step"] for line in read_metrics(stopped)] == list(range(1, 13))
    assert exact(stopped) == exact(Path(uninterrupted.output_dir))
    events = [(line["event"], line["step"]) for line in read_metrics(stopped, "event")]
    assert events == [("start", 0), ("resume", 10), ("done", 12)]
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-00000012/optimizer.safetensors"):
        assert (stopped / name).read_bytes() == (Path(uninterrupted.output_dir) / name).read_bytes()


def test_restarting_a_finished_run_changes_nothing(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    adapter = run_training(config)
    before = (adapter / "adapter_model.safetensors").read_bytes(), exact(Path(config.output_dir))
    run_training(config)
    assert ((adapter / "adapter_model.safetensors").read_bytes(), exact(Path(config.output_dir))) == before


@pytest.mark.parametrize(
    ("section", "change", "key"),
    [
        ("training", {"learning_rate": 5e-3}, "training.learning_rate"),
        ("training", {"epochs": 2}, "plan.total_steps"),
        ("training", {"batch_size": 3}, "plan.batch_size"),
        ("adapter", {"r": 2}, "adapter.r"),
        ("data", {"loss_on": "all"}, "data.loss_on"),
        ("model", {"chat_template": "chatml"}, "model.chat_template"),
        ("seed", 1, "seed"),
    ],
)
def test_resuming_with_a_different_config_is_an_error(
    make_config: Callable[..., RunConfig], section: str, change: object, key: str
) -> None:
    run_training(make_config())
    with pytest.raises(ArtifactError, match=key.replace(".", r"\.")) as caught:
        run_training(make_config(**{section: change}))
    assert "checkpoint -> now" in str(caught.value)


def test_resuming_with_different_data_is_an_error(make_config: Callable[..., RunConfig], rows_file: Path) -> None:
    run_training(make_config())
    rows_file.write_text(rows_file.read_text().replace("alpha", "omega"))
    with pytest.raises(ArtifactError, match=r"data\.train\[0\]\.bytes"):
        run_training(make_config())


def test_changes_that_keep_the_result_are_allowed(make_config: Callable[..., RunConfig]) -> None:
    run_training(make_config())
    run_training(make_config(logging={"every_steps": 2}, training={"micro_batch_tokens": 512}))


def test_nonfinite_loss_stops_the_run_and_keeps_the_last_checkpoint(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(training={"micro_batch_tokens": 10_000})  # one forward per step
    original = step_module.summed_token_loss
    calls = iter(range(1000))

    def patched(model: torch.nn.Module, batch: MicroBatch, *options: float) -> torch.Tensor:
        loss = original(model, batch, *options)
        return loss * math.nan if next(calls) >= 4 else loss

    monkeypatch.setattr(step_module, "summed_token_loss", patched)
    with pytest.raises(TrainingError, match="step 5: loss nan") as caught:
        run_training(config)
    assert caught.value.exit_code == 3
    folder = Path(config.output_dir)
    assert why_invalid(folder / "checkpoints" / "step-00000004") is None
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    assert not (folder / "adapter").exists()
    weights = load_file(folder / "checkpoints" / "step-00000004" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_trains_on_a_quantized_base(make_config: Callable[..., RunConfig], bits: int) -> None:
    config = make_config(quantization={"bits": bits}, training={"epochs": 2})
    adapter = run_training(config)
    losses = [line["loss"] for line in read_metrics(Path(config.output_dir))]
    assert losses[-1] < 0.95 * losses[0]
    weights = load_file(adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_activation_checkpointing_gives_the_same_losses(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    plain = make_config(output_dir=str(tmp_path / "plain"))
    recomputed = make_config(output_dir=str(tmp_path / "recomputed"), training={"activation_checkpointing": True})
    run_training(plain)
    run_training(recomputed)
    assert exact(Path(plain.output_dir)) == exact(Path(recomputed.output_dir))


@pytest.mark.parametrize("recompute", [False, True])
def test_compile_gives_the_same_losses(make_config: Callable[..., RunConfig], tmp_path: Path, recompute: bool) -> None:
    """Few layers have LoRA: each one adds kernels, and compiling one takes about 4 s."""
    folders = [tmp_path / "plain", tmp_path / "compiled"]
    adapter = {"dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}
    for folder in folders:
        training = {"compile": folder.name == "compiled", "activation_checkpointing": recompute}
        run_training(make_config(output_dir=str(folder), adapter=adapter, training=training))
    plain, compiled = ([line["loss"] for line in read_metrics(folder)] for folder in folders)
    assert compiled == pytest.approx(plain, rel=1e-5)
    first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders)
    assert first.keys() == second.keys()


@pytest.mark.parametrize(
    ("free", "layers", "message"),
    [
        (1000, [False, False], "no activation checkpointing"),
        (999, [True, False], "enabling activation checkpointing in 1 of 2 layers"),
        (599, [True, True], "enabling activation checkpointing in 2 of 2 layers"),
    ],
)
def test_by_default_the_layers_that_do_not_fit_recompute_their_activations(
    make_config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free: int,
    layers: list[bool],
    message: str,
) -> None:
    estimates = iter([1000, 200])  # bytes if no layer recomputes its activations, and if all do
    monkeypatch.setattr("lora_accel.training.memory.ActivationCost.num_bytes", lambda *_: next(estimates))
    monkeypatch.setattr("lora_accel.setup.memory.free_bytes", lambda *_: free)
    monkeypatch.setattr("lora_accel.setup.memory.update_bytes", lambda *_: 0)
    recompute: list[bool] = []
    monkeypatch.setattr(
        "lora_accel.training.loop.train",
        lambda run, _: recompute.extend(layer.gradient_checkpointing for layer in decoder_layers(run.model)),
    )
    run_training(make_config())
    assert recompute == layers
    assert message in capsys.readouterr().out


def test_a_batch_that_cannot_be_built_ahead_loses_no_finished_step(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Batches._build

    def fail(batches: Batches, step: int) -> StepBatch:
        if step == 2:
            raise RuntimeError("the third step's rows cannot be read")
        return build(batches, step)

    monkeypatch.setattr(Batches, "_build", fail)
    config = make_config()
    with pytest.raises(RuntimeError, match="the third step's rows"):
        run_training(config)
    folder = Path(config.output_dir)
    assert [line["step"] for line in read_metrics(folder)] == [1, 2]
    assert why_invalid(folder / "checkpoints" / "step-00000002") is None


# Valid and invalid run folders


def tree(folder: Path) -> dict[str, bytes]:
    """Return path -> bytes of all files in a folder; subfolders map to no bytes."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def output_dir_error(make_config: Callable[..., RunConfig], folder: Path, base: Path) -> str:
    """Train into an invalid run folder and return the error. Check that nothing below `base` changed."""
    before = tree(base)
    with pytest.raises(ConfigError) as caught:
        run_training(make_config(output_dir=str(folder)))
    assert tree(base) == before
    assert str(caught.value).startswith("output_dir: ")
    return str(caught.value)


@pytest.mark.parametrize("name", ["run[1]", "a[/run", "up/../run", "../run", ".."])
def test_run_folder_name_with_special_characters_is_an_error(
    make_config: Callable[..., RunConfig], tmp_path: Path, name: str
) -> None:
    assert "write the path without them" in output_dir_error(make_config, tmp_path / "inner" / name, tmp_path)


def test_run_folder_name_may_have_spaces_dots_and_unicode(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    folder = tmp_path / "..lauf nr. 3" / "läuft…今 (b)*?]"
    assert run_training(make_config(output_dir=str(folder), training={"max_steps": 1})) == folder / "adapter"
    assert why_invalid(folder / "adapter") is None


@pytest.mark.parametrize("name", ["file", "file/deep/run"])
def test_run_folder_cannot_be_a_file(make_config: Callable[..., RunConfig], tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("notes")
    folder = tmp_path / name
    assert f"{tmp_path / 'file'} is a file" in output_dir_error(make_config, folder, tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_is_not_writable_is_an_error(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    for folder in (tmp_path / "locked", tmp_path / "locked" / "run"):
        assert f"{tmp_path / 'locked'} is not writable" in output_dir_error(make_config, folder, tmp_path)


@pytest.mark.parametrize("other", ["thesis.tex", ".git", "data"])
def test_folder_with_other_files_is_an_error(make_config: Callable[..., RunConfig], tmp_path: Path, other: str) -> None:
    (tmp_path / "run" / other).mkdir(parents=True)
    assert "contains other files but no run" in output_dir_error(make_config, tmp_path / "run", tmp_path)


def test_adapter_without_checkpoints_is_not_replaced(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    run_training(make_config())
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    message = output_dir_error(make_config, tmp_path / "run", tmp_path)
    assert "contains an adapter but no checkpoints" in message
    assert "move the adapter" in message
    (tmp_path / "run" / "adapter").rename(tmp_path / "adapter")
    assert run_training(make_config(training={"max_steps": 1})) == tmp_path / "run" / "adapter"


@pytest.mark.parametrize(
    "names",
    [
        [],
        [".lock"],
        [".lock", ".plan.json.lora-accel-writing"],
        [".lock", "plan.json", ".config.yaml.lora-accel-writing"],
        [".lock", ".plan.json.writing"],  # of older versions
    ],
)
def test_leftovers_of_a_run_that_was_killed_at_the_start_are_accepted(tmp_path: Path, names: list[str]) -> None:
    for name in (".lock", *names):
        (tmp_path / name).write_text("")
    check_output_folder(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "thesis.tex"])
def test_folder_without_a_run_is_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match="contains other files but no run"):
        check_output_folder(tmp_path)


@pytest.mark.parametrize("kind", ["long", "file"])
def test_invalid_run_folder_path_is_reported(tmp_path: Path, kind: str) -> None:
    if kind == "long":
        folder = tmp_path / ("a" * 300)
    else:
        folder = tmp_path
        (tmp_path / "plan.json").write_text("{}")
        (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ConfigError, match="output_dir: "):
        check_output_folder(folder)


def test_adapter_with_an_empty_checkpoints_folder_is_not_replaced(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run_training(make_config())
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints").mkdir()
    assert "contains an adapter but no checkpoints" in output_dir_error(make_config, tmp_path / "run", tmp_path)


def test_dangling_link_in_an_older_checkpoint_does_not_prevent_resuming(make_config: Callable[..., RunConfig]) -> None:
    adapter = run_training(make_config())
    older = adapter.parent / "checkpoints" / "step-00000004" / "optimizer.safetensors"
    older.unlink()
    older.symlink_to("/nowhere")
    run_training(make_config())


def test_changed_config_of_the_base_is_an_error(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(make_config().model.name_or_path, base)
    config = make_config(model={"name_or_path": str(base)})
    run_training(config)
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | {"transformers_version": "9", "_name_or_path": "x"}))
    run_training(config)
    (base / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 0.5}))
    with pytest.raises(ArtifactError, match=r"model\.config: "):
        run_training(config)


def test_run_that_resumes_from_another_run_keeps_its_own_files(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    parent = run_training(make_config()).parent / "checkpoints" / "step-00000004"
    options = {"checkpoint": {"every_steps": 2, "allow_changes": ["seed"]}, "seed": 1}
    other = make_config(output_dir=str(tmp_path / "other"), **options)
    run_training(other)
    checkpoints, log_file = tmp_path / "other" / "checkpoints", tmp_path / "other" / "metrics.jsonl"
    weights, log = (checkpoints / "step-00000004" / "adapter_model.safetensors").read_bytes(), log_file.read_bytes()
    options["checkpoint"] |= {"resume": str(parent)}
    run_training(make_config(output_dir=str(tmp_path / "other"), **options))
    superseded = checkpoints / "superseded-step-00000004" / "adapter_model.safetensors"
    assert superseded.read_bytes() == weights
    assert (tmp_path / "other" / "superseded-metrics.jsonl").read_bytes() == log
    assert [line["step"] for line in read_metrics(tmp_path / "other")] == [5, 6]
    # The run has its own checkpoints now, so it no longer needs the parent.
    shutil.rmtree(parent)
    run_training(make_config(output_dir=str(tmp_path / "other"), **options))
    with pytest.raises(ArtifactError, match="is not a folder"):
        run_training(make_config(output_dir=str(tmp_path / "third"), **options))


@pytest.mark.parametrize("fault", ["step.begin@2=kill", "save.mid_file@1=kill", "save.before_rename@1=kill"])
def test_run_killed_before_its_first_checkpoint_restarts_bitwise(
    make_config: Callable[..., RunConfig], config_file: Callable[[RunConfig], Path], tmp_path: Path, fault: str
) -> None:
    config = make_config()
    folder = Path(config.output_dir)
    uninterrupted = make_config(output_dir=str(tmp_path / "uninterrupted"))
    run_training(uninterrupted)
    killed = run_module("lora_accel.train", "--config", config_file(config), env={"LORA_ACCEL_FAULT": fault})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (folder / ".lock").exists()
    assert not list(folder.glob("checkpoints/step-*"))
    run_training(config)
    assert exact(folder) == exact(tmp_path / "uninterrupted")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    assert not list(folder.glob(".*"))
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-00000006/optimizer.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "uninterrupted" / name).read_bytes()


def test_leftovers_in_the_run_folder_are_cleaned_up(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    adapter = run_training(config)
    folder = adapter.parent
    checkpoints = folder / "checkpoints"
    adapter.rename(folder / ".adapter.lora-accel-older")
    (checkpoints / "step-00000006").rename(checkpoints / ".step-00000006.lora-accel-older")
    (checkpoints / ".step-00000007.lora-accel-writing").mkdir()
    (checkpoints / ".step-00000002.lora-accel-deleting").mkdir()
    (folder / ".status.json.lora-accel-writing").write_text("{")
    run_training(config)
    assert [line["step"] for line in read_metrics(folder, "event") if line["event"] == "resume"] == [6]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000004", "step-00000006"]
    assert not list(folder.glob(".*"))


def test_moved_adapter_is_restored_before_training(make_config: Callable[..., RunConfig]) -> None:
    """A run that is killed between two renames leaves no adapter under its name; the next run restores it first."""
    adapter = run_training(make_config())
    before = tree(adapter)
    adapter.rename(adapter.with_name(".adapter.lora-accel-older"))
    longer = make_config(training={"epochs": 2, "max_hours": 1e-9}, checkpoint={"allow_changes": ["training.epochs"]})
    with pytest.raises(Interrupted, match="after step 7"):
        run_training(longer)
    assert tree(adapter) == before


# Resuming with a different config


def test_allowed_change_takes_effect_on_resume(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    options = {"scheduler": "constant", "warmup_steps": 0, "max_hours": None}
    first = make_config(training=options | {"learning_rate": 3e-2})
    run_training(first)
    folder = Path(first.output_dir)
    unchanged = exact(folder)
    for name in ("checkpoints/step-00000006", "adapter"):
        shutil.rmtree(folder / name)
    run_training(
        make_config(
            training=options | {"learning_rate": 1e-3}, checkpoint={"allow_changes": ["training.learning_rate"]}
        )
    )
    assert [line["learning_rate"] for line in read_metrics(folder)] == [3e-2] * 4 + [1e-3] * 2
    assert exact(folder)[:4] == unchanged[:4]
    assert exact(folder)[4][2] == unchanged[4][2], "a step logs the loss before its update"
    assert exact(folder)[5][2] != unchanged[5][2]
    recorded = json.loads((folder / "checkpoints" / "step-00000006" / "state.json").read_text())["provenance"]
    assert recorded["config"]["training"]["learning_rate"] == 1e-3
    # The new value needs no permission any more; changing it back does.
    run_training(make_config(training=options | {"learning_rate": 1e-3}))
    with pytest.raises(ArtifactError, match=r"training\.learning_rate: 0\.001 -> 0\.03"):
        run_training(first)


def test_finished_run_trains_more_epochs_if_allowed(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """With a constant learning rate it equals a run that had the longer plan from the start."""
    options = {"scheduler": "constant", "warmup_steps": 1}
    run_training(make_config(training=options))
    longer = make_config(training=options | {"epochs": 2}, checkpoint={"allow_changes": ["training.epochs"]})
    adapter = run_training(longer)
    uninterrupted = run_training(
        make_config(output_dir=str(tmp_path / "uninterrupted"), training=options | {"epochs": 2})
    )
    assert [line["step"] for line in read_metrics(adapter.parent)] == list(range(1, 13))
    assert exact(adapter.parent) == exact(uninterrupted.parent)
    name = "adapter_model.safetensors"
    assert (adapter / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_fewer_steps_than_are_done_are_an_error(make_config: Callable[..., RunConfig]) -> None:
    adapter = run_training(make_config())
    before = tree(adapter.parent)
    shorter = make_config(training={"max_steps": 3}, checkpoint={"allow_changes": ["training.max_steps"]})
    with pytest.raises(
        ConfigError, match=r"the run has 3 steps, but .*step-00000006 is after step 6; raise epochs or max_steps"
    ):
        run_training(shorter)
    assert tree(adapter.parent) == before


# Graceful stops, and finished runs


def test_run_with_minimal_max_hours_is_bitwise_the_uninterrupted_run(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Every start trains one step and stops."""
    run_training(make_config(output_dir=str(tmp_path / "uninterrupted"), checkpoint={"every_steps": 100}))
    config = make_config(training={"max_hours": 1e-9}, checkpoint={"every_steps": 100})
    folder = Path(config.output_dir)
    for step in range(1, 7):
        with pytest.raises(
            Interrupted, match=rf"stopped by training\.max_hours on rank 0 after step {step};"
        ) as caught:
            run_training(config)
        assert caught.value.exit_code == 143
        status = json.loads((folder / "status.json").read_text())
        assert (status["state"], status["step"]) == ("preempted", step)
        assert status["checkpoint"] == str(folder / "checkpoints" / f"step-{step:08d}")
        assert not (folder / "adapter").exists()
    run_training(config)
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert exact(folder) == exact(tmp_path / "uninterrupted")
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-00000006/optimizer.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "uninterrupted" / name).read_bytes()


def test_stopped_command_prints_the_cause_and_exits_with_143(
    make_config: Callable[..., RunConfig],
    config_file: Callable[[RunConfig], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["--config", str(config_file(make_config()))]
    assert main([*command, "training.max_hours=1e-9"]) == 143
    lines = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    assert lines == [
        "stopped by training.max_hours on rank 0 after step 1; checkpoint saved. Run the same command to resume"
    ]
    assert main(command) == 0


def test_finished_run_prints_nothing_to_do(
    make_config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(checkpoint={"keep_last": 1})
    adapter = run_training(config)
    before = tree(adapter.parent)
    output = capsys.readouterr().out
    assert re.search(r"^finished: 6 steps in .*; loss \d+\.\d{4}$", output, re.MULTILINE)
    commands = [f"  lora-accel chat --adapter {adapter}", f"  lora-accel merge {adapter} {adapter.parent / 'merged'}"]
    assert output.splitlines()[-3:] == ["next:", *commands]
    assert f"adapter: {adapter}" in output.splitlines()

    def load(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("lora_accel.setup.model.load_base_model", load)
    assert run_training(config) == adapter
    assert tree(adapter.parent) == before
    lines = capsys.readouterr().out.splitlines()
    assert f"{adapter.parent}: finished after step 6; nothing to do" in lines
    assert f"adapter: {adapter}" in lines


def test_finished_run_rewrites_a_corrupt_adapter(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(checkpoint={"keep_last": 1})
    adapter = run_training(config)
    before = tree(adapter), tree(adapter.parent / "checkpoints")
    with (adapter / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    run_training(config)
    assert (tree(adapter), tree(adapter.parent / "checkpoints")) == before
    resumed = [line["step"] for line in read_metrics(adapter.parent, "event") if line["event"] == "resume"]
    assert resumed == [6]


def test_finished_run_trains_longer_if_allowed(make_config: Callable[..., RunConfig]) -> None:
    run_training(make_config())
    longer = make_config(training={"epochs": 2}, checkpoint={"allow_changes": ["training.epochs"]})
    assert [line["step"] for line in read_metrics(run_training(longer).parent)] == list(range(1, 13))


@pytest.mark.parametrize(
    "change", ["state", "step", "plan", "data", "config", "precision", "template", "base", "no file"]
)
def test_is_finished_compares_the_run(make_config: Callable[..., RunConfig], change: str) -> None:
    config = make_config(training={"max_steps": 1})
    folder = run_training(config).parent
    data = prepare_data(config, 1)
    options = {"template": data.template.source, "mixed_precision": "no"}
    assert is_finished(folder, config, data.plan, data.dataset.ledgers, **options)
    assert is_finished(folder, config, dataclasses.replace(data.plan, num_ranks=7), data.dataset.ledgers, **options)
    file = folder / "provenance.json"
    values = json.loads(file.read_text())
    if change in ("state", "step"):
        file = folder / "status.json"
        values = json.loads(file.read_text()) | ({"state": "preempted"} if change == "state" else {"total_steps": 2})
    elif change == "plan":
        values["plan"]["num_examples"] += 1
    elif change == "data":
        values["data"][0]["tokens_sha256"] = "0"
    elif change == "config":
        values["config"]["evaluation"]["prompts"] = ["hello"]
    elif change == "precision":
        options["mixed_precision"] = "bf16"
    elif change == "template":
        options["template"] += " "
    elif change == "base":
        values["base"] |= {"sha256": {"model.safetensors": "0"}, "tensors_sha256": "0"}
    file.write_text(json.dumps(values))
    if change == "no file":
        file.unlink()
    assert not is_finished(folder, config, data.plan, data.dataset.ledgers, **options)
