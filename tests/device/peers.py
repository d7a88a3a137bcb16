"""How other trainers would run a step: transformers with PEFT, and TRL with Liger-Kernel's kernels.

Liger's kernels need Triton, so operators with their inputs and outputs replace them, after liger-kernel 0.8.5
(ops/rms_norm.py, ops/swiglu.py, ops/rope.py, ops/fused_linear_cross_entropy.py). Both get packed rows and this
package's attention kernel, as TRL does with FlashAttention.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from lora_accel.model.attention import pack_attention

ROTARY = modeling_llama.apply_rotary_pos_emb
LIGER = torch.library.Library("liger", "DEF")
LIGER.define("rms_norm(Tensor x, Tensor weight) -> (Tensor, Tensor)")
LIGER.define("rms_norm_backward(Tensor(a!) grad, Tensor x, Tensor weight, Tensor scale) -> ()")
LIGER.define("swiglu(Tensor gate, Tensor up) -> Tensor")
LIGER.define("swiglu_backward(Tensor grad, Tensor(a!) gate, Tensor(b!) up) -> ()")
LIGER.define("rope(Tensor(a!) query, Tensor(b!) key, Tensor cos, Tensor sin) -> ()")
LIGER.define("cross_entropy(Tensor(a!) logits, Tensor targets, Tensor(b!) losses) -> ()")
LIGER.define("element_mul(Tensor(a!) x, Tensor factor) -> ()")
for _name in ("rms_norm_backward", "swiglu_backward", "rope", "cross_entropy", "element_mul"):
    torch.library.register_fake(f"liger::{_name}", lambda *args: None, lib=LIGER)
torch.library.register_fake("liger::swiglu", lambda gate, up: torch.empty_like(gate), lib=LIGER)
torch.library.register_fake(
    "liger::rms_norm",
    lambda x, weight: (torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)),
    lib=LIGER,
)


def transformers_with_peft(base: PreTrainedModel, *, dropout: float, is_quantized: bool) -> PeftModel:
    """Return a model as PEFT's documentation prepares it: QLoRA by `prepare_model_for_kbit_training`."""
    pack_attention(base)
    if is_quantized:
        prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    return get_peft_model(base, _lora(dropout))


def trl_with_liger(base: PreTrainedModel, *, dropout: float, is_quantized: bool) -> PeftModel:
    """Return a model as TRL 1.16's SFTTrainer prepares it (trl/trainer/sft_trainer.py), loaded in bfloat16.

    It does not call `prepare_model_for_kbit_training`. In QLoRA it casts the adapter to bfloat16.
    """
    pack_attention(base)
    model = get_peft_model(base, _lora(dropout))
    if is_quantized:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    for module in base.modules():
        if isinstance(module, modeling_llama.LlamaRMSNorm):
            module.forward = functools.partial(_rms_norm, module)
        elif isinstance(module, modeling_llama.LlamaMLP):
            module.forward = functools.partial(_mlp, module)
    base.forward = functools.partial(_forward_with_fused_loss, base)
    return model


@contextlib.contextmanager
def rotary_embedding(way: str) -> Iterator[None]:
    """Give a peer its own RoPE in the block: transformers calls a function of its module, which others replace."""
    current = modeling_llama.apply_rotary_pos_emb
    modeling_llama.apply_rotary_pos_emb = {"PEFT": ROTARY, "TRL + Liger": _liger_rotary}.get(way, current)
    try:
        yield
    finally:
        modeling_llama.apply_rotary_pos_emb = current


def _lora(dropout: float) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear", lora_dropout=dropout)


def _rms_norm(module: Any, x: torch.Tensor) -> Any:
    return _RMSNorm.apply(x, module.weight)


def _mlp(module: Any, x: torch.Tensor) -> Any:
    return module.down_proj(_SwiGLU.apply(module.gate_proj(x), module.up_proj(x)))


def _forward_with_fused_loss(base: Any, *, labels: torch.Tensor, **inputs: Any) -> Any:
    hidden = base.model(**inputs)[0]
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
    return {"loss": _FusedLinearCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), base.lm_head.weight, shifted)}


def _liger_rotary(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **_: Any) -> Any:
    return _Rope.apply(query, key, cos, sin)


class _RMSNorm(torch.autograd.Function):
    """LigerRMSNormFunction with a frozen weight: the gradient replaces that of the output."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        normed, scale = torch.ops.liger.rms_norm(x, weight)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.contiguous()
        torch.ops.liger.rms_norm_backward(grad, *ctx.saved_tensors)
        return grad, None


class _SwiGLU(torch.autograd.Function):
    """LigerSiLUMulFunction: the gradients replace the saved inputs."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return torch.ops.liger.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        torch.ops.liger.swiglu_backward(grad.contiguous(), gate, up)
        return gate, up


class _Rope(torch.autograd.Function):
    """LigerRopeFunction: rotates queries and keys in place, in the layout [B, T, H, D]."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        ctx.save_for_backward(cos, sin)
        return _rotate(query, key, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad_query: torch.Tensor, grad_key: torch.Tensor) -> Any:
        return (*_rotate(grad_query, grad_key, *ctx.saved_tensors), None, None)


def _rotate(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    query, key = query.transpose(1, 2).contiguous(), key.transpose(1, 2).contiguous()
    torch.ops.liger.rope(query, key, cos.contiguous(), sin.contiguous())
    return query.transpose(1, 2), key.transpose(1, 2)


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """LigerFusedLinearCrossEntropyFunction with a frozen head: the gradient is computed in forward, by chunks."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        num_chunks = -(-len(weight) // hidden.shape[-1])
        chunk = min(len(hidden), 1 << (-(-len(hidden) // num_chunks) - 1).bit_length())
        grad, losses = torch.zeros_like(hidden), torch.zeros(len(hidden), device=hidden.device)
        (targets != -100).sum()
        logits = hidden.new_empty((chunk, len(weight)))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                rows = slice(start, min(start + chunk, len(hidden)))
                part = logits[: rows.stop - start]
                torch.mm(hidden[rows], weight.t(), out=part)
                torch.ops.liger.cross_entropy(part, targets[rows], losses[rows])
                torch.mm(part, weight, out=grad[rows])
        ctx.save_for_backward(grad)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        torch.ops.liger.element_mul(grad, grad_loss)
        return grad, None, None
