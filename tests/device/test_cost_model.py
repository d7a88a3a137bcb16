"""The traffic of an operator, and the cost model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from tests.device.cost_model import Gpu, step_time
from tests.device.traffic import Kernel, count_bytes

GPU = Gpu("a GPU", peak_flops=1e12, peak_bandwidth=1e9, compute_share=0.5, bandwidth_share=0.5)
OPERATORS = torch.library.Library("test_traffic", "FRAGMENT")
OPERATORS.define("scale_(Tensor(a!) x, Tensor factor) -> ()")
OPERATORS.define("norm(Tensor x) -> (Tensor, Tensor)")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


X, ROW = meta(8, 4), meta(4)
SIZE = 8 * 4 * 4


@pytest.mark.parametrize(
    ("func", "args", "kwargs", "output", "expected"),
    [
        (torch.ops.aten.add.Tensor, (X, X), {}, meta(8, 4), 3 * SIZE),
        (torch.ops.aten.add_.Tensor, (X, meta(8, 4)), {}, X, 3 * SIZE),
        (torch.ops.aten.mul.Tensor, (X, ROW.expand(8, 4)), {}, meta(8, 4), 2 * SIZE + 16),
        (torch.ops.aten.mul.out, (X, meta(8, 4)), {"out": (out := meta(8, 4))}, out, 3 * SIZE),
        (torch.ops.aten.copy_.default, (X, meta(8, 4, dtype=torch.bfloat16)), {}, X, SIZE // 2 + SIZE),
        (torch.ops.aten.fill_.Scalar, (X, 0.0), {}, X, SIZE),
        (torch.ops.aten.embedding.default, (meta(1000, 4), meta(8, dtype=torch.int64)), {}, X, 2 * SIZE + 64),
        (torch.ops.test_traffic.norm.default, (X,), {}, (meta(8, 4), meta(8)), 2 * SIZE + 32),
        (torch.ops.test_traffic.scale_.default, (X, ROW), {}, None, 2 * SIZE + 16),
    ],
    ids=["new", "in place", "expanded", "out", "copy and cast", "fill", "look-up", "own operator", "own, in place"],
)
def test_traffic_is_what_is_read_and_written(func: Any, args: Any, kwargs: Any, output: Any, expected: int) -> None:
    assert count_bytes(func, args, kwargs, output) == expected


def test_a_kernel_takes_as_long_as_the_slower_of_products_and_memory() -> None:
    products = Kernel("mm", nbytes=500_000, flop=10**10, is_backward=False)
    memory = Kernel("mm", nbytes=5_000_000, flop=10**9, is_backward=False)
    device = step_time({products: 1, memory: 3}, GPU).device_seconds
    assert device == pytest.approx(0.02 + 3 * 0.01 + 4 * GPU.kernel_seconds)


def test_a_step_waits_for_the_host_if_its_kernels_are_short() -> None:
    short, long = Kernel("add", 10, 0, False), Kernel("add", 10**6, 0, False)
    time = step_time({short: 100}, GPU)
    assert time.is_host_bound
    assert time.seconds == pytest.approx(100 * GPU.launch_seconds)
    assert not step_time(Counter({long: 100}), GPU).is_host_bound
