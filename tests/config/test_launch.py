"""What the launcher says and what the run config says, brought to one value or refused by name."""

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
from lora_accel.config.schema import RunConfig
from lora_accel.errors import ConfigError
from tests.conftest import ROOT, run_code

# What torchrun, and so `accelerate launch`, leaves for each of two processes.
TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
BY_TOKENS: dict[str, Any] = {"batch_size": 16, "micro_batch_tokens": 4096}
PER_DEVICE: dict[str, Any] = {"micro_batch_size": 2, "gradient_accumulation_steps": 4}  # 16 a step on two devices
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
    """The environment that `accelerate launch` makes of a preset's `deepspeed_config`."""
    return TORCHRUN | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)} | more


def of_machine() -> Precision:
    """The precision of a device without bfloat16."""
    return Precision("no", "this machine")


def settle(environment: dict[str, str], **sections: Any) -> Settings:
    return reconcile(config_of(**sections), read_launch(environment), of_machine)


def rows_of(settings: Settings) -> dict[str, tuple[str, str]]:
    """(value, who decided) under each setting."""
    assert len({name for name, _, _ in settings.rows}) == len(settings.rows)
    return {name: (value, who) for name, value, who in settings.rows}


def refused(environment: dict[str, str], **sections: Any) -> list[str]:
    """Return the reasons why the two sides cannot agree, each a line."""
    launch = read_launch(environment)
    with pytest.raises(ConfigError) as caught:
        reconcile(config_of(**sections), launch, of_machine)
    return str(caught.value).split("\n")


def unread(environment: dict[str, str]) -> str:
    """Return why what the launcher left is refused without a look at the run config."""
    with pytest.raises(ConfigError) as caught:
        read_launch(environment)
    return str(caught.value)


@pytest.fixture
def write_json(tmp_path: Path) -> WriteJson:
    """Write a DeepSpeed JSON and return the environment of a launch that names it."""

    def write(stage: object = 2, zero_optimization: dict[str, Any] | None = None, **values: Any) -> dict[str, str]:
        whole = {"zero_optimization": {"stage": stage} | (zero_optimization or {})} | values
        path = tmp_path / "zero.json"
        path.write_text(json.dumps(whole), encoding="utf-8")
        return TORCHRUN | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}

    return write


# --- processes and backends


def test_without_a_launcher_one_process_runs() -> None:
    launch = read_launch({})
    assert launch == Launch(num_processes=1, mixed_precision="no", deepspeed=None, source="accelerate launch")
    assert (launch.zero, launch.zero_stage, launch.gathers_16bit) == ({}, 0, False)
    assert launch.offload == {"optimizer": "none", "param": "none"}
    settings = reconcile(config_of(), launch, of_machine)
    assert (settings.mixed_precision, settings.deepspeed) == ("no", {})
    assert settings.rows == [
        ("processes", "1", "accelerate launch"),
        ("backend", "one process", "accelerate launch"),
        ("mixed precision", "no", "this machine"),
        ("gradient accumulation", "as many micro-batches as a step needs", "run config"),
        ("gradient clipping", "1", "run config"),
        ("batch size", "16 examples a step", "run config"),
        ("micro-batch", "4096 tokens a device", "run config"),
    ]


def test_two_processes_run_under_ddp() -> None:
    settings = settle(TORCHRUN | {"ACCELERATE_MIXED_PRECISION": "bf16"}, training=PER_DEVICE | {"max_grad_norm": 0.3})
    assert (settings.mixed_precision, settings.deepspeed) == ("bf16", {})
    assert settings.rows == [
        ("processes", "2", "accelerate launch"),
        ("backend", "DDP", "accelerate launch"),
        ("mixed precision", "bf16", "accelerate launch"),
        ("gradient accumulation", "4 micro-batches", "run config"),
        ("gradient clipping", "0.3", "run config"),
        ("batch size", "16 examples a step", "run config"),
        ("micro-batch", "2 examples a device", "run config"),
    ]


