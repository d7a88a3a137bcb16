"""Bases whose weights are stored in 4 or 8 bits: recognized by config.json, checked, and dequantized for a merge.

torch is imported inside functions: the plan of a run needs to know how a base is stored, and no model.
"""

from __future__ import annotations

import collections
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from lora_accel.config.schema import AdapterSection, ModelSection, QuantizationSection
from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.model.sizes import load_config, read_config_file

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lora_accel.model.headers import StoredTensor

STATE = "quant_state.bitsandbytes__"
"""In the name of the tensor with the shape of a weight in 4 bits, as JSON."""
PART = re.compile(rf"(.+\.weight)\.((?:nested_)?(?:absmax|quant_map)|{re.escape(STATE)}\w+)")
BLOCK_SIZES = tuple(2**n for n in range(5, 13))
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


def stored_quantization(section: ModelSection) -> QuantizationSection | None:
    """Return how the weights of a base are stored; None = not quantized.

    Reads config.json without transformers if it is on this machine.

    Raises:
        ArtifactError: they are quantized by another library than bitsandbytes, or the model does not exist.
    """
    config = read_config_file(section)
    return quantization_of(load_config(section).to_dict() if config is None else config, section.name_or_path)


def quantization_of(config: Mapping[str, Any], name: str) -> QuantizationSection | None:
    """Return how the weights of the model of a config are stored; see `stored_quantization`.

    Args:
        config: the content of config.json.
        name: of the model, for messages.
    """
    values = config.get("quantization_config")
    if not values:
        return None
    if not isinstance(values, dict):
        raise ArtifactError(f"{name}: config.json: quantization_config should be an object")
    bits = 4 if values.get("load_in_4bit") else 8 if values.get("load_in_8bit") else None
    method = str(values.get("quant_method") or ("bitsandbytes" if bits else "an unknown method"))
    if method != "bitsandbytes" or bits is None:
        raise ArtifactError(
            f"{name}: its weights are quantized with {method}, which is not supported: only bitsandbytes in 4 or 8 "
            "bits is. Use the same model in 16 or 32 bits; quantization.bits=4 quantizes it for QLoRA"
        )
    kind, compute = values.get("bnb_4bit_quant_type", "fp4"), values.get("bnb_4bit_compute_dtype")
    return QuantizationSection(
        bits=4 if bits == 4 else 8,
        type="nf4" if kind == "nf4" else "fp4",
        double_quant=bits == 4 and values.get("bnb_4bit_use_double_quant") is True,
        compute_dtype=compute if compute in COMPUTE_DTYPES else "auto",
    )


def check_quantization(section: ModelSection, quantization: QuantizationSection) -> QuantizationSection | None:
    """Check that a run config does not ask for another quantization than that in which its base is stored.

    Returns:
        How the base is stored; None = not quantized.

    Raises:
        ConfigError: it does.
        ArtifactError: see `stored_quantization`.
    """
    stored = stored_quantization(section)
    if stored is None:
        return None
    asked = quantization.model_fields_set if quantization.bits is not None else ()
    for field in ("bits", *(("type", "double_quant") if stored.bits == 4 else ())):
        if field in asked and getattr(quantization, field) != getattr(stored, field):
            raise ConfigError(
                f"quantization.{field}={getattr(quantization, field)}: {section.name_or_path} is stored with "
                f"{describe(stored)}, which does not change when it is loaded; remove quantization.{field}, or use the "
                "model in 16 or 32 bits"
            )
    return stored


def check_modules_to_save(base: PreTrainedModel, section: AdapterSection) -> None:
    """Check that no module of `adapter.modules_to_save` is quantized: integers cannot be trained.

    Raises:
        ConfigError: one is.
    """
    if not getattr(base, "is_quantized", False):
        return
    for wanted in section.modules_to_save or []:
        for name, module in base.named_modules():
            if f".{name}".endswith(f".{wanted}") and _has_quantized_weight(module):
                raise ConfigError(
                    f"adapter.modules_to_save: {wanted} is quantized ({name}), so it cannot be trained in full; add it "
                    "to adapter.target_modules instead, or train without quantization"
                )


