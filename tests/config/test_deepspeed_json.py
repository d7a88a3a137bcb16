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
    given = launching._deepspeed_plugin(launch, settings).deepspeed_config
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
        ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, {"optimizer_options": {"betas": [0.9, 0.95]}}),
        ({"optimizer": {"type": "Lion", "params": {"betas": [0.9, 0.99]}}}, {"optimizer": "lion"}),
        ({"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}, {"optimizer": "sgd"}),
        (scheduler("WarmupLR", warmup_num_steps=5), {"scheduler": "constant_with_warmup", "warmup_steps": 5}),
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
        ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, ("betas is [0.9, 0.95]", "betas is [0.9, 0.999]")),
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


def plugin_values(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the config that DeepSpeed gets."""
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    launch = read_launch(environment)
    return dict(launching._deepspeed_plugin(launch, reconcile(config_of(), launch, device_default)).deepspeed_config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op is "sum", but the training loop needs "mean"'),
        ({"gradient_predivide_factor": "2"}, 'gradient_predivide_factor is "2", but the training loop needs 1.0'),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation is false, but the training loop"),
        (
            {"zero_optimization": {"stage": 2, "compute_grad_norm": False}},
            "zero_optimization.compute_grad_norm is false",
        ),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "zero_quantized_gradients' is not"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}}, "weights' is not supported"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "'zero_optimization.zenflow' is not"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "'bf16.bf16_master_weights_and_grads' is not supported"),
        ({"data_types": {"param_dtype": "bf16"}}, "'data_types.param_dtype' is not supported: it would change"),
        ({"hybrid_engine": {"enabled": True}}, "'hybrid_engine' is not supported: it would change the result"),
    ],
)
def test_values_that_change_the_result_are_an_error(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    (line,) = error_lines(environment_of({"zero_optimization": {"stage": 2}} | values, tmp_path))
    assert message in line


def test_auto_without_a_meaning_is_the_default_of_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate would raise after the model is loaded: it knows no value for these."""
    zero = {"stage": 3, "overlap_comm": AUTO, "sub_group_size": AUTO, "reduce_bucket_size": AUTO}
    zero |= {"offload_optimizer": {"device": AUTO, "pin_memory": AUTO}}
    sections = {"bf16": {"enabled": AUTO, "immediate_grad_update": AUTO}, "checkpoint": {"tag_validation": AUTO}}
    given = plugin_values(environment_of({"zero_optimization": zero} | sections, tmp_path), monkeypatch)
    left = {"stage": 3, "reduce_bucket_size": AUTO, "offload_optimizer": {}}
    assert {key: given["zero_optimization"][key] for key in left} == left
    assert not {"overlap_comm", "sub_group_size"} & given["zero_optimization"].keys()
    assert (given["checkpoint"], given["bf16"]) == ({}, {"enabled": False, "check_grad_overflow": True})


def test_what_is_off_is_not_passed_to_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed 0.19 rejects removed features by their names, even if they are off."""
    names = ("amp", "elasticity", "flops_profiler", "sparse_attention")
    values: dict[str, Any] = {name: {"enabled": False} for name in names} | {"sparse_gradients": False, "bf16": None}
    values |= {"nebula": None, "data_types": None, "zero_optimization": {"stage": 2, "offload_optimizer": None}}
    given = plugin_values(environment_of(values | {"amp": {"enabled": AUTO, "opt_level": AUTO}}, tmp_path), monkeypatch)
    assert not given.keys() & {*names, "sparse_gradients", "nebula"}
    assert given["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"overlap_comms": True}, "DeepSpeed rejects overlap_comms: Extra inputs are not permitted"),
        ({"reduce_bucket_size": "big"}, "DeepSpeed rejects reduce_bucket_size: Input should be a valid"),
        ({"offload_param": {"device": "cpu", "pin_memory": "x"}, "stage": 3}, "pin_memory: Input should be"),
        ({"cpu_offload": []}, "cpu_offload is deprecated"),
    ],
)
def test_what_deepspeed_rejects_is_one_message_before_the_model_is_loaded(
    values: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = environment_of({"zero_optimization": {"stage": 2} | values}, tmp_path)
    with pytest.raises(ConfigError) as caught:
        plugin_values(environment, monkeypatch)
    assert str(caught.value).startswith(environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"data_types": {"grad_accum_dtype": "fp7"}},
        {"communication_data_type": "fp7"},
        {"eigenvalue": {"enabled": True}},
        {"wall_clock_breakdown": "loud"},
    ],
)
def test_other_rejections_of_deepspeed_are_one_message(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = environment_of({"zero_optimization": {"stage": 2}} | values, tmp_path)
    with pytest.raises(ConfigError, match=r"zero\.json: DeepSpeed rejects the config: \S+"):
        plugin_values(environment, monkeypatch)


def test_a_key_that_appears_twice_is_an_error(tmp_path: Path) -> None:
    environment = environment_of({}, tmp_path)
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2, "stage": 3}}', encoding="utf-8")
    with pytest.raises(ConfigError, match="key 'stage' appears twice in one object; keep one"):
        read_launch(environment)


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