@pytest.mark.parametrize(
    ("environment", "num_processes"),
    [
        (TORCHRUN, 2),
        (TORCHRUN | {"WORLD_SIZE": "16"}, 16),
        ({"WORLD_SIZE": "1"}, 1),  # one process needs nobody to meet
        ({"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}, 1),
        ({"PMI_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}, 3),  # Intel MPI and MPICH
        ({"OMPI_COMM_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}, 4),
        ({"MV2_COMM_WORLD_SIZE": "5"}, 5),
        ({"PMI_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}, 1),
        (TORCHRUN | {"PMI_SIZE": "7"}, 2),  # torchrun under a batch system's MPI: the nearest launcher counts
        ({"WORLD_SIZE": "", "PMI_SIZE": "3"}, 3),
    ],
)
def test_the_number_of_processes(environment: dict[str, str], num_processes: int) -> None:
    assert read_launch(environment).num_processes == num_processes


def test_several_processes_asked_for_and_one_started_is_refused() -> None:
    said = unread({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    for bit in ("MASTER_ADDR is set", "WORLD_SIZE is not", "cpu_ddp.yaml", "unset MASTER_ADDR"):
        assert bit in said


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
def test_processes_that_could_not_meet_are_refused(missing: list[str], named: str) -> None:
    said = unread({name: value for name, value in TORCHRUN.items() if name not in missing})
    assert f"WORLD_SIZE is 2, but {named}" in said
    assert "unset WORLD_SIZE" in said


def test_deepspeed_without_a_launcher_is_refused() -> None:
    """As after an `export` that was forgotten."""
    said = unread({"ACCELERATE_USE_DEEPSPEED": "true"})
    assert said.startswith("ACCELERATE_USE_DEEPSPEED is true, but WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR")
    assert "unset ACCELERATE_USE_DEEPSPEED" in said


@pytest.mark.parametrize(
    ("variable", "backend"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")]
)
@pytest.mark.parametrize("word", ["true", "True", "1", "yes"])
def test_other_backends_are_refused_by_name(variable: str, backend: str, word: str) -> None:
    said = unread(TORCHRUN | {variable: word})
    assert f"asks for {backend}, which is not supported" in said
    assert "accelerate_configs/zero3.yaml" in said


@pytest.mark.parametrize("word", ["false", "False", "0", "no", ""])
def test_a_backend_that_is_switched_off_does_not_run(word: str) -> None:
    switches = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_DEEPSPEED")
    launch = read_launch(TORCHRUN | dict.fromkeys(switches, word) | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"})
    assert (launch.deepspeed, launch.zero_stage) == (None, 0)


def test_what_another_backend_could_not_do_is_no_problem_without_deepspeed() -> None:
    settings = settle(
        TORCHRUN, quantization={"bits": 4}, checkpoint={"gather": "state_dict"}, model=model_of("bfloat16")
    )
    assert rows_of(settings)["backend"] == ("DDP", "accelerate launch")


# --- DeepSpeed from Accelerate's own variables


@pytest.mark.parametrize(
    ("environment", "stage", "offload", "gathers", "rows"),
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
def test_deepspeed_from_accelerates_own_variables(
    environment: dict[str, str], stage: int, offload: tuple[str, str], gathers: bool, rows: dict[str, str]
) -> None:
    launch = read_launch(environment)
    assert (launch.zero_stage, launch.source) == (stage, "accelerate launch")
    assert (launch.offload["optimizer"], launch.offload["param"]) == offload
    assert launch.gathers_16bit is gathers
    told = rows_of(reconcile(config_of(), launch, of_machine))
    assert told["backend"] == (f"DeepSpeed ZeRO-{stage}", "accelerate launch")
    assert {name: told[name] for name in rows} == {name: (value, "accelerate launch") for name, value in rows.items()}
    assert ("base dtype" in told, "gather 16-bit on save" in told) == (stage == 3, stage == 3)


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
def test_accelerate_makes_the_same_of_these_variables(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    theirs = DeepSpeedPlugin().deepspeed_config
    ours = read_launch(TORCHRUN | environment | {"ACCELERATE_USE_DEEPSPEED": "true"})
    assert ours.deepspeed is not None
    assert ours.zero_stage == theirs["zero_optimization"]["stage"]
    for name, device in ours.offload.items():
        assert device == theirs["zero_optimization"][f"offload_{name}"]["device"]
        path = ours.zero[f"offload_{name}"]["nvme_path"] if device == "nvme" else None
        assert path == theirs["zero_optimization"][f"offload_{name}"]["nvme_path"]
    assert ours.gathers_16bit is theirs["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    for key in ("gradient_accumulation_steps", "gradient_clipping"):
        assert ours.deepspeed.get(key, AUTO) == theirs[key]


@pytest.mark.parametrize(
    ("variables", "training"),
    [
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, BY_TOKENS),  # what `accelerate config` writes unasked
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, PER_DEVICE),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, PER_DEVICE),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, PER_DEVICE),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, BY_TOKENS),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1"}, BY_TOKENS),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.3"}, {"max_grad_norm": 0.3}),
        ({"ACCELERATE_GRADIENT_CLIPPING": "auto"}, {"max_grad_norm": 0.3}),
    ],
)
def test_accelerates_variables_that_agree_are_accepted(variables: dict[str, str], training: dict[str, Any]) -> None:
    settings = settle(zero(2, **variables), training=training)
    assert settings.deepspeed["gradient_accumulation_steps"] == 1
    assert settings.deepspeed["gradient_clipping"] == training.get("max_grad_norm", 1.0)


@pytest.mark.parametrize(
    ("variables", "training", "bits"),
    [
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"},
            BY_TOKENS,
            ("gradient_accumulation_steps is 8", "cut by tokens, not training.gradient_accumulation_steps"),
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
def test_accelerates_variables_that_differ_are_refused(
    variables: dict[str, str], training: dict[str, Any], bits: tuple[str, ...]
) -> None:
    (said,) = refused(zero(2, **variables), training=training)
    assert said.startswith("accelerate launch: ")
    for bit in bits:
        assert bit in said


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
def test_every_auto_is_filled_from_the_run_config(
    write_json: WriteJson, stage: int, training: dict[str, Any], launched: str, bf16: bool
) -> None:
    settings = settle(write_json(stage, **ALL_AUTO) | {"ACCELERATE_MIXED_PRECISION": launched}, training=training)
    assert settings.mixed_precision == ("bf16" if bf16 else "no")
    assert settings.deepspeed == {
        "gradient_accumulation_steps": 1,  # the loop itself says which micro-batch is a step's last
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": 2,
        "gradient_clipping": training.get("max_grad_norm", 1.0),
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def test_deepspeed_is_given_the_same_however_it_was_asked_for(write_json: WriteJson) -> None:
    training = PER_DEVICE | {"mixed_precision": "bf16"}
    with_values = write_json(2, bf16={"enabled": True}, gradient_accumulation_steps=4, train_batch_size=16)
    given = [settle(asked, training=training).deepspeed for asked in (zero(2), write_json(2), with_values)]
    assert given[0] == given[1] == given[2]
    assert settle(zero(2, WORLD_SIZE="8"), training=training).deepspeed == given[0] | {"train_batch_size": 8}


def test_the_presets_json_files_agree_with_any_run_config() -> None:
    for stage in (2, 3):
        file = ROOT / "accelerate_configs" / "deepspeed" / f"zero{stage}.json"
        asked = TORCHRUN | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
        for training in (BY_TOKENS, PER_DEVICE | {"mixed_precision": "bf16", "max_grad_norm": 0.1}):
            settings = settle(asked, training=training)
            assert rows_of(settings)["backend"] == (f"DeepSpeed ZeRO-{stage}", str(file))
            assert settings.mixed_precision == training.get("mixed_precision", "no")


def test_what_the_json_decides_is_told_with_its_name(write_json: WriteJson) -> None:
    asked = write_json(
        3,
        {"offload_param": {"device": "cpu"}, "stage3_gather_16bit_weights_on_model_save": True},
        bf16={"enabled": True},
    )
    file = asked["ACCELERATE_DEEPSPEED_CONFIG_FILE"]
    assert settle(asked).rows == [
        ("processes", "2", "accelerate launch"),
        ("backend", "DeepSpeed ZeRO-3", file),
        ("offload", "optimizer none, parameters cpu", file),
        ("base dtype", "bfloat16", file),
        ("gather 16-bit on save", "true", file),
        ("mixed precision", "bf16", file),
        ("gradient accumulation", "as many micro-batches as a step needs", "run config"),
        ("gradient clipping", "1", "run config"),
        ("batch size", "16 examples a step", "run config"),
        ("micro-batch", "4096 tokens a device", "run config"),
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
def test_values_of_the_json_that_agree_are_accepted(
    write_json: WriteJson, values: dict[str, Any], training: dict[str, Any]
) -> None:
    settings = settle(write_json(2, **values), training=training)
    assert settings.mixed_precision == training.get("mixed_precision", "no")
    assert (settings.deepspeed["gradient_accumulation_steps"], settings.deepspeed["train_batch_size"]) == (1, 2)


@pytest.mark.parametrize(
    ("values", "training", "bits"),
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
            ("gradient_accumulation_steps is 8", "cut by tokens, not training.gradient_accumulation_steps"),
        ),
        ({"gradient_clipping": 0.5}, BY_TOKENS, ("gradient_clipping is 0.5", "training.max_grad_norm is 1.0")),
        ({"gradient_clipping": 0}, BY_TOKENS, ("gradient_clipping is 0,", "training.max_grad_norm is 1.0")),
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
            ("train_micro_batch_size_per_gpu is 1", "cut by tokens, not training.micro_batch_size"),
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
def test_values_of_the_json_that_differ_are_refused(
    write_json: WriteJson, values: dict[str, Any], training: dict[str, Any], bits: tuple[str, ...]
) -> None:
    asked = write_json(2, **values)
    (said,) = refused(asked, training=training)
    assert said.startswith(asked["ACCELERATE_DEEPSPEED_CONFIG_FILE"] + ": ")
    assert re.search(r'(say|use) "auto" there, or the same in both', said)
    for bit in bits:
        assert bit in said


@pytest.mark.parametrize("key", ["optimizer", "scheduler"])
def test_an_optimizer_or_scheduler_of_the_json_is_refused(write_json: WriteJson, key: str) -> None:
    asked = write_json(2, **{key: {"type": "AdamW", "params": {"lr": AUTO}}})
    (said,) = refused(asked)
    assert said.startswith(asked["ACCELERATE_DEEPSPEED_CONFIG_FILE"] + f": '{key}' would replace")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read: No such file"),
        ("zero_optimization: {stage: 2}", "is no JSON"),
        ("", "is no JSON"),
        ("[]", 'has no "zero_optimization": {"stage"'),
        ("{}", 'has no "zero_optimization": {"stage"'),
        ('{"zero_optimization": 2}', 'has no "zero_optimization": {"stage"'),
        ('{"zero_optimization": {}}', "zero_optimization.stage must be 1, 2 or 3"),
        ('{"zero_optimization": {"stage": "auto"}}', "zero_optimization.stage must be 1, 2 or 3"),
        ('{"zero_optimization": {"stage": "2"}}', "zero_optimization.stage must be 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 2.0}}', "zero_optimization.stage must be 1, 2 or 3"),
    ],
)
def test_a_json_that_cannot_be_used_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "zero.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    refusal = unread(TORCHRUN | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})
    assert refusal.startswith(f"deepspeed_config_file: {path}")
    assert said in refusal


def test_a_json_that_is_no_text_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_bytes(b"\xff\xfe\x00")
    asked = TORCHRUN | {"ACCELERATE_USE_DEEPSPEED": "true"}
    assert "is no JSON" in unread(asked | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero.json")})
    assert "cannot be read: Is a directory" in unread(asked | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path)})


@pytest.mark.parametrize("file", ["", "none", "None"])
def test_no_json_is_named(file: str) -> None:
    launch = read_launch(zero(3, ACCELERATE_DEEPSPEED_CONFIG_FILE=file))
    assert (launch.zero_stage, launch.source) == (3, "accelerate launch")


# --- what cannot work


@pytest.mark.parametrize("stage", [0, 4])
def test_a_stage_that_does_not_exist_or_partitions_nothing_is_refused(write_json: WriteJson, stage: int) -> None:
    for asked in (zero(stage), write_json(stage)):
        (said,) = refused(asked)
        assert said.startswith(asked.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "accelerate launch") + ": ")
        assert f"ZeRO stage {stage}" in said
        assert "use 1, 2 or 3, or accelerate_configs/ddp.yaml" in said


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_refused_under_zero3_alone(bits: int) -> None:
    (said,) = refused(zero(3), quantization={"bits": bits})
    for bit in (f"quantization.bits={bits} with ZeRO-3", "accelerate_configs/zero2.yaml", "quantization.bits=null"):
        assert bit in said
    for stage in (1, 2):
        assert settle(zero(stage), quantization={"bits": bits}).deepspeed["train_batch_size"] == 2


@pytest.mark.parametrize(
    ("stage", "optimizer", "param", "said"),
    [
        (1, "cpu", "none", "offload_optimizer is supported here with ZeRO stage 2 or 3, not 1"),
        (1, "none", "cpu", "offload_param is supported here with ZeRO stage 3, not 1"),
        (2, "none", "cpu", "offload_param is supported here with ZeRO stage 3, not 2"),
        (3, "nvme", "none", "offload_optimizer to nvme is not supported"),
        (3, "none", "nvme", "offload_param to nvme has no nvme_path"),
    ],
)
def test_offload_that_cannot_work_is_refused(
    write_json: WriteJson, stage: int, optimizer: str, param: str, said: str
) -> None:
    by_variables = zero(
        stage,
        ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE=optimizer,
        ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE=param,
    )
    devices = {"offload_optimizer": {"device": optimizer}, "offload_param": {"device": param}}
    by_json = write_json(stage, devices)
    for asked in (by_variables, by_json):
        (reason,) = refused(asked)
        assert reason.startswith(f"{asked.get('ACCELERATE_DEEPSPEED_CONFIG_FILE', 'accelerate launch')}: {said}")


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
def test_offload_that_works(
    write_json: WriteJson, stage: int, zero_optimization: dict[str, Any], offload: dict[str, str]
) -> None:
    asked = write_json(stage, zero_optimization)
    assert read_launch(asked).offload == offload
    where, _ = rows_of(settle(asked))["offload"]
    assert where == f"optimizer {offload['optimizer']}, parameters {offload['param']}"


@pytest.mark.parametrize("path", [None, "", "none"])
def test_nvme_needs_a_folder(write_json: WriteJson, path: str | None) -> None:
    (said,) = refused(write_json(3, {"offload_param": {"device": "nvme", "nvme_path": path}}))
    assert "has no nvme_path; give a folder of a local disk in a DeepSpeed JSON" in said


def test_a_state_dict_is_gathered_under_zero3_only_where_deepspeed_gathers_it(write_json: WriteJson) -> None:
    whole: dict[str, Any] = {"checkpoint": {"gather": "state_dict"}}
    key = "stage3_gather_16bit_weights_on_model_save"
    for asked in (zero(3), write_json(3), write_json(3, {key: False})):
        (said,) = refused(asked, **whole)
        for bit in ("checkpoint.gather=state_dict", "zero3_save_16bit_model", key, "or let gather be auto"):
            assert bit in said
        for other in ("auto", "parameters"):
            assert settle(asked, checkpoint={"gather": other}).deepspeed["train_batch_size"] == 2
    gathering = [zero(3, ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL="true"), write_json(3, {key: True})]
    for asked in (*gathering, zero(1), zero(2)):
        assert settle(asked, **whole).deepspeed["train_batch_size"] == 2


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("no", "bfloat16"), ("no", "float16"), ("bf16", "float32"), ("bf16", "float16")],
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_dtype_that_deepspeed_would_not_hold_is_refused(stage: int, precision: str, dtype: str) -> None:
    (said,) = refused(zero(stage, ACCELERATE_MIXED_PRECISION=precision), model=model_of(dtype))
    held = {"no": "float32", "bf16": "bfloat16"}[precision]
    assert f"model.dtype={dtype} under DeepSpeed, which keeps all weights in {held} at mixed precision" in said
    assert "let model.dtype be auto, or change training.mixed_precision" in said


@pytest.mark.parametrize(
    ("precision", "dtype"), [("no", "auto"), ("no", "float32"), ("bf16", "auto"), ("bf16", "bfloat16")]
)
def test_a_dtype_that_deepspeed_holds(precision: str, dtype: str) -> None:
    settings = settle(zero(3, ACCELERATE_MIXED_PRECISION=precision), model=model_of(dtype))
    assert settings.deepspeed["bf16"] == {"enabled": precision == "bf16", "check_grad_overflow": True}


# --- precision


@pytest.mark.parametrize(
    ("asked", "launched", "of_json", "decided"),
    [
        ("auto", None, None, ("no", "this machine")),
        ("auto", "no", None, ("no", "this machine")),  # Accelerate writes it where nobody has asked for anything
        (None, "no", None, ("no", "this machine")),  # what auto was called before
        ("auto", "bf16", None, ("bf16", "accelerate launch")),
        ("auto", "BF16", None, ("bf16", "accelerate launch")),
        ("auto", "fp16", None, ("fp16", "accelerate launch")),
        ("bf16", "no", None, ("bf16", "run config")),
        ("fp16", "bf16", None, ("fp16", "run config")),
        ("no", "bf16", None, ("no", "run config")),
        ("no", "fp16", None, ("no", "run config")),  # what the launcher asks for does not matter any more
        ("auto", "bf16", AUTO, ("bf16", "accelerate launch")),
        ("auto", "no", True, ("bf16", "the JSON")),
        ("auto", "bf16", True, ("bf16", "the JSON")),
        ("auto", "no", False, ("no", "this machine")),
        ("bf16", "no", True, ("bf16", "run config")),
        ("bf16", "no", AUTO, ("bf16", "run config")),
    ],
)
def test_who_decides_the_precision(
    write_json: WriteJson,
    asked: str | None,
    launched: str | None,
    of_json: bool | str | None,
    decided: tuple[str, str],
) -> None:
    environment = TORCHRUN if of_json is None else write_json(2, bf16={"enabled": of_json})
    if launched is not None:
        environment = environment | {"ACCELERATE_MIXED_PRECISION": launched}
    settings = settle(environment, training={"mixed_precision": asked})
    precision, who = decided
    assert settings.mixed_precision == precision
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    assert rows_of(settings)["mixed precision"] == (precision, who.replace("the JSON", file))


def test_a_default_that_the_json_switches_off_is_not_taken(write_json: WriteJson) -> None:
    launch = read_launch(write_json(2, bf16={"enabled": False}))
    settings = reconcile(config_of(), launch, lambda: Precision("bf16", "this machine", "native"))
    value, who = rows_of(settings)["mixed precision"]
    assert settings.mixed_precision == "no"
    assert value == "no (bf16.enabled is false)"
    assert who == launch.source


def test_the_machine_is_asked_last_and_only_if_nobody_else_decides(write_json: WriteJson) -> None:
    def unasked() -> Precision:
        raise AssertionError("asked")

    launch = read_launch(write_json(2))
    assert reconcile(config_of(training={"mixed_precision": "bf16"}), launch, unasked).mixed_precision == "bf16"
    with pytest.raises(ConfigError, match="gradient_clipping is 5"):  # a mistake costs no import of torch
        reconcile(config_of(), read_launch(write_json(2, gradient_clipping=5)), unasked)


def test_the_reason_stands_in_the_table() -> None:
    settings = reconcile(config_of(), read_launch({}), lambda: Precision("bf16", "this machine", "it is native"))
    assert rows_of(settings)["mixed precision"] == ("bf16 (it is native)", "this machine")


@pytest.mark.parametrize(
    ("environment", "training", "precision"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "fp8"),
        (zero(3, ACCELERATE_MIXED_PRECISION="fp8"), {}, "fp8"),
    ],
)
def test_a_precision_that_is_not_supported(
    environment: dict[str, str], training: dict[str, Any], precision: str
) -> None:
    (said,) = refused(environment, training=training)
    assert said == f"mixed precision {precision} is not supported; use bf16, fp16, or no"


@pytest.mark.parametrize("training", [{}, {"mixed_precision": "fp16"}])
def test_fp16_under_deepspeed_leaves_the_scale_to_the_loop(write_json: WriteJson, training: dict[str, Any]) -> None:
    """Hugging Face's usual JSON names a window and a first scale; the rule is the loop's all the same."""
    usual = {"enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 12, "hysteresis": 2}
    settings = settle(write_json(2, fp16=usual), training=training)
    assert settings.mixed_precision == "fp16"
    assert settings.deepspeed["bf16"]["enabled"] is False
    fp16 = settings.deepspeed["fp16"]
    assert (fp16["enabled"], fp16["loss_scale"], fp16["hysteresis"], fp16["initial_scale_power"]) == (True, 0, 1, 16)
    assert fp16["loss_scale_window"] >= 10**9
    assert settle(zero(3), training={"mixed_precision": "fp16"}).deepspeed["fp16"] == fp16


def test_a_fixed_loss_scale_is_not_supported(write_json: WriteJson) -> None:
    (said,) = refused(write_json(2, fp16={"enabled": True, "loss_scale": 128}))
    assert "fp16.loss_scale is fixed" in said
    assert "set it to 0" in said


# --- all at once


@pytest.mark.parametrize(
    ("sections", "environment", "said"),
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
def test_a_precision_that_the_launcher_contradicts_itself_on_is_refused(
    write_json: WriteJson, sections: dict[str, Any], environment: dict[str, str], said: str
) -> None:
    (reason,) = refused(write_json(2, **sections) | environment)
    assert said in reason


def test_what_nobody_else_owns_stays_as_the_json_says(write_json: WriteJson) -> None:
    section = {"enabled": AUTO, "immediate_grad_update": True, "check_grad_overflow": False}
    asked = write_json(2, bf16=section, communication_data_type="bf16")
    given = settle(asked).deepspeed
    assert given["bf16"] == {"enabled": False, "immediate_grad_update": True, "check_grad_overflow": True}
    assert given["communication_data_type"] == "bf16"
    for left_open in ({}, {"communication_data_type": AUTO, "data_types": {"grad_accum_dtype": AUTO}}):
        given = settle(write_json(2, **left_open)).deepspeed
        assert (given["communication_data_type"], given["data_types"]) == ("fp32", {"grad_accum_dtype": "fp32"})


@pytest.mark.parametrize("key", ["torch_autocast", "amp", "bfloat16", "elasticity", "tensor_parallel"])
def test_what_would_change_the_result_behind_the_runs_back_is_refused(write_json: WriteJson, key: str) -> None:
    (said,) = refused(write_json(2, **{key: {"enabled": True}}))
    assert f"{key!r} would change what is computed" in said
    (said,) = refused(write_json(3, {"zero_quantized_gradients": True}))
    assert "zero_optimization.zero_quantized_gradients would change" in said


def test_compiling_and_other_parallelism_of_the_launcher_are_refused() -> None:
    assert "dynamo_backend" in unread(TORCHRUN | {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"})
    assert read_launch({"ACCELERATE_DYNAMO_BACKEND": "no"}).num_processes == 1
    assert "a parallelism_config" in unread(TORCHRUN | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"})


def test_single_trained_tokens_are_refused_under_zero3_alone() -> None:
    adapter = {"trainable_token_indices": [1, 2]}
    (said,) = refused(zero(3), adapter=adapter)
    assert said.startswith("adapter.trainable_token_indices: PEFT cannot gather them")
    settle(zero(2), adapter=adapter)


def test_compiled_layers_are_refused_under_zero3_alone() -> None:
    (said,) = refused(zero(3), training={"compile": True})
    assert said.startswith("training.compile with ZeRO-3")
    settle(zero(2), training={"compile": True})


@pytest.mark.parametrize(
    ("zero_optimization", "said"),
    [
        ({"offload_optimizer": {"device": "gpu"}}, "offload_optimizer.device is 'gpu'; it must be none, cpu or nvme"),
        ({"cpu_offload": True}, "cpu_offload is no longer read"),
    ],
)
def test_an_offload_that_would_not_be_seen_is_refused(
    write_json: WriteJson, zero_optimization: dict[str, Any], said: str
) -> None:
    (reason,) = refused(write_json(2, zero_optimization))
    assert said in reason


def test_an_offload_of_auto_is_none(write_json: WriteJson) -> None:
    assert read_launch(write_json(2, {"offload_optimizer": {"device": AUTO}})).offload["optimizer"] == "none"


@pytest.mark.parametrize("key", ["bf16", "fp16", "data_types"])
def test_a_section_of_the_json_that_is_none_is_refused(write_json: WriteJson, key: str) -> None:
    assert f"{key} must be an object, not true" in unread(write_json(2, **{key: True}))
    assert "offload_param must be an object" in unread(write_json(3, {"offload_param": "cpu"}))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("WORLD_SIZE", "two"),
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "x"),
        ("ACCELERATE_GRADIENT_CLIPPING", "none"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1.5"),
    ],
)
def test_a_variable_that_is_no_number_is_named(name: str, text: str) -> None:
    assert f"{name} is {text!r}, which is no number" in unread(zero(2) | {name: text})


def test_a_json_left_in_the_environment_decides_nothing_without_deepspeed() -> None:
    launch = read_launch(TORCHRUN | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "left.json"})
    assert (launch.deepspeed, launch.source) == (None, "accelerate launch")


def test_every_problem_is_told_in_one_message(write_json: WriteJson) -> None:
    asked = write_json(
        3,
        {"offload_optimizer": {"device": "nvme"}, "offload_param": {"device": "nvme"}},
        bf16={"enabled": True},
        fp16={"enabled": True},
        gradient_accumulation_steps=8,
        gradient_clipping=0.5,
        train_batch_size=32,
        train_micro_batch_size_per_gpu=4,
        optimizer={"type": "AdamW"},
        scheduler={"type": "WarmupLR"},
    )
    said = refused(
        asked,
        training={"mixed_precision": "no"},
        quantization={"bits": 4},
        checkpoint={"gather": "state_dict"},
        model=model_of("bfloat16"),
    )
    file = re.escape(asked["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
    expected = [
        f"{file}: bf16.enabled is true",
        f"{file}: fp16.enabled is true",
        "model.dtype=bfloat16",
        f"{file}: gradient_accumulation_steps is 8",
        f"{file}: gradient_clipping is 0.5",
        f"{file}: train_batch_size is 32",
        f"{file}: train_micro_batch_size_per_gpu is 4",
        f"{file}: 'optimizer' would replace",
        f"{file}: 'scheduler' would replace",
        "quantization.bits=4 with ZeRO-3",
        f"{file}: offload_optimizer to nvme",
        f"{file}: offload_param to nvme",
        "checkpoint.gather=state_dict",
    ]
    for line, pattern in zip(said, expected, strict=True):
        assert re.match(pattern, line), line


def test_reading_a_launch_and_reconciling_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from lora_accel.config.launch import Precision, read_launch, reconcile\n"
        "from lora_accel.config.schema import RunConfig\n"
        "needed = {'output_dir': 'run', 'model': {'name_or_path': 'm'}, 'data': {'train': [{'path': 'x'}]}}\n"
        f"asked = {TORCHRUN | {'ACCELERATE_USE_DEEPSPEED': 'true'}}\n"
        "default = lambda: Precision('no', 'this machine')\n"
        "print(reconcile(RunConfig.model_validate(needed), read_launch(asked), default).rows[1][1])\n"
        "heavy = ('torch', 'numpy', 'transformers', 'accelerate', 'deepspeed')\n"
        "print(*[name for name in heavy if name in sys.modules])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ran.stdout.splitlines() == ["DeepSpeed ZeRO-2", ""]


def test_a_config_that_cannot_work_ends_before_torch_is_imported(
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
    asked = TORCHRUN | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    ran = run_code(code, **asked)
    assert (ran.returncode, ran.stdout) == (2, "[]\n")
    assert ran.stderr.startswith("error: quantization.bits=4 with ZeRO-3: packed weights cannot be partitioned.")
    assert "Traceback" not in ran.stderr
    assert not Path(config.output_dir).exists()
