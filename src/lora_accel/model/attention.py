"""Packed attention: examples lie end to end in one row, and each attends to itself only.

There is no mask that could be wrong: keys of other examples are never read. A forward is given the lengths of its row's
segments, transformers' attention interface hands them on to each layer, and `packed_attention` dispatches to one of two
kernels: torch's variable-length FlashAttention where it can run (`model/device.py: attention_kernel`), else products
over one block of queries after the other.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_accel.model.device import attention_kernel, detect_device
from lora_accel.model.families import family_of

BLOCK = 128
"""Queries that are worked on together: few, so that most products with later keys are never made; and enough for a
matrix product at full speed."""


class Block(NamedTuple):
    """Queries [first, last) of a row, and the first key that any of them may see; the last is their own."""

    first: int
    last: int
    first_key: int


class Options(NamedTuple):
    """What a model's attention does beside the usual."""

    scaling: float
    sliding_window: int | None
    softcap: float | None


def can_pack(model: PreTrainedModel) -> bool:
    """Whether a model takes packed rows: its type is known to, its attention has no dropout, and is a usual one."""
    config = model.config
    drops = getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0)
    return family_of(config.model_type).packs and config._attn_implementation in ("sdpa", "eager") and not drops


def pack_attention(model: PreTrainedModel) -> None:
    """Let a model take packed rows: `segments`, their lengths, in its forward. Without them it attends as before."""
    own = model.config._attn_implementation
    usual = ALL_ATTENTION_FUNCTIONS.get(own)

    def attention(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> tuple[torch.Tensor, Any]:
        if options.get("segments") is not None:
            return packed_attention(query, key, value, **options), None
        # A model's own eager attention is a function of its module's file.
        attend = usual or sys.modules[type(module).__module__].eager_attention_forward
        attended: tuple[torch.Tensor, Any] = attend(module, query, key, value, mask, **options)
        return attended

    name = f"packed_{own}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    model.set_attn_implementation(name)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    segments: Iterable[int],
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> torch.Tensor:
    """Return causal attention within each segment, [1, T, H, D].

    Args:
        query: [1, H, T, D].
        key: [1, G, T, D]; each of its G heads serves H / G of the query's. `value` likewise.
        segments: lengths, in order; their sum is T.
        scaling: of the products of query and key; None = 1 / sqrt(D).
        sliding_window: how many keys a query sees at most, its own among them.
        softcap: products are squeezed to ±softcap by tanh (Gemma 2).
    """
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = (x[0].to(dtype) for x in (query, key, value))
    options = Options(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    sizes = query.shape[-1], value.shape[-1]
    if attention_kernel(detect_device(query.device), dtype, *sizes, softcap=softcap) == "varlen" and flash_kernel():
        return _flash(query, key, value, segments, options)[None]
    blocks = list(_blocks(segments, sliding_window))
    attended: torch.Tensor = _Blockwise.apply(query, key, value, blocks, options)  # type: ignore[no-untyped-call]
    return attended[None]


@functools.cache
def flash_kernel() -> Callable[..., Any] | None:
    """Return torch's variable-length flash attention, or None where it lacks what is needed here.

    torch 2.9 has none, 2.10 has no window, 2.11 no grouped keys and values. Drop this when torch >= 2.12 is required.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "enable_gqa" in inspect.signature(varlen_attn).parameters else None


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Iterable[int], options: Options
) -> torch.Tensor:
    varlen_attn = flash_kernel()
    assert varlen_attn is not None  # packed_attention looks first
    edges = torch.tensor([0, *itertools.accumulate(segments)], dtype=torch.int32).to(query.device, non_blocking=True)
    sees = (-1 if options.sliding_window is None else options.sliding_window - 1, 0)
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    attended = varlen_attn(
        *(query, key, value, edges, edges, max(segments), max(segments)),
        scale=options.scaling,
        window_size=sees,
        enable_gqa=True,
    )
    assert isinstance(attended, torch.Tensor)
    return attended


def _blocks(segments: Iterable[int], window: int | None) -> Iterator[Block]:
    start = 0
    for length in segments:
        for first in range(start, start + length, BLOCK):
            first_key = start if window is None else max(start, first - window + 1)
            yield Block(first, min(first + BLOCK, start + length), first_key)
        start += length


class _Blockwise(torch.autograd.Function):
    """Keeps query, key and value for the way back, and makes each block's weights again."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: list[Block], options: Options
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.options = blocks, options
        attended = query.new_empty((query.shape[1], query.shape[0], value.shape[-1]))  # [T, H, D]
        with torch.autocast(query.device.type, enabled=False):
            for first, last, first_key in blocks:
                q, k, v = query[:, first:last], key[:, first_key:last], value[:, first_key:last]
                attended[first:last] = _attend(q, k, v, options)
        return attended

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        query, key, value = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for first, last, first_key in ctx.blocks:
            q, k, v = query[:, first:last], key[:, first_key:last], value[:, first_key:last]
            grads = _attend_backward(q, k, v, grad[first:last], ctx.options)
            of_query[:, first:last] = grads[0]
            of_key[:, first_key:last] += grads[1]
            of_value[:, first_key:last] += grads[2]
        return of_query, of_key, of_value, None, None


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options) -> torch.Tensor:
    """Return [N, H, D] of queries [H, N, D] and keys [G, M, D], of which the last N are the queries' own."""
    _, weights, _ = _weigh(query, key, options)
    return (weights @ value).view(*query.shape[:2], -1).transpose(0, 1)


def _attend_backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value for that of `_attend`, [N, H, D]."""
    scaled, weights, slope = _weigh(query, key, options)
    grad = grad.transpose(0, 1).reshape(len(key), -1, value.shape[-1])  # [G, H / G * N, D]
    of_products = torch.ops.aten._softmax_backward_data(grad @ value.mT, weights, -1, weights.dtype)
    if slope is not None:
        of_products = of_products * slope
    of_query = (of_products @ key).mul_(options.scaling)
    return of_query.view(query.shape), of_products.mT @ scaled, weights.mT @ grad


def _weigh(
    query: torch.Tensor, key: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the scaled queries [G, H / G * N, D], their weights [G, H / G * N, M], and the slope of the cap."""
    (heads, n, width), (groups, m, _) = query.shape, key.shape
    scaled = (query * options.scaling).reshape(groups, heads // groups * n, width)
    products, slope = scaled @ key.mT, None
    if options.softcap is not None:
        capped = torch.tanh(products / options.softcap)
        products, slope = capped * options.softcap, 1 - capped.square()
    if options.sliding_window is None:
        products.view(groups, -1, n, m)[..., m - n :].add_(_later(BLOCK, query.dtype, query.device)[:n, :n])
    else:
        products.view(groups, -1, n, m).add_(_unseen(n, m, options.sliding_window, query))
    return scaled, torch.softmax(products, dim=-1), slope


@functools.lru_cache(maxsize=8)
def _later(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return _unseen(n, n, None, torch.empty(0, dtype=dtype, device=device))


def _unseen(n: int, m: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """Return [N, M], -inf where one of the last N of M tokens may not see another, to be added: on CPU four times
    as fast as filling in."""
    unseen = torch.ones((n, m), dtype=torch.bool, device=like.device).triu_(m - n + 1)
    if window is not None:
        unseen |= torch.ones_like(unseen).tril_(m - n - window)
    return torch.zeros((n, m), dtype=like.dtype, device=like.device).masked_fill_(unseen, float("-inf"))
