"""The run config: PEFT's fields, the batch options, the JSON schema, and validation."""

from __future__ import annotations

import dataclasses
from typing import Any

import peft
import pytest
from packaging.version import Version
from pydantic import ValidationError

from lora_accel.config.schema import PEFT_SINCE, AdapterSection, RunConfig
from lora_accel.model.adapter import lora_config

PEFT = Version(peft.__version__)
NEEDED: dict[str, Any] = {
    "output_dir": "run",
    "model": {"name_or_path": "model"},
    "data": {"train": [{"path": "rows.jsonl"}]},
}

# Fields of LoraConfig that this package renames or sets itself.
RESERVED = {"lora_alpha", "lora_dropout", "task_type", "peft_type", "auto_mapping", "peft_version"}
RESERVED |= {"base_model_name_or_path", "revision", "inference_mode"}


def test_every_peft_field_is_an_option() -> None:
    peft_fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    newer = {name for name, since in PEFT_SINCE.items() if Version(since) > PEFT}
    own = {"alpha", "dropout", "init_from", "init_from_force", "loraplus_ratio"}
    assert set(AdapterSection.model_fields) - own == (peft_fields - RESERVED) | newer
    assert not newer & peft_fields


@pytest.mark.parametrize("name", PEFT_SINCE)
def test_field_that_the_installed_peft_lacks_is_an_error(name: str) -> None:
    value: Any = {"init_type": "random"} if name == "velora_config" else {}
    if Version(PEFT_SINCE[name]) <= PEFT:
        assert AdapterSection.model_validate({name: value}).peft_fields() == {name: value}
    else:
        with pytest.raises(ValidationError, match=rf"needs peft >= {PEFT_SINCE[name]}, but {PEFT} is installed"):
            AdapterSection.model_validate({name: value})


def test_peft_versions_are_compared_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, has_field in (("0.18.1", False), ("0.20.9", False), ("0.21.0", True), ("0.100.0.dev0", True)):
        monkeypatch.setattr("importlib.metadata.version", {"peft": installed}.__getitem__)
        if has_field:
            AdapterSection.model_validate({"kasa_config": {}})
        else:
            with pytest.raises(ValidationError, match=r"needs peft >= 0\.21"):
                AdapterSection.model_validate({"kasa_config": {}})


def test_peft_fields_are_passed_and_null_keeps_the_default() -> None:
    section = AdapterSection.model_validate({"r": 3, "alpha": 5, "use_rslora": True, "rank_pattern": {"q_proj": 2}})
    assert section.peft_fields() == {"use_rslora": True, "rank_pattern": {"q_proj": 2}}
    config = lora_config(section)
    assert (config.r, config.lora_alpha, config.use_rslora, config.rank_pattern) == (3, 5, True, {"q_proj": 2})
    assert config.init_lora_weights is peft.LoraConfig().init_lora_weights is True


def test_false_is_passed_to_peft() -> None:
    assert lora_config(AdapterSection(init_lora_weights=False)).init_lora_weights is False


def test_every_schema_field_has_a_description() -> None:
    schema = RunConfig.model_json_schema()
    sections = {"RunConfig": schema, **schema["$defs"]}
    assert len(sections) == 14
    assert all(section["description"] for section in sections.values())
    missing = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, field in section["properties"].items()
        if not field.get("description") and "$ref" not in field  # sections are described in their own schema
    ]
    assert missing == []


def test_config_is_frozen() -> None:
    config = RunConfig.model_validate(NEEDED)
    with pytest.raises(ValidationError, match="frozen"):
        config.training.batch_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (16, None, None)),
        ({"batch_size": 3}, (3, None, None)),
        ({"micro_batch_size": 2}, (None, 2, None)),
        ({"micro_batch_size": 2, "gradient_accumulation_steps": 4}, (None, 2, 4)),
        ({"micro_batch_size": 2, "batch_size": None}, (None, 2, None)),
        ({"micro_batch_size": None}, (16, None, None)),
    ],
)
def test_batch_options(values: dict[str, Any], expected: tuple[int | None, ...]) -> None:
    training = RunConfig.model_validate(NEEDED | {"training": values}).training
    assert (training.batch_size, training.micro_batch_size, training.gradient_accumulation_steps) == expected


