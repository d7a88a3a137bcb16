"""Native dtypes of a device, and the precision, dtype and kernels selected from them.

Decisions follow from the device's capabilities only. `slowdown` measures time for a warning.
"""

from __future__ import annotations

import functools
import importlib.util
import platform
import time
from typing import Any, NamedTuple

import torch

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Mixed precision -> dtype of matrix products."""
CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""CPU features with bfloat16 matrix instructions: x86, then ARM."""
CPU_FP16 = ("avx512_fp16", "amx_fp16", "fp16_arith")
ROCM_BF16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
"""AMD architectures with bfloat16 matrix instructions: MI100 and later, RDNA 3 and later."""
FUSED_ADAMW = frozenset({"cpu", "cuda", "rocm", "xpu", "mps"})
"""Kinds of devices for which torch has a fused AdamW."""


class Device(NamedTuple):
    """A kind of device and the capabilities that determine its native dtypes."""

    kind: str
    """cuda | rocm | xpu | npu | mps | cpu | another of torch's device types."""
    capability: tuple[int, int] | None = None
    """Compute capability, CUDA only."""
    features: frozenset[str] = frozenset()
    """CPU flags, AMD architecture, or `bf16` and `fp16` as reported by other backends."""


@functools.cache
def detect_device(device: torch.device | None = None) -> Device:
    """Return a device's kind and capabilities.

    Args:
        device: None = this machine's accelerator, or its CPU if there is none.
    """
    if device is None and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    if device is None or device.type == "cpu":
        return Device("cpu", features=_cpu_features())
    if device.type == "cuda" and torch.version.hip:
        return Device("rocm", features=frozenset({torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]}))
    if device.type == "cuda":
        return Device("cuda", torch.cuda.get_device_capability(device))
    return Device(device.type, features=_reported_features(device.type))


def native_dtypes(device: Device) -> frozenset[torch.dtype]:
    """Return the floating-point dtypes in which a device multiplies matrices without emulation."""
    dtypes = {torch.float32}
    if device.kind == "cuda":
        assert device.capability is not None
        # https://docs.nvidia.com/cuda/cuda-c-programming-guide: bfloat16 from 8.0, float16 from 5.3.
        dtypes |= {torch.float16} if device.capability >= (5, 3) else set()
        dtypes |= {torch.bfloat16} if device.capability >= (8, 0) else set()
    elif device.kind == "rocm":
        dtypes |= {torch.float16}
        dtypes |= {torch.bfloat16} if any(name.startswith(ROCM_BF16) for name in device.features) else set()
    elif device.kind == "cpu":
        dtypes |= {torch.bfloat16} if device.features.intersection(CPU_BF16) else set()
        dtypes |= {torch.float16} if device.features.intersection(CPU_FP16) else set()
    else:
        dtypes |= {torch.bfloat16} if "bf16" in device.features else set()
        dtypes |= {torch.float16} if "fp16" in device.features else set()
    return frozenset(dtypes)


def native_precision(device: Device) -> tuple[str, str]:
    """Return the default mixed precision of a device, and the reason to print.

    bf16 if native; else fp16 on accelerators with native float16, except MPS; else no.
    """
    dtypes, name = native_dtypes(device), describe(device)
    if torch.bfloat16 in dtypes:
        return "bf16", f"{name} computes bfloat16 natively"
    if torch.float16 in dtypes and device.kind not in ("cpu", "mps"):
        return "fp16", f"{name} has float16 and no bfloat16"
    return "no", f"{name} has no bfloat16 instructions: float32 is faster"


