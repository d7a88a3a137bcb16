"""The arithmetic of memory: what each layout partitions, and the bytes of quantized weights."""

from __future__ import annotations

import pytest
import torch

from lora_accel.planning.memory import (
    BUCKET_NUMEL,
    PARTS,
    Layout,
    Sizes,
    Usage,
    device_memory,
    layouts,
    quantized_bytes,
)

SIZES = Sizes(
    base=16_000,
    base_numel=8000,
    trained_numel=100,
    trained=400,
    moments=800,
    compute_itemsize=2,
    usage=Usage(7, 2, 5),
)
BUCKET = 2 * BUCKET_NUMEL


@pytest.mark.parametrize(
    ("layout", "expected", "host"),
    [
        # base, adapter, gradients, moments (and masters), communication
        (Layout(), (16_000, 400, 400, 800, 0), 0),
        (Layout(4), (16_000, 400, 400, 800, 400), 0),
        (Layout(4, 1), (16_000, 200, 200, 300, BUCKET), 0),
        (Layout(4, 2), (16_000, 200, 50, 300, BUCKET), 0),
        (Layout(4, 2, offload=True), (16_000, 200, 50, 0, BUCKET), 400),
        (Layout(4, 3), (4000, 50, 50, 300, BUCKET + 16_000), 0),
        (Layout(4, 3, offload=True), (0, 50, 50, 0, BUCKET + 16_000), 4400),
    ],
)
def test_parts_of_a_device(layout: Layout, expected: tuple[int, ...], host: int) -> None:
    memory = device_memory(SIZES, layout)
    assert tuple(memory.parts[part] for part in PARTS[:5]) == expected
    assert (memory.parts["activations"], memory.parts["temporaries"]) == (7, 5), "the same in every layout"
    assert memory.total == sum(expected) + 7 + 5
    assert memory.host == host


def test_an_unwritten_bucket_costs_nothing_on_a_cpu() -> None:
    assert device_memory(SIZES, Layout(2, 2), on_cpu=True).parts["communication"] == 200


def test_layouts_of_one_and_of_several_ranks() -> None:
    assert [layout.name for layout in layouts(1)] == [
        "one device",
        "ZeRO-2 x 1 + CPU offload",
        "ZeRO-3 x 1 + CPU offload",
    ]
    assert [layout.name for layout in layouts(2)] == [
        "one device",
        "DDP x 2",
        "ZeRO-1 x 2",
        "ZeRO-2 x 2",
        "ZeRO-2 x 2 + CPU offload",
        "ZeRO-3 x 2",
        "ZeRO-3 x 2 + CPU offload",
    ]


@pytest.mark.parametrize("double_quant", [False, True])
def test_bytes_of_4_bit_weights_are_those_of_bitsandbytes(double_quant: bool) -> None:
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(96, 300)
    packed, state = quantize_4bit(weight, compress_statistics=double_quant, quant_type="nf4")
    tensors = [packed, state.absmax, *([state.state2.absmax] if double_quant else [])]
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert quantized_bytes(weight.numel(), 96, 4, double_quant=double_quant) == stored


def test_bytes_of_8_bit_weights() -> None:
    assert quantized_bytes(96 * 300, 96, 8, double_quant=True) == 96 * 300 + 4 * 96
