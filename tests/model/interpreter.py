"""Runs the Triton kernels in Triton's interpreter, on the CPU, and compares them with references in float64.

TRITON_INTERPRET=1 python -m tests.model.interpreter RESULTS.json
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from triton.runtime import interpreter

from lora_accel.config.schema import AdapterSection
from lora_accel.model import dropout, fused_loss
from lora_accel.model.adapter import add_adapter, key_dropout, trainable_parameters
from lora_accel.model.kernels import gates, low_rank, norms, patch_base, rotary, triton_kernels
from lora_accel.model.kernels.adapters import patch_adapters
from lora_accel.model.kernels.table import KERNELS, LIBRARY, run_kernel
from tests.families import model_of

Errors = dict[str, float]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
P = 0.1
USED: set[str] = set()
"""Kernels that a model has run."""


def main(target: str) -> None:
    """Write the relative errors of each kernel and dtype."""
    _multiply_bfloat16()
    results = {
        f"{name}-{str(dtype).removeprefix('torch.')}": check(dtype)
        for name, check in CHECKS.items()
        for dtype in DTYPES
    }
    _use_kernels_on_the_cpu()
    results |= {f"model-{family}": _model_errors(family) for family in ("llama", "gemma2", "qwen3")}
    Path(target).write_text(json.dumps(results), encoding="utf-8")


def _multiply_bfloat16() -> None:
    """Let the interpreter multiply matrices of bfloat16, whose bits it would multiply as integers."""
    original = interpreter.InterpreterBuilder.create_dot

    def in_float32(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        values = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(values, tl.float32)

    def create_dot(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        return original(self, in_float32(left), in_float32(right), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _use_kernels_on_the_cpu() -> None:
    def run(name: str, *args: Any) -> Any:
        USED.add(name)
        return run_kernel(name, *args)

    for name in KERNELS:
        LIBRARY.impl(name, functools.partial(run, name), "CPU")  # type: ignore[no-untyped-call]


def _errors(names: str, computed: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> Errors:
    def error(left: torch.Tensor, right: torch.Tensor) -> float:
        assert left.shape == right.shape
        return float((left.double() - right.detach()).norm() / right.detach().norm())

    return {name: error(*pair) for name, *pair in zip(names.split(), computed, exact, strict=True)}


def _worst(errors: Iterator[Errors]) -> Errors:
    worst: Errors = {}
    for entry in errors:
        worst |= {name: max(error, worst.get(name, 0.0)) for name, error in entry.items()}
    return worst


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _keys(count: int, seed: int) -> torch.Tensor:
    return dropout.feature_keys(count, seed)


def _rms_norm(dtype: torch.dtype) -> Errors:
    def at(rows: int, width: int, is_gemma: bool) -> Errors:
        x, weight, grad = (
            _random(rows, width).to(dtype),
            _random(width).to(dtype),
            _random(rows, width, seed=1).to(dtype),
        )
        exact = x.double().requires_grad_()
        scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-5)
        output = exact * scale * (weight.double() + is_gemma)
        output.backward(grad.double())
        normed, scales = triton_kernels.rms_norm(x, weight, 1e-5, is_gemma)
        computed = normed, scales, triton_kernels.rms_norm_backward(grad, x, weight, scales, is_gemma)
        return _errors("output scale grad", computed, (output, scale[:, 0], exact.grad))

    return _worst(at(*shape, gemma) for shape in ((7, 40), (1, 1500), (50, 64)) for gemma in (False, True))


def _gate(dtype: torch.dtype) -> Errors:
    def at(rows: int, width: int, is_gelu: bool) -> Errors:
        gate, up, grad = (_random(rows, width, seed=seed).mul(4).to(dtype) for seed in range(3))
        exact = [x.double().requires_grad_() for x in (gate, up)]
        act = F.gelu(exact[0], approximate="tanh") if is_gelu else F.silu(exact[0])
        (act * exact[1]).backward(grad.double())
        computed = triton_kernels.gate(gate, up, is_gelu), *triton_kernels.gate_backward(grad, gate, up, is_gelu)
        return _errors("output grad_gate grad_up", computed, (act * exact[1], exact[0].grad, exact[1].grad))

    return _worst(at(*shape, gelu) for shape in ((3, 700), (1, 1), (64, 33)) for gelu in (False, True))


def _rotate(dtype: torch.dtype) -> Errors:
    def at(rows: int, tokens: int, heads: int, groups: int, size: int, shared: bool) -> Errors:
        tensors = [_random(rows, tokens, n, size, seed=n).to(dtype).transpose(1, 2) for n in (heads, groups)]
        angles = _random(1 if shared else rows, tokens, size // 2).repeat(1, 1, 2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        grads = [_random(*x.shape, seed=9).to(dtype) for x in tensors]  # with other strides
        exact = [x.double().requires_grad_() for x in tensors]
        rotated = apply_rotary_pos_emb(*exact, cos.double(), sin.double())
        torch.autograd.backward(rotated, [grad.double() for grad in grads])
        computed = *triton_kernels.rotate(*tensors, cos, sin, False), *triton_kernels.rotate(*grads, cos, sin, True)
        return _errors("query key grad_query grad_key", computed, (*rotated, *(x.grad for x in exact)))

    return _worst(at(*case) for case in ((2, 6, 3, 1, 20, False), (1, 5, 4, 2, 64, True), (3, 1, 1, 1, 6, True)))


def _low_rank(dtype: torch.dtype) -> Errors:
    def at(tokens: int, features: int, rank: int) -> Errors:
        x, a, down = _random(tokens, features).to(dtype), _random(rank, features), _random(tokens, rank).to(dtype)
        added = _random(tokens, features, seed=3).to(dtype)
        keys = _keys(tokens, 1), _keys(features, 2), P
        mask = dropout.keep_mask(*keys).double() / (1 - P)
        rounded = a.to(dtype).double()
        exact = (
            (x * mask) @ rounded.T,
            added.double() + (down.double() @ rounded) * mask,
            down.double().T @ (x * mask),
            x * mask,
        )
        computed_down = triton_kernels.project_down(x, a, *keys)
        triton_kernels.add_gradient(added, down, a, *keys)
        dropped = triton_kernels.drop(x, *keys)
        assert torch.equal(dropped == 0, (mask == 0) | (x == 0)), "the mask is that of the CPU"
        computed = computed_down, added, triton_kernels.matrix_gradient(down, x, *keys), dropped
        return _errors("down grad_x grad_a dropped", computed, exact)

    return _worst(at(*shape) for shape in ((70, 300, 5), (33, 128, 16), (1, 40, 3), (520, 20, 17)))


def _cross_entropy(dtype: torch.dtype) -> Errors:
    def at(num_classes: int, scale: float, softcap: float | None, smoothing: float) -> Errors:
        logits = _random(6, num_classes).mul(3).to(dtype)
        targets = torch.tensor([3, -100, num_classes - 1, 0, 50, 7])
        exact = logits.double().requires_grad_()
        scaled = exact * scale if softcap is None else torch.tanh(exact * scale / softcap) * softcap
        losses = F.cross_entropy(scaled, targets, reduction="none", label_smoothing=smoothing)
        losses.sum().backward()
        before = logits.clone()
        evaluated = triton_kernels.cross_entropy(logits, targets, scale, softcap, smoothing, False)
        assert torch.equal(logits, before), "an evaluation needs no gradient"
        computed = triton_kernels.cross_entropy(logits, targets, scale, softcap, smoothing, True)
        assert torch.equal(computed, evaluated)
        return _errors("losses gradient", (computed, logits), (losses, exact.grad))

    return _worst(at(*case) for case in ((100, 1.0, None, 0.0), (5000, 0.5, 30.0, 0.1), (4097, 2.0, None, 0.1)))


CHECKS: dict[str, Callable[[torch.dtype], Errors]] = {
    "rms_norm": _rms_norm,
    "gate": _gate,
    "rotate": _rotate,
    "low_rank": _low_rank,
    "cross_entropy": _cross_entropy,
}


def _model_errors(family: str) -> Errors:
    """Return the errors of a step's loss and gradients with kernels, against those of PEFT and transformers."""
    exact = _step(family, use_kernels=False)
    USED.clear()
    computed = _step(family, use_kernels=True)
    assert set(KERNELS) - USED == {"drop"}, "which is for layers that keep PEFT's forward"
    return _errors(" ".join(exact), tuple(computed.values()), tuple(x.double() for x in exact.values()))


