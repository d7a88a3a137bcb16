"""Packed attention by torch's kernels for NVIDIA GPUs; `model/attention.py` has that for other devices.

| kernel | what it is | where |
| --- | --- | --- |
| varlen | FlashAttention 2 with segment offsets | 16 bits, compute capability 8.0 |
| efficient | memory-efficient attention with segment offsets | float32, older GPUs, any head size |
| flex | a Triton kernel that torch.compile generates | softcap, sinks, and windows where varlen cannot run |

`model/device.py: attention_kernel` chooses among them. Layouts here: query [H, T, D], key and value [G, T, D]; output
[T, H, D].
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import functional as F

CAUSAL_FROM_TOP_LEFT = 1
"""`custom_mask_type` of aten::_efficient_attention_forward: within each segment, a query attends to no later key."""
ALIGNMENT = {torch.float16: 8, torch.bfloat16: 8, torch.float32: 4}
"""Head sizes of the memory-efficient kernel are multiples of 16 bytes."""

MASK_BLOCK = 128
"""Queries, and keys, of a block of FlexAttention's mask: torch's own size."""


@functools.cache
def flash_kernel() -> Callable[..., Any] | None:
    """Return torch's variable-length FlashAttention, or None if this torch lacks a feature that is needed here.

    torch 2.9 has no kernel, 2.10 no sliding window, 2.11 no grouped-query attention. Remove this function when
    torch >= 2.12 is required.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "enable_gqa" in inspect.signature(varlen_attn).parameters else None


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Iterable[int],
    *,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """Return attention by FlashAttention.

    Args:
        segments: see `packed_attention`.
        window: maximum number of keys that a query attends to; None = all earlier ones.
    """
    varlen_attn = flash_kernel()
    assert varlen_attn is not None  # attention_kernel checks
    offsets, longest = segment_offsets(segments, query.device), max(segments)
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    output = varlen_attn(
        *(query, key, value, offsets, offsets, longest, longest),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )
    assert isinstance(output, torch.Tensor)
    return output


