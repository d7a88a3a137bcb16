"""Precision, dtype and kernels of each kind of device. Run with `-s` to print the table."""

from __future__ import annotations

import pytest
import torch

from lora_accel.model.device import (
    Device,
    attention_kernel,
    detect_device,
    emulation_warning,
    has_fused_adamw,
    native_dtype,
    native_dtypes,
    native_precision,
    slowdown,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def cuda(major: int, minor: int) -> Device:
    return Device("cuda", (major, minor))


def other(kind: str, *features: str) -> Device:
    return Device(kind, features=frozenset(features))


DEVICES = [
    # device, name, precision, dtype of a bfloat16 base without mixed precision, kernel at head size 64
    (cuda(6, 1), "GTX 1080", "fp16", FP32, "blockwise"),
    (cuda(7, 0), "V100", "fp16", FP32, "blockwise"),
    (cuda(7, 5), "T4, RTX 20", "fp16", FP32, "blockwise"),
    (cuda(8, 0), "A100", "bf16", BF16, "varlen"),
    (cuda(8, 6), "RTX 30", "bf16", BF16, "varlen"),
    (cuda(8, 9), "L4, RTX 40", "bf16", BF16, "varlen"),
    (cuda(9, 0), "H100", "bf16", BF16, "varlen"),
    (cuda(10, 0), "B200", "bf16", BF16, "varlen"),
    (cuda(12, 0), "RTX 50", "bf16", BF16, "varlen"),
    (other("rocm", "gfx906"), "MI50", "fp16", FP32, "blockwise"),
    (other("rocm", "gfx1030"), "RX 6900", "fp16", FP32, "blockwise"),
    (other("rocm", "gfx90a"), "MI250", "bf16", BF16, "blockwise"),
    (other("rocm", "gfx942"), "MI300", "bf16", BF16, "blockwise"),
    (other("rocm", "gfx1100"), "RX 7900", "bf16", BF16, "blockwise"),
    (other("xpu", "fp16", "bf16"), "Data Center Max, Arc", "bf16", BF16, "blockwise"),
    (other("xpu", "fp16"), "integrated, older", "fp16", FP32, "blockwise"),
    (other("npu", "fp16", "bf16"), "Ascend 910B", "bf16", BF16, "blockwise"),
    (other("npu", "fp16"), "Ascend 910", "fp16", FP32, "blockwise"),
    (other("mps", "fp16", "bf16"), "macOS 14", "bf16", BF16, "blockwise"),
    (other("mps", "fp16"), "macOS 13", "no", FP32, "blockwise"),
    (other("cpu", "avx2"), "most laptops", "no", FP32, "blockwise"),
    (other("cpu", "avx2", "avx512_f", "avx512_bw"), "Skylake-X, Ice Lake", "no", FP32, "blockwise"),
    (other("cpu", "avx2", "avx512_f", "avx512_bf16"), "Cooper Lake, Zen 4", "bf16", BF16, "blockwise"),
    (other("cpu", "avx512_bf16", "amx_bf16", "avx512_fp16"), "Sapphire Rapids", "bf16", BF16, "blockwise"),
    (other("cpu", "neon", "fp16_arith"), "ARM before v8.6", "no", FP32, "blockwise"),
    (other("cpu", "neon", "fp16_arith", "bf16"), "Graviton 3, Apple M2", "bf16", BF16, "blockwise"),
]


@pytest.mark.parametrize(
    ("device", "name", "precision", "base", "kernel"), DEVICES, ids=[f"{d.kind} {name}" for d, name, *_ in DEVICES]
)
def test_capabilities_determine_precision_and_kernels(
    device: Device, name: str, precision: str, base: torch.dtype, kernel: str
) -> None:
    value, reason = native_precision(device)
    dtype = {"bf16": BF16, "fp16": FP16, "no": FP32}[value]
    assert (value, native_dtype(device, BF16)) == (precision, base)
    assert attention_kernel(device, dtype, 64, 64) == kernel
    assert dtype in native_dtypes(device)
    assert has_fused_adamw(device) == (device.kind != "npu")
    capabilities = " ".join([*(map(str, device.capability or ())), *sorted(device.features)])
    fused = "AdamW, norms and gates" if has_fused_adamw(device) else "norms and gates"
    print(f"| {device.kind} {capabilities} ({name}) | {value} | {str(base)[6:]} | {kernel} | {fused} | {reason} |")


@pytest.mark.parametrize(
    ("capability", "dtype", "sizes", "softcap", "kernel"),
    [
        ((8, 0), BF16, (128, 128), None, "varlen"),
        ((8, 0), FP16, (128, 128), None, "varlen"),
        ((8, 0), FP32, (128, 128), None, "blockwise"),
        ((7, 5), FP16, (128, 128), None, "blockwise"),
        ((8, 0), BF16, (4, 4), None, "blockwise"),
        ((8, 0), BF16, (20, 20), None, "blockwise"),
        ((8, 0), BF16, (96, 96), None, "varlen"),
        ((8, 0), BF16, (256, 256), None, "varlen"),
        ((8, 0), BF16, (264, 264), None, "blockwise"),
        ((8, 0), BF16, (192, 128), None, "blockwise"),
        ((8, 0), BF16, (128, 128), 50.0, "blockwise"),
        ((8, 0), BF16, (200, 200), None, "varlen"),
        ((9, 0), BF16, (224, 224), None, "varlen"),
        ((8, 6), BF16, (200, 200), None, "blockwise"),
        ((8, 9), BF16, (224, 224), None, "blockwise"),
        ((12, 0), BF16, (200, 200), None, "blockwise"),
        ((8, 6), BF16, (192, 192), None, "varlen"),
        ((8, 9), BF16, (256, 256), None, "varlen"),
    ],
)
def test_varlen_attention_is_used_only_where_supported(
    capability: tuple[int, int], dtype: torch.dtype, sizes: tuple[int, int], softcap: float | None, kernel: str
) -> None:
    assert attention_kernel(Device("cuda", capability), dtype, *sizes, softcap=softcap) == kernel


def test_cpu_features_match_cpuinfo() -> None:
    device = detect_device(torch.device("cpu"))
    assert device.kind == "cpu"
    assert device.capability is None
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = {flag for line in file if line.startswith(("flags", "Features")) for flag in line.split(":")[1].split()}
    has_bf16 = not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})
    assert (BF16 in native_dtypes(device)) == has_bf16
    assert native_precision(device)[0] == ("bf16" if has_bf16 else "no")


def test_emulation_warning_contains_the_slowdown() -> None:
    cpu = other("cpu", "avx2")
    warning = emulation_warning(cpu, "bf16", "training.mixed_precision=auto")
    assert warning is not None
    assert "this CPU emulates bfloat16" in warning
    assert "times as long as in float32" in warning
    assert "training.mixed_precision=auto avoids it" in warning
    assert emulation_warning(cpu, "no", "training.mixed_precision=auto") is None
    assert emulation_warning(other("cpu", "amx_bf16"), "bf16", "training.mixed_precision=auto") is None
    assert slowdown(cpu, FP32) > 0
