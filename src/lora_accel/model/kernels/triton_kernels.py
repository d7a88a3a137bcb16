"""The Triton kernels of kernels/table.py: norms, gates, rotary embeddings, LoRA with keyed dropout, and the loss.

Sums are in float32 and in a fixed order: results repeat bit for bit. Products of float32 do not use TF32 ("ieee").
Counts that change with each micro-batch are not specialized, else Triton would compile a kernel for several of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lora_accel.labels import IGNORE_INDEX

MAX_SPLITS = 8
"""Parts of the tokens whose gradients of a matrix are summed separately, so that all of a GPU is busy."""


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm(
    x, weight, normed, scales, num_rows, width, eps, IS_GEMMA: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    at = rows.to(tl.int64)[:, None] * width + columns[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=1) / width + eps)
    tl.store(scales + rows, scale, mask=rows < num_rows)
    weights = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    values *= scale[:, None]
    if IS_GEMMA:
        values *= 1.0 + weights
    else:
        values = values.to(x.dtype.element_ty).to(tl.float32) * weights
    tl.store(normed + at, values.to(normed.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, is_gemma: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalized rows of x [N, H], and 1 / rms [N] in float32."""
    x = x.contiguous()
    normed, scales = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
    rows, width, num_warps = _row_tile(x.shape[1])
    _rms_norm[(triton.cdiv(len(x), rows),)](
        x, weight, normed, scales, len(x), x.shape[1], eps, IS_GEMMA=is_gemma, ROWS=rows, WIDTH=width,
        num_warps=num_warps,
    )  # fmt: skip
    return normed, scales


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_backward(
    grad, x, weight, scales, grad_x, num_rows, width,
    IS_GEMMA: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    at = rows.to(tl.int64)[:, None] * width + columns[None, :]
    scale = tl.load(scales + rows, mask=rows < num_rows, other=0.0)[:, None]
    weights = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    if IS_GEMMA:
        weights += 1.0
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * weights
    n = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale
    result = (d - n * (tl.sum(n * d, axis=1) / width)[:, None]) * scale
    tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=inside)


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, is_gemma: bool
) -> torch.Tensor:
    """Return the gradient of x, [N, H]."""
    grad, x = grad.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x)
    rows, width, num_warps = _row_tile(x.shape[1])
    _rms_norm_backward[(triton.cdiv(len(x), rows),)](
        grad, x, weight, scales, grad_x, len(x), x.shape[1], IS_GEMMA=is_gemma, ROWS=rows, WIDTH=width,
        num_warps=num_warps,
    )  # fmt: skip
    return grad_x


