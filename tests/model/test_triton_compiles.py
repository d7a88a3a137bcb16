"""The Triton kernels compile for NVIDIA GPUs to machine code, which needs no GPU. Their results: test_triton.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_accel.model.dropout import feature_keys
from lora_accel.model.kernels.table import KERNELS

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from lora_accel.model.kernels import triton_kernels  # noqa: E402

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is there for Linux"),
    pytest.mark.launch,  # NVIDIA's assembler is a process
]

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}
Launch = tuple[Any, dict[str, Any]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Return a list that gets each kernel with its arguments, instead of a GPU."""
    made: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert all(size > 0 for size in grid)
        made.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | options))

    monkeypatch.setattr(JITFunction, "run", run)
    return made


def launch_all(dtype: torch.dtype, rank: int) -> set[str]:
    """Call all functions of the module at the sizes of an 8B model, and return their names."""
    x, weight, a = torch.zeros(64, 4096, dtype=dtype), torch.zeros(4096, dtype=dtype), torch.zeros(rank, 4096)
    down, scales, keys = (
        torch.zeros(64, rank, dtype=dtype),
        torch.zeros(64),
        (feature_keys(64, 0), feature_keys(4096, 1)),
    )
    heads, targets = torch.zeros(1, 8, 64, 128, dtype=dtype), torch.zeros(64, dtype=torch.int64)
    calls: list[tuple[str, tuple[Any, ...]]] = []
    for flag in (False, True):
        calls += [("rms_norm", (x, weight, 1e-5, flag)), ("rms_norm_backward", (x, x, weight, scales, flag))]
        calls += [("gate", (x, x, flag)), ("gate_backward", (x, x, x, flag))]
        calls += [("rotate", (heads, heads[:, :2], heads[:, 0], heads[:, 0], flag))]
    calls += [("project_down", (x, a, *keys, 0.1)), ("add_gradient", (x, down, a, *keys, 0.1))]
    calls += [("matrix_gradient", (down, x, *keys, 0.1)), ("drop", (x, *keys, 0.1))]
    calls += [
        ("cross_entropy", (x, targets, 1.0, None, 0.0, True)),
        ("cross_entropy", (x, targets, 2.0, 30.0, 0.1, False)),
    ]
    for name, args in calls:
        getattr(triton_kernels, name)(*args)
    return {name for name, _ in calls}


def signature_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"


def is_aligned(value: Any) -> bool:
    """Whether Triton takes a tensor's address, or a number, for a multiple of 16: it then prefetches aligned rows."""
    return isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("capability", "dtype", "rank"),
    [
        (80, torch.float32, 128),
        (90, torch.bfloat16, 16),
        (80, torch.bfloat16, 128),
        (80, torch.float32, 64),
        (80, torch.bfloat16, 64),
        (80, torch.float32, 16),
        (89, torch.float16, 16),
        (100, torch.bfloat16, 16),
    ],
    ids=str,
)
def test_kernels_compile(
    launches: list[Launch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: int,
    dtype: torch.dtype,
    rank: int,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert launch_all(dtype, rank) == KERNELS.keys()
    for kernel, args in launches:
        options = {"num_warps": args.pop("num_warps")} if "num_warps" in args else {}
        constants = {p.name: args[p.name] for p in kernel.params if p.is_constexpr}
        source = ASTSource(
            fn=kernel,
            signature={n: "constexpr" if n in constants else signature_of(args[n]) for n in kernel.arg_names},
            constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
            attrs={
                (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
                for name, value in args.items()
                if name not in constants and is_aligned(value)
            },
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 99 * 1024, "shared memory of a block on 8.6 and 8.9"
