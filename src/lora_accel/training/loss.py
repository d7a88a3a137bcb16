"""The loss of a micro-batch: the sum over its supervised tokens. The logits of all its tokens are never made."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""The target of a place that carries no loss."""

KNOWN_HEADS = frozenset(
    """
    apertus arcee cohere cohere2 ernie4_5 exaone4 gemma gemma2 gemma3_text glm gpt2 gpt_neox granite helium
    hunyuan_v1_dense llama ministral mistral mixtral olmo olmo2 olmo3 olmoe opt phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe
    seed_oss smollm3 starcoder2 stablelm
    """.split()  # noqa: SIM905  a list would fill a page
)
"""Model types whose logits are `head(hidden)`, scaled and capped as their config says: tests/training/test_loss.py
proves it of each. Others make their logits themselves."""

CHUNK = 2**24
"""Logits made at once: 32 MiB in 16 bits, whatever the vocabulary."""

CACHED = 2**22
"""Of these, how many go through softmax together on CPU: their float32 stays in its cache."""


class Batch(Protocol):
    """What the loss reads of a micro-batch. B rows, T tokens, C columns."""

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model's forward takes."""

    @property
    def columns(self) -> torch.Tensor:
        """[C]"""

    @property
    def targets(self) -> torch.Tensor:
        """[B, C]"""


def summed_token_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the cross-entropy summed over supervised tokens, in float32.

    A sum, since only the whole step knows how many tokens to divide by.
    """
    if forward_takes(model, "targets"):
        loss: torch.Tensor = model(**batch.inputs, columns=batch.columns, targets=batch.targets)
        return loss
    if forward_takes(model, "logits_to_keep"):
        logits = model(**batch.inputs, logits_to_keep=batch.columns).logits  # [B, C, V]
    else:
        logits = model(**batch.inputs).logits[:, batch.columns]  # [B, C, V], after all [B, T, V] were made
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")


def return_loss(base: Any) -> bool:
    """Let a model of transformers return the loss itself where its forward is given `columns` and `targets`.

    Within its forward, since the wrappers of DDP and ZeRO look after no product outside of it. Returns whether the
    model's head is known.
    """
    config, own, head = base.config, base.forward, base.get_output_embeddings()
    if config.model_type not in KNOWN_HEADS:
        return False
    # Cohere multiplies its logits, Granite divides them, Gemma squeezes them.
    scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1)
    softcap = getattr(config, "final_logit_softcapping", None)
    fused = type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters())
    if fused:
        _return_fused_loss(head, scale, softcap)

    @functools.wraps(own)
    def forward(
        *words: Any, columns: torch.Tensor | None = None, targets: torch.Tensor | None = None, **inputs: Any
    ) -> Any:
        if columns is None or targets is None:
            return own(*words, **inputs)
        hidden = base.base_model(*words, **inputs)[0]  # [B, T, H]
        hidden, targets = hidden[:, columns].flatten(0, 1), targets.flatten()  # [N, H], [N]
        if fused:
            return head(hidden, targets)
        # A head that is trained wants gradients of its own, so its logits are made again on the way back.
        parts = [
            checkpoint(_head_loss, head, hidden[rows], targets[rows], scale, softcap, use_reentrant=False)
            for rows in _chunks(len(hidden), CHUNK // config.vocab_size)
        ]
        return torch.stack(parts).sum()

    base.forward = forward
    return True


def _return_fused_loss(head: Any, scale: float, softcap: float | None) -> None:
    own = head.forward

    @functools.wraps(own)
    def forward(hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if targets is None:
            logits: torch.Tensor = own(hidden)
            return logits
        loss: torch.Tensor = _FusedLoss.apply(hidden, head.weight, head.bias, targets, scale, softcap)  # type: ignore[no-untyped-call]
        return loss

    head.forward = forward


def _head_loss(
    head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    logits = head(hidden).float() * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


class _FusedLoss(torch.autograd.Function):
    """Head and cross-entropy of a frozen head, chunk by chunk, with the gradient formed in the same pass.

    d loss / d logits = softmax(logits) - onehot(target), so once a chunk's logits are there, nothing else is wanted of
    them: only [N, H] is kept for the way back.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        loss = torch.zeros((), device=hidden.device)
        with torch.autocast(kind, enabled=False):
            for rows in _chunks(len(hidden), CHUNK // len(weight)):
                logits = F.linear(hidden[rows].to(dtype), weight, bias)  # [n, V]
                for part in _chunks(len(logits), (CACHED if kind == "cpu" else CHUNK) // len(weight)):
                    loss += _loss(logits[part], targets[rows][part], scale, softcap, overwrite=grad is not None)
                if grad is not None:
                    supervised = targets[rows, None] != IGNORED
                    grad[rows] = (logits @ weight) * (supervised * scale)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, of_loss: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return (grad * of_loss.float()).to(grad.dtype), None, None, None, None, None


def _loss(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, softcap: float | None, *, overwrite: bool
) -> torch.Tensor:
    """Return the summed loss of logits [n, V], once scaled and capped.

    Args:
        overwrite: leave its gradient in their place; a factor `scale`, and zero for what is not supervised, is the
            caller's to apply.
    """
    target = targets[:, None].clamp(min=0)
    exact, slope = logits.float(), None
    if scale != 1:
        exact = exact * scale
    if softcap is not None:
        tanh = torch.tanh(exact / softcap)
        exact, slope = tanh * softcap, 1 - tanh.square()
    log_p = torch.log_softmax(exact, dim=-1)
    loss = -(log_p.gather(1, target)[:, 0] * (targets != IGNORED)).sum()
    if overwrite:
        gradient = log_p.exp_()
        gradient.scatter_add_(1, target, -torch.ones_like(target, dtype=gradient.dtype))
        logits.copy_(gradient if slope is None else gradient.mul_(slope))
    return loss


def _chunks(rows: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def forward_takes(model: Any, argument: str) -> bool:
    """Whether the forward of the model within the wrappers of DDP, DeepSpeed and PEFT takes an argument."""
    while hasattr(model, "module"):
        model = model.module
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    forwards = (inspect.signature(base.forward, follow_wrapped=False), inspect.signature(type(base).forward))
    return any(argument in forward.parameters for forward in forwards)