def describe(quantization: QuantizationSection) -> str:
    """Return a quantization in words: `bitsandbytes, 4 bits (nf4, double_quant)`."""
    if quantization.bits == 8:
        return "bitsandbytes, 8 bits"
    double = ", double_quant" if quantization.double_quant else ""
    return f"bitsandbytes, 4 bits ({quantization.type}{double})"


def quantized_parts(names: Collection[str]) -> dict[str, dict[str, str]]:
    """Return the parts in which bitsandbytes stores each quantized weight: {weight: {key of a part: tensor}}.

    The key of the weight itself is empty. In 4 bits the others follow the weight's name; in 8 bits they are beside it.
    """
    parts: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for name in names:
        if match := PART.fullmatch(name):
            parts[match[1]][match[2]] = name
        elif name.endswith((".SCB", ".weight_format")):
            module, _, key = name.rpartition(".")
            parts[f"{module}.weight"][key] = name
    return {weight: own | ({"": weight} if weight in names else {}) for weight, own in parts.items()}


def dequantized_headers(
    name: str, tensors: Mapping[str, StoredTensor], read: Callable[[str], torch.Tensor]
) -> dict[str, StoredTensor]:
    """Return the tensors of weight files as they were before quantization.

    Checks that the sizes of the parts of each weight follow from its shape: bitsandbytes would read beyond the end of
    parts that are too small.

    Args:
        name: of the model, for messages.
        tensors: from `read_headers`.
        read: returns a stored tensor by its name.

    Raises:
        ArtifactError: a part is missing, or does not fit.
    """
    from lora_accel.model.headers import StoredTensor, main_dtype

    dtype, headers = main_dtype(tensors), dict(tensors)
    for weight, parts in quantized_parts(tensors.keys()).items():
        state = next((part for key, part in parts.items() if key.startswith(STATE)), None)
        own = {key: tensors[part] for key, part in parts.items()}
        shape = _shape_in_8_bits(own) if "SCB" in own else _shape_in_4_bits(own, None if state is None else read(state))
        if shape is None:
            raise ArtifactError(
                f"{name}: the parts of the quantized weight {weight} are missing, or do not fit together; use complete "
                "weights"
            )
        for part in parts.values():
            headers.pop(part)
        headers[weight] = StoredTensor(dtype, shape)
    return headers


def _shape_in_8_bits(parts: Mapping[str, StoredTensor]) -> tuple[int, ...] | None:
    import torch

    weight = parts.get("")
    if weight is None or len(weight.shape) != 2 or weight.dtype != torch.int8:
        return None
    return weight.shape if parts["SCB"].shape == weight.shape[:1] else None


def _shape_in_4_bits(parts: Mapping[str, StoredTensor], state: torch.Tensor | None) -> tuple[int, ...] | None:
    import torch

    try:
        assert state is not None
        values = json.loads(bytes(state.tolist()))
        shape, block = tuple(map(int, values["shape"])), int(values["blocksize"])
        sizes = {"": -(-math.prod(shape) // 2), "absmax": -(-math.prod(shape) // block), "quant_map": 16}
        if "nested_blocksize" in values:
            sizes |= {"nested_absmax": -(-sizes["absmax"] // int(values["nested_blocksize"])), "nested_quant_map": 256}
        has_sizes = all(math.prod(parts[part].shape) == size for part, size in sizes.items())
        is_packed = parts[""].dtype in (torch.uint8, torch.int8)
    except (AssertionError, KeyError, TypeError, ValueError, ArithmeticError, RecursionError):
        return None
    return shape if has_sizes and is_packed and min(shape) > 0 and block in BLOCK_SIZES else None


def dequantized(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a quantized weight, as a layer computes with it.

    Args:
        parts: the stored tensors by their keys, of sizes that `dequantized_headers` checked.
    """
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit

    weight = parts[""]
    if "SCB" in parts:  # int8: rows are scaled by their largest value
        return weight.float() * (parts["SCB"].float() / 127).unsqueeze(1)
    state = QuantState.from_dict({f"weight.{key}": part for key, part in parts.items() if key}, torch.device("cpu"))
    result: torch.Tensor = dequantize_4bit(weight, state)
    return result


def _has_quantized_weight(module: torch.nn.Module) -> bool:
    return any(not parameter.is_floating_point() for parameter in module.parameters())