def _step(family: str, *, use_kernels: bool) -> dict[str, torch.Tensor]:
    """Return the loss and the gradients of a model with dropout."""
    for module in (dropout, fused_loss, gates, low_rank, norms, rotary):
        vars(module)["has_kernel"] = lambda name, tensor: use_kernels
    base = model_of(family, num_hidden_layers=1).requires_grad_(False)
    section = AdapterSection(target_modules="all-linear", dropout=P, r=3)
    if use_kernels:
        patch_base(base)
    model = add_adapter(base, section, seed=0, autocast=False)
    keys = key_dropout(model)
    if use_kernels:
        patch_adapters(model)
        fused_loss.patch_fused_loss(model.get_base_model())
    for seed, (name, parameter) in enumerate(trainable_parameters(model).items()):
        if "lora_B" in name:
            parameter.data = _random(*parameter.shape, seed=seed) * 0.1
    ids = torch.arange(1, 25).view(2, 12)
    targets, keys.keys = ids[:, 1:], _keys(ids.numel(), 5).view(2, 12)
    if use_kernels:
        loss = model.train()(input_ids=ids, logit_positions=torch.arange(11), targets=targets, use_cache=False)
    else:
        logits = model.train()(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in trainable_parameters(model).items()}


if __name__ == "__main__":
    main(sys.argv[1])
