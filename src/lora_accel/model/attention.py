"""Packed attention: one row holds several examples (segments), and each attends only to itself.

It needs no mask, since keys of other segments are never read. The model's forward gets the segment lengths,
transformers' attention interface passes them to each layer, and `packed_attention` dispatches to a kernel
(`model/device.py: attention_kernel`): on NVIDIA GPUs one of `model/gpu_attention.py`, elsewhere blockwise matrix
products. A FlashAttention package that `model.attention` names gets them as offsets (`cu_seq_lens_q`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_accel.errors import ConfigError
from lora_accel.model.device import attention_kernel, detect_device
from lora_accel.model.families import RECURRENT_FROM, family_of, is_installed
from lora_accel.model.gpu_attention import (
    efficient_attention,
    flash_kernel,
    flex_attention,
    segment_offsets,
    varlen_attention,
)
from lora_accel.model.recurrence import pack_recurrences

BLOCK = 128
"""Queries per block. Smaller blocks compute fewer products that the mask discards; larger ones are faster."""

TILE = 32
"""In 16 bits on a CPU, rows, blocks and their keys begin and end at multiples of so many tokens.

oneDNN compiles each shape of a matrix product and keeps it. With arbitrary lengths that takes gigabytes over a run, and
a few percent of the time. In float32, MKL computes any shape at once.
"""

ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})
"""Layers that support packing, by their names in configs."""
RECURRENT_LAYERS = frozenset({"conv", "hybrid", "linear_attention", "mamba"})
"""Layers that carry a state over the row; model/recurrence.py resets it."""
OTHER_LAYERS = frozenset({"mlp", "moe"})


class Block(NamedTuple):
    """Queries [first, last) of a row, N, and the keys to which any of them attends, M."""

    first: int
    last: int
    ranges: tuple[tuple[int, int], ...]
    """Where the keys are: ranges [first, last) of the row, in order."""
    masks: tuple[tuple[int, torch.Tensor], ...]
    """For keys to which not all queries attend: the first of K keys, and an additive mask [N, K], -inf = does not."""

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows [G, M, D] of the block's keys, of those of all tokens [G, T, D]."""
        parts = [rows[:, first:last] for first, last in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def add(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Add values [G, M, D] to the rows that `take` returns, in place."""
        start = 0
        for first, last in self.ranges:
            rows[:, first:last] += values[:, start : start + last - first]
            start += last - first


class AttentionOptions(NamedTuple):
    """Arguments of `packed_attention`."""

    scaling: float
    softcap: float | None


def can_pack(model: PreTrainedModel) -> bool:
    """Whether a model supports packing."""
    return why_padded(model) is None


def why_padded(model: PreTrainedModel) -> str | None:
    """Return why a model does not support packing; None = it does.

    Its family does, and its attention does, is causal and without dropout.
    """
    config, implementation = model.config.get_text_config(), model.config._attn_implementation
    layers = set(getattr(config, "layer_types", None) or ())
    if (reason := family_of(model.config.model_type).why_padded) is not None:
        return reason
    if layers & RECURRENT_LAYERS and not is_installed(RECURRENT_FROM):
        return f"packing its recurrent layers needs transformers {RECURRENT_FROM}"
    if unknown := layers - ATTENTION_LAYERS - RECURRENT_LAYERS - OTHER_LAYERS:
        return f"no test proves packed rows of layers of type {min(unknown)}"
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "its attention is not causal"
    if getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0):
        return "it drops attention weights at random"
    if implementation not in ("sdpa", "eager") and not is_flash_package(implementation):
        return f"model.attention={implementation} does not support packing"
    return None


def is_flash_package(implementation: str) -> bool:
    """Whether an implementation is a FlashAttention package, by transformers' rule.

    Such as flash_attention_2, flash_attention_3, or a kernel of the Hub: kernels-community/flash-attn2.
    """
    return "flash" in implementation


def check_flash_dtype(model: PreTrainedModel, mixed_precision: str) -> None:
    """Check that a FlashAttention package gets 16 bits, the only ones it computes in.

    Args:
        mixed_precision: no, bf16 or fp16.

    Raises:
        ConfigError: the model computes in float32.
    """
    implementation = model.config._attn_implementation
    if is_flash_package(implementation) and mixed_precision == "no" and model.dtype == torch.float32:
        raise ConfigError(
            f"model.attention: {implementation!r} needs bfloat16 or float16, and this run computes in float32; set "
            "training.mixed_precision=bf16 or fp16, or model.attention=auto"
        )


def pack_attention(model: PreTrainedModel) -> None:
    """Make a model use packed attention if its forward gets `segments`, the lengths of a row's examples."""
    pack_recurrences(model)
    implementation = model.config._attn_implementation
    original = ALL_ATTENTION_FUNCTIONS.get(implementation)
    if getattr(original, "is_packed", False):  # of another model
        return

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **options: Any,
    ) -> tuple[torch.Tensor, Any]:
        if options.get("segments") is not None and is_flash_package(implementation):
            return packed_flash_attention(original, module, query, key, value, **options), None
        if options.get("segments") is not None:
            return packed_attention(query, key, value, **options), None
        # Eager attention is not registered; each model's module defines its own.
        attend = original or sys.modules[type(module).__module__].eager_attention_forward
        output: tuple[torch.Tensor, Any] = attend(module, query, key, value, attention_mask, **options)
        return output

    if is_flash_package(implementation):  # transformers loads the package by this name
        attention.is_packed = True  # type: ignore[attr-defined]
        AttentionInterface.register(implementation, attention)
        return
    name = f"packed_{implementation}"
    AttentionInterface.register(name, attention)
    _register_mask(name, implementation)
    model.set_attn_implementation(name)


def pad_attention(model: PreTrainedModel) -> None:
    """Make a model compute the masks of padded rows without waiting for the device."""
    implementation = model.config._attn_implementation
    if implementation == "sdpa":
        name = "padded_sdpa"
        AttentionInterface.register(name, ALL_ATTENTION_FUNCTIONS[implementation])
        _register_mask(name, implementation)
        model.set_attn_implementation(name)


def _register_mask(name: str, implementation: str) -> None:
    """Register the mask of an attention implementation under another name."""
    mask = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
    AttentionMaskInterface.register(name, functools.partial(_unread_mask, mask) if implementation == "sdpa" else mask)


def _unread_mask(
    mask: Any,
    *args: Any,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> torch.Tensor | None:
    """Return transformers' 4-D mask of rows, without reading on the host whether any row has padding.

    transformers reads it in each forward, to replace the mask by a causal kernel if none has: on a GPU the host waits.
    Here a single row has none, and several are taken to have some. On the CPU nothing waits.

    Args:
        mask: transformers' function.
        attention_mask: [B, T].
    """
    if attention_mask is not None and attention_mask.device.type != "cpu":
        if len(attention_mask) == 1:
            attention_mask = None
        else:
            allow_is_causal_skip = False
    masks: torch.Tensor | None = mask(
        *args, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **options
    )
    return masks


@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_flash_attention(
    attend: Any,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    segments: Iterable[int],
    **options: Any,
) -> torch.Tensor:
    """Return causal attention within each segment by a FlashAttention package, [1, T, H, D].

    Args:
        attend: transformers' attention function, which calls the package.
        query, key, value, segments: see `packed_attention`.
    """
    offsets, longest = segment_offsets(segments, query.device), max(segments)
    options |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest}
    # Otherwise transformers would look for segments in them, which waits for the device.
    options["position_ids"] = None
    if torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True
    output: torch.Tensor = attend(module, query, key, value, None, **options)[0]
    return output


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
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """Return causal attention within each segment, [1, T, H, D].

    Args:
        query: [1, H, T, D].
        key, value: [1, G, T, D]; grouped-query attention with H / G query heads per group.
        segments: lengths in tokens, in order; their sum is T.
        scaling: factor of query-key products; None = 1 / sqrt(D).
        sliding_window: maximum number of keys that a query attends to, its own included.
        softcap: limits products to ±softcap with tanh (Gemma 2).
        s_aux: [H], attention sinks (gpt-oss): a product of each head that takes part in the softmax and has no value.
    """
    is_shared = getattr(segments, "is_shared", False)
    assert sliding_window is None or not is_shared, "why_not_shared names models with windows"
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = (x.squeeze(0).to(dtype) for x in (query, key, value))
    sinks = None if s_aux is None else s_aux.to(dtype)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = attention_kernel(
        detect_device(query.device),
        dtype,
        query.shape[-1],
        value.shape[-1],
        softcap=softcap,
        window=sliding_window,
        has_sinks=sinks is not None,
        has_varlen=flash_kernel() is not None,
        is_shared=is_shared,
    )
    if kernel == "varlen":
        return varlen_attention(query, key, value, segments, scaling=scaling, window=sliding_window)[None]
    if kernel == "efficient":
        return efficient_attention(query, key, value, segments, scaling=scaling)[None]
    if kernel == "flex":
        return flex_attention(
            query, key, value, segments, scaling=scaling, window=sliding_window, softcap=softcap, sinks=sinks
        )[None]
    blocks = _blocks(segments, sliding_window, query)
    options = AttentionOptions(scaling, softcap)
    output = _Blockwise.apply(query, key, value, sinks, blocks, options)  # type: ignore[no-untyped-call]
    assert isinstance(output, torch.Tensor)
    return output[None]


def tile_size(dtype: torch.dtype, device: torch.device) -> int:
    """Return the multiple of tokens to which rows are padded, and at which blocks begin; see `TILE`."""
    return TILE if device.type == "cpu" and dtype.itemsize == 2 else 1


def _blocks(segments: Iterable[int], window: int | None, like: torch.Tensor) -> list[Block]:
    """Return the blocks of a row. All layers of a forward share them: they are kept with the segments.

    Args:
        like: has the dtype and the device of the masks.
    """
    cache: dict[Any, list[Block]] = getattr(segments, "cache", {})  # of batching.Segments
    key = window, like.dtype, like.device
    if key not in cache:
        cache[key] = list(_find_blocks(_seen_until(segments), window, tile_size(like.dtype, like.device), like))
    return cache[key]


def _seen_until(segments: Iterable[int]) -> npt.NDArray[np.int32]:
    """Return for each token of a row the position after the last token that attends to it, [T]."""
    if getattr(segments, "is_shared", False):
        ends: npt.NDArray[np.int32] = segments.find_ends()  # type: ignore[attr-defined]
        return ends
    lengths = list(segments)
    return np.repeat(np.cumsum(lengths, dtype=np.int32), lengths)


def _find_blocks(ends: npt.NDArray[np.int32], window: int | None, tile: int, like: torch.Tensor) -> Iterator[Block]:
    """Divide a row into blocks that need few keys: they end where an example ends, at the next multiple of `tile`.

    Args:
        ends: of `_seen_until`.
    """
    num_tokens = len(ends)
    stops = np.flatnonzero(ends == np.arange(1, num_tokens + 1)) + 1  # ends of examples
    starts_of_tiles = np.arange(0, num_tokens, tile)
    ends_of_tiles = np.maximum.reduceat(ends, starts_of_tiles)

    def stop_after(position: int) -> int:
        stop = int(stops[np.searchsorted(stops, position, side="right")])
        return min(-(-stop // tile) * tile, num_tokens)

    first = 0
    while first < num_tokens:
        last = min(stop_after(first), first + BLOCK)
        # Several short examples fit into one block. With tiles, that saves more than the mask discards.
        while tile > 1 and last < num_tokens and stop_after(last) <= first + BLOCK:
            last = stop_after(last)
        is_needed = (ends_of_tiles > first) & (starts_of_tiles < last)
        if window is not None:
            is_needed &= starts_of_tiles + tile + window > first + 1
        tiles = np.flatnonzero(is_needed)
        runs = np.split(tiles, np.flatnonzero(np.diff(tiles) > 1) + 1)
        ranges = tuple((int(run[0]) * tile, min(int(run[-1] + 1) * tile, last)) for run in runs)
        keys = np.concatenate([np.arange(*bounds) for bounds in ranges])
        yield Block(first, last, ranges, tuple(_masks(np.arange(first, last), keys, ends[keys], window, like)))
        first = last


def _masks(
    queries: npt.NDArray[np.int64],
    keys: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int32],
    window: int | None,
    like: torch.Tensor,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Return `Block.masks`. On CPU, adding them is four times as fast as masked_fill_.

    Args:
        queries: positions in the row, [N].
        keys: likewise, [M].
        ends: of the keys, see `_seen_until`, [M].
    """
    queries = queries[:, None]

    def is_hidden(first: npt.NDArray[np.int64], last: npt.NDArray[np.int64], part: slice) -> npt.NDArray[np.bool_]:
        hidden = (keys[part] > first) | (ends[part] <= last)
        return hidden if window is None else hidden | (keys[part] <= last - window)

    columns = np.flatnonzero(is_hidden(queries[0], queries[-1], slice(None)))  # not all queries attend to these keys
    for run in np.split(columns, np.flatnonzero(np.diff(columns) > TILE) + 1):
        if len(run):
            hidden = is_hidden(queries, queries, slice(int(run[0]), int(run[-1]) + 1))
            mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
            yield int(run[0]), mask.masked_fill_(torch.tensor(hidden, device=like.device), float("-inf"))


class _Blockwise(torch.autograd.Function):
    """Saves its inputs for backward, and recomputes the attention weights of each block there."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        blocks: list[Block],
        options: AttentionOptions,
    ) -> torch.Tensor:
        query = query * options.scaling
        ctx.save_for_backward(query, key, value, sinks)
        ctx.blocks, ctx.options = blocks, options
        output = query.new_empty((query.shape[1], query.shape[0], value.shape[-1]))  # [T, H, D]
        with torch.autocast(query.device.type, enabled=False):
            for block in blocks:
                _, _, weights, _ = _attention_weights(block, query, key, sinks, options)
                attended = torch.bmm(weights, block.take(value))  # [G, H / G * N, D]
                output[block.first : block.last] = attended.view(len(query), -1, value.shape[-1]).transpose(0, 1)
        return output

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, None, None]:
        query, key, value, sinks = ctx.saved_tensors
        # In 16 bits, the sum over many blocks that share a key would lose most of them.
        is_shared = any(len(block.ranges) > 1 for block in ctx.blocks)
        dtype = torch.promote_types(key.dtype, torch.float32) if is_shared else key.dtype
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(x, dtype=dtype) for x in (key, value))
        grad_sinks = torch.zeros_like(sinks) if ctx.needs_input_grad[3] else None  # usually frozen
        for block in ctx.blocks:
            grads = _gradients(block, query, key, value, sinks, grad, ctx.options, grad_sinks)
            grad_query[:, block.first : block.last] = grads[0].view(len(query), -1, query.shape[-1])
            block.add(grad_key, grads[1])
            block.add(grad_value, grads[2])
        grad_query.mul_(ctx.options.scaling)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_sinks, None, None


