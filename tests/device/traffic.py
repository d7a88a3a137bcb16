"""What each kernel of a fake GPU would read, write and compute.

A kernel reads its inputs once and writes its outputs once: caches, and kernels that need several passes, are ignored.
Operators of any namespace count by their name, and are not decomposed. One that changes an argument reads and writes
it. Modeled, not measured.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.device.fake_cuda import ATTRIBUTES, VIEWS, Recorder, tensors_in

WRITTEN_ONLY = frozenset({"copy_", "fill_", "zero_"})
"""Operators that do not read the argument that they change."""
LOOK_UPS = frozenset({"embedding", "gather", "index", "index_select"})
"""Operators that read as many elements of their first argument as they return."""
HARDLY_READ = {"nll_loss_backward": 1, "nll_loss_forward": 0}
"""Position of an argument of which one element per row is read, or none."""
ATTENTION = "torch_attn::_varlen_attn"
FLOP: dict[str, Callable[[Any, Any], int]] = {
    "mm": lambda args, output: 2 * output.numel() * args[0].shape[-1],
    "bmm": lambda args, output: 2 * output.numel() * args[0].shape[-1],
    "addmm": lambda args, output: 2 * output.numel() * args[1].shape[-1],
    "addmm_": lambda args, output: 2 * output.numel() * args[1].shape[-1],
    "baddbmm": lambda args, output: 2 * output.numel() * args[1].shape[-1],
    "lora_accel::project_down": lambda args, output: 2 * args[0].numel() * args[1].shape[0],
    "lora_accel::add_gradient": lambda args, output: 2 * args[0].numel() * args[1].shape[1],
    "lora_accel::matrix_gradient": lambda args, output: 2 * args[1].numel() * args[0].shape[1],
    # Two products of 2 · T · L · H · D for segments of L tokens, of which the causal mask leaves half. Backward has
    # five (Dao, FlashAttention-2, arXiv 2307.08691).
    ATTENTION: lambda args, output: 2 * args[0].numel() * args[5],
    f"{ATTENTION}_backward": lambda args, output: 5 * args[1].numel() * args[8],
}
"""Operations of a kernel, from its arguments and its output. An operator that contains products needs an entry."""
COPIES = frozenset({"_to_copy", "clone", "copy_"})


class Kernel(NamedTuple):
    """One kernel launch."""

    name: str
    """With its namespace, unless that is aten."""
    nbytes: int
    """Read and written."""
    flop: int
    """Of matrix products and attention; 0 for all other kernels."""
    is_backward: bool


class TrafficRecorder(Recorder):
    """Records the traffic of every kernel, and which of the tensors that were created still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic: Counter[Kernel] = Counter()
        self.is_backward = False
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record it if it has a tensor on the GPU."""
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name in ATTRIBUTES:
            return func(*args, **kwargs)
        if func._schema.name == "bitsandbytes::gemm_4bit":
            return self._expand_gemm_4bit(args, kwargs)
        if _is_composite(func):  # below autograd, such as a linear layer in an operator of bitsandbytes
            with self:
                return func.decompose(*args, **kwargs)
        output = super().__torch_dispatch__(func, types, args, kwargs)
        if name in VIEWS or func.is_view:
            self._track(output)
            return output
        if any(tensor.device.type == "cuda" for tensor in tensors_in((args, kwargs, output))):
            full_name = name if func.namespace == "aten" else f"{func.namespace}::{name}"
            flop = FLOP[full_name](args, output) if full_name in FLOP else 0
            nbytes = count_bytes(func, args, kwargs, output)
            self.traffic[Kernel(full_name, nbytes, int(flop), self.is_backward)] += 1
            self._track(output)
        return output

    def live_bytes(self) -> int:
        """Return the size of the tensors that were created while recording and that still exist."""
        return sum(size for storage, size in self._storages.values() if not storage.expired())

    def _track(self, output: Any) -> None:
        for tensor in tensors_in(output):
            storage = tensor.untyped_storage()
            known = self._storages.get(storage._cdata)
            if tensor.device.type == "cuda" and (known is None or known[0].expired()):
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def _expand_gemm_4bit(self, args: Any, kwargs: Any) -> torch.Tensor:
        """Run bitsandbytes' product with a 4-bit weight as its CUDA code does for more than 1,536 rows.

        It dequantizes the weight and multiplies, `_dequant_linear_fallback` in bitsandbytes/backends/cuda/ops.py. The
        implementation that needs no GPU has the same kernels.
        """
        from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

        with self:
            product: torch.Tensor = _gemm_4bit_default_impl(*args, **kwargs)
        return product


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether an operator only calls others, on every device."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(func.name(), "CompositeImplicitAutograd") and not has_kernel(func.name(), "CPU")


@functools.cache
def _changed_arguments(func: Any) -> tuple[tuple[int, str, bool], ...]:
    """Return position, name, and whether it is only written, of each argument that an operator changes."""
    name, arguments = func.overloadpacket.__name__, func._schema.arguments
    return tuple(
        (position, argument.name, argument.is_out or name in WRITTEN_ONLY)
        for position, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def count_bytes(func: Any, args: Any, kwargs: Any, output: Any) -> int:
    """Return the bytes that an operator reads and writes."""
    name = func.overloadpacket.__name__
    read = sum(map(_nbytes, tensors_in((args, kwargs))))
    if name in LOOK_UPS:
        read += sum(map(_nbytes, tensors_in(output))) - _nbytes(args[0])
    elif name in HARDLY_READ:
        read -= _nbytes(args[HARDLY_READ[name]])
    changed = [
        (is_only_written, tensor)
        for position, argument, is_only_written in _changed_arguments(func)
        for tensor in tensors_in(args[position] if position < len(args) else kwargs.get(argument))
    ]
    read -= sum(_nbytes(tensor) for is_only_written, tensor in changed if is_only_written)
    written = {id(tensor): tensor for tensor in (*(tensor for _, tensor in changed), *tensors_in(output))}
    return read + sum(map(_nbytes, written.values()))


def _nbytes(tensor: torch.Tensor) -> int:
    """Return the size of a tensor; of an expanded one, that of its different elements."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size for size, stride in sizes if stride != 0)
