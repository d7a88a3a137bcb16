"""Public DeepSpeed JSONs are accepted; explicit values of their optimizer and scheduler must be the run config's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_accel.config.launch import read_launch, reconcile
from lora_accel.distributed import launch as launching
from lora_accel.errors import ConfigError
from tests.config.test_launch import AUTO, TORCHRUN, config_of, device_default, error_lines, rows_of

FP16 = {"loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1}
SIZES: dict[str, Any] = {"train_micro_batch_size_per_gpu": AUTO, "gradient_accumulation_steps": AUTO}
COMMON = SIZES | {"gradient_clipping": AUTO, "train_batch_size": AUTO, "steps_per_print": 2000}
COMMON |= {"wall_clock_breakdown": False}
ADAMW = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), AUTO)}
WARMUP = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), AUTO)
CPU = {"device": "cpu", "pin_memory": True}
OVERLAP = {"overlap_comm": True, "contiguous_gradients": True}
ZERO2 = {"allgather_partitions": True, "allgather_bucket_size": 2e8, "reduce_scatter": True} | OVERLAP
AUTO_SIZES = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
ZERO3 = OVERLAP | {"sub_group_size": 1e9, "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9}
HF = COMMON | {
    "fp16": FP16 | {"enabled": AUTO},
    "bf16": {"enabled": AUTO},
    "optimizer": ADAMW,
    "scheduler": {"type": "WarmupLR", "params": WARMUP},
}
ACCELERATE = COMMON | {
    "gradient_accumulation_steps": 1,
    "fp16": FP16 | {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": AUTO, "weight_decay": AUTO}},
    "scheduler": {"type": "WarmupDecayLR", "params": WARMUP | {"total_num_steps": AUTO}},
}
TORCH_ADAM = {"lr": AUTO, "weight_decay": AUTO, "torch_adam": True, "adam_w_mode": True}
FASTCHAT3 = {"stage3_prefetch_bucket_size": 5e8, "stage3_param_persistence_threshold": 1e6, "sub_group_size": 1e12}
GATHER = "stage3_gather_16bit_weights_on_model_save"

FILES: dict[str, dict[str, Any]] = {
    "transformers zero2": HF | {"zero_optimization": ZERO2 | {"stage": 2, "reduce_bucket_size": 2e8}},
    "transformers zero2 offload": HF
    | {"zero_optimization": ZERO2 | {"stage": 2, "reduce_bucket_size": 2e8, "offload_optimizer": CPU}},
    "transformers zero3": HF
    | {"zero_optimization": ZERO3 | dict.fromkeys(AUTO_SIZES, AUTO) | {"stage": 3, GATHER: True}},
    "transformers zero3 offload": HF
    | {
        "zero_optimization": ZERO3
        | dict.fromkeys(AUTO_SIZES, AUTO)
        | {"stage": 3, GATHER: True, "offload_optimizer": CPU, "offload_param": CPU},
    },
    "accelerate stage 1": ACCELERATE
    | {
        "zero_optimization": ZERO2 | {"stage": 1, "reduce_bucket_size": AUTO},
        "optimizer": {"type": "AdamW", "params": TORCH_ADAM},
    },
    "accelerate stage 2 offload": ACCELERATE
    | {
        "zero_optimization": ZERO2 | {"stage": 2, "reduce_bucket_size": AUTO, "offload_optimizer": CPU},
        "optimizer": {"type": "AdamW", "params": TORCH_ADAM},
    },
    "accelerate stage 3 offload": ACCELERATE
    | {
        "zero_optimization": ZERO3
        | dict.fromkeys(AUTO_SIZES, AUTO)
        | {"stage": 3, GATHER: AUTO, "offload_optimizer": CPU, "offload_param": CPU},
    },
    "fastchat s2": SIZES | {"zero_optimization": OVERLAP | {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "fastchat s3": SIZES
    | {
        "train_batch_size": AUTO,
        "fp16": FP16 | {"enabled": AUTO},
        "zero_optimization": ZERO3
        | FASTCHAT3
        | {"stage": 3, GATHER: True, "offload_optimizer": CPU, "offload_param": CPU},
    },
}
"""DeepSpeed JSONs by origin: the documentation of transformers, Accelerate's examples, FastChat's playground."""


def environment_of(values: dict[str, Any], folder: Path) -> dict[str, str]:
    file = folder / "zero.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    return TORCHRUN | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}


@pytest.mark.parametrize("name", FILES)
def test_public_json_is_accepted_and_the_run_config_fills_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the values that DeepSpeed gets."""
    values = FILES[name]
    environment = environment_of(values, tmp_path)
    launch = read_launch(environment)
    settings = reconcile(config_of(), launch, device_default)
    rows = rows_of(settings)
    assert rows["backend"] == (f"DeepSpeed ZeRO-{values['zero_optimization']['stage']}", launch.source)
    devices = [
        values["zero_optimization"].get(f"offload_{key}", {}).get("device", "none") for key in ("optimizer", "param")
    ]
    assert rows["offload"][0] == f"optimizer {devices[0]}, parameters {devices[1]}"
    assert ("optimizer" in rows) == ("optimizer" in values)
    if "optimizer" in values:
        assert rows["optimizer"] == ("adamw, learning rate 0.0002", "run config")
        assert rows["scheduler"] == (f"cosine (not {values['scheduler']['type']})", "run config")
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    given = launching._deepspeed_plugin(settings).deepspeed_config
    assert not {"optimizer", "scheduler"} & set(given), "Accelerate would raise, and DeepSpeed would build its own"
    assert given["zero_optimization"]["stage"] == values["zero_optimization"]["stage"]
    assert given["gradient_clipping"] == 1.0