def _gradients(
    block: Block,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    grad: torch.Tensor,
    options: AttentionOptions,
    grad_sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of a block's scaled queries [G, H / G * N, D], keys and values [G, M, D].

    Args:
        grad: gradient of the output, [T, H, D].
        grad_sinks: [H]; the gradient of the sinks is added to it.
    """
    queries, keys, weights, slope = _attention_weights(block, query, key, sinks, options)
    grad = grad[block.first : block.last].transpose(0, 1).reshape(len(key), -1, value.shape[-1])  # [G, H / G * N, D]
    grad_weights = torch.bmm(grad, block.take(value).mT)
    grad_products = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    if grad_sinks is not None:  # the gradients of all inputs of a softmax sum to zero, and the sink is one of them
        grad_sinks -= grad_products.sum(-1).view(len(query), -1).sum(1)
    if slope is not None:
        grad_products = grad_products * slope
    return torch.bmm(grad_products, keys), torch.bmm(grad_products.mT, queries), torch.bmm(weights.mT, grad)


def _attention_weights(
    block: Block, query: torch.Tensor, key: torch.Tensor, sinks: torch.Tensor | None, options: AttentionOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return a block's queries [G, H / G * N, D], its keys [G, M, D], their weights, and the softcap's derivative.

    Args:
        query: scaled, [H, T, D].
    """
    groups, n = len(key), block.last - block.first
    queries = query[:, block.first : block.last].reshape(groups, -1, query.shape[-1])
    keys = block.take(key)
    products, slope = torch.bmm(queries, keys.mT), None  # [G, H / G * N, M]
    if options.softcap is not None:
        capped = torch.tanh(products / options.softcap)
        products, slope = capped * options.softcap, 1 - capped.square()
    for start, mask in block.masks:
        products.view(groups, -1, n, keys.shape[1])[..., start : start + mask.shape[1]].add_(mask)
    if sinks is None:
        return queries, keys, torch.softmax(products, dim=-1), slope
    sink = sinks.repeat_interleave(n).view(groups, -1, 1)  # [G, H / G * N, 1]
    return queries, keys, torch.softmax(torch.cat((products, sink), dim=-1), dim=-1)[..., :-1], slope
