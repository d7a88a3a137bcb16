"""Recurrent layers in packed rows: linear attention, state spaces and short convolutions.

Within such a layer, only the operations of `TIME_DIMENSION` mix tokens. From transformers 5.23 they are functions of
its modeling modules and get `segments`, the lengths of a row's examples; here they compute each segment by itself.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

TIME_DIMENSION = {
    "causal_conv1d_fn": 2,  # [B, C, T]
    "chunk_kimi_delta_attention": 1,  # [B, T, H, D]
    "mamba2_chunk_scan": 1,
    "torch_chunk_gated_delta_rule": 1,
}
"""Which dimension of their inputs and output counts tokens. Inputs with fewer than three dimensions are weights."""

FUSED = "mamba2_split_conv1d_scan_combined"
"""Convolution, scan and output projection by one kernel, which would not see an adapter of the projection."""

CHUNK = 64
"""Segments of the same number of chunks are computed together: the operations pad to chunks anyway."""


def pack_recurrences(model: nn.Module) -> None:
    """Make the recurrent operations of a model's layers compute by segment if they get `segments`.

    They belong to transformers' modules, so other models use the patched functions, too. Without `segments` these call
    the original.
    """
    for name in {type(module).__module__ for module in model.modules()}:
        if not name.startswith("transformers.models."):
            continue
        for operation in (*TIME_DIMENSION, FUSED):
            original = getattr(sys.modules[name], operation, None)
            if original is None or getattr(original, "is_packed", False):
                continue
            dimension = TIME_DIMENSION.get(operation)
            packed = _unfused(original) if dimension is None else by_segment(original, dimension)
            packed.is_packed = True  # type: ignore[attr-defined]
            setattr(sys.modules[name], operation, packed)


def by_segment(operation: Callable[..., Any], dimension: int) -> Callable[..., Any]:
    """Return a causal operation that computes each segment of a row by itself if it gets `segments`.

    Args:
        operation: gets tensors [B, ..., T, ...], and weights; returns one such tensor, alone or before a state.
        dimension: of T, 1 or 2.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @functools.wraps(operation)
    def apply(*args: Any, segments: Any = None, **options: Any) -> Any:
        if segments is None:
            return operation(*args, **options)
        assert not getattr(segments, "is_shared", False), "why_not_shared names models with recurrent layers"
        lengths, outputs = list(segments), {}
        for numbers in _groups(lengths):
            part = functools.partial(_rows_of, numbers=numbers, lengths=lengths, dimension=dimension)
            result = operation(*map(part, args), **{name: part(value) for name, value in options.items()})
            output = result[0] if isinstance(result, tuple) else result
            for number, row in zip(numbers, output.transpose(1, dimension), strict=True):
                outputs[number] = row[: lengths[number]]
        joined = torch.cat([outputs[number] for number in range(len(lengths))])[None].transpose(1, dimension)
        return (joined, None) if isinstance(result, tuple) else joined

    packed: Callable[..., Any] = apply
    return packed


def _unfused(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Return an operation that returns None if it gets `segments`: the layer then computes its parts."""

    @functools.wraps(operation)
    def apply(*args: Any, segments: Any = None, **options: Any) -> Any:
        return operation(*args, **options) if segments is None else None

    return apply


def _rows_of(value: Any, numbers: Sequence[int], lengths: Sequence[int], dimension: int) -> Any:
    """Return an argument of an operation for some segments, padded on the right: earlier tokens do not see that."""
    if not isinstance(value, torch.Tensor) or value.ndim < 3:
        return value
    segments = torch.split(value.transpose(1, dimension)[0], list(lengths))  # [L, ...]
    return pad_sequence([segments[number] for number in numbers], batch_first=True).transpose(1, dimension)


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    """Return the segments with each number of chunks."""
    groups: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        groups.setdefault(-(-length // CHUNK), []).append(number)
    return list(groups.values())
