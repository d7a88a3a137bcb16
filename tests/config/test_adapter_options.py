"""Options of PEFT's LoraConfig: each is supported in a run, or rejected before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from peft import LoraConfig
from pydantic import ValidationError

from lora_accel.config.adapter_options import PLAIN_INITS, UNSUPPORTED_INITS, subtracts_initial_adapter
from lora_accel.config.schema import AdapterSection, RunConfig
from tests.conftest import CommandResult


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "eva"}, "init_lora_weights=eva: needs activations of training data"),
        ({"init_lora_weights": "corda"}, "init_lora_weights=corda: needs activations of training data"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights=lora_ga: needs gradients"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights=loftq: replaces the base's weights.*quantization.bits=4"),
        ({"init_lora_weights": "pissa_niter_x"}, "init_lora_weights=pissa_niter_x: is not a known initialization"),
        ({"init_lora_weights": "anything"}, "is not a known initialization. Supported: true, false, gaussian"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "init_lora_weights=pissa with use_dora is not supported"),
        ({"init_lora_weights": "olora", "lora_bias": True}, "init_lora_weights=olora with lora_bias is not supported"),
        ({"eva_config": {"rho": 2.0}}, "eva_config: is for init_lora_weights=eva"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config: is for init_lora_weights=loftq"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication: .*could not be merged"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config: routes between existing adapters"),
        ({"megatron_config": {"a": 1}}, "megatron_config: is for Megatron"),
        ({"runtime_config": {"ephemeral_gpu_offload": True}}, "runtime_config: is for inference"),
        ({"use_qalora": True}, "use_qalora: needs a GPTQ base"),
        ({"velora_config": {}}, "velora_config: its projections depend on the batches.*init_type=random"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: dropout is not supported"),
    ],
)
def test_what_could_not_be_used_afterwards_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AdapterSection.model_validate(options)


@pytest.mark.parametrize("init", [True, False, None, *PLAIN_INITS, "pissa", "pissa_niter_4", "olora"])
def test_supported_initializations(init: bool | str | None) -> None:
    assert AdapterSection.model_validate({"init_lora_weights": init}).init_lora_weights == init


def test_every_initialization_of_peft_is_decided() -> None:
    """Fails when PEFT adds one: decide whether the result is plain LoRA (tests/saving/test_serving.py) or reject it."""
    literals = [value for kind in get_args(get_type_hints(LoraConfig)["init_lora_weights"]) for value in get_args(kind)]
    assert len(literals) > 5
    for value in (str(value).replace("[number of iters]", "4") for value in literals):
        assert value in (*PLAIN_INITS, *UNSUPPORTED_INITS) or subtracts_initial_adapter(value)


def test_every_option_of_peft_is_in_the_section() -> None:
    own = {"r", "lora_alpha", "lora_dropout", "target_modules", "bias"}
    of_peft = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
    names = {field.name for field in dataclasses.fields(LoraConfig) if field.init} - own - of_peft - {"inference_mode"}
    assert names <= set(AdapterSection.model_fields)


def test_alora_needs_rows_of_one_example(make_config: Callable[..., RunConfig]) -> None:
    adapter = {"alora_invocation_tokens": [3], "dropout": 0.0}
    with pytest.raises(ValidationError, match=r"alora_invocation_tokens.*set data\.packing=false"):
        make_config(adapter=adapter)
    make_config(adapter=adapter, data={"packing": False})


def test_alora_with_activation_checkpointing_is_not_evaluated(make_config: Callable[..., RunConfig]) -> None:
    """PEFT raises at the first forward after an evaluation."""
    adapter, training = {"alora_invocation_tokens": [3], "dropout": 0.0}, {"activation_checkpointing": True}
    make_config(adapter=adapter, data={"packing": False}, training=training)
    for data, evaluation in (({"eval_fraction": 0.2}, {}), ({}, {"prompts": ["hi"]})):
        with pytest.raises(ValidationError, match=r"alora_invocation_tokens with training\.activation_checkpointing"):
            make_config(adapter=adapter, data={"packing": False} | data, training=training, evaluation=evaluation)
        make_config(adapter=adapter, data={"packing": False} | data, evaluation=evaluation)  # auto never does so


def test_kasa_on_a_quantized_base_is_an_error(make_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ValidationError, match="kasa_config"):
        make_config(adapter={"kasa_config": {"beta": 0.1}}, quantization={"bits": 4})


def test_command_exits_with_2_and_writes_nothing(
    command: Callable[..., CommandResult], make_config: Callable[..., RunConfig], config_file: Callable[..., Path]
) -> None:
    config = make_config()
    result = command("plan", "--config", config_file(config), "adapter.init_lora_weights=eva")
    assert result.returncode == 2
    assert "adapter: init_lora_weights=eva: needs activations" in result.stderr + result.stdout
    assert not Path(config.output_dir).exists()