@pytest.mark.parametrize(
    "values",
    [
        {"batch_size": 3, "micro_batch_size": 2},
        {"batch_size": None},
        {"gradient_accumulation_steps": 2},
        {"batch_size": 16, "gradient_accumulation_steps": 1},
    ],
)
def test_conflicting_batch_options_are_an_error(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="batch_size"):
        RunConfig.model_validate(NEEDED | {"training": values})


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("quantization", {"bits": 3}, "4 or 8"),
        ("quantization", {"bits": "4"}, "4 or 8"),
        ("adapter", {"dropout": 1.0}, "less than 1"),
        ("adapter", {"r": 8.0}, "valid integer"),
        ("adapter", {"r": True}, "valid integer"),
        ("training", {"learning_rate": float("nan")}, "finite"),
        ("training", {"learning_rate": float("inf")}, "finite"),
        ("training", {"epochs": 0}, "greater than 0"),
        ("training", {"max_grad_norm": 0}, "greater than 0"),
        ("training", {"label_smoothing": 1}, "less than 1"),
        ("training", {"neftune_alpha": 0}, "greater than 0"),
        ("training", {"optimizer_options": {"betas": [0.9, 1.0]}}, "less than 1"),
        ("training", {"optimizer_options": {"betas": [0.9]}}, "at least 2"),
        ("training", {"optimizer_options": {"beta": 1}}, "Extra inputs"),
        ("training", {"optimizer_options": {"momentum": 0.9}}, "momentum is not an option of optimizer=adamw; its"),
        ("training", {"optimizer": "adafactor", "optimizer_options": {"eps": 1e-8}}, "=adafactor; it has no options"),
        ("training", {"scheduler_options": {"power": 2.0}}, "power is not an option of scheduler=cosine; it has no"),
        ("training", {"scheduler": "wsd", "scheduler_options": {"power": 2.0}}, "its options are decay_ratio, min_"),
        ("training", {"scheduler": "wsd", "scheduler_options": {"decay_ratio": 0}}, "greater than 0"),
        ("training", {"scheduler_options": {"num_cycles": 2.5}}, "valid integer"),
        ("adapter", {"loraplus_ratio": 0.5}, "greater than or equal to 1"),
        ("data", {"train": []}, "at least 1 item"),
        ("data", {"train": [{"path": "x", "weight": 0}]}, "greater than 0"),
        ("checkpoint", {"keep_last": 0}, "greater than or equal to 1"),
        ("checkpoint", {"allow_changes": "seed"}, "valid list"),
        ("training", {"max_hours": 0}, "greater than 0"),
        ("training", {"max_hours": float("nan")}, "finite"),
        ("training", {"skip_nonfinite": -1}, "greater than or equal to 0"),
        ("seed", 2**32, "less than 4294967296"),
    ],
)
def test_invalid_values_are_an_error(section: str, values: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(NEEDED | {section: values})


@pytest.mark.parametrize(
    "option",
    ["seed", "training", "training.learning_rate", "data.train", "adapter.alpha", "model.name_or_path", "data"],
)
def test_allow_changes_accepts_options_and_sections(option: str) -> None:
    config = RunConfig.model_validate(NEEDED | {"checkpoint": {"allow_changes": [option, "seed"]}})
    assert config.checkpoint.allow_changes == [option, "seed"]


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("training.lerning_rate", "learning_rate"),
        ("train.learning_rate", "training"),
        ("training.learning_rat.x", "learning_rate"),
        ("adaptor", "adapter"),
        ("training.learning_rate.peak", None),
        ("learning_rate", None),
        ("", None),
        (".", None),
        ("training.", None),
        ("training.model_fields", None),
        ("*", None),
    ],
)
def test_allow_changes_rejects_unknown_options(option: str, nearest: str | None) -> None:
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(NEEDED | {"checkpoint": {"allow_changes": ["seed", option]}})
    message = str(caught.value)
    assert f"checkpoint.allow_changes: {option!r} is not an option" in message
    if nearest is not None:
        assert f"(did you mean {nearest}?)" in message


EVERY = {"every_steps": 5}
HELD_OUT = {"train": [{"path": "rows.jsonl"}], "eval_fraction": 0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": {"bits": 4}, "model": {"name_or_path": "m", "dtype": "float16"}}, "model.dtype=float16"),
        ({"quantization": {"bits": 4}, "adapter": {"modules_to_save": ["lm_head"]}}, "modules_to_save"),
        ({"evaluation": {"every_steps": 1}}, "evaluation.every_steps: there is nothing to evaluate"),
        ({"evaluation": {"every_epochs": 0.5}}, "evaluation.every_epochs: there is nothing to evaluate"),
        ({"evaluation": EVERY | {"every_epochs": 0.5, "prompts": ["a"]}}, "set every_steps or every_epochs, not both"),
        ({"evaluation": {"min_delta": 0.1}}, "min_delta needs patience"),
        (
            {"evaluation": EVERY | {"patience": 2, "prompts": ["a"]}},
            "evaluation.patience: there are no evaluation rows",
        ),
        ({"data": HELD_OUT, "evaluation": {"patience": 2}}, "evaluation.patience: the run is evaluated after its last"),
        ({"data": HELD_OUT, "checkpoint": {"export": "best"}}, "checkpoint.export=best: the run is evaluated after"),
        ({"checkpoint": {"keep_best": "eval_loss"}}, "checkpoint.keep_best: there are no evaluation rows"),
        (
            {"data": HELD_OUT, "evaluation": EVERY, "checkpoint": {"keep_best": "eval_los"}},
            r"no metric 'eval_los' \(did you mean eval_loss\?\)",
        ),
        (
            {"data": HELD_OUT, "evaluation": EVERY, "checkpoint": {"keep_best": "eval_exact_match"}},
            "no metric 'eval_exact_match'; add exact_match to evaluation.metrics",
        ),
        (
            {"data": HELD_OUT, "evaluation": EVERY | {"metrics": ["a:b"]}, "checkpoint": {"keep_best": "eval_b"}},
            "checkpoint.keep_best=eval_b is computed by your own function; set checkpoint.best_is to min or max",
        ),
        ({"checkpoint": {"best_is": "max"}}, "checkpoint.best_is needs checkpoint.keep_best"),
        ({"checkpoint": {"every_steps": 5, "every_epochs": 0.5}}, "set every_steps or every_epochs, not both"),
        ({"checkpoint": {"every_steps": None}}, "every_steps is null; set it, or every_epochs"),
    ],
)
def test_conflicting_sections_are_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(NEEDED | changes)
