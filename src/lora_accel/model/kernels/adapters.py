"""LoRA on a linear layer as one operation, W x + s B A drop(x), with its backward.

PEFT drops, scales and adds in operations of their own, and autograd saves a dropped x for each layer. Here dropout and
sums are part of the matrix products, and layers that read the same x save it once. Layers that PEFT computes in another
way (DoRA, several adapters, 8 bits, weights that are gathered for each forward) keep its forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear
from torch import nn
from torch.autograd.function import once_differentiable

from lora_accel.model.dropout import KeyedDropout
from lora_accel.model.kernels.low_rank import Dropout, add_gradient, matrix_gradient, project_down, scaled_product

DenseWeight = Callable[[Any, torch.dtype], torch.Tensor]


def dense_weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight of a linear layer [N, F], dequantized if it is in 4 bits."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        weight: torch.Tensor = layer.weight
    else:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(layer.weight.view(-1, 1), state)
    return weight.to(dtype)


def patch_adapters(model: nn.Module, weight_of: DenseWeight = dense_weight) -> None:
    """Patch the forward of the model's adapted linear layers, once their dropout is keyed.

    Args:
        weight_of: returns the weight of a base layer.
    """
    for module in model.modules():
        layer: Any = module
        if isinstance(module, _linear_classes()) and _is_frozen_linear(layer.get_base_layer()):
            layer.forward = functools.partial(_adapted, layer, layer.forward, weight_of)


@functools.cache
def _linear_classes() -> tuple[type, ...]:
    from peft.import_utils import is_bnb_4bit_available

    if not is_bnb_4bit_available():
        return (Linear,)
    from peft.tuners.lora.bnb import Linear4bit

    return (Linear, Linear4bit)


def _is_frozen_linear(layer: nn.Module) -> bool:
    """Whether a layer computes x W' + b, and nothing of it is trained. (GPT-2's Conv1D stores W', and is none.)"""
    is_linear = isinstance(layer, nn.Linear) and not any(p.requires_grad for p in layer.parameters())
    return is_linear and type(layer).__name__ in ("Linear", "Linear4bit")


class _Layer(NamedTuple):
    """What a forward needs besides tensors that get gradients."""

    base: Any
    weight_of: DenseWeight
    scale: float
    dropout: Dropout | None
    dtype: torch.dtype


def _adapted(layer: Any, original: Callable[..., Any], weight_of: DenseWeight, x: torch.Tensor, **kwargs: Any) -> Any:
    if kwargs or not x.numel() or not _is_plain(layer):
        return original(x, **kwargs)
    base, name = layer.get_base_layer(), layer.active_adapters[0]
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    has_one_dtype = x.dtype == a.weight.dtype == b.weight.dtype and base.weight.dtype in (x.dtype, torch.uint8)
    if not torch.is_autocast_enabled(device) and not has_one_dtype:
        return original(x)  # PEFT defines what is cast then
    keyed = None
    if isinstance(dropout, KeyedDropout) and dropout.is_active:
        keyed = Dropout(dropout.keys_of(x).flatten(), dropout.feature_keys, dropout.p)
    call = _Layer(base, weight_of, layer.scaling[name], keyed, dtype)
    output = _AdaptedLinear.apply(x.reshape(-1, x.shape[-1]), a.weight, b.weight, call)  # type: ignore[no-untyped-call]
    return output.view(*x.shape[:-1], -1)  # outside of the Function: OLMo clips it in place


def _is_plain(layer: Any) -> bool:
    """Whether an adapted layer now computes W x + s B A drop(x), with weights that are there."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    name, base = layer.active_adapters[0], layer.get_base_layer()
    if name in layer.lora_variant or name not in layer.lora_A or layer.lora_B[name].bias is not None:
        return False
    if base._forward_hooks or base._backward_hooks or base._backward_pre_hooks or base.weight.requires_grad:
        return False  # what they compute needs gradients
    dropout = layer.lora_dropout[name]
    parts = (layer.lora_A[name], layer.lora_B[name])
    # Hooks may gather a sharded weight.
    has_hooks = any(part._forward_pre_hooks or part._forward_hooks or "forward" in vars(part) for part in parts)
    return (
        not has_hooks and isinstance(dropout, (nn.Identity, KeyedDropout)) and all(type(p) is nn.Linear for p in parts)
    )


class _AdaptedLinear(torch.autograd.Function):
    """y = W x + s B h with h = A drop(x): Hu et al., LoRA, arXiv 2106.09685, section 4.1.

    With g = dy: dB = s g' h, dh = s g B, dA = dh' drop(x), dx = g W + drop(dh A), and drop is recomputed in backward.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, layer: _Layer) -> torch.Tensor:
        ctx.dtypes = a.dtype, b.dtype
        flat = x.to(layer.dtype)  # [T, F]
        output: torch.Tensor = layer.base(flat)  # [T, N]
        if layer.dropout is None:
            a = a.to(layer.dtype)
        b = b.to(layer.dtype)
        down = project_down(flat, a, layer.dropout)
        output.addmm_(down, b.t(), alpha=layer.scale)
        ctx.save_for_backward(x, a, b, down)
        ctx.layer = layer
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, None]:
        x, a, b, down = ctx.saved_tensors
        layer = ctx.layer
        grad, flat = grad.to(layer.dtype), x.to(layer.dtype)  # [T, N], [T, F]
        dropout = None if layer.dropout is None else layer.dropout.with_selection(flat, len(a))
        grad_down = scaled_product(grad, b, layer.scale)
        grad_b = scaled_product(grad.t(), down, layer.scale)
        grad_a = matrix_gradient(grad_down, flat, dropout)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ layer.weight_of(layer.base, layer.dtype)
            add_gradient(grad_x, grad_down, a, dropout)
            grad_x = grad_x.to(x.dtype)
        return grad_x, grad_a.to(ctx.dtypes[0]), grad_b.to(ctx.dtypes[1]), None