def _row_tile(width: int) -> tuple[int, int, int]:
    """Return rows and columns of a tile of rows, and the warps that share it."""
    columns = int(triton.next_power_of_2(width))
    return max(1, 1024 // columns), columns, min(16, max(4, columns // 512))


@triton.jit
def _tanh(x):
    """1 - 2 / (exp(2 x) + 1), which is right at both infinities."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _activation(x, IS_GELU: tl.constexpr):
    """Return silu(x), or GELU by its tanh approximation (arXiv 1606.08415), and the derivative."""
    if IS_GELU:
        tanh = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))  # sqrt(2 / pi)
        slope = 0.7978845608028654 * (1.0 + 0.134145 * x * x) * (1.0 - tanh * tanh)
        return 0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * x * slope
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid))


@triton.jit(do_not_specialize=["numel"])
def _gate(gate, up, output, numel, IS_GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value, _ = _activation(tl.load(gate + at, mask=at < numel, other=0.0).to(tl.float32), IS_GELU)
    value = value.to(gate.dtype.element_ty).to(tl.float32) * tl.load(up + at, mask=at < numel, other=0.0).to(tl.float32)
    tl.store(output + at, value.to(output.dtype.element_ty), mask=at < numel)


def gate(gate: torch.Tensor, up: torch.Tensor, is_gelu: bool) -> torch.Tensor:
    """Return act(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    output = torch.empty_like(gate)
    _gate[(triton.cdiv(gate.numel(), 1024),)](gate, up, output, gate.numel(), IS_GELU=is_gelu, BLOCK=1024)
    return output


@triton.jit(do_not_specialize=["numel"])
def _gate_backward(grad, gate, up, grad_gate, grad_up, numel, IS_GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value, slope = _activation(tl.load(gate + at, mask=at < numel, other=0.0).to(tl.float32), IS_GELU)
    d = tl.load(grad + at, mask=at < numel, other=0.0).to(tl.float32)
    factor = tl.load(up + at, mask=at < numel, other=0.0).to(tl.float32)
    tl.store(grad_gate + at, (d * factor * slope).to(grad_gate.dtype.element_ty), mask=at < numel)
    tl.store(grad_up + at, (d * value).to(grad_up.dtype.element_ty), mask=at < numel)


def gate_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, is_gelu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and up."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    _gate_backward[(triton.cdiv(gate.numel(), 1024),)](
        grad, gate, up, grad_gate, grad_up, gate.numel(), IS_GELU=is_gelu, BLOCK=1024
    )
    return grad_gate, grad_up


@triton.jit
def _rotate_heads(
    x, output, cos, sin, stride_h, num_heads, half, BACKWARD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr
):
    heads, columns = tl.arange(0, HEADS), tl.arange(0, HALF)
    inside = (heads < num_heads)[:, None] & (columns < half)[None, :]
    first = tl.load(x + heads.to(tl.int64)[:, None] * stride_h + columns[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    second = tl.load(x + heads.to(tl.int64)[:, None] * stride_h + half + columns[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    cos_1 = tl.load(cos + columns, mask=columns < half, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos + half + columns, mask=columns < half, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin + columns, mask=columns < half, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin + half + columns, mask=columns < half, other=0.0).to(tl.float32)[None, :]
    if BACKWARD:
        first, second = first * cos_1 + second * sin_2, second * cos_2 - first * sin_1
    else:
        first, second = first * cos_1 - second * sin_1, second * cos_2 + first * sin_2
    target = output + heads[:, None] * (2 * half) + columns[None, :]
    tl.store(target, first.to(output.dtype.element_ty), mask=inside)
    tl.store(target + half, second.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _rotate(
    query, key, new_query, new_key, cos, sin, num_tokens,
    query_b, query_h, query_t, key_b, key_h, key_t, angle_b, angle_t, query_heads, key_heads, half,
    BACKWARD: tl.constexpr, QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    row, token = index // num_tokens, index % num_tokens
    cos += row * angle_b + token * angle_t
    sin += row * angle_b + token * angle_t
    if tl.program_id(1) == 0:
        query += row * query_b + token * query_t
        new_query += index * query_heads * 2 * half
        _rotate_heads(query, new_query, cos, sin, query_h, query_heads, half, BACKWARD, QUERY_HEADS, HALF)
    else:
        key += row * key_b + token * key_t
        new_key += index * key_heads * 2 * half
        _rotate_heads(key, new_key, cos, sin, key_h, key_heads, half, BACKWARD, KEY_HEADS, HALF)


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rotated queries and keys [B, heads, T, D], stored as [B, T, heads, D]; or gradients, rotated back.

    Args:
        cos, sin: [B or 1, T, D].
    """
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    cos, sin = cos.contiguous(), sin.contiguous()
    rows, _, tokens, size = query.shape
    outputs = [x.new_empty(rows, tokens, x.shape[1], size) for x in (query, key)]
    tiles = [triton.next_power_of_2(x.shape[1]) for x in (query, key)]
    _rotate[(rows * tokens, 2)](
        query, key, *outputs, cos, sin, tokens, *query.stride()[:3], *key.stride()[:3],
        cos.stride(0) if len(cos) > 1 else 0, cos.stride(1), query.shape[1], key.shape[1], size // 2,
        BACKWARD=backward, QUERY_HEADS=tiles[0], KEY_HEADS=tiles[1], HALF=triton.next_power_of_2(size // 2),
    )  # fmt: skip
    return outputs[0].transpose(1, 2), outputs[1].transpose(1, 2)


@triton.jit
def _kept(token_keys, feature_keys, least):
    """The mask of model/dropout.py `keep_mask`: the product wraps."""
    return token_keys[:, None] * feature_keys[None, :] >= least


@triton.jit(do_not_specialize=["num_tokens"])
def _project_down(
    x, a, token_keys, feature_keys, down, num_tokens, num_features, rank, stride_x, stride_a, least, scale,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    tokens, ranks = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, RANKS)
    is_token, is_rank = tokens < num_tokens, ranks < rank
    keys = tl.load(token_keys + tokens, mask=is_token, other=0)
    rows = x + tokens.to(tl.int64)[:, None] * stride_x
    total = tl.zeros((TOKENS, RANKS), dtype=tl.float32)
    for start in range(0, num_features, FEATURES):
        features = start + tl.arange(0, FEATURES)
        is_feature = features < num_features
        tile = tl.load(rows + features[None, :], mask=is_token[:, None] & is_feature[None, :], other=0.0)
        hashes = tl.load(feature_keys + features, mask=is_feature, other=0)
        tile = tl.where(_kept(keys, hashes, least), tile, 0.0).to(x.dtype.element_ty)
        weights = tl.load(
            a + ranks[None, :] * stride_a + features[:, None], mask=is_rank[None, :] & is_feature[:, None], other=0.0
        )
        total += tl.dot(tile, weights.to(x.dtype.element_ty), input_precision="ieee")
    target = down + tokens[:, None] * rank + ranks[None, :]
    tl.store(target, (total * scale).to(down.dtype.element_ty), mask=is_token[:, None] & is_rank[None, :])


def project_down(
    x: torch.Tensor, a: torch.Tensor, token_keys: torch.Tensor, feature_keys: torch.Tensor, p: float
) -> torch.Tensor:
    """Return drop(x) @ a.T, [T, R]."""
    x, a, token_keys = x.contiguous(), a.contiguous(), token_keys.contiguous()
    num_tokens, rank = len(x), len(a)
    down = x.new_empty(num_tokens, rank)
    tokens, features = 32, 128 if _tile(rank) <= 32 else 32  # what fits into the shared memory of 8.6 and 8.9
    _project_down[(triton.cdiv(num_tokens, tokens),)](
        x, a, token_keys, feature_keys, down, num_tokens, x.shape[1], rank, x.stride(0), a.stride(0), _least(p),
        1 / (1 - p), TOKENS=tokens, FEATURES=features, RANKS=_tile(rank),
    )  # fmt: skip
    return down


@triton.jit(do_not_specialize=["num_tokens"])
def _add_gradient(
    output, down, a, token_keys, feature_keys, num_tokens, num_features, rank, stride_o, stride_a, least, scale,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    tokens, ranks = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, RANKS)
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    is_token, is_feature, is_rank = tokens < num_tokens, features < num_features, ranks < rank
    left = tl.load(down + tokens[:, None] * rank + ranks[None, :], mask=is_token[:, None] & is_rank[None, :], other=0.0)
    right = tl.load(
        a + ranks[:, None] * stride_a + features[None, :], mask=is_rank[:, None] & is_feature[None, :], other=0.0
    )
    product = tl.dot(left, right.to(left.dtype), input_precision="ieee")
    keys = tl.load(token_keys + tokens, mask=is_token, other=0)
    hashes = tl.load(feature_keys + features, mask=is_feature, other=0)
    target = output + tokens.to(tl.int64)[:, None] * stride_o + features[None, :]
    inside = is_token[:, None] & is_feature[None, :]
    total = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    total += tl.where(_kept(keys, hashes, least), product * scale, 0.0)
    tl.store(target, total.to(output.dtype.element_ty), mask=inside)


def add_gradient(
    output: torch.Tensor,
    down: torch.Tensor,
    a: torch.Tensor,
    token_keys: torch.Tensor,
    feature_keys: torch.Tensor,
    p: float,
) -> None:
    """Add drop(down @ a) to output [T, F], whose rows are contiguous, in place."""
    down, a, token_keys = down.contiguous(), a.contiguous(), token_keys.contiguous()
    (num_tokens, num_features), rank = output.shape, len(a)
    tokens, features = 32, 128
    _add_gradient[(triton.cdiv(num_tokens, tokens), triton.cdiv(num_features, features))](
        output, down, a, token_keys, feature_keys, num_tokens, num_features, rank, output.stride(0), a.stride(0),
        _least(p), 1 / (1 - p), TOKENS=tokens, FEATURES=features, RANKS=_tile(rank),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def _matrix_gradient(
    down, x, token_keys, feature_keys, parts, num_tokens, num_features, rank, stride_x, span, least, scale,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    features, ranks = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES), tl.arange(0, RANKS)
    is_feature, is_rank = features < num_features, ranks < rank
    hashes = tl.load(feature_keys + features, mask=is_feature, other=0)
    total = tl.zeros((RANKS, FEATURES), dtype=tl.float32)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, num_tokens), TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        is_token = tokens < num_tokens
        keys = tl.load(token_keys + tokens, mask=is_token, other=0)
        tile = tl.load(
            x + tokens.to(tl.int64)[:, None] * stride_x + features[None, :],
            mask=is_token[:, None] & is_feature[None, :],
            other=0.0,
        )
        tile = tl.where(_kept(keys, hashes, least), tile, 0.0).to(x.dtype.element_ty)
        left = tl.load(
            down + tokens[None, :] * rank + ranks[:, None], mask=is_token[None, :] & is_rank[:, None], other=0.0
        )
        total += tl.dot(left, tile, input_precision="ieee")
    target = parts + (tl.program_id(1) * rank + ranks[:, None]) * num_features + features[None, :]
    tl.store(target, total * scale, mask=is_rank[:, None] & is_feature[None, :])


def matrix_gradient(
    down: torch.Tensor, x: torch.Tensor, token_keys: torch.Tensor, feature_keys: torch.Tensor, p: float
) -> torch.Tensor:
    """Return down.T @ drop(x), [R, F] float32."""
    down, x, token_keys = down.contiguous(), x.contiguous(), token_keys.contiguous()
    (num_tokens, num_features), rank = x.shape, down.shape[1]
    tokens, features = 32, 128
    span = triton.cdiv(triton.cdiv(num_tokens, MAX_SPLITS), tokens) * tokens  # a multiple of the tile
    splits = triton.cdiv(num_tokens, span)
    parts = x.new_empty((splits, rank, num_features), dtype=torch.float32)
    _matrix_gradient[(triton.cdiv(num_features, features), splits)](
        down, x, token_keys, feature_keys, parts, num_tokens, num_features, rank, x.stride(0), span, _least(p),
        1 / (1 - p), TOKENS=tokens, FEATURES=features, RANKS=_tile(rank),
    )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(0)


@triton.jit
def _drop(x, token_keys, feature_keys, output, num_features, least, scale, FEATURES: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    is_feature = features < num_features
    is_kept = tl.load(token_keys + token) * tl.load(feature_keys + features, mask=is_feature, other=0) >= least
    values = tl.load(x + token * num_features + features, mask=is_feature, other=0.0).to(tl.float32)
    target = output + token * num_features + features
    tl.store(target, tl.where(is_kept, values * scale, 0.0).to(output.dtype.element_ty), mask=is_feature)


def drop(x: torch.Tensor, token_keys: torch.Tensor, feature_keys: torch.Tensor, p: float) -> torch.Tensor:
    """Return x [..., F] with values zeroed, and the rest scaled by 1 / (1 - p)."""
    x, features = x.contiguous(), 1024
    output = torch.empty_like(x)
    grid = (x.numel() // x.shape[-1], triton.cdiv(x.shape[-1], features))
    _drop[grid](
        x, token_keys.contiguous(), feature_keys, output, x.shape[-1], _least(p), 1 / (1 - p), FEATURES=features
    )
    return output


@triton.jit
def _logit(row, columns, num_classes, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """The logits of some columns after scaling and capping, and the slope of the cap."""
    values = tl.load(row + columns, mask=columns < num_classes, other=0.0).to(tl.float32) * scale
    slope = tl.full(values.shape, 1.0, tl.float32)
    if HAS_SOFTCAP:
        tanh = _tanh(values / softcap)
        values, slope = tanh * softcap, 1.0 - tanh * tanh
    return values, slope


@triton.jit
def _cross_entropy(
    logits, targets, losses, num_classes, stride, scale, softcap, smoothing, ignored,
    HAS_SOFTCAP: tl.constexpr, OVERWRITE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    row, target = logits + index.to(tl.int64) * stride, tl.load(targets + index)
    is_supervised = target != ignored
    # Loaded before all else: gradients overwrite it, in another warp maybe before this one would read it.
    column = tl.where(is_supervised, target, 0) + tl.zeros((1,), dtype=tl.int64)
    chosen, _slope = _logit(row, column, num_classes, scale, softcap, HAS_SOFTCAP)
    largest, total, mean = -float("inf"), 0.0, 0.0
    for start in range(0, num_classes, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        values, _ = _logit(row, columns, num_classes, scale, softcap, HAS_SOFTCAP)
        inside = columns < num_classes
        mean += tl.sum(tl.where(inside, values, 0.0), axis=0) / num_classes
        values = tl.where(inside, values, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(values, axis=0))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(values - new_largest), axis=0)
        largest = new_largest
    log_sum = largest + tl.log(total)
    expected = (1.0 - smoothing) * tl.sum(chosen, axis=0) + smoothing * mean
    tl.store(losses + index, tl.where(is_supervised, log_sum - expected, 0.0))
    if OVERWRITE:
        for start in range(0, num_classes, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            values, slope = _logit(row, columns, num_classes, scale, softcap, HAS_SOFTCAP)
            gradient = tl.exp(values - log_sum) - smoothing / num_classes
            gradient = tl.where(columns == target, gradient - (1.0 - smoothing), gradient) * slope * scale
            gradient = tl.where(is_supervised, gradient, 0.0)
            tl.store(row + columns, gradient.to(logits.dtype.element_ty), mask=columns < num_classes)


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, softcap: float | None, smoothing: float, overwrite: bool
) -> torch.Tensor:
    """Return the losses [N] float32 of logits [N, V] after scaling and capping; 0 where a target is not supervised.

    Args:
        overwrite: replace the logits by the gradient of the sum of the losses.
    """
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    _cross_entropy[(len(logits),)](
        logits, targets, losses, logits.shape[1], logits.stride(0), scale, softcap or 1.0, smoothing, IGNORE_INDEX,
        HAS_SOFTCAP=softcap is not None, OVERWRITE=overwrite, COLUMNS=4096, num_warps=8,
    )  # fmt: skip
    return losses


def _least(p: float) -> int:
    return round(p * 2**32) - 2**31


def _tile(rank: int) -> int:
    return max(16, int(triton.next_power_of_2(rank)))  # tl.dot needs 16
