"""The frozen base model. The only module that uses bitsandbytes."""

from __future__ import annotations

import json
import logging
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
from lora_accel.errors import ArtifactError, ConfigError, first_line
from lora_accel.model.device import detect_device, native_dtype
from lora_accel.model.sizes import load_config
from lora_accel.model.tokenizer import check_model_folder, load_error_message

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_dtype(
    section: ModelSection, mixed_precision: str, device: torch.device | None, recorded: str | None = None
) -> torch.dtype | str:
    """Return the dtype of the base; `auto` = as stored.

    `model.dtype: auto` follows mixed precision, since autocast would cast a frozen float32 base in every forward.
    Without mixed precision the base is loaded as stored, or in float32 if the device only emulates the stored dtype.

    Args:
        device: the device that computes; None = this machine's accelerator, or its CPU.
        recorded: name of the base's dtype in the checkpoint to resume from (`auto` = as stored); None = a new run.
    """
    if section.dtype != "auto":
        return DTYPES[section.dtype]
    if mixed_precision in AUTOCAST_DTYPES:
        return AUTOCAST_DTYPES[mixed_precision]
    if recorded is not None:
        return DTYPES.get(recorded, "auto")
    return native_dtype(detect_device(device), stored_dtype(section))


def stored_dtype(section: ModelSection) -> torch.dtype:
    """Return the dtype in the config of a base; float32 if it has none.

    Raises:
        ArtifactError: the model does not exist.
    """
    dtype = load_config(section).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


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
    dtype = stored_dtype(section) if isinstance(dtype, str) else dtype
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
        ArtifactError: the model does not exist, its files cannot be read, or its index names files outside its folder.
        ConfigError: the attention implementation, the quantization or the RoPE scaling is not available here.
    """
    check_model_folder(section)
    dtype = choose_dtype(section, mixed_precision, device, recorded_dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if section.attention != "auto":
        options["attn_implementation"] = section.attention
    if section.rope_scaling is not None:
        options["config"] = load_config(section)
    if quantization.bits is not None:
        options["quantization_config"] = _bitsandbytes_config(quantization, dtype)
        options["device_map"] = {"": device or torch.device("cpu")}
    check_index_paths(Path(section.name_or_path))
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            section.name_or_path,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            **options,
        )
    except (ImportError, ValueError) as error:
        raise ConfigError(load_error_message(section, "model", error)) from None
    except (OSError, SafetensorError, UnpicklingError) as error:
        raise ArtifactError(load_error_message(section, "model", error)) from None
    model.config.use_cache = False
    model.requires_grad_(False)
    return model


def build_on_meta_device(config: PretrainedConfig) -> PreTrainedModel:
    """Return the model of a config on the meta device.

    Raises:
        ArtifactError: the config does not describe a causal language model.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            )
    except ValueError as error:
        reason = first_line(error)
        raise ArtifactError(f"{config.name_or_path or 'config.json'}: no model can be built: {reason}") from None
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


def check_index_paths(folder: Path) -> None:
    """Check that the weight index names only files in its own folder: transformers would follow any path.

    Raises:
        ArtifactError: the index names a file outside its folder, or is not a weight index.
    """
    for index in sorted(folder.glob("*.index.json")):
        try:
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ArtifactError(f"{index}: is not a weight index") from None
        for file in files:
            if not isinstance(file, str) or file != Path(file).name:
                raise ArtifactError(f"{index}: names {file!r}, which is outside its folder")


def _bitsandbytes_config(quantization: QuantizationSection, dtype: torch.dtype | str) -> BitsAndBytesConfig:
    # Without the optional `kernels` package bitsandbytes warns once per layer on CPU and uses its default kernel.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = DTYPES.get(quantization.compute_dtype, dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=compute if isinstance(compute, torch.dtype) else torch.bfloat16,
    )
