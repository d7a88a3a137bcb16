"""The model that a run would train, with its adapter, on the meta device: no weight is loaded or computed."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_accel.config.adapter_options import subtracts_initial_adapter
from lora_accel.config.schema import QuantizationSection, RunConfig
from lora_accel.model.adapter import add_adapter, key_dropout
from lora_accel.model.attention import can_pack, is_flash_package, pack_attention
from lora_accel.model.base import AUTOCAST_DTYPES, build_on_meta_device, check_base, choose_dtype, quantized_names
from lora_accel.model.dropout import DropoutKeys
from lora_accel.model.fused_loss import patch_fused_loss
from lora_accel.model.headers import main_dtype
from lora_accel.model.kernels import patch_base
from lora_accel.model.kernels.adapters import dense_weight, patch_adapters
from lora_accel.model.new_tokens import extend_vocabulary, train_new_tokens
from lora_accel.model.sharing import min_saving_of
from lora_accel.model.sizes import load_config
from lora_accel.model.tokenizer import load_tokenizer
from lora_accel.planning.memory import quantized_bytes


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, patched as for training, and how its base is stored."""

    model: PeftModel
    dropout_keys: DropoutKeys
    packed: bool
    min_saving: float | None
    autocast: torch.dtype | None
    """dtype of mixed precision; None = off."""
    quantized: dict[str, int]
    """Bytes of the quantized weights, by the name of their parameter."""

    def stored_bytes(self, name: str, tensor: torch.Tensor) -> int:
        """Return the bytes of a parameter or buffer as training stores it."""
        return self.quantized.get(name, tensor.numel() * tensor.element_size())


def build_skeleton(config: RunConfig, mixed_precision: str, device: torch.device) -> Skeleton:
    """Build the model of a run, in the order of setup/model.py, from config.json and the headers of its weight files.

    Of a base on the Hub only config.json is read, which may be downloaded: its weights are not.

    Args:
        mixed_precision: no, bf16 or fp16.
        device: the device that will train; it decides the dtype of the base.

    Raises:
        ArtifactError: the weight files do not hold the model of config.json, or it describes no causal language model.
        ConfigError: the adapter does not fit the model.
    """
    base_config, stored = _read_base(config)
    bits = _quantized_bits(config.quantization, base_config)
    dtype = choose_dtype(config.model, mixed_precision, device, stored=stored)
    plain = copy.deepcopy(base_config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    attention = config.model.attention
    if is_flash_package(attention):  # saves what packed attention saves, and need not be installed for a plan
        attention = "auto"
    base = build_on_meta_device(
        plain, dtype=dtype, attention=attention, trust_remote_code=config.model.trust_remote_code
    )
    base.config.use_cache = False
    base.requires_grad_(False)
    adapter = config.adapter
    if subtracts_initial_adapter(adapter.init_lora_weights):
        adapter = adapter.model_copy(update={"init_lora_weights": True})
    if config.model.add_tokens is not None:
        extend_vocabulary(base, config.model)
        adapter = train_new_tokens(adapter, base, config.model.add_tokens, load_tokenizer(config.model))
    weights = {} if bits is None else {name: base.get_parameter(name) for name in sorted(quantized_names(base))}
    packed = config.data.packing and can_pack(base)
    min_saving = min_saving_of(config.training, base, device, packed=packed)
    if packed:
        pack_attention(base)
    if not config.training.compile:
        patch_base(base)
    if bits is not None:
        _quantize(base, weights)
    model = add_adapter(base, adapter, seed=config.seed, autocast=mixed_precision != "no")
    is_fused = patch_fused_loss(model.get_base_model())
    keys = key_dropout(model, fused_loss=is_fused)
    if bits != 8 and not config.training.compile:  # as kernels/adapters.py and setup/model.py
        patch_adapters(
            model, dense_weight if bits is None else lambda layer, dtype: torch.empty_like(layer.weight, dtype=dtype)
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    quantized = {
        names[id(weight)]: quantized_bytes(
            weight.numel(), len(weight), bits or 4, double_quant=config.quantization.double_quant
        )
        for weight in weights.values()
        if id(weight) in names
    }
    return Skeleton(model.train(), keys, packed, min_saving, AUTOCAST_DTYPES.get(mixed_precision), quantized)


def _read_base(config: RunConfig) -> tuple[PretrainedConfig, torch.dtype]:
    """Return the config of a base, and the dtype in which it is stored: for the Hub, as config.json declares it."""
    if Path(config.model.name_or_path).is_dir():
        base_config, tensors = check_base(config.model)
        return base_config, main_dtype(tensors)
    base_config = load_config(config.model)
    named = getattr(base_config, "dtype", None)
    return base_config, named if isinstance(named, torch.dtype) else torch.float32


def _quantized_bits(section: QuantizationSection, config: PretrainedConfig) -> int | None:
    """Return the bits of the base's linear layers: as configured, or as its files hold them; None = not quantized."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return section.bits
    values = stored if isinstance(stored, dict) else stored.to_dict()
    return 8 if values.get("load_in_8bit") else 4


def _quantize(base: PreTrainedModel, weights: dict[str, torch.nn.Parameter]) -> None:
    """Make the linear layers dequantize their weights."""
    owners = {name.rpartition(".")[0] for name in weights}
    for name, module in base.named_modules():
        if name in owners:
            module.forward = _DequantizingLinear(module)


class _DequantizingLinear:
    """The forward of a quantized linear layer: its weight is dequantized for each product and not saved."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module = self._module
        product: torch.Tensor = _DequantizedProduct.apply(x, module.weight, isinstance(module, Conv1D))  # type: ignore[no-untyped-call]
        return product if module.bias is None else product + module.bias.to(product.dtype)


class _DequantizedProduct(torch.autograd.Function):
    """x @ dequantize(weight), in the dtype of the weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, is_transposed: bool) -> torch.Tensor:
        ctx.weight, ctx.dtype, ctx.is_transposed = weight, x.dtype, is_transposed
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        dequantized = torch.empty_like(weight)  # [in, out] if transposed (transformers' Conv1D), else [out, in]
        return (x.to(weight.dtype) @ (dequantized if is_transposed else dequantized.T)).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        dequantized = torch.empty_like(ctx.weight)
        product = grad.to(ctx.weight.dtype) @ (dequantized.T if ctx.is_transposed else dequantized)
        return product.to(ctx.dtype), None, None
