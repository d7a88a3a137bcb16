"""The table of GPU kernels: their operators, and the shapes of their results.

A kernel is an operator of torch (`torch.ops.lora_accel.NAME`), so that torch knows its shapes without running it. The
reference beside each caller is the same mathematics in torch's own operations. It runs on all other devices, and
without Triton. To do without an operation, remove its rows: those of its forward and of its backward.

Liger-Kernel 0.8 has norms, gates and rotary embeddings, too. These exist for three reasons: its kernels do not run in
Triton's interpreter, so without a GPU nothing can be proven of them; its backward fills the gradient of a norm with
zeros first, and overwrites the saved inputs of a gate; its cross-entropy waits for the GPU in each call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lora_accel.model import device

MIN_CAPABILITY = (8, 0)
"""The oldest GPUs that Triton supports (https://github.com/triton-lang/triton, Compatibility)."""


class Kernel(NamedTuple):
    """One row of the table. triton_kernels.py has a function of the same name."""

    schema: str
    shapes: Callable[..., Any]
    """The results for arguments on the meta device."""


def _nothing(*_: Any) -> None:
    pass


_DROPOUT = "Tensor token_keys, Tensor feature_keys, float p"

KERNELS = {
    "rms_norm": Kernel(
        "(Tensor x, Tensor weight, float eps, bool is_gemma) -> (Tensor, Tensor)",
        lambda x, *_: (torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)),
    ),
    "rms_norm_backward": Kernel(
        "(Tensor grad, Tensor x, Tensor weight, Tensor scales, bool is_gemma) -> Tensor",
        lambda grad, x, *_: torch.empty_like(x),
    ),
    "gate": Kernel("(Tensor gate, Tensor up, bool is_gelu) -> Tensor", lambda gate, *_: torch.empty_like(gate)),
    "gate_backward": Kernel(
        "(Tensor grad, Tensor gate, Tensor up, bool is_gelu) -> (Tensor, Tensor)",
        lambda grad, gate, up, _: (torch.empty_like(gate), torch.empty_like(up)),
    ),
    "rotate": Kernel(
        "(Tensor query, Tensor key, Tensor cos, Tensor sin, bool backward) -> (Tensor, Tensor)",
        lambda query, key, *_: tuple(
            torch.empty_like(x.transpose(1, 2).contiguous()).transpose(1, 2) for x in (query, key)
        ),
    ),
    "project_down": Kernel(
        f"(Tensor x, Tensor a, {_DROPOUT}) -> Tensor",
        lambda x, a, *_: x.new_empty(len(x), len(a)),
    ),
    "add_gradient": Kernel(f"(Tensor(z!) output, Tensor down, Tensor a, {_DROPOUT}) -> ()", _nothing),
    "matrix_gradient": Kernel(
        f"(Tensor down, Tensor x, {_DROPOUT}) -> Tensor",
        lambda down, x, *_: x.new_empty(down.shape[1], x.shape[1], dtype=torch.float32),
    ),
    "drop": Kernel(
        "(Tensor x, Tensor token_keys, Tensor feature_keys, float p) -> Tensor", lambda x, *_: torch.empty_like(x)
    ),
    "cross_entropy": Kernel(
        "(Tensor(a!) logits, Tensor targets, float scale, float? softcap, float smoothing, bool overwrite) -> Tensor",
        lambda logits, *_: logits.new_empty(len(logits), dtype=torch.float32),
    ),
}
"""By name."""


def has_kernel(name: str, tensor: torch.Tensor) -> bool:
    """Whether a kernel runs on a tensor's device. None runs without elements."""
    if not tensor.is_cuda or not tensor.numel() or name not in KERNELS or not device.has_package("triton"):
        return False
    capability = device.detect_device(tensor.device).capability  # None on AMD
    return capability is not None and capability >= MIN_CAPABILITY


def run_kernel(name: str, *args: Any) -> Any:
    """Run a kernel on tensors of a GPU."""
    from lora_accel.model.kernels import triton_kernels  # imports Triton

    with torch.cuda.device_of(args[0]):  # type: ignore[no-untyped-call]  # Triton starts kernels on the current device
        return getattr(triton_kernels, name)(*args)


def _define_operators() -> torch.library.Library:
    library = torch.library.Library("lora_accel", "DEF")  # type: ignore[no-untyped-call]
    for name, kernel in KERNELS.items():
        library.define(name + kernel.schema)  # type: ignore[no-untyped-call]
        library.impl(name, functools.partial(run_kernel, name), "CUDA")  # type: ignore[no-untyped-call]
        library.impl(name, kernel.shapes, "Meta")  # type: ignore[no-untyped-call]
    return library


LIBRARY = _define_operators()  # kept alive: torch removes the operators with it
