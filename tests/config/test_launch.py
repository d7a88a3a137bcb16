"""The settings of launcher and run config: resolved to one value, or reported as a conflict."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import DeepSpeedPlugin

from lora_accel.config.launch import Launch, Precision, Settings, read_launch, reconcile
from lora_accel.config.optimizers import OPTIMIZERS
from lora_accel.config.schema import RunConfig
from lora_accel.errors import ConfigError
from tests.conftest import ROOT, run_code

# Environment that `accelerate launch` sets for the first of two processes.
TORCHRUN = {
    "WORLD_SIZE": "2",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "ACCELERATE_MIXED_PRECISION": "no",
}
BY_TOKENS: dict[str, Any] = {"batch_size": 16, "micro_batch_tokens": 4096}
PER_DEVICE: dict[str, Any] = {"micro_batch_size": 2, "gradient_accumulation_steps": 4}  # 16 per step on two devices
AUTO = "auto"
ALL_AUTO: dict[str, Any] = {
    "bf16": {"enabled": AUTO},
    "fp16": {"enabled": AUTO},
    "gradient_accumulation_steps": AUTO,
    "gradient_clipping": AUTO,
    "train_batch_size": AUTO,
    "train_micro_batch_size_per_gpu": AUTO,
}

WriteJson = Callable[..., dict[str, str]]


def config_of(**sections: Any) -> RunConfig:
    needed: dict[str, Any] = {
        "output_dir": "run",
        "model": {"name_or_path": "model"},
        "data": {"train": [{"path": "rows.jsonl"}]},
    }
    return RunConfig.model_validate(needed | sections)


def model_of(dtype: str) -> dict[str, str]:
    return {"name_or_path": "model", "dtype": dtype}


def zero(stage: int, **more: str) -> dict[str, str]:
    """Return the environment that `accelerate launch` sets for the `deepspeed_config` of a preset."""
    return TORCHRUN | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)} | more


def device_default() -> Precision:
    """Return the default precision of a device without bfloat16."""
    return Precision("no", "this machine")


def resolve(environment: dict[str, str], **sections: Any) -> Settings:
    return reconcile(config_of(**sections), read_launch(environment), device_default)


def rows_of(settings: Settings) -> dict[str, tuple[str, str]]:
    """Return (value, decided by) for each setting."""
    assert len({name for name, _, _ in settings.rows}) == len(settings.rows)
    return {name: (value, decided_by) for name, value, decided_by in settings.rows}


def error_lines(environment: dict[str, str], **sections: Any) -> list[str]:
    """Return the lines of the error that `reconcile` raises."""
    launch = read_launch(environment)
    with pytest.raises(ConfigError) as caught:
        reconcile(config_of(**sections), launch, device_default)
    return str(caught.value).split("\n")


def read_error(environment: dict[str, str]) -> str:
    """Return the error that `read_launch` raises."""
    with pytest.raises(ConfigError) as caught:
        read_launch(environment)
    return str(caught.value)


@pytest.fixture
def write_json(tmp_path: Path) -> WriteJson:
    """Return a function that writes a DeepSpeed JSON and returns the environment of a launch with it."""

    def write(stage: object = 2, zero_optimization: dict[str, Any] | None = None, **values: Any) -> dict[str, str]:
        config = {"zero_optimization": {"stage": stage} | (zero_optimization or {})} | values
        path = tmp_path / "zero.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        return TORCHRUN | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}

    return write


# --- processes and backends


def test_default_is_one_process() -> None:
    launch = read_launch({})
    assert launch == Launch(1, mixed_precision="no", deepspeed=None, source="no launcher", launcher="no launcher")
    assert (launch.zero, launch.zero_stage, launch.gathers_16bit) == ({}, 0, False)
    assert launch.offload == {"optimizer": "none", "param": "none"}
    settings = reconcile(config_of(), launch, device_default)
    assert (settings.mixed_precision, settings.deepspeed) == ("no", {})
    assert settings.rows == [
        ("processes", "1", "no launcher"),
        ("backend", "one process", "no launcher"),
        ("mixed precision", "no", "this machine"),
        ("gradient accumulation", "as needed per step", "run config"),
        ("gradient clipping", "1", "run config"),
        ("batch size", "16 examples per step", "run config"),
        ("micro-batch", "auto: before the first step", "run config"),
    ]


def test_two_processes_use_ddp() -> None:
    settings = resolve(TORCHRUN | {"ACCELERATE_MIXED_PRECISION": "bf16"}, training=PER_DEVICE | {"max_grad_norm": 0.3})
    assert (settings.mixed_precision, settings.deepspeed) == ("bf16", {})
    assert settings.rows == [
        ("processes", "2", "accelerate launch"),
        ("backend", "DDP", "accelerate launch"),
        ("mixed precision", "bf16", "accelerate launch"),
        ("gradient accumulation", "4 micro-batches", "run config"),
        ("gradient clipping", "0.3", "run config"),
        ("batch size", "16 examples per step", "run config"),
        ("micro-batch", "2 examples per device", "run config"),
    ]


@pytest.mark.parametrize(
    ("environment", "num_processes"),
    [
        (TORCHRUN, 2),
        (TORCHRUN | {"WORLD_SIZE": "16"}, 16),
        ({"WORLD_SIZE": "1"}, 1),  # one process needs no rendezvous
        ({"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}, 1),
        ({"PMI_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}, 3),  # Intel MPI and MPICH
        ({"OMPI_COMM_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}, 4),
        ({"MV2_COMM_WORLD_SIZE": "5"}, 5),
        ({"PMI_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}, 1),
        (TORCHRUN | {"PMI_SIZE": "7"}, 2),  # torchrun under MPI: the inner launcher counts
        ({"WORLD_SIZE": "", "PMI_SIZE": "3"}, 3),
    ],
)
def test_the_number_of_processes(environment: dict[str, str], num_processes: int) -> None:
    assert read_launch(environment).num_processes == num_processes


def test_master_addr_without_world_size_is_an_error() -> None:
    message = read_error({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    for fragment in ("MASTER_ADDR is set", "WORLD_SIZE is not", "cpu_ddp.yaml", "unset MASTER_ADDR"):
        assert fragment in message


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        (["RANK"], "RANK is not set"),
        (["LOCAL_RANK"], "LOCAL_RANK is not set"),
        (["MASTER_ADDR"], "MASTER_ADDR is not set"),
        (["MASTER_PORT"], "MASTER_PORT is not set"),
        (["RANK", "MASTER_PORT"], "RANK, MASTER_PORT is not set"),
        (["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"], "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
    ],
)
def test_missing_rendezvous_variables_are_an_error(missing: list[str], named: str) -> None:
    message = read_error({name: value for name, value in TORCHRUN.items() if name not in missing})
    assert f"WORLD_SIZE is 2, but {named}" in message
    assert "unset WORLD_SIZE" in message


def test_deepspeed_without_a_launcher_is_an_error() -> None:
    """For example after an `export` in the shell."""
    message = read_error({"ACCELERATE_USE_DEEPSPEED": "true"})
    assert message.startswith("ACCELERATE_USE_DEEPSPEED is true, but WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR")
    assert "unset ACCELERATE_USE_DEEPSPEED" in message


@pytest.mark.parametrize(
    ("variable", "backend"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")]
)
@pytest.mark.parametrize("value", ["true", "True", "1", "yes"])
def test_other_backends_are_not_supported(variable: str, backend: str, value: str) -> None:
    message = read_error(TORCHRUN | {variable: value})
    assert f"asks for {backend}, which is not supported" in message
    assert "accelerate_configs/zero3.yaml" in message


@pytest.mark.parametrize("value", ["false", "False", "0", "no", ""])
def test_disabled_backend_is_ignored(value: str) -> None:
    switches = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_DEEPSPEED")
    launch = read_launch(TORCHRUN | dict.fromkeys(switches, value) | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"})
    assert (launch.deepspeed, launch.zero_stage) == (None, 0)


def test_deepspeed_limits_do_not_apply_to_ddp() -> None:
    settings = resolve(
        TORCHRUN, quantization={"bits": 4}, checkpoint={"gather": "state_dict"}, model=model_of("bfloat16")
    )
    assert rows_of(settings)["backend"] == ("DDP", "accelerate launch")


# --- DeepSpeed from Accelerate's own variables


@pytest.mark.parametrize(
    ("environment", "stage", "offload", "gathers", "expected"),
    [
        (zero(1), 1, ("none", "none"), False, {"offload": "optimizer none, parameters none"}),
        (zero(2), 2, ("none", "none"), False, {"offload": "optimizer none, parameters none"}),
        (
            zero(2, ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="cpu"),
            2,
            ("cpu", "none"),
            False,
            {"offload": "optimizer cpu, parameters none"},
        ),
        (
            zero(3, ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL="false"),
            3,
            ("none", "none"),
            False,
            {"base dtype": "float32", "gather 16-bit on save": "false"},
        ),
        (
            zero(3, ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL="true", ACCELERATE_MIXED_PRECISION="bf16"),
            3,
            ("none", "none"),
            True,
            {"base dtype": "bfloat16", "gather 16-bit on save": "true"},
        ),
        (
            zero(
                3,
                ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="cpu",
                ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE="nvme",
                ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH="/local",
            ),
            3,
            ("cpu", "nvme"),
            False,
            {"offload": "optimizer cpu, parameters nvme"},
        ),
    ],
)
def test_deepspeed_from_environment_variables(
    environment: dict[str, str], stage: int, offload: tuple[str, str], gathers: bool, expected: dict[str, str]
) -> None:
    launch = read_launch(environment)
    assert (launch.zero_stage, launch.source) == (stage, "accelerate launch")
    assert (launch.offload["optimizer"], launch.offload["param"]) == offload
    assert launch.gathers_16bit is gathers
    rows = rows_of(reconcile(config_of(), launch, device_default))
    assert rows["backend"] == (f"DeepSpeed ZeRO-{stage}", "accelerate launch")
    for name, value in expected.items():
        assert rows[name] == (value, "accelerate launch")
    assert ("base dtype" in rows, "gather 16-bit on save" in rows) == (stage == 3, stage == 3)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
        {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"},
        {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu", "ACCELERATE_GRADIENT_CLIPPING": "0.5"},
        {
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme",
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": "/local",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8",
        },
    ],
)
def test_environment_variables_are_read_as_accelerate_reads_them(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    expected = DeepSpeedPlugin().deepspeed_config
    launch = read_launch(TORCHRUN | environment | {"ACCELERATE_USE_DEEPSPEED": "true"})
    assert launch.deepspeed is not None
    assert launch.zero_stage == expected["zero_optimization"]["stage"]
    for name, device in launch.offload.items():
        assert device == expected["zero_optimization"][f"offload_{name}"]["device"]
        path = launch.zero[f"offload_{name}"]["nvme_path"] if device == "nvme" else None
        assert path == expected["zero_optimization"][f"offload_{name}"]["nvme_path"]
    assert launch.gathers_16bit is expected["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    for key in ("gradient_accumulation_steps", "gradient_clipping"):
        assert launch.deepspeed.get(key, AUTO) == expected[key]


@pytest.mark.parametrize(
    ("variables", "training"),
    [
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, BY_TOKENS),  # what `accelerate config` writes by default
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, PER_DEVICE),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, PER_DEVICE),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, PER_DEVICE),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, BY_TOKENS),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1"}, BY_TOKENS),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.3"}, {"max_grad_norm": 0.3}),
        ({"ACCELERATE_GRADIENT_CLIPPING": "auto"}, {"max_grad_norm": 0.3}),
    ],
)
def test_equal_environment_variables_are_accepted(variables: dict[str, str], training: dict[str, Any]) -> None:
    settings = resolve(zero(2, **variables), training=training)
    assert settings.deepspeed["gradient_accumulation_steps"] == 1
    assert settings.deepspeed["gradient_clipping"] == training.get("max_grad_norm", 1.0)


@pytest.mark.parametrize(
    ("variables", "training", "fragments"),
    [
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"},
            BY_TOKENS,
            (
                "gradient_accumulation_steps is 8",
                "sized by training.micro_batch_tokens, not training.gradient_accumulation_steps",
            ),
        ),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"},
            PER_DEVICE,
            ("gradient_accumulation_steps is 8", "training.gradient_accumulation_steps is 4"),
        ),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"},
            {"micro_batch_size": 2},
            ("gradient_accumulation_steps is 8", "training.gradient_accumulation_steps is 1"),
        ),
        (
            {"ACCELERATE_GRADIENT_CLIPPING": "0.5"},
            BY_TOKENS,
            ("gradient_clipping is 0.5", "training.max_grad_norm is 1.0"),
        ),
    ],
)
def test_different_environment_variables_are_an_error(
    variables: dict[str, str], training: dict[str, Any], fragments: tuple[str, ...]
) -> None:
    (message,) = error_lines(zero(2, **variables), training=training)
    assert message.startswith("accelerate launch: ")
    for fragment in fragments:
        assert fragment in message


# --- DeepSpeed from a JSON file


@pytest.mark.parametrize(
    ("stage", "training", "launched", "bf16"),
    [
        (1, BY_TOKENS, "no", False),
        (2, PER_DEVICE | {"max_grad_norm": 0.25}, "bf16", True),
        (3, {"mixed_precision": "bf16"}, "no", True),
        (3, {"mixed_precision": "no"}, "bf16", False),
    ],
)
def test_auto_is_filled_from_the_run_config(
    write_json: WriteJson, stage: int, training: dict[str, Any], launched: str, bf16: bool
) -> None:
    settings = resolve(write_json(stage, **ALL_AUTO) | {"ACCELERATE_MIXED_PRECISION": launched}, training=training)
    assert settings.mixed_precision == ("bf16" if bf16 else "no")
    assert settings.deepspeed == {
        "gradient_accumulation_steps": 1,  # the loop marks the last micro-batch of a step
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": 2,
        "gradient_clipping": training.get("max_grad_norm", 1.0),
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def test_deepspeed_config_does_not_depend_on_its_source(write_json: WriteJson) -> None:
    training = PER_DEVICE | {"mixed_precision": "bf16"}
    explicit = write_json(2, bf16={"enabled": True}, gradient_accumulation_steps=4, train_batch_size=16)
    configs = [resolve(launch, training=training).deepspeed for launch in (zero(2), write_json(2), explicit)]
    assert configs[0] == configs[1] == configs[2]
    assert resolve(zero(2, WORLD_SIZE="8"), training=training).deepspeed == configs[0] | {"train_batch_size": 8}


def test_preset_json_files_fit_any_run_config() -> None:
    for stage in (2, 3):
        file = ROOT / "accelerate_configs" / "deepspeed" / f"zero{stage}.json"
        environment = TORCHRUN | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
        for training in (BY_TOKENS, PER_DEVICE | {"mixed_precision": "bf16", "max_grad_norm": 0.1}):
            settings = resolve(environment, training=training)
            assert rows_of(settings)["backend"] == (f"DeepSpeed ZeRO-{stage}", str(file))
            assert settings.mixed_precision == training.get("mixed_precision", "no")


def test_rows_name_the_json_as_source(write_json: WriteJson) -> None:
    environment = write_json(
        3,
        {"offload_param": {"device": "cpu"}, "stage3_gather_16bit_weights_on_model_save": True},
        bf16={"enabled": True},
    )
    file = environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"]
    assert resolve(environment).rows == [
        ("processes", "2", "accelerate launch"),
        ("backend", "DeepSpeed ZeRO-3", file),
        ("offload", "optimizer none, parameters cpu", file),
        ("base dtype", "bfloat16", file),
        ("gather 16-bit on save", "true", file),
        ("mixed precision", "bf16", file),
        ("gradient accumulation", "as needed per step", "run config"),
        ("gradient clipping", "1", "run config"),
        ("batch size", "16 examples per step", "run config"),
        ("micro-batch", "auto: before the first step", "run config"),
    ]


@pytest.mark.parametrize(
    ("values", "training"),
    [
        ({"gradient_accumulation_steps": 4}, PER_DEVICE),
        ({"gradient_accumulation_steps": 1}, BY_TOKENS),
        ({"gradient_accumulation_steps": 1}, {"micro_batch_size": 2}),
        ({"gradient_clipping": 1.0}, BY_TOKENS),
        ({"gradient_clipping": 1}, BY_TOKENS),
        ({"gradient_clipping": 0.3}, {"max_grad_norm": 0.3}),
        ({"gradient_clipping": 0}, {"max_grad_norm": None}),
        ({"train_batch_size": 16}, BY_TOKENS),
        ({"train_batch_size": 16}, PER_DEVICE),  # 2 examples * 4 micro-batches * 2 devices
        ({"train_batch_size": 4}, {"micro_batch_size": 2}),
        ({"train_micro_batch_size_per_gpu": 2}, PER_DEVICE),
        ({"bf16": {"enabled": True}}, {"mixed_precision": "bf16"}),
        ({"bf16": {"enabled": False}}, {"mixed_precision": "no"}),
        ({"bf16": {"enabled": AUTO}}, {"mixed_precision": "bf16"}),
        ({"fp16": {"enabled": False}}, {"mixed_precision": "bf16"}),
        ({"bf16": {}}, {"mixed_precision": "bf16"}),
    ],
)
def test_equal_json_values_are_accepted(
    write_json: WriteJson, values: dict[str, Any], training: dict[str, Any]
) -> None:
    settings = resolve(write_json(2, **values), training=training)
    assert settings.mixed_precision == training.get("mixed_precision", "no")
    assert (settings.deepspeed["gradient_accumulation_steps"], settings.deepspeed["train_batch_size"]) == (1, 2)


@pytest.mark.parametrize(
    ("values", "training", "fragments"),
    [
        (
            {"gradient_accumulation_steps": 8},
            PER_DEVICE,
            ("gradient_accumulation_steps is 8", "training.gradient_accumulation_steps is 4"),
        ),
        (
            {"gradient_accumulation_steps": 1},
            PER_DEVICE,
            ("gradient_accumulation_steps is 1", "training.gradient_accumulation_steps is 4"),
        ),
        (
            {"gradient_accumulation_steps": 2},
            {"micro_batch_size": 2},
            ("gradient_accumulation_steps is 2", "training.gradient_accumulation_steps is 1"),
        ),
        (
            {"gradient_accumulation_steps": 8},
            BY_TOKENS,
            (
                "gradient_accumulation_steps is 8",
                "sized by training.micro_batch_tokens, not training.gradient_accumulation_steps",
            ),
        ),
        ({"gradient_clipping": 0.5}, BY_TOKENS, ("gradient_clipping is 0.5", "training.max_grad_norm is 1.0")),
        ({"gradient_clipping": 0}, BY_TOKENS, ("gradient_clipping is 0,", "training.max_grad_norm is 1.0")),
        (
            {"gradient_clipping": 1.0},
            {"max_grad_norm": None},
            ("gradient_clipping is 1.0,", "training.max_grad_norm is null, so it is 0.0;"),
        ),
        ({"train_batch_size": 32}, BY_TOKENS, ("train_batch_size is 32", "training.batch_size is 16")),
        ({"train_batch_size": 8}, PER_DEVICE, ("train_batch_size is 8", "is 16")),
        (
            {"train_micro_batch_size_per_gpu": 4},
            PER_DEVICE,
            ("train_micro_batch_size_per_gpu is 4", "training.micro_batch_size is 2"),
        ),
        (
            {"train_micro_batch_size_per_gpu": 1},
            BY_TOKENS,
            (
                "train_micro_batch_size_per_gpu is 1",
                "sized by training.micro_batch_tokens, not training.micro_batch_size",
            ),
        ),
        (
            {"bf16": {"enabled": True}},
            {"mixed_precision": "no"},
            ("bf16.enabled is true", "training.mixed_precision is no"),
        ),
        (
            {"bf16": {"enabled": False}},
            {"mixed_precision": "bf16"},
            ("bf16.enabled is false", "training.mixed_precision is bf16"),
        ),
        (
            {"fp16": {"enabled": True}},
            {"mixed_precision": "bf16"},
            ("fp16.enabled is true", "training.mixed_precision is bf16"),
        ),
        (
            {"fp16": {"enabled": True}},
            {"mixed_precision": "no"},
            ("fp16.enabled is true", "training.mixed_precision is no"),
        ),
    ],
)
def test_different_json_values_are_an_error(
    write_json: WriteJson, values: dict[str, Any], training: dict[str, Any], fragments: tuple[str, ...]
) -> None:
    environment = write_json(2, **values)
    (message,) = error_lines(environment, training=training)
    assert message.startswith(environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] + ": ")
    assert 'use "auto" there, or the same value in both' in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "cannot be read: No such file"),
        ("zero_optimization: {stage: 2}", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[]", 'has no "zero_optimization": {"stage"'),
        ("{}", 'has no "zero_optimization": {"stage"'),
        ('{"zero_optimization": 2}', 'has no "zero_optimization": {"stage"'),
        ('{"zero_optimization": {}}', "zero_optimization.stage must be 1, 2 or 3"),
        ('{"zero_optimization": {"stage": "auto"}}', "zero_optimization.stage must be 1, 2 or 3"),
        ('{"zero_optimization": {"stage": "2"}}', "zero_optimization.stage must be 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 2.0}}', "zero_optimization.stage must be 1, 2 or 3"),
    ],
)
def test_invalid_json_is_an_error(tmp_path: Path, text: str | None, expected: str) -> None:
    path = tmp_path / "zero.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    message = read_error(TORCHRUN | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})
    assert message.startswith(f"deepspeed_config_file: {path}")
    assert expected in message


def test_binary_json_and_folder_are_errors(tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_bytes(b"\xff\xfe\x00")
    environment = TORCHRUN | {"ACCELERATE_USE_DEEPSPEED": "true"}
    assert "is not valid JSON" in read_error(
        environment | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero.json")}
    )
    assert "cannot be read: Is a directory" in read_error(
        environment | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path)}
    )


@pytest.mark.parametrize("file", ["", "none", "None"])
def test_none_as_json_file_means_no_file(file: str) -> None:
    launch = read_launch(zero(3, ACCELERATE_DEEPSPEED_CONFIG_FILE=file))
    assert (launch.zero_stage, launch.source) == (3, "accelerate launch")


# --- unsupported combinations


@pytest.mark.parametrize("stage", [0, 4])
def test_unsupported_zero_stage_is_an_error(write_json: WriteJson, stage: int) -> None:
    for environment in (zero(stage), write_json(stage)):
        (message,) = error_lines(environment)
        assert message.startswith(environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "accelerate launch") + ": ")
        assert f"ZeRO stage {stage}" in message
        assert "is not supported; use 1, 2 or 3, or accelerate_configs/ddp.yaml" in message


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_base_is_not_supported_under_zero3(bits: int) -> None:
    (message,) = error_lines(zero(3), quantization={"bits": bits})
    for fragment in (f"quantization.bits={bits} with ZeRO-3", "accelerate_configs/zero2.yaml", "bits=null"):
        assert fragment in message
    for stage in (1, 2):
        assert resolve(zero(stage), quantization={"bits": bits}).deepspeed["train_batch_size"] == 2


@pytest.mark.parametrize(
    ("stage", "optimizer", "param", "expected"),
    [
        (1, "cpu", "none", "offload_optimizer is supported with ZeRO stage 2 or 3, not 1"),
        (1, "none", "cpu", "offload_param is supported with ZeRO stage 3, not 1"),
        (2, "none", "cpu", "offload_param is supported with ZeRO stage 3, not 2"),
        (3, "nvme", "none", "offload_optimizer to nvme is not supported"),
        (3, "none", "nvme", "offload_param to nvme has no nvme_path"),
    ],
)
def test_unsupported_offload_is_an_error(
    write_json: WriteJson, stage: int, optimizer: str, param: str, expected: str
) -> None:
    by_variables = zero(
        stage,
        ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE=optimizer,
        ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE=param,
    )
    devices = {"offload_optimizer": {"device": optimizer}, "offload_param": {"device": param}}
    by_json = write_json(stage, devices)
    for environment in (by_variables, by_json):
        (reason,) = error_lines(environment)
        assert reason.startswith(
            f"{environment.get('ACCELERATE_DEEPSPEED_CONFIG_FILE', 'accelerate launch')}: {expected}"
        )


@pytest.mark.parametrize(
    ("stage", "zero_optimization", "offload"),
    [
        (1, {}, {"optimizer": "none", "param": "none"}),
        (1, {"offload_optimizer": None}, {"optimizer": "none", "param": "none"}),
        (1, {"offload_param": {"device": None}}, {"optimizer": "none", "param": "none"}),
        (2, {"offload_optimizer": {"device": "cpu", "pin_memory": True}}, {"optimizer": "cpu", "param": "none"}),
        (3, {"offload_optimizer": {"device": "cpu"}}, {"optimizer": "cpu", "param": "none"}),
        (3, {"offload_param": {"device": "cpu"}}, {"optimizer": "none", "param": "cpu"}),
        (3, {"offload_param": {"device": "nvme", "nvme_path": "/local"}}, {"optimizer": "none", "param": "nvme"}),
    ],
)
def test_supported_offload(
    write_json: WriteJson, stage: int, zero_optimization: dict[str, Any], offload: dict[str, str]
) -> None:
    environment = write_json(stage, zero_optimization)
    assert read_launch(environment).offload == offload
    devices, _ = rows_of(resolve(environment))["offload"]
    assert devices == f"optimizer {offload['optimizer']}, parameters {offload['param']}"


@pytest.mark.parametrize("path", [None, "", "none"])
def test_nvme_needs_a_path(write_json: WriteJson, path: str | None) -> None:
    (message,) = error_lines(write_json(3, {"offload_param": {"device": "nvme", "nvme_path": path}}))
    assert "has no nvme_path; set it to a folder on a local disk in a DeepSpeed JSON" in message


def test_state_dict_gather_under_zero3_needs_gather_16bit_on_save(write_json: WriteJson) -> None:
    state_dict: dict[str, Any] = {"checkpoint": {"gather": "state_dict"}}
    key = "stage3_gather_16bit_weights_on_model_save"
    for environment in (zero(3), write_json(3), write_json(3, {key: False})):
        (message,) = error_lines(environment, **state_dict)
        for fragment in ("checkpoint.gather=state_dict", "zero3_save_16bit_model", key, "or checkpoint.gather=auto"):
            assert fragment in message
        for other in ("auto", "parameters"):
            assert resolve(environment, checkpoint={"gather": other}).deepspeed["train_batch_size"] == 2
    gathering = [zero(3, ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL="true"), write_json(3, {key: True})]
    for environment in (*gathering, zero(1), zero(2)):
        assert resolve(environment, **state_dict).deepspeed["train_batch_size"] == 2


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("no", "bfloat16"), ("no", "float16"), ("bf16", "float32"), ("bf16", "float16")],
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_dtype_that_deepspeed_would_change_is_an_error(stage: int, precision: str, dtype: str) -> None:
    (message,) = error_lines(zero(stage, ACCELERATE_MIXED_PRECISION=precision), model=model_of(dtype))
    kept = {"no": "float32", "bf16": "bfloat16"}[precision]
    assert f"model.dtype={dtype} is not supported under DeepSpeed, which keeps all weights in {kept}" in message
    assert "set model.dtype=auto, or change training.mixed_precision" in message


@pytest.mark.parametrize(
    ("precision", "dtype"), [("no", "auto"), ("no", "float32"), ("bf16", "auto"), ("bf16", "bfloat16")]
)
def test_dtype_that_deepspeed_keeps(precision: str, dtype: str) -> None:
    settings = resolve(zero(3, ACCELERATE_MIXED_PRECISION=precision), model=model_of(dtype))
    assert settings.deepspeed["bf16"] == {"enabled": precision == "bf16", "check_grad_overflow": True}


# --- precision


@pytest.mark.parametrize(
    ("requested", "launched", "json_value", "expected"),
    [
        ("auto", None, None, ("no", "this machine")),
        ("auto", "no", None, ("no", "this machine")),  # Accelerate's default
        (None, "no", None, ("no", "this machine")),  # the name of auto in older configs
        ("auto", "bf16", None, ("bf16", "accelerate launch")),
        ("auto", "BF16", None, ("bf16", "accelerate launch")),
        ("auto", "fp16", None, ("fp16", "accelerate launch")),
        ("bf16", "no", None, ("bf16", "run config")),
        ("fp16", "bf16", None, ("fp16", "run config")),
        ("no", "bf16", None, ("no", "run config")),
        ("no", "fp16", None, ("no", "run config")),  # overrides the launcher
        ("auto", "bf16", AUTO, ("bf16", "accelerate launch")),
        ("auto", "no", True, ("bf16", "the JSON")),
        ("auto", "bf16", True, ("bf16", "the JSON")),
        ("auto", "no", False, ("no", "this machine")),
        ("bf16", "no", True, ("bf16", "run config")),
        ("bf16", "no", AUTO, ("bf16", "run config")),
    ],
)
def test_precedence_of_mixed_precision(
    write_json: WriteJson,
    requested: str | None,
    launched: str | None,
    json_value: bool | str | None,
    expected: tuple[str, str],
) -> None:
    environment = TORCHRUN if json_value is None else write_json(2, bf16={"enabled": json_value})
    if launched is not None:
        environment = environment | {"ACCELERATE_MIXED_PRECISION": launched}
    settings = resolve(environment, training={"mixed_precision": requested})
    precision, decided_by = expected
    assert settings.mixed_precision == precision
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    assert rows_of(settings)["mixed precision"] == (precision, decided_by.replace("the JSON", file))


def test_json_can_disable_the_default_precision(write_json: WriteJson) -> None:
    launch = read_launch(write_json(2, bf16={"enabled": False}))
    settings = reconcile(config_of(), launch, lambda: Precision("bf16", "this machine", "native"))
    value, decided_by = rows_of(settings)["mixed precision"]
    assert settings.mixed_precision == "no"
    assert value == "no (bf16.enabled is false)"
    assert decided_by == launch.source


def test_default_precision_is_computed_last_and_only_if_needed(write_json: WriteJson) -> None:
    def unused() -> Precision:
        raise AssertionError("called")

    launch = read_launch(write_json(2))
    assert reconcile(config_of(training={"mixed_precision": "bf16"}), launch, unused).mixed_precision == "bf16"
    with pytest.raises(ConfigError, match="gradient_clipping is 5"):  # an error needs no import of torch
        reconcile(config_of(), read_launch(write_json(2, gradient_clipping=5)), unused)


def test_reason_is_shown_in_the_rows() -> None:
    settings = reconcile(config_of(), read_launch({}), lambda: Precision("bf16", "this machine", "it is native"))
    assert rows_of(settings)["mixed precision"] == ("bf16 (it is native)", "this machine")


@pytest.mark.parametrize(
    ("environment", "training", "precision"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "fp8"),
        (zero(3, ACCELERATE_MIXED_PRECISION="fp8"), {}, "fp8"),
    ],
)
def test_unsupported_precision_is_an_error(
    environment: dict[str, str], training: dict[str, Any], precision: str
) -> None:
    (message,) = error_lines(environment, training=training)
    assert message == f"mixed precision {precision} is not supported; use bf16, fp16, or no"


@pytest.mark.parametrize("training", [{}, {"mixed_precision": "fp16"}])
def test_loop_sets_the_loss_scale_under_deepspeed(write_json: WriteJson, training: dict[str, Any]) -> None:
    """Even if the JSON sets a window and an initial scale, as Hugging Face's example does."""
    usual = {"enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 12, "hysteresis": 2}
    settings = resolve(write_json(2, fp16=usual), training=training)
    assert settings.mixed_precision == "fp16"
    assert settings.deepspeed["bf16"]["enabled"] is False
    fp16 = settings.deepspeed["fp16"]
    assert (fp16["enabled"], fp16["loss_scale"], fp16["hysteresis"], fp16["initial_scale_power"]) == (True, 0, 1, 16)
    assert fp16["loss_scale_window"] >= 10**9
    assert resolve(zero(3), training={"mixed_precision": "fp16"}).deepspeed["fp16"] == fp16


def test_fixed_loss_scale_is_not_supported(write_json: WriteJson) -> None:
    (message,) = error_lines(write_json(2, fp16={"enabled": True, "loss_scale": 128}))
    assert "fp16.loss_scale is fixed" in message
    assert "set it to 0" in message


# --- conflicts within the DeepSpeed config, and several problems at once


@pytest.mark.parametrize(
    ("sections", "environment", "expected"),
    [
        ({"bf16": {"enabled": False}}, {"ACCELERATE_MIXED_PRECISION": "bf16"}, "bf16.enabled is false, but accelerate"),
        (
            {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
            {},
            "fp16.enabled is true, but mixed precision is bf16",
        ),
        ({"bf16": {"enabled": "false"}}, {}, 'bf16.enabled is "false"'),
    ],
)
def test_contradictory_precision_of_the_launcher_is_an_error(
    write_json: WriteJson, sections: dict[str, Any], environment: dict[str, str], expected: str
) -> None:
    (reason,) = error_lines(write_json(2, **sections) | environment)
    assert expected in reason


def test_other_json_values_are_kept(write_json: WriteJson) -> None:
    section = {"enabled": AUTO, "immediate_grad_update": True, "check_grad_overflow": False}
    environment = write_json(2, bf16=section, communication_data_type="bf16")
    config = resolve(environment).deepspeed
    assert config["bf16"] == {"enabled": False, "immediate_grad_update": True, "check_grad_overflow": True}
    assert config["communication_data_type"] == "bf16"
    for default in ({}, {"communication_data_type": AUTO, "data_types": {"grad_accum_dtype": AUTO}}):
        config = resolve(write_json(2, **default)).deepspeed
        assert (config["communication_data_type"], config["data_types"]) == ("fp32", {"grad_accum_dtype": "fp32"})


@pytest.mark.parametrize("key", ["torch_autocast", "amp", "bfloat16", "elasticity", "tensor_parallel"])
def test_json_keys_that_change_the_result_are_not_supported(write_json: WriteJson, key: str) -> None:
    (message,) = error_lines(write_json(2, **{key: {"enabled": True}}))
    assert f"{key!r} is not supported: it would change the result" in message
    assert resolve(write_json(2, **{key: {"enabled": False}})).deepspeed


def test_dynamo_and_parallelism_config_are_not_supported() -> None:
    assert "dynamo_backend" in read_error(TORCHRUN | {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"})
    assert read_launch({"ACCELERATE_DYNAMO_BACKEND": "no"}).num_processes == 1
    assert "a parallelism_config" in read_error(TORCHRUN | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"})


def test_trainable_token_indices_are_not_supported_under_zero3() -> None:
    adapter = {"trainable_token_indices": [1, 2]}
    (message,) = error_lines(zero(3), adapter=adapter)
    assert message.startswith("adapter.trainable_token_indices: PEFT cannot gather them")
    resolve(zero(2), adapter=adapter)


def test_compile_is_not_supported_under_zero3() -> None:
    (message,) = error_lines(zero(3), training={"compile": True})
    assert message.startswith("training.compile with ZeRO-3")
    resolve(zero(2), training={"compile": True})


@pytest.mark.parametrize(
    ("zero_optimization", "expected"),
    [
        ({"offload_optimizer": {"device": "gpu"}}, "offload_optimizer.device is 'gpu'; it must be none, cpu or nvme"),
        ({"cpu_offload": True}, "cpu_offload is deprecated"),
    ],
)
def test_invalid_or_deprecated_offload_is_an_error(
    write_json: WriteJson, zero_optimization: dict[str, Any], expected: str
) -> None:
    (reason,) = error_lines(write_json(2, zero_optimization))
    assert expected in reason


def test_auto_offload_is_none(write_json: WriteJson) -> None:
    assert read_launch(write_json(2, {"offload_optimizer": {"device": AUTO}})).offload["optimizer"] == "none"


@pytest.mark.parametrize("key", ["bf16", "fp16", "data_types"])
def test_json_section_must_be_an_object(write_json: WriteJson, key: str) -> None:
    assert f"{key} must be an object, not true" in read_error(write_json(2, **{key: True}))
    assert "offload_param must be an object" in read_error(write_json(3, {"offload_param": "cpu"}))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("WORLD_SIZE", "two"),
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "x"),
        ("ACCELERATE_GRADIENT_CLIPPING", "none"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1.5"),
    ],
)
def test_variable_that_is_not_a_number_is_reported(name: str, text: str) -> None:
    assert f"{name} is {text!r}, which is not a number" in read_error(zero(2) | {name: text})


def test_json_file_is_ignored_without_deepspeed() -> None:
    launch = read_launch(TORCHRUN | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "left.json"})
    assert (launch.deepspeed, launch.source) == (None, "accelerate launch")


def test_all_problems_are_in_one_message(write_json: WriteJson) -> None:
    environment = write_json(
        3,
        {"offload_optimizer": {"device": "nvme"}, "offload_param": {"device": "nvme"}},
        bf16={"enabled": True},
        fp16={"enabled": True},
        gradient_accumulation_steps=8,
        gradient_clipping=0.5,
        train_batch_size=32,
        train_micro_batch_size_per_gpu=4,
        optimizer={"type": "Lamb"},
        scheduler={"type": "OneCycle"},
    )
    message = error_lines(
        environment,
        training={"mixed_precision": "no"},
        quantization={"bits": 4},
        checkpoint={"gather": "state_dict"},
        model=model_of("bfloat16"),
    )
    file = re.escape(environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
    expected = [
        f"{file}: bf16.enabled is true",
        f"{file}: fp16.enabled is true",
        "model.dtype=bfloat16",
        f"{file}: gradient_accumulation_steps is 8",
        f"{file}: gradient_clipping is 0.5",
        f"{file}: train_batch_size is 32",
        f"{file}: train_micro_batch_size_per_gpu is 4",
        f"{file}: optimizer.type is",
        f"{file}: scheduler.type is",
        "quantization.bits=4 with ZeRO-3",
        f"{file}: offload_optimizer to nvme",
        f"{file}: offload_param to nvme",
        "checkpoint.gather=state_dict",
    ]
    for line, pattern in zip(message, expected, strict=True):
        assert re.match(pattern, line), line


def test_read_launch_and_reconcile_do_not_import_torch() -> None:
    code = (
        "import sys\n"
        "from lora_accel.config.launch import Precision, read_launch, reconcile\n"
        "from lora_accel.config.schema import RunConfig\n"
        "needed = {'output_dir': 'run', 'model': {'name_or_path': 'm'}, 'data': {'train': [{'path': 'x'}]}}\n"
        f"environment = {TORCHRUN | {'ACCELERATE_USE_DEEPSPEED': 'true'}}\n"
        "default = lambda: Precision('no', 'this machine')\n"
        "print(reconcile(RunConfig.model_validate(needed), read_launch(environment), default).rows[1][1])\n"
        "heavy = ('torch', 'numpy', 'transformers', 'accelerate', 'deepspeed')\n"
        "print(*[name for name in heavy if name in sys.modules])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ran.stdout.splitlines() == ["DeepSpeed ZeRO-2", ""]


def test_unsupported_config_is_reported_before_torch_is_imported(
    make_config: Callable[..., RunConfig], config_file: Callable[[RunConfig], Path]
) -> None:
    config = make_config(quantization={"bits": 4})
    file = config_file(config)
    code = (
        "import sys\n"
        "from lora_accel.train import main\n"
        f"code = main(['--config', {str(file)!r}])\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
        "sys.exit(code)\n"
    )
    environment = TORCHRUN | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    ran = run_code(code, **environment)
    assert (ran.returncode, ran.stdout) == (2, "[]\n")
    assert ran.stderr.startswith("error: quantization.bits=4 with ZeRO-3 is not supported: quantized weights cannot")
    assert "Traceback" not in ran.stderr
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS])
def test_deepspeed_trains_with_some_optimizers(optimizer: str) -> None:
    """ZeRO splits what the others need in one piece."""
    environment, training = zero(2), {"optimizer": optimizer}
    if OPTIMIZERS[optimizer].zero_problem:
        (message,) = error_lines(environment, training=training)
        assert message.startswith(f"training.optimizer={optimizer} is not supported under DeepSpeed: ")
        assert message.endswith(". Use adamw, lion or sgd, or DDP (accelerate_configs/ddp.yaml)")
    else:
        resolve(environment, training=training)
    resolve(TORCHRUN, training=training)


def test_offload_is_for_adamw(write_json: WriteJson) -> None:
    values = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    (message,) = error_lines(write_json(2, **values), training={"optimizer": "lion"})
    assert "offload_optimizer with training.optimizer=lion is not supported" in message
    resolve(write_json(2, **values), training={"optimizer": "adamw"})


def test_null_turns_clipping_off_under_deepspeed() -> None:
    settings = resolve(zero(2), training={"max_grad_norm": None})
    assert settings.deepspeed["gradient_clipping"] == 0.0
    assert ("gradient clipping", "none", "run config") in settings.rows
