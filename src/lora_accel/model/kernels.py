"""Norms and gates that save only their inputs for backward.

Autograd would also save a norm's float32 copy of its input and a gate's activation: a third of what a frozen layer
saves. Here both are recomputed in backward. Outputs are bitwise those of transformers; gradients differ by rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation

from lora_accel.model.families import GATES, NORMS

ROWS = 256
"""Rows of a norm that are computed at once on CPU, so that they stay in its cache."""


def patch_norms_and_gates(model: nn.Module) -> None:
    """Patch the frozen norms and the gates of a model, if `NORMS` or `GATES` lists their class."""
    for module in model.modules():
        if not type(module).__module__.startswith("transformers.models."):
            continue
        if type(module).__name__ in NORMS and not module.weight.requires_grad:
            module.forward = functools.partial(_rms_norm, module)
        elif type(module).__name__ in GATES and isinstance(module.act_fn, (nn.SiLU, SiLUActivation)):
            module.forward = functools.partial(_gated_mlp, module)


def _rms_norm(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    normed: torch.Tensor = _RMSNorm.apply(hidden_states, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return normed


def _gated_mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
    down: torch.Tensor = module.down_proj(_Gate.apply(module.gate_proj(x), module.up_proj(x)))  # type: ignore[no-untyped-call]
    return down


class _RMSNorm(torch.autograd.Function):
    """RMSNorm: Zhang & Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.

    With n = x / rms and d = grad * weight, the gradient of x is (d - n * mean(n * d)) / rms.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])  # [N, H]
        scale = x.new_empty((len(flat), 1), dtype=torch.float32)  # 1 / rms
        normed = x.new_empty(flat.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
        for rows in _rows(flat):
            n = flat[rows].float()
            scale[rows] = torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + eps)
            torch.mul(weight, (n * scale[rows]).to(x.dtype), out=normed[rows])
        ctx.save_for_backward(x, weight, scale)
        return normed.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        flat, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        grad_x = torch.empty_like(flat)
        for rows in _rows(flat):
            n, d = flat[rows] * scale[rows], (grad[rows] * weight).float()
            grad_x[rows] = d.sub_(n.mul_((n * d).mean(-1, keepdim=True))).mul_(scale[rows])
        return grad_x.view(x.shape), None, None


class _Gate(torch.autograd.Function):
    """silu(gate) * up: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate) * grad


def _rows(flat: torch.Tensor) -> Iterator[slice]:
    size = ROWS if flat.device.type == "cpu" else max(1, len(flat))
    return (slice(start, start + size) for start in range(0, len(flat), size))
