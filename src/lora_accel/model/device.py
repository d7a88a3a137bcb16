"""What this machine's device computes natively, from its capabilities, and what follows: precision, dtype, kernels.

Nothing here is decided by timing. `slowdown` measures, for a warning only.
"""

from __future__ import annotations

import functools
import platform
import time
from typing import Any, NamedTuple

import torch

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What matrix products are computed in under each mixed precision."""
CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""CPU features of which each multiplies bfloat16 matrices: x86, then ARM."""
CPU_FP16 = ("avx512_fp16", "amx_fp16", "fp16_arith")
ROCM_BF16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
"""AMD architectures with bfloat16 matrix instructions: MI100 and later, RDNA 3 and later."""
FUSED_ADAMW = frozenset({"cpu", "cuda", "rocm", "xpu", "mps"})
"""Kinds of devices with a fused AdamW in torch."""


class Device(NamedTuple):
    """A kind of device and the capabilities that decide what it computes natively."""

    kind: str
    """cuda | rocm | xpu | npu | mps | cpu | another of torch's device types."""
    capability: tuple[int, int] | None = None
    """CUDA's compute capability."""
    features: frozenset[str] = frozenset()
    """CPU flags, AMD's architecture, or `bf16` and `fp16` where the backend reports them."""


@functools.cache
def detect_device(place: torch.device | None = None) -> Device:
    """Return a device's capabilities.

    Args:
        place: the device that is meant; None = the accelerator of this machine, or else its CPU.
    """
    if place is None and torch.accelerator.is_available():
        place = torch.accelerator.current_accelerator()
    if place is None or place.type == "cpu":
        return Device("cpu", features=_cpu_features())
    if place.type == "cuda" and torch.version.hip:
        return Device("rocm", features=frozenset({torch.cuda.get_device_properties(place).gcnArchName.split(":")[0]}))
    if place.type == "cuda":
        return Device("cuda", torch.cuda.get_device_capability(place))
    return Device(place.type, features=_reported(place.type))


def native_dtypes(device: Device) -> frozenset[torch.dtype]:
    """Return the floating-point dtypes that a device multiplies matrices in without emulation."""
    found = {torch.float32}
    if device.kind == "cuda":
        assert device.capability is not None
        # https://docs.nvidia.com/cuda/cuda-c-programming-guide: bfloat16 from 8.0, float16 from 5.3.
        found |= {torch.float16} if device.capability >= (5, 3) else set()
        found |= {torch.bfloat16} if device.capability >= (8, 0) else set()
    elif device.kind == "rocm":
        found |= {torch.float16}
        found |= {torch.bfloat16} if any(name.startswith(ROCM_BF16) for name in device.features) else set()
    elif device.kind == "cpu":
        found |= {torch.bfloat16} if device.features.intersection(CPU_BF16) else set()
        found |= {torch.float16} if device.features.intersection(CPU_FP16) else set()
    else:
        found |= {torch.bfloat16} if "bf16" in device.features else set()
        found |= {torch.float16} if "fp16" in device.features else set()
    return frozenset(found)


def native_precision(device: Device) -> tuple[str, str]:
    """Return the mixed precision for a device, and the reason for a person to read.

    bf16 where it is native; fp16 on other accelerators that have float16, whose loss scale is tested there; else no.
    """
    dtypes, name = native_dtypes(device), describe(device)
    if torch.bfloat16 in dtypes:
        return "bf16", f"{name} computes bfloat16 natively"
    if torch.float16 in dtypes and device.kind not in ("cpu", "mps"):
        return "fp16", f"{name} has float16 and no bfloat16"
    return "no", f"{name} has no bfloat16 instructions: float32 is faster"


def native_dtype(device: Device, stored: torch.dtype) -> torch.dtype:
    """Return the dtype in which weights stored in `stored` are computed with: float32 where that one is emulated."""
    return stored if stored in native_dtypes(device) else torch.float32


def attention_kernel(
    device: Device, dtype: torch.dtype, head_size: int, value_size: int, *, softcap: float | None = None
) -> str:
    """Return which of its two kernels packed attention dispatches to: varlen or blockwise.

    torch's `varlen_attn` is FlashAttention 2. It raises for anything else than 16 bits, heads of a multiple of 8 up to
    256 (it does not pad), and compute capability 8.0; backward with heads of 193 to 224 has no kernel on 8.6, 8.9 and
    12.x (torch: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp). It knows no soft cap. AMD's is not tested here.
    """
    if device.kind != "cuda" or device.capability is None or device.capability < (8, 0):
        return "blockwise"
    supported = (
        dtype in (torch.float16, torch.bfloat16)
        and softcap is None
        and head_size == value_size
        and head_size % 8 == 0
        and head_size <= 256
        and not (192 < head_size <= 224 and (device.capability in ((8, 6), (8, 9)) or device.capability[0] == 12))
    )
    return "varlen" if supported else "blockwise"


def has_fused_adamw(device: Device) -> bool:
    """Whether torch updates all parameters in one kernel on this device."""
    return device.kind in FUSED_ADAMW


def describe(device: Device) -> str:
    """Return the device and what decides of it, for a person to read."""
    if device.kind == "cuda" and device.capability is not None:
        return f"this GPU (compute capability {device.capability[0]}.{device.capability[1]})"
    if device.kind == "rocm":
        return f"this GPU ({', '.join(sorted(device.features))})"
    return f"this {device.kind.upper()}"


def emulation_warning(device: Device, precision: str, option: str) -> str | None:
    """Return a warning if a device only emulates a mixed precision, with the slowdown measured here; else None.

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
    """Measure how many times as long as in float32 a small matrix product takes: tens of milliseconds."""
    place = {"rocm": "cuda"}.get(device.kind, device.kind)

    def seconds(dtype: torch.dtype) -> float:
        left, right = (torch.ones(shape, dtype=dtype, device=place) for shape in ((64, 576), (576, 576)))
        times = []
        for _ in range(4):  # the first one warms up
            begin = time.perf_counter()
            left @ right
            if place != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - begin)
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


def _reported(kind: str) -> frozenset[str]:
    """Return what the backend of an accelerator that is not CUDA or ROCm reports."""
    if kind == "mps":
        newer = int((platform.mac_ver()[0] or "0").split(".")[0]) >= 14  # Metal has bfloat16 from macOS 14 on
        return frozenset({"fp16", "bf16"} if newer else {"fp16"})
    if kind == "xpu":
        told = torch.xpu.get_device_capability()
        names = {"has_fp16": "fp16", "has_bfloat16_conversions": "bf16"}
        return frozenset(feature for key, feature in names.items() if told.get(key))
    module = getattr(torch, kind, None)
    is_bf16_supported = getattr(module, "is_bf16_supported", None)
    return frozenset({"fp16", "bf16"} if is_bf16_supported is not None and is_bf16_supported() else {"fp16"})
