"""The frozen base model. The only place that knows bitsandbytes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from lora_accel.config.schema import ModelSection, QuantizationSection
from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.model.device import detect_device, native_dtype
from lora_accel.model.tokenizer import check_folder, not_loaded

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_dtype(
    section: ModelSection, mixed_precision: str, device: torch.device | None, kept: str | None = None
) -> torch.dtype | str:
    """Return the dtype of the base.

    `auto` follows mixed precision, since autocast would cast a frozen float32 base again at every forward. Without it
    the base is loaded as stored, or in float32 where the device only emulates that.

    Args:
        device: where it computes; None = this machine's accelerator, or else its CPU.
        kept: what the checkpoint that is resumed was trained on, by name; `auto` = as stored.
    """
    if section.dtype != "auto":
        return DTYPES[section.dtype]
    if mixed_precision in AUTOCAST_DTYPES:
        return AUTOCAST_DTYPES[mixed_precision]
    if kept is not None:
        return DTYPES.get(kept, "auto")
    return native_dtype(detect_device(device), stored_dtype(section))


def stored_dtype(section: ModelSection) -> torch.dtype:
    """Return the dtype that the config of a base names; float32 if it names none.

    Raises:
        ArtifactError: there is no such model.
    """
    try:
        config = AutoConfig.from_pretrained(
            section.name_or_path, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ArtifactError(not_loaded(section, "config", error)) from None
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def check_zero3_dtype(section: ModelSection, device: torch.device, kept: str | None) -> None:
    """Raise if ZeRO-3 without mixed precision would turn a base in 16 bits into float32. Arguments: `choose_dtype`.

    Raises:
        ConfigError: model.dtype is auto, and the base would be in 16 bits on other backends.
    """
    if section.dtype != "auto":
        return
    dtype = choose_dtype(section, "no", device, kept)
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
    kept_dtype: str | None = None,
) -> PreTrainedModel:
    """Load the base model, frozen, without a key-value cache.

    Args:
        mixed_precision: no, bf16 or fp16; with `kept_dtype` it decides the dtype, see `choose_dtype`.
        device: where it computes. A quantized model is put there; another stays on the CPU for `prepare`.

    Raises:
        ArtifactError: there is no such model, or its files cannot be read or lie elsewhere.
        ConfigError: the attention implementation or the quantisation is not to be had here.
    """
    check_folder(section)
    dtype = choose_dtype(section, mixed_precision, device, kept_dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if section.attention != "auto":
        options["attn_implementation"] = section.attention
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
        raise ConfigError(not_loaded(section, "model", error)) from None
    except (OSError, SafetensorError, UnpicklingError) as error:
        raise ArtifactError(not_loaded(section, "model", error)) from None
    model.config.use_cache = False
    model.requires_grad_(False)
    return model


def build_on_meta_device(config: PretrainedConfig) -> PreTrainedModel:
    """Return a model of a config whose tensors have shapes and nothing in them (torch's meta device).

    Raises:
        ArtifactError: it is no config of a causal language model.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            )
    except ValueError as error:
        reason = str(error).strip().split("\n")[0]
        raise ArtifactError(f"{config.name_or_path or 'config.json'}: no model can be built: {reason}") from None
    return model.eval()


def quantized_names(model: PreTrainedModel) -> set[str]:
    """Return the names of the weights that loading in 4 bits packs: those of linear layers, the head apart."""
    kept = get_keys_to_not_convert(model)
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    }


def quantize_round_trip(
    weight: torch.Tensor, quantization: QuantizationSection, *, transposed: bool = False
) -> torch.Tensor:
    """Return a weight as a 4-bit base computes with it: packed, and unpacked to the dtype it had.

    Args:
        weight: out x in, or in x out if `transposed` (transformers' Conv1D), in the dtype of training.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        (weight.T if transposed else weight).contiguous(),
        compress_statistics=quantization.double_quant,
        quant_type=quantization.type,
    )
    whole: torch.Tensor = dequantize_4bit(packed, state)
    return whole.T if transposed else whole


def check_index_paths(folder: Path) -> None:
    """Refuse weights whose index names files outside their own folder: transformers would read these.

    Raises:
        ArtifactError: it does, or is no index.
    """
    for index in sorted(folder.glob("*.index.json")):
        try:
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ArtifactError(f"{index}: is no index of weights") from None
        for file in files:
            if not isinstance(file, str) or file != Path(file).name:
                raise ArtifactError(f"{index}: names {file!r}, which is outside its folder")


def _bitsandbytes_config(quantization: QuantizationSection, dtype: torch.dtype | str) -> BitsAndBytesConfig:
    # Without the optional `kernels` package it warns once per layer on CPU and takes the ordinary road.
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
