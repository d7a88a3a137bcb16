"""RMSNorm that saves only its input for backward.

Autograd would also save a norm's float32 copy of its input: a sixth of what a frozen layer saves. Here it is recomputed
in backward. Outputs on the CPU are bitwise those of transformers; gradients differ by rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lora_accel.model.families import GEMMA_NORMS, NORMS
from lora_accel.model.kernels.table import has_kernel

ROWS = 256
"""Rows of a norm that are computed at once on CPU, so that they stay in its cache."""


def patch_norms(model: nn.Module) -> None:
    """Patch the frozen norms of a model, if `NORMS` or `GEMMA_NORMS` lists their class."""
    for module in model.modules():
        name = type(module).__name__
        if not type(module).__module__.startswith("transformers.models.") or name not in NORMS | GEMMA_NORMS:
            continue
        if not module.weight.requires_grad:
            module.forward = functools.partial(_rms_norm, module, name in GEMMA_NORMS)


def _rms_norm(module: Any, is_gemma: bool, hidden_states: torch.Tensor) -> torch.Tensor:
    if module.weight.requires_grad:  # PEFT trains copies of patched norms (modules_to_save)
        trained: torch.Tensor = type(module).forward(module, hidden_states)
        return trained
    eps = module.eps if is_gemma else module.variance_epsilon
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    normed: torch.Tensor = _RMSNorm.apply(flat, module.weight, eps, is_gemma)  # type: ignore[no-untyped-call]
    return normed.view(hidden_states.shape)  # outside of the Function: OLMoE clips it in place


class _RMSNorm(torch.autograd.Function):
    """RMSNorm: Zhang & Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.

    With n = x / rms, the output is n * weight; n is rounded first. Gemma's is n * (1 + weight), rounded last.
    With d = grad * weight, the gradient of x is (d - n * mean(n * d)) / rms = (d - x * mean(x * d) / rms^2) / rms.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, is_gemma: bool) -> torch.Tensor:  # [N, H]
        is_fused = x.dtype == weight.dtype and has_kernel("rms_norm", x)
        normed, scale = (torch.ops.lora_accel.rms_norm if is_fused else _normed)(x, weight, eps, is_gemma)
        ctx.save_for_backward(x, weight, scale)
        ctx.is_fused, ctx.is_gemma = is_fused, is_gemma
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        backward = torch.ops.lora_accel.rms_norm_backward if ctx.is_fused else _gradient
        return backward(grad, x, weight, scale, ctx.is_gemma), None, None, None


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float, is_gemma: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output [N, H], and 1 / rms [N, 1] in float32."""
    scale = x.new_empty((len(x), 1), dtype=torch.float32)
    normed = x.new_empty(x.shape, dtype=x.dtype if is_gemma else torch.promote_types(x.dtype, weight.dtype))
    for rows in _rows(x):
        n = x[rows].float()
        scale[rows] = torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + eps)
        if is_gemma:
            normed[rows] = (n * scale[rows]).mul_(1.0 + weight.float())
        else:
            torch.mul(weight, (n * scale[rows]).to(x.dtype), out=normed[rows])
    return normed, scale


def _gradient(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, is_gemma: bool
) -> torch.Tensor:
    """Return the gradient of x, [N, H]."""
    grad_x = torch.empty_like(x)
    for rows in _rows(x):
        exact, s = x[rows].float(), scale[rows]
        d = grad[rows].float() * (1.0 + weight.float()) if is_gemma else (grad[rows] * weight).float()
        mean = (exact * d).mean(-1, keepdim=True).mul_(s.square())
        grad_x[rows] = d.addcmul_(exact, mean, value=-1).mul_(s)
    return grad_x


def _rows(flat: torch.Tensor) -> Iterator[slice]:
    size = ROWS if flat.device.type == "cpu" else max(1, len(flat))
    return (slice(start, start + size) for start in range(0, len(flat), size))