def efficient_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Iterable[int], *, scaling: float
) -> torch.Tensor:
    """Return attention by the memory-efficient kernel, which has no groups and needs aligned head sizes.

    So keys and values are repeated for the heads of their group, and head sizes are padded with zeros, which change no
    product.
    """
    heads, width = len(query), value.shape[-1]
    key, value = (x.repeat_interleave(heads // len(x), dim=0) for x in (key, value))
    query, key, value = (_aligned(x).transpose(0, 1)[None] for x in (query, key, value))  # [1, T, H, D]
    offsets, longest = segment_offsets(segments, query.device), max(segments)
    output: torch.Tensor = torch.ops.aten._efficient_attention_forward(
        *(query, key, value, None, offsets, offsets, longest, longest),
        0.0,  # dropout
        CAUSAL_FROM_TOP_LEFT,
        compute_log_sumexp=True,
        scale=scaling,
    )[0]
    return output[0, :, :, :width]


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Iterable[int],
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return attention by FlexAttention: a mask of (segment, order, window), and the softcap on the products.

    Without a head's sink s, the weights of a query sum to one. With it they sum to
    exp(lse) / (exp(lse) + exp(s)) = sigmoid(lse - s), where lse is the log-sum-exp of the query's products.

    Args:
        sinks: [H]; see `packed_attention`.
    """
    attend = functools.partial(
        _flex_kernel(query.device.type),
        *(query[None], key[None], value[None]),
        score_mod=None if softcap is None else _softcap(softcap),
        block_mask=_block_mask(segments, window, query.device),
        scale=scaling,
        enable_gqa=len(query) != len(key),
    )
    if sinks is None:
        output: torch.Tensor = attend()
        return output[0].transpose(0, 1)
    from torch.nn.attention.flex_attention import AuxRequest

    output, aux = attend(return_aux=AuxRequest(lse=True))
    weight = torch.sigmoid(aux.lse[0] - sinks[:, None].float())  # [H, T]
    return (output[0] * weight[..., None].to(output.dtype)).transpose(0, 1)


@functools.cache
def _flex_kernel(device_type: str) -> Callable[..., Any]:
    """Return FlexAttention, compiled on GPUs: without that it would compute all products in float32."""
    from torch.nn.attention import flex_attention as module

    kernel: Callable[..., Any] = module.flex_attention
    return kernel if device_type == "cpu" else torch.compile(kernel, dynamic=True)


@functools.cache
def _softcap(softcap: float) -> Callable[..., torch.Tensor]:
    """Return the change of a product; one function per value, since a new one would be compiled again."""

    def score_mod(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.tanh(score / softcap) * softcap

    return score_mod


def _block_mask(segments: Iterable[int], window: int | None, device: torch.device) -> Any:
    """Return FlexAttention's mask. All layers of a forward share it: it is kept with the segments."""
    masks: dict[Any, Any] = getattr(segments, "cache", {})
    if (window, device) not in masks:
        num_tokens = sum(segments)
        ends = getattr(segments, "seen_until", None)  # of batching.Segments that share tokens
        if ends is None:
            last = segment_offsets(segments, device)[1:]
            ends = last[torch.bucketize(torch.arange(num_tokens, device=device), last, right=True)]
        masks[window, device] = _mask_of(ends, window)
    return masks[window, device]


def _mask_of(ends: torch.Tensor, window: int | None) -> Any:
    """Return FlexAttention's mask, in which queries [key, ends[key]) attend to a key.

    torch's `create_block_mask` would compute [T, T] values, to find which blocks of them are empty
    or full. Here both follow from the smallest and the largest end in a block of keys.

    Args:
        ends: [T] int32.
        window: maximum number of keys that a query attends to; None = all.
    """
    from torch.nn.attention.flex_attention import BlockMask

    num_tokens, device = len(ends), ends.device

    def mask_mod(b: Any, h: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        is_visible = (key <= query) & (query < ends[key])
        return is_visible if window is None else is_visible & (query - key < window)

    num_blocks = -(-num_tokens // MASK_BLOCK)
    blocks = F.pad(ends, (0, num_blocks * MASK_BLOCK - num_tokens)).view(num_blocks, MASK_BLOCK)
    first = torch.arange(num_blocks, device=device) * MASK_BLOCK
    last = first + MASK_BLOCK - 1
    query_first, query_last = first[:, None], last[:, None]
    is_later = query_first > first
    has_any = (is_later & (query_first < blocks.amax(dim=1))) | (query_first == first)
    is_full = is_later & (query_last < blocks.amin(dim=1))
    if window is not None:
        has_any &= query_first - last < window
        is_full &= query_last - first < window
    partial, full = (
        (is_chosen.sum(dim=1), torch.argsort(is_chosen.int(), dim=1, descending=True, stable=True))
        for is_chosen in (has_any & ~is_full, is_full)
    )
    kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices = (x.int()[None, None] for x in (*partial, *full))
    return BlockMask.from_kv_blocks(
        kv_num_blocks,
        kv_indices,
        full_kv_num_blocks,
        full_kv_indices,
        BLOCK_SIZE=MASK_BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(num_tokens, num_tokens),
    )


def segment_offsets(segments: Iterable[int], device: torch.device) -> torch.Tensor:
    """Return where each segment begins, and the end of the last one, [N + 1] int32."""
    offsets: torch.Tensor | None = getattr(segments, "cu_seqlens", None)  # of batching.Segments: copied once
    if offsets is None:
        offsets = torch.tensor([0, *itertools.accumulate(segments)], dtype=torch.int32).to(device)
    return offsets


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """Pad the last dimension with zeros to what the memory-efficient kernel supports."""
    missing = -x.shape[-1] % ALIGNMENT[x.dtype]
    return F.pad(x, (0, missing)) if missing else x
