"""Rotary embeddings in one kernel, where a model's own are those of Llama.

Su et al., RoFormer, arXiv 2104.09864.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.models.llama import modeling_llama

from lora_accel.model.kernels.table import has_kernel

NAMES = ("apply_rotary_pos_emb", "rotate_half")


def patch_rotary(model: torch.nn.Module) -> None:
    """Patch the function that rotates queries and keys, in the module of transformers that defines the model.

    All models of that class share it. It changes only what runs on a GPU with the kernel.
    """
    module = sys.modules[type(model).__module__]
    original = getattr(module, NAMES[0], None)
    if original is None or hasattr(original, "is_patched") or not _rotates_as_llama(module):
        return
    setattr(module, NAMES[0], _patched(original))


def _rotates_as_llama(module: ModuleType) -> bool:
    """Whether a module's functions are those of Llama, instruction by instruction: other models interleave halves."""
    return all(_code(getattr(module, name, None)) == _code(_LLAMA[name]) for name in NAMES)


def _code(function: Any) -> Any:
    if function is None:
        return None
    function = inspect.unwrap(function)
    constants = [constant for constant in function.__code__.co_consts if constant != function.__doc__]
    return function.__code__.co_code, function.__code__.co_names, constants, function.__defaults__


def _patched(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def rotated(
        query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        is_rotated_in_full = query.shape[-1] == key.shape[-1] == cos.shape[-1] and cos.ndim == 3
        if args or kwargs or not is_rotated_in_full or not has_kernel("rotate", query):
            return original(query, key, cos, sin, *args, **kwargs)
        return _Rotate.apply(query, key, cos, sin)  # type: ignore[no-untyped-call]

    rotated.is_patched = True  # type: ignore[attr-defined]
    return rotated


class _Rotate(torch.autograd.Function):
    """x * cos + rotate_half(x) * sin, [B, heads, T, D]. Its gradient is rotated back by the same angles."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        rotated: tuple[torch.Tensor, torch.Tensor] = torch.ops.lora_accel.rotate(query, key, cos, sin, False)
        return rotated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: torch.Tensor, grad_key: torch.Tensor) -> tuple[Any, ...]:
        return *torch.ops.lora_accel.rotate(grad_query, grad_key, *ctx.saved_tensors, True), None, None


_LLAMA = {name: getattr(modeling_llama, name) for name in NAMES}
