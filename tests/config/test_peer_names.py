"""Names of other trainers in a run config or on the command line: an error that names the option here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from lora_accel import train
from lora_accel.config.files import read_config
from lora_accel.config.peer_names import LAUNCHED, PEERS, TEXTS, hint, options
from lora_accel.config.schema import RunConfig
from lora_accel.errors import ConfigError
from tests.conftest import CommandResult

MINIMAL = "output_dir: run\nmodel: {name_or_path: model}\ndata: {train: [{path: a.jsonl}]}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def error_of(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error_info:
        read_config(file, overrides)
    return str(error_info.value)


def test_every_peer_is_an_option_here_and_no_name_of_ours() -> None:
    known = set(options())
    assert {peer.option for peer in [*PEERS.values(), *TEXTS.values()]} <= known
    ours = {option.rpartition(".")[2] for option in known}
    assert not ours & {*PEERS, *LAUNCHED} - {"num_workers"}, "a hint may not hide the option of another section"
    assert PEERS["num_workers"].option == "data.num_workers"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("num_train_epochs", "3", "training.epochs=3"),
        ("lr", "1e-4", "training.learning_rate=0.0001"),
        ("learning-rate", "1e-4", "training.learning_rate=0.0001"),
        ("lora_r", "8", "adapter.r=8"),
        ("lora_alpha", "16", "adapter.alpha=16"),
        ("lora_dropout", "0.1", "adapter.dropout=0.1"),
        ("lora_target_modules", "[q_proj, v_proj]", 'adapter.target_modules=["q_proj", "v_proj"]'),
        ("lora_target", "all", "adapter.target_modules=all-linear"),
        ("lora_target", "q_proj,v_proj", 'adapter.target_modules=["q_proj", "v_proj"]'),
        ("bf16", "true", "training.mixed_precision=bf16"),
        ("bf16", "auto", "training.mixed_precision"),
        ("fp16", "true", "training.mixed_precision=fp16"),
        ("load_in_4bit", "true", "quantization.bits=4"),
        ("load_in_4bit", "false", "quantization.bits=null"),
        ("load_in_8bit", "true", "quantization.bits=8"),
        ("q_lora", "true", "quantization.bits=4"),
        ("bnb_4bit_quant_type", "fp4", "quantization.type=fp4"),
        ("report_to", "wandb", 'logging.trackers=["wandb"]'),
        ("report_to", "none", "logging.trackers=[]"),
        ("per_device_train_batch_size", "4", "training.micro_batch_size=4"),
        ("gradient_checkpointing", "true", "training.activation_checkpointing=true"),
        ("max_seq_length", "512", "data.max_length=512"),
        ("model_max_length", "512", "data.max_length=512"),
        ("warmup_ratio", "0.1", "training.warmup_ratio=0.1"),
        ("save_steps", "50", "checkpoint.every_steps=50"),
        ("eval_steps", "50", "evaluation.every_steps=50"),
        ("save_total_limit", "3", "checkpoint.keep_last=3"),
        ("lr_scheduler_type", "constant", "training.scheduler=constant"),
        ("lr_scheduler_type", "reduce_lr_on_plateau", "training.scheduler"),
        ("optim", "adamw_torch", "training.optimizer=adamw"),
        ("optim", "sgd", "training.optimizer=sgd"),
        ("optim", "lomo", "training.optimizer"),
        ("optim", "paged_adamw_32bit", "training.optimizer=paged_adamw"),
        ("lr_scheduler_type", "warmup_stable_decay", "training.scheduler=wsd"),
        ("dataset", "a.jsonl", 'data.train=[{"path": "a.jsonl"}]'),
        ("datasets", "[{path: a.jsonl, type: alpaca}]", "data.train"),
        ("val_set_size", "0.05", "data.eval_fraction=0.05"),
        ("val_set_size", "500", "data.eval_fraction"),
        ("train_on_inputs", "false", "data.loss_on=assistant"),
        ("flash_attn", "fa2", "model.attention=flash_attention_2"),
        ("resume_from_checkpoint", "true", "checkpoint.resume=auto"),
        ("output", "out", "output_dir=out"),
        ("every_steps", "5", "checkpoint.every_steps, evaluation.every_steps or logging.every_steps"),
    ],
)
def test_hint_translates_name_and_value(file: Path, key: str, value: str, expected: str) -> None:
    """At the top level of the file, in a section that lacks it, and as an override."""
    assert error_of(file, f"{key}={value}") == f"override '{key}={value}': {key}: unknown key; that is {expected}"
    if key != "every_steps":
        file.write_text(f"{MINIMAL}logging:\n  {key}: {value}\n", encoding="utf-8")
        assert error_of(file) == f"{file}, line 5: logging.{key}: unknown key; that is {expected}"
    file.write_text(f"{MINIMAL}{key}: {value}\n", encoding="utf-8")
    assert error_of(file) == f"{file}, line 4: {key}: unknown key; that is {expected}"


def test_hints_that_have_a_value_can_be_used_as_they_are(file: Path) -> None:
    values: dict[str, Any] = {
        "lora_r": 8,
        "bf16": True,
        "report_to": "none",
        "load_in_4bit": True,
        "train_data": "b.js",
    }
    overrides = [str(hint(name, value)).removeprefix("that is ") for name, value in values.items()]
    config = read_config(file, overrides)
    assert (config.adapter.r, config.training.mixed_precision, config.logging.trackers) == (8, "bf16", [])
    assert (config.quantization.bits, config.data.train[0].path) == (4, "b.js")


@pytest.mark.parametrize("key", ["deepspeed", "fsdp", "num_gpus"])
def test_settings_of_the_launcher_are_named_as_such(file: Path, key: str) -> None:
    message = error_of(file, f"{key}=x")
    assert "--launcher" in message
    assert "accelerate_configs/zero" in message


def test_an_unknown_key_of_a_source_gets_no_hint_from_other_sections(file: Path) -> None:
    assert "that is" not in error_of(file, "data.train=[{path: a.jsonl, type: alpaca}]")


def test_a_text_instead_of_a_section(file: Path) -> None:
    file.write_text("output_dir: run\nmodel: org/name\ndata: rows.jsonl\n", encoding="utf-8")
    message = error_of(file)
    assert "line 2: model: should be a section of keys, not 'org/name'; set model.name_or_path=org/name" in message
    assert 'set data.train=[{"path": "rows.jsonl"}]' in message
    file.write_text(MINIMAL, encoding="utf-8")
    assert error_of(file, "data.eval=b.jsonl").endswith("""not 'b.jsonl'; set data.eval=[{"path": "b.jsonl"}]""")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--lr", "1e-4"), "override '--lr': no such option; that is training.learning_rate=1e-4."),
        (("--lr=1e-4",), "that is training.learning_rate=1e-4."),
        (("--training.lr=1e-4",), "that is training.learning_rate=1e-4."),
        (("--learning-rate", "1e-4"), "that is training.learning_rate=1e-4."),
        (("--bf16", "true", "seed=1"), "that is training.mixed_precision=bf16."),
        (("--load_in_4bit",), "that is quantization.bits."),
        (("--deepspeed_config", "zero.json"), "lora-accel train --launcher FILE"),
        (("--lancher", "zero.yaml"), "override '--lancher': no such option; see --help."),
    ],
)
def test_options_with_dashes(
    command: Callable[..., CommandResult],
    file: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    expected: str,
) -> None:
    """By `lora-accel`, and by `python -m lora_accel.train`, whose parser separates a value from its option."""
    for name in ("train", "inspect"):
        result = command(name, "--config", file, *arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert expected in result.stderr
        assert result.stderr.count("error: ") == 1
    assert train.main(["--config", str(file), *arguments]) == 2
    message = capsys.readouterr().err
    assert f"override '{arguments[0]}': no such option; " in message
    assert expected.partition("=")[0].rstrip(".") in message


def test_options_lists_the_run_config() -> None:
    assert {"seed", "training.epochs", "adapter.r"} <= {*options()}
    assert {option.partition(".")[0] for option in options()} == {*RunConfig.model_fields}


def test_options_in_a_section_of_a_section_are_listed() -> None:
    class Inner(BaseModel):
        size: int

    class Outer(BaseModel):
        seed: int
        inner: Inner

    assert [*options(Outer)] == ["seed", "inner.size"]
