"""Gated MLPs that save only the two inputs of their gate for backward; autograd would also save the activation."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.activations import GELUTanh, SiLUActivation

from lora_accel.model.families import GATES
from lora_accel.model.kernels.table import has_kernel


def patch_gates(model: nn.Module) -> None:
    """Patch the gated MLPs of a model, if `GATES` lists their class and their activation is SiLU or tanh-GELU."""
    for module in model.modules():
        if not type(module).__module__.startswith("transformers.models.") or type(module).__name__ not in GATES:
            continue
        if isinstance(module.act_fn, (nn.SiLU, SiLUActivation, GELUTanh)):
            module.forward = functools.partial(_gated_mlp, module, isinstance(module.act_fn, GELUTanh))


def _gated_mlp(module: Any, is_gelu: bool, x: torch.Tensor) -> torch.Tensor:
    gated = _Gate.apply(module.gate_proj(x), module.up_proj(x), is_gelu)  # type: ignore[no-untyped-call]
    down: torch.Tensor = module.down_proj(gated)
    return down


class _Gate(torch.autograd.Function):
    """act(gate) * up: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, is_gelu: bool) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.is_gelu = is_gelu
        if has_kernel("gate", gate):
            gated: torch.Tensor = torch.ops.lora_accel.gate(gate, up, is_gelu)
            return gated
        return _activation(gate, is_gelu).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        gate, up = ctx.saved_tensors
        if has_kernel("gate_backward", gate):
            return *torch.ops.lora_accel.gate_backward(grad, gate, up, ctx.is_gelu), None
        grad_gate = grad * up
        if ctx.is_gelu:
            torch.ops.aten.gelu_backward.grad_input(grad_gate, gate, approximate="tanh", grad_input=grad_gate)
        else:
            torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, _activation(gate, ctx.is_gelu).mul_(grad), None


def _activation(x: torch.Tensor, is_gelu: bool) -> torch.Tensor:
    return F.gelu(x, approximate="tanh") if is_gelu else F.silu(x)