def scheduler(kind: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": WARMUP | params}}


@pytest.mark.parametrize(
    ("values", "training"),
    [
        ({"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8}}}, {}),
        ({"optimizer": {"type": "AdamW", "params": {"weight_decay": 0, "fused": True}}}, {}),
        ({"optimizer": {"type": "AdamW"}}, {}),
        (scheduler("WarmupLR", warmup_max_lr=1e-3, warmup_num_steps=5), {"scheduler": "constant", "warmup_steps": 5}),
        (scheduler("WarmupDecayLR", total_num_steps=40), {"scheduler": "linear", "max_steps": 40}),
        (scheduler("WarmupCosineLR", warmup_min_ratio=0, warmup_type="linear"), {}),
    ],
)
def test_equal_values_are_accepted(values: dict[str, Any], training: dict[str, Any], tmp_path: Path) -> None:
    environment = environment_of({"zero_optimization": {"stage": 2}} | values, tmp_path)
    config = config_of(training={"learning_rate": 1e-3} | training)
    rows = rows_of(reconcile(config, read_launch(environment), device_default))
    assert {"optimizer", "scheduler"} & set(rows) == set(values)
    assert "not" not in rows.get("scheduler", ("",))[0]


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({"optimizer": {"params": {"lr": 2e-5}}}, ("optimizer.params.lr is 2e-05", "training.learning_rate is 0.0002")),
        ({"optimizer": {"params": {"weight_decay": 0.1}}}, ("weight_decay is 0.1", "training.weight_decay is 0.0")),
        ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, ("betas is [0.9, 0.95]", "here is [0.9, 0.999]")),
        ({"optimizer": {"params": {"adam_w_mode": False}}}, ("adam_w_mode is false", "here is true")),
        ({"optimizer": {"params": {"momentum": 0.9}}}, ("optimizer.params.momentum is not supported; remove it",)),
        ({"optimizer": {"type": "Lamb"}}, ('optimizer.type is "Lamb"', "training.optimizer is adamw")),
        ({"optimizer": "AdamW"}, ("optimizer must be an object",)),
        ({"scheduler": {"type": "WarmupLR", "params": []}}, ("scheduler must be an object",)),
        (scheduler("OneCycle"), ('scheduler.type is "OneCycle"', "training.scheduler is cosine")),
        ({"scheduler": {"type": ["WarmupLR"]}}, ('scheduler.type must be a name, not ["WarmupLR"]',)),
        ({"optimizer": {"type": None}}, ("optimizer.type must be a name, not null",)),
        (scheduler("WarmupLR", warmup_max_lr=2e-4), ('scheduler.type is "WarmupLR"', "constant = WarmupLR")),
        (scheduler("WarmupCosineLR", warmup_max_lr=1), ("warmup_max_lr is 1,", "training.learning_rate is 0.0002")),
        (scheduler("WarmupCosineLR", warmup_num_steps=9), ("warmup_num_steps is 9", "warmup_steps is not set")),
        (scheduler("WarmupCosineLR", warmup_type="log"), ('warmup_type is "log"', 'is "linear"')),
    ],
)
def test_other_values_are_an_error_that_names_both(
    values: dict[str, Any], fragments: tuple[str, ...], tmp_path: Path
) -> None:
    environment = environment_of({"zero_optimization": {"stage": 2}} | values, tmp_path)
    (message,) = error_lines(environment)
    assert message.startswith(environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] + ": ")
    for fragment in fragments:
        assert fragment in message


# --- the options that launchers pass


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({"WORLD_SIZE": "2", "CROSS_SIZE": "1", "CROSS_RANK": "0", "LOCAL_SIZE": "2"}, "deepspeed"),
        ({"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
        ({"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch"),
        ({"WORLD_SIZE": "2"}, "the environment"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "MPI"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch"),
    ],
)
def test_the_launch_table_names_the_launcher(environment: dict[str, str], launcher: str) -> None:
    if "WORLD_SIZE" in environment:
        environment = environment | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    rows = rows_of(reconcile(config_of(), read_launch(environment), device_default))
    assert rows["processes"][1] == rows["backend"][1] == launcher
    assert ("--deepspeed FILE" in rows["backend"][0]) == (launcher == "deepspeed")


def test_local_rank_of_the_command_line_must_be_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    launching.check_local_rank(-1)
    launching.check_local_rank(0)
    with pytest.raises(ConfigError, match="--local_rank=1, but LOCAL_RANK is not set; start with"):
        launching.check_local_rank(1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    launching.check_local_rank(1)
    with pytest.raises(ConfigError, match="--local_rank=0, but LOCAL_RANK is 1"):
        launching.check_local_rank(0)


def test_deepspeed_option_sets_the_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    with pytest.raises(
        ConfigError, match=r"--deepspeed zero\.json: .*MASTER_PORT is not set; start with deepspeed, torchrun or"
    ):
        launching.use_deepspeed("zero.json")
    for variable, value in TORCHRUN.items():
        monkeypatch.setenv(variable, value)
    launching.use_deepspeed("zero.json")
    with pytest.raises(ConfigError, match=r"deepspeed_config_file: zero\.json cannot be read"):
        read_launch(TORCHRUN | dict(launching.os.environ))
    with pytest.raises(ConfigError, match="configures DeepSpeed already"):
        launching.use_deepspeed("zero.json")
