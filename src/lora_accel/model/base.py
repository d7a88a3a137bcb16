"""The frozen base model. The only module that uses bitsandbytes."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from lora_accel.config.schema import ModelSection, QuantizationSection
from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.model.device import detect_device, native_dtype
from lora_accel.model.headers import StoredTensor, main_dtype, read_headers, read_tensor
from lora_accel.model.prequantized import check_quantization, dequantized_headers, stored_quantization
from lora_accel.model.sizes import check_config, load_config, unknown_name
from lora_accel.model.tokenizer import check_model_folder, load_error_message
from lora_accel.model.weight_files import check_index_paths, find_weight_files
from lora_accel.model.weights import check_loading_info, check_weights, describe_error, without_zero3

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NO_ADAPTER = "no-adapter"
"""A subfolder that no model has. transformers looks there for an adapter, which it would load onto the base."""
_CHECKED: set[tuple[str, str, frozenset[tuple[str, StoredTensor]]]] = set()
"""What `check_base` accepted (name, config, headers): a run checks its base before its data, and when it loads it."""
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_dtype(
    section: ModelSection,
    mixed_precision: str,
    device: torch.device | None,
    recorded: str | None = None,
    *,
    stored: torch.dtype | None = None,
) -> torch.dtype:
    """Return the dtype of the base.

    `model.dtype: auto` follows mixed precision, since autocast would cast a frozen float32 base in every forward.
    Without mixed precision the base is loaded as stored, or in float32 if the device only emulates the stored dtype.

    Args:
        device: the device that computes; None = this machine's accelerator, or its CPU.
        recorded: name of the base's dtype in the checkpoint to resume from; None = a new run. `auto` = the checkpoint
            does not record it: it was written by a version that took the dtype in config.json.
        stored: dtype in which the base is stored; None = read it from its weight files, if it matters.

    Raises:
        ArtifactError: the model does not exist, or its files cannot be read.
    """
    if section.dtype != "auto":
        return DTYPES[section.dtype]
    if mixed_precision in AUTOCAST_DTYPES:
        return AUTOCAST_DTYPES[mixed_precision]
    if recorded in DTYPES:
        return DTYPES[recorded]
    if recorded is not None and isinstance(named := load_config(section).dtype, torch.dtype):
        return named
    stored = stored_dtype(section) if stored is None else stored
    return stored if recorded is not None else native_dtype(detect_device(device), stored)


def stored_dtype(section: ModelSection) -> torch.dtype:
    """Return the dtype in which most elements of a base are stored, whatever the dtype in its config.json.

    Raises:
        ArtifactError: the model does not exist, or its files cannot be read.
    """
    return main_dtype(_stored_tensors(section))


def check_zero3_dtype(section: ModelSection, device: torch.device, recorded: str | None) -> None:
    """Check that ZeRO-3 without mixed precision, which loads every base in float32, does not change its dtype.

    Args:
        device, recorded: see `choose_dtype`.

    Raises:
        ConfigError: model.dtype is auto, and other backends would load the base in 16 bits.
    """
    if section.dtype != "auto":
        return
    dtype = choose_dtype(section, "no", device, recorded)
    if dtype != torch.float32:
        raise ConfigError(
            f"model.dtype=auto: {section.name_or_path} is stored in {str(dtype).removeprefix('torch.')}, but ZeRO-3 "
            "without mixed precision loads it in float32, so losses would differ from other backends'; set "
            "training.mixed_precision=bf16, or model.dtype=float32"
        )


def load_base_model(
    section: ModelSection,
    quantization: QuantizationSection,
    *,
    mixed_precision: str = "no",
    device: torch.device | None = None,
    recorded_dtype: str | None = None,
) -> PreTrainedModel:
    """Load the base model, frozen and without key-value cache.

    Args:
        mixed_precision, recorded_dtype: decide the dtype, see `choose_dtype`.
        device: the device that computes. A quantized model is loaded onto it; others stay on the CPU until `prepare`.

    Raises:
        ArtifactError: the model does not exist, its files cannot be read or do not hold the model of its config.json,
            or its index names files outside its folder.
        ConfigError: the attention implementation, the quantization or the RoPE scaling is not available here.
    """
    check_model_folder(section)
    quantized = check_quantization(section, quantization)
    config, tensors = check_base(section)
    if quantized is not None:
        _check_can_load_quantized()
    dtype = choose_dtype(section, mixed_precision, device, recorded_dtype, stored=main_dtype(tensors))
    options: dict[str, Any] = {"dtype": dtype}
    if section.attention != "auto":
        options["attn_implementation"] = section.attention
    if section.rope_scaling is not None:
        options["config"] = config
    if quantized is not None or quantization.bits is not None:
        options["device_map"] = {"": device or torch.device("cpu")}
    if quantized is None and quantization.bits is not None:
        options["quantization_config"] = _bitsandbytes_config(quantization, dtype)
    model = _load(section, tensors, options)
    if quantized is not None or quantization.bits is not None:
        _cast_unquantized(model, dtype)
        _keep_weights_as_loaded(model)
        if mixed_precision in AUTOCAST_DTYPES:
            _cast_inputs_of_quantized(model, AUTOCAST_DTYPES[mixed_precision])
    model.config.use_cache = False
    model.requires_grad_(False)
    return model


def _cast_unquantized(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what is not quantized (norms, embeddings, head): a base stored in 4 or 8 bits keeps its own dtype there."""
    for parameter in model.parameters():
        # A quantized weight may be stored in a floating-point dtype, too (`bnb_4bit_quant_storage`).
        is_plain = type(parameter) is torch.nn.Parameter and parameter.dtype in DTYPES.values()
        if is_plain and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def _keep_weights_as_loaded(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights at the first evaluation on a CPU with bfloat16 instructions.

    It never unpacks them, and a product with repacked weights has no gradient: what is trained after an evaluation
    would get wrong gradients. It also fails for small layers.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _cast_inputs_of_quantized(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what quantized layers get, as autocast does for plain ones: it does not know bitsandbytes' products.

    A LayerNorm returns float32 under autocast. From there on all hidden states, and the products of 8-bit layers in
    backward, would be in float32.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for module in model.modules():
        if isinstance(module, (Linear4bit, Linear8bitLt)):
            module.register_forward_pre_hook(functools.partial(_cast_input, dtype))


def _cast_input(dtype: torch.dtype, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (inputs[0].to(dtype),)


def _load(section: ModelSection, tensors: Mapping[str, StoredTensor], options: Mapping[str, Any]) -> PreTrainedModel:
    """Load a model by transformers, and check what it reports."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            section.name_or_path,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            adapter_kwargs={"subfolder": NO_ADAPTER},
            output_loading_info=True,
            **options,
        )
    except (ImportError, ValueError) as error:
        raise ConfigError(load_error_message(section, "model", error)) from None
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, UnpicklingError, RuntimeError) as error:  # RuntimeError: shapes that differ
        raise ArtifactError(load_error_message(section, "model", error)) from None
    check_loading_info(section.name_or_path, model, info, tensors)
    loaded: PreTrainedModel = model
    return loaded


def check_base(section: ModelSection) -> tuple[PretrainedConfig, dict[str, StoredTensor]]:
    """Check that the weight files of a base hold the model of its config.json, without reading a weight.

    A base whose own code is trusted is only checked by what transformers reports when it is loaded.

    Returns:
        Its config, and the tensors that its files declare, by name.

    Raises:
        ArtifactError: they do not, or the model does not exist.
    """
    config, tensors = load_config(section), _stored_tensors(section)
    if section.trust_remote_code and getattr(config, "auto_map", None):
        return config, tensors
    weights, plain = tensors, config
    if stored_quantization(section) is not None:
        files = find_weight_files(section)
        weights = dequantized_headers(section.name_or_path, tensors, lambda name: read_tensor(files, name))
        plain = copy.deepcopy(config)
        del plain.quantization_config
    key = (section.name_or_path, repr(plain.to_dict()), frozenset(weights.items()))
    if key not in _CHECKED:
        check_weights(section.name_or_path, plain, weights)
        _CHECKED.add(key)
    return config, tensors


def _stored_tensors(section: ModelSection) -> dict[str, StoredTensor]:
    """Return the tensors that the weight files of a base declare, by name."""
    check_model_folder(section)
    check_index_paths(Path(section.name_or_path))
    try:
        return read_headers(find_weight_files(section))
    except OSError as error:
        raise ArtifactError(load_error_message(section, "model", error)) from None


def _check_can_load_quantized() -> None:
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise ConfigError(
            "ZeRO-3 does not support a base that is stored in 4 or 8 bits: quantized weights cannot be partitioned. "
            "Use ZeRO-2 or DDP, or the model in 16 or 32 bits"
        )
    # Without the optional `kernels` package bitsandbytes warns once per layer on CPU and uses its default kernel.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def build_on_meta_device(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "eager",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Return the model of a config on the meta device.

    Args:
        attention: implementation of transformers; auto = its choice.
        trust_remote_code: whether to run the model's own code, which the config names.

    Raises:
        ArtifactError: the config does not describe a causal language model.
    """
    name = config.name_or_path or "config.json"
    check_config(config.to_dict(), name)
    try:
        with without_zero3(), torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=None if attention == "auto" else attention,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # an invalid config raises many types
        reason = unknown_name(config) or describe_error(error)
        raise ArtifactError(f"{name}: no model can be built from its config: {reason}") from None
    return model.eval()


def quantized_names(model: PreTrainedModel) -> set[str]:
    """Return the names of the weights that loading in 4 bits quantizes: those of linear layers except the head."""
    excluded = get_keys_to_not_convert(model)
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, excluded)
    }


def quantize_round_trip(
    weight: torch.Tensor, quantization: QuantizationSection, *, transposed: bool = False
) -> torch.Tensor:
    """Return a weight with the values that a 4-bit base computes with: quantized and dequantized to its dtype.

    Args:
        weight: [out, in] in the dtype of training; [in, out] if `transposed` (transformers' Conv1D).
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    quantized, state = quantize_4bit(
        (weight.T if transposed else weight).contiguous(),
        compress_statistics=quantization.double_quant,
        quant_type=quantization.type,
    )
    dequantized: torch.Tensor = dequantize_4bit(quantized, state)
    return dequantized.T if transposed else dequantized


def _bitsandbytes_config(quantization: QuantizationSection, dtype: torch.dtype) -> BitsAndBytesConfig:
    # Without the optional `kernels` package bitsandbytes warns once per layer on CPU and uses its default kernel.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = DTYPES.get(quantization.compute_dtype, dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=compute,
    )