def native_dtype(device: Device, stored: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in with weights stored as `stored`: float32 if the device emulates that one."""
    return stored if stored in native_dtypes(device) else torch.float32


def attention_kernel(
    device: Device,
    dtype: torch.dtype,
    head_size: int,
    value_size: int,
    *,
    softcap: float | None = None,
    window: int | None = None,
    has_sinks: bool = False,
    has_varlen: bool = True,
    is_shared: bool = False,
) -> str:
    """Return the kernel of packed attention: varlen, efficient, flex (model/gpu_attention.py) or blockwise.

    - varlen is FlashAttention 2. It needs compute capability 8.0, 16 bits, a head size that is a multiple of 8 (it does
      not pad) and at most 256, and no softcap or sinks. With head sizes of 193 to 224 there is no backward kernel on
      8.6, 8.9 and 12.x (torch: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
    - efficient is the memory-efficient kernel, for compute capability 5.0 and all sizes, without softcap, window or
      sinks.
    - flex is compiled by Triton, for compute capability 7.0 and head sizes of at most 256.
    - blockwise is a loop in Python. On a GPU it would start thousands of kernels, so it is the last choice there.

    Not tested on AMD, which has blockwise.

    Args:
        head_size, value_size: last dimension of query and key, and of value.
        window: of keys that a query attends to.
        has_sinks: whether there are attention sinks.
        has_varlen: whether torch has the kernel.
        is_shared: whether segments continue others, whose keys only flex and blockwise find.
    """
    if device.kind != "cuda" or device.capability is None or dtype not in native_dtypes(device):
        return "blockwise"
    supports_varlen = (
        has_varlen
        and device.capability >= (8, 0)
        and dtype in (torch.float16, torch.bfloat16)
        and softcap is None
        and not has_sinks
        and head_size == value_size
        and head_size % 8 == 0
        and head_size <= 256
        and not (192 < head_size <= 224 and (device.capability in ((8, 6), (8, 9)) or device.capability[0] == 12))
    )
    if supports_varlen and not is_shared:
        return "varlen"
    if softcap is None and window is None and not has_sinks and not is_shared:
        return "efficient"
    supports_flex = has_package("triton") and device.capability >= (7, 0) and max(head_size, value_size) <= 256
    return "flex" if supports_flex else "blockwise"


@functools.cache
def has_package(name: str) -> bool:
    """Whether a package is installed. Triton is, with a torch for GPUs."""
    return importlib.util.find_spec(name) is not None


def has_fused_adamw(device: Device) -> bool:
    """Whether torch has a fused AdamW for this device."""
    return device.kind in FUSED_ADAMW


def describe(device: Device) -> str:
    """Return a description of the device for messages."""
    if device.kind == "cuda" and device.capability is not None:
        return f"this GPU (compute capability {device.capability[0]}.{device.capability[1]})"
    if device.kind == "rocm":
        return f"this GPU ({', '.join(sorted(device.features))})"
    return f"this {device.kind.upper()}"


def emulation_warning(device: Device, precision: str, option: str) -> str | None:
    """Return a warning if a device only emulates a mixed precision, with the measured slowdown; else None.

    Args:
        option: the override that avoids it.
    """
    dtype = PRECISIONS[precision]
    if dtype in native_dtypes(device):
        return None
    ratio = slowdown(device, dtype)
    return (
        f"warning: {describe(device)} emulates {str(dtype).removeprefix('torch.')}: a matrix product takes "
        f"{ratio:.1f} times as long as in float32; {option} avoids it"
    )


def slowdown(device: Device, dtype: torch.dtype) -> float:
    """Measure the time of a small matrix product relative to float32. Takes tens of milliseconds."""
    device_type = {"rocm": "cuda"}.get(device.kind, device.kind)

    def seconds(dtype: torch.dtype) -> float:
        left, right = (torch.ones(shape, dtype=dtype, device=device_type) for shape in ((64, 576), (576, 576)))
        times = []
        for _ in range(4):  # the first one warms up
            start = time.perf_counter()
            left @ right
            if device_type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    return seconds(dtype) / seconds(torch.float32)


def _cpu_features() -> frozenset[str]:
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:  # torch 2.12 and later
        return frozenset(name for name, value in capabilities().items() if value is True)
    checks: dict[str, Any] = {
        "avx512_bf16": getattr(torch.cpu, "_is_avx512_bf16_supported", None),
        "amx_bf16": getattr(torch.cpu, "_is_amx_tile_supported", None),
    }
    return frozenset(name for name, check in checks.items() if check is not None and check())


def _reported_features(kind: str) -> frozenset[str]:
    """Return the features that the backend of an accelerator other than CUDA or ROCm reports."""
    if kind == "mps":
        has_bf16 = int((platform.mac_ver()[0] or "0").split(".")[0]) >= 14  # macOS 14 added bfloat16 to Metal
        return frozenset({"fp16", "bf16"} if has_bf16 else {"fp16"})
    if kind == "xpu":
        capability = torch.xpu.get_device_capability()
        names = {"has_fp16": "fp16", "has_bfloat16_conversions": "bf16"}
        return frozenset(feature for key, feature in names.items() if capability.get(key))
    module = getattr(torch, kind, None)
    is_bf16_supported = getattr(module, "is_bf16_supported", None)
    return frozenset({"fp16", "bf16"} if is_bf16_supported is not None and is_bf16_supported() else {"fp16"})
