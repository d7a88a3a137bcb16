"""GPU kernels of packed attention, as far as a CPU can run them, against the blockwise one.

FlexAttention runs on a CPU without a backward pass. tests/device traces the forward and backward pass of all kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from lora_accel.batching.batch import Segments
from lora_accel.model import gpu_attention
from lora_accel.model.attention import packed_attention
from lora_accel.model.gpu_attention import flex_attention

LENGTHS = (5, 130, 1, 60)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 7, 64])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_flex_equals_blockwise(groups: int, window: int | None, softcap: float | None, has_sinks: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(heads, sum(LENGTHS), 16, generator=generator) for heads in (4, groups, groups))
    segments, sinks = Segments(LENGTHS), torch.linspace(-1, 3, 4) if has_sinks else None
    actual = flex_attention(query, key, value, segments, scaling=0.3, window=window, softcap=softcap, sinks=sinks)
    options = {"scaling": 0.3, "sliding_window": window, "softcap": softcap, "s_aux": sinks}
    expected = packed_attention(query[None], key[None], value[None], segments=LENGTHS, **options)[0]  # type: ignore[arg-type]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_layers_share_masks_and_the_softcap() -> None:
    """Else each layer would build a mask, and torch.compile would compile for each softcap function."""
    segments, cpu = Segments(LENGTHS), torch.device("cpu")
    assert gpu_attention._block_mask(segments, 7, cpu) is gpu_attention._block_mask(segments, 7, cpu)
    assert gpu_attention._block_mask(segments, 7, cpu) is not gpu_attention._block_mask(segments, None, cpu)
    assert gpu_attention._softcap(2.0) is gpu_attention._softcap(2.0)


@pytest.mark.parametrize(
    ("dtype", "size", "padded"), [(torch.float16, 20, 24), (torch.float32, 20, 20), (torch.float32, 3, 4)]
)
def test_head_sizes_are_padded_for_the_efficient_kernel(dtype: torch.dtype, size: int, padded: int) -> None:
    x = torch.ones(2, 3, size, dtype=dtype)
    aligned = gpu_attention._aligned(x)
    assert aligned.shape == (2, 3, padded)
    assert aligned.sum() == x.sum()


def test_schema_of_the_efficient_kernel() -> None:
    """Its arguments are passed by position; another torch may change them."""
    schema = torch.ops.aten._efficient_attention_forward.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[:4] == ["query", "key", "value", "bias"]
    assert names[4:8] == ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    assert names[8:11] == ["dropout_p", "custom_mask_type", "compute_log_sumexp"]
    assert "scale" in names


@pytest.mark.parametrize("window", [None, 50, 300])
@pytest.mark.parametrize("num_tokens", [1, 128, 1000, 1024])
def test_the_blocks_of_a_mask_are_those_of_its_values(num_tokens: int, window: int | None) -> None:
    """Of segments that continue others, and of some that do not."""
    generator = torch.Generator().manual_seed(num_tokens)
    ends = torch.full((num_tokens,), num_tokens, dtype=torch.int32)
    for start in sorted(torch.randint(0, num_tokens, (9,), generator=generator).tolist()):
        length = int(torch.randint(1, 400, (), generator=generator))
        ends[start : start + length] = ends[start : start + length].clamp(max=start + length)
    mask = gpu_attention._mask_of(ends, window)
    expected = create_block_mask(mask.mask_mod, None, None, num_tokens, num_tokens, device="cpu")
    assert (mask.to_dense() >= expected.to_dense()).all()
    if window is None:  # else a block may have keys within the window, and others that are visible
        assert torch.equal(mask.to_dense(), expected.to_dense())
    assert torch.equal(mask.full_kv_num_blocks, expected.full_kv_num_blocks)
    assert torch.equal(mask.full_q_num_blocks, expected.full_q_num_blocks)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the number of values of the largest tensor."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.numel = max(self.numel, output.numel())
        return output


def test_a_mask_is_never_materialized() -> None:
    with Largest() as largest:
        gpu_attention._mask_of(torch.full((16384,), 16384, dtype=torch.int32), None)
    assert 16384 <= largest.numel <= 2 * 128**2
