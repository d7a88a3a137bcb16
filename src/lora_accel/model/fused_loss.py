"""Fused head and loss: logits are computed chunk by chunk, only at logit positions, and never materialized in full.

The loss is computed inside the model's forward: DDP and ZeRO synchronize only what a forward computes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_accel.labels import IGNORE_INDEX
from lora_accel.model.dropout import dropout_keys_of
from lora_accel.model.families import family_of
from lora_accel.model.kernels.table import has_kernel

CHUNK_NUMEL = 2**24
"""Logits computed at once: 32 MiB in 16 bits, whatever the vocabulary size."""

GPU_ROWS = 512
"""Rows of logits that a GPU computes at once, at least: fewer would not keep it busy. Of a 128k vocabulary, 131 MB."""

SOFTMAX_NUMEL = 2**20
"""Logits that go through softmax at once on CPU, so that their float32 copy stays in the cache."""


def patch_fused_loss(base: Any) -> bool:
    """Make a transformers model return the summed loss when its forward gets `logit_positions` and `targets`.

    The forward then takes `label_smoothing`, too, as torch's cross_entropy does.

    Returns:
        Whether the head of this model family is known; otherwise nothing is patched.
    """
    config, original, head = base.config.get_text_config(), base.forward, base.get_output_embeddings()
    if not family_of(base.config.model_type).supports_fused_loss:
        return False
    # Llama 4 names its decoder unlike its `base_model_prefix`.
    decoder = base.model if base.base_model is base else base.base_model
    # Cohere and Falcon-H1 multiply their logits, Granite divides them, Gemma caps them.
    multiplier = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
    scale = multiplier or 1 / getattr(config, "logits_scaling", 1)
    softcap = getattr(config, "final_logit_softcapping", None)
    is_frozen = type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters())
    if is_frozen:
        _patch_head(head, scale, softcap)

    @functools.wraps(original)
    def forward(
        *args: Any,
        logit_positions: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> Any:
        if logit_positions is None or targets is None:
            return original(*args, **kwargs)
        hidden = decoder(*args, **kwargs)[0]  # [B, T, H]
        # Many examples may continue one token. In 16 bits, the sum of their gradients would lose most of them.
        source = hidden.float() if getattr(kwargs.get("segments"), "is_shared", False) else hidden
        hidden = source[:, logit_positions].to(hidden.dtype).flatten(0, 1)  # [N, H]
        targets = targets.flatten()  # [N]
        if is_frozen:
            return head(hidden, targets, label_smoothing)
        # A trained head needs its own gradients, so its logits are recomputed in backward.
        keys = _keys_at(head, logit_positions)
        losses = [
            checkpoint(
                _head_loss,
                head,
                hidden[rows],
                targets[rows],
                None if keys is None else keys[rows],
                scale,
                softcap,
                label_smoothing,
                use_reentrant=False,
            )
            for rows in _chunks(len(hidden), _chunk_size(hidden, config.vocab_size))
        ]
        return torch.stack(losses).sum()

    base.forward = forward
    return True


def _patch_head(head: Any, scale: float, softcap: float | None) -> None:
    """Make a frozen head return the loss when it gets targets [N]. Sharded weights are gathered for its forward."""
    original = head.forward

    @functools.wraps(original)
    def forward(
        hidden: torch.Tensor, targets: torch.Tensor | None = None, label_smoothing: float = 0.0
    ) -> torch.Tensor:
        if targets is None:
            logits: torch.Tensor = original(hidden)
            return logits
        loss: torch.Tensor = _FusedLoss.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, targets, scale, softcap, label_smoothing
        )
        return loss

    head.forward = forward


def _keys_at(head: nn.Module, positions: torch.Tensor) -> torch.Tensor | None:
    """Return the keys [N] for the head's dropout at some positions of each row; None if it has none."""
    dropout = dropout_keys_of(head)
    return None if dropout is None or dropout.keys is None else dropout.keys[:, positions].flatten()


def _head_loss(
    head: nn.Module,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    keys: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    label_smoothing: float,
) -> torch.Tensor:
    dropout = dropout_keys_of(head)
    with contextlib.nullcontext() if dropout is None or keys is None else dropout.replaced(keys):
        logits = head(hidden).float() * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=label_smoothing)


class _FusedLoss(torch.autograd.Function):
    """Frozen head and cross-entropy, chunk by chunk. The gradient is computed in forward.

    d loss / d logits = softmax(logits) - onehot(target), so a chunk's gradient is computed right after its logits, and
    only [N, H] is saved for backward. With label smoothing s, the target is (1 - s) * onehot(target) + s / V.
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
        smoothing: float,
    ) -> torch.Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        loss = torch.zeros((), device=hidden.device)
        is_fused, overwrite = has_kernel("cross_entropy", hidden), grad is not None
        softmax_rows = (SOFTMAX_NUMEL if device == "cpu" else CHUNK_NUMEL) // len(weight)
        with torch.autocast(device, enabled=False):
            for rows in _chunks(len(hidden), _chunk_size(hidden, len(weight))):
                logits, labels = F.linear(hidden[rows].to(dtype), weight, bias), targets[rows]  # [n, V], [n]
                if is_fused:
                    losses = torch.ops.lora_accel.cross_entropy(logits, labels, scale, softcap, smoothing, overwrite)
                    loss += losses.sum()
                else:
                    for part in _chunks(len(logits), softmax_rows):
                        loss += _loss(logits[part], labels[part], scale, softcap, smoothing, overwrite=overwrite)
                if grad is not None:
                    product = logits @ weight
                    grad[rows] = product if is_fused else product * ((labels[:, None] != IGNORE_INDEX) * scale)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return (grad * grad_loss.float()).to(grad.dtype), None, None, None, None, None, None


def _loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scale: float,
    softcap: float | None,
    smoothing: float,
    *,
    overwrite: bool,
) -> torch.Tensor:
    """Return the summed loss of logits [n, V] after scaling and capping.

    Args:
        overwrite: replace the logits by their gradient. The caller multiplies it by `scale`, and by zero where a
            target is not supervised.
    """
    target = targets[:, None].clamp(min=0)
    exact, slope = logits.float(), None
    if scale != 1:
        exact = exact * scale
    if softcap is not None:
        tanh = torch.tanh(exact / softcap)
        exact, slope = tanh * softcap, 1 - tanh.square()
    # Relative to the largest logit, whose probability is exp(-log_total): softmax computes each exponential once.
    peak = exact.amax(1)
    gradient = torch.softmax(exact, dim=-1) if overwrite else None
    log_total = (exact - peak[:, None]).logsumexp(1) if gradient is None else -gradient.amax(1).log_()
    expected = exact.gather(1, target)[:, 0] - peak
    if smoothing:
        expected = (1 - smoothing) * expected + smoothing * (exact.mean(dim=1) - peak)
    loss = ((log_total - expected) * (targets != IGNORE_INDEX)).sum()
    if gradient is not None:
        if smoothing:
            gradient -= smoothing / gradient.shape[1]
        gradient.scatter_add_(1, target, torch.full_like(target, smoothing - 1, dtype=gradient.dtype))
        logits.copy_(gradient if slope is None else gradient.mul_(slope))
    return loss


def _chunk_size(hidden: torch.Tensor, vocab_size: int) -> int:
    """Return the number of rows whose logits are computed at once."""
    return max(CHUNK_NUMEL // vocab_size, GPU_ROWS if hidden.is_cuda else 1)


def _chunks(rows: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
