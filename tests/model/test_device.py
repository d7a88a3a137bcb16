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
    (cuda(6, 1), "GTX 1080", "fp16", FP32, "efficient"),
    (cuda(7, 0), "V100", "fp16", FP32, "efficient"),
    (cuda(7, 5), "T4, RTX 20", "fp16", FP32, "efficient"),
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


CAPABILITIES = ((7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
HEAD_SIZES = (4, 20, 64, 96, 128, 200, 256, 264)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_kernel_of_packed_attention(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop over blocks runs on a GPU only where no kernel exists."""
    monkeypatch.setattr("lora_accel.model.device.has_package", lambda name: True)
    gpu = Device("cuda", capability)
    for size in HEAD_SIZES:
        kernels = [
            attention_kernel(gpu, dtype, size, size, softcap=s, window=w) for s in (None, 50.0) for w in (None, 9)
        ]
        if dtype == BF16 and capability < (8, 0):  # emulated: nobody should train in it
            expected = ["blockwise"] * 4
        else:
            flex = "flex" if size <= 256 else "blockwise"
            is_varlen = dtype != FP32 and capability >= (8, 0) and size in (64, 96, 128, 200, 256)
            if size == 200 and capability in ((8, 9), (12, 0)):
                is_varlen = False  # no backward kernel
            expected = ["varlen", "varlen", flex, flex] if is_varlen else ["efficient", flex, flex, flex]
        assert kernels == expected, size
        assert attention_kernel(gpu, dtype, size, size, has_sinks=True) == expected[2]


def test_kernel_where_libraries_lack_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device("cuda", (9, 0))
    assert attention_kernel(gpu, BF16, 64, 64, has_varlen=False) == "efficient"
    assert attention_kernel(gpu, BF16, 192, 128) == "efficient", "keys and values of different size"
    monkeypatch.setattr("lora_accel.model.device.has_package", lambda name: False)
    assert attention_kernel(gpu, BF16, 64, 64, softcap=50.0) == "blockwise"
    assert attention_kernel(gpu, BF16, 64, 64, has_sinks=True) == "blockwise"
    assert attention_kernel(Device("cuda", (6, 1)), FP16, 64, 64) == "efficient"
    assert attention_kernel(Device("cuda", (6, 1)), FP16, 64, 64, softcap=50.0) == "blockwise"
    for kind in ("cpu", "rocm", "xpu", "npu", "mps"):
        assert attention_kernel(Device(kind, features=frozenset({"bf16", "gfx942"})), BF16, 64, 64) == "blockwise"


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
