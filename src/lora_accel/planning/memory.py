"""The memory of a run by part, for one device, DDP and ZeRO. Pure arithmetic; all sizes are in bytes.

Sources: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, arXiv 1910.02054, for
what each stage partitions; Dettmers et al., QLoRA, arXiv 2305.14314, for blocks and double quantization; DeepSpeed's
`runtime/zero/config.py` for the sizes of its buffers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

BLOCK, DOUBLE_BLOCK = 64, 256
"""Weights that share a scale in 4 bits, and scales that share one if they are quantized too (bitsandbytes)."""
BUCKET_NUMEL, LIVE_NUMEL = 500_000_000, 1_000_000_000
"""DeepSpeed's defaults: elements of its buffer of gradients, and of the parameters that ZeRO-3 keeps gathered."""
FLOAT32 = 4
PARTS = ("base", "adapter", "gradients", "moments", "communication", "activations", "temporaries")


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a forward and backward of one micro-batch allocate, beside weights."""

    activations: int
    """Saved for backward, at the end of the forward."""
    loss: int
    """Temporaries at the peak of the forward: a chunk of logits, with their float32 copy."""
    backward: int
    """Temporaries at the peak of the backward pass."""

    @property
    def temporaries(self) -> int:
        """The larger of both: the loss and the backward pass follow each other."""
        return max(self.loss, self.backward)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a model that is trained, for one way to store its base."""

    base: int
    """Frozen weights and buffers."""
    base_numel: int
    trained_numel: int
    trained: int
    """Trained weights as one process or DDP holds them."""
    moments: int
    """State tensors of the optimizer, over all ranks."""
    compute_itemsize: int
    """Bytes of an element in the dtype of mixed precision; 4 without."""
    usage: Usage
    """Of the largest micro-batch."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a run is distributed."""

    num_ranks: int = 1
    zero_stage: int = 0
    """0 = one process or DDP."""
    offload: bool = False
    """Whether the optimizer's state is in CPU memory; with ZeRO-3 the parameters, too."""

    @property
    def name(self) -> str:
        """The name in tables."""
        if not self.zero_stage:
            return "one device" if self.num_ranks == 1 else f"DDP x {self.num_ranks}"
        offload = " + CPU offload" if self.offload else ""
        return f"ZeRO-{self.zero_stage} x {self.num_ranks}{offload}"


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory of each device, by part, and of the CPU for each rank."""

    parts: dict[str, int]
    """By the names in `PARTS`."""
    host: int
    """CPU memory that offloading takes, per rank."""

    @property
    def total(self) -> int:
        """Peak of one device."""
        return sum(self.parts.values())


def layouts(num_ranks: int) -> Iterator[Layout]:
    """Yield the layouts to compare, without those that equal another one on this number of ranks."""
    yield Layout()
    if num_ranks > 1:
        yield Layout(num_ranks)
        yield Layout(num_ranks, 1)
        yield Layout(num_ranks, 2)
    yield Layout(num_ranks, 2, offload=True)
    if num_ranks > 1:
        yield Layout(num_ranks, 3)
    yield Layout(num_ranks, 3, offload=True)


def quantized_bytes(numel: int, num_rows: int, bits: int, *, double_quant: bool) -> int:
    """Return the bytes of a weight that bitsandbytes quantizes.

    Args:
        num_rows: output features, each with a float32 scale in 8 bits.
        double_quant: whether the scales of 4-bit weights are quantized to 8 bits.
    """
    if bits == 8:
        return numel + FLOAT32 * num_rows
    blocks = math.ceil(numel / BLOCK)
    scales = blocks + FLOAT32 * math.ceil(blocks / DOUBLE_BLOCK) if double_quant else FLOAT32 * blocks
    return math.ceil(numel / 2) + scales


def device_memory(sizes: Sizes, layout: Layout, *, on_cpu: bool = False) -> Memory:
    """Return the peak memory of a run on one of its devices.

    Args:
        on_cpu: whether the device is the CPU, where memory that is allocated and not written costs nothing.
    """
    adapter, moments = _weights(sizes, layout), sizes.moments
    masters = FLOAT32 * sizes.trained_numel if layout.zero_stage else 0
    state = (moments + masters) // layout.num_ranks if layout.zero_stage else moments
    base, host = sizes.base, 0
    if layout.zero_stage == 3:
        base = math.ceil(base / layout.num_ranks)
    if layout.offload:
        host, state = state + FLOAT32 * sizes.trained_numel // layout.num_ranks, 0  # with the gradients of this rank
        if layout.zero_stage == 3:
            host, base = host + base, 0
    parts = {
        "base": base,
        "adapter": adapter,
        "gradients": _gradients(sizes, layout),
        "moments": state,
        "communication": _communication(sizes, layout, on_cpu=on_cpu),
        "activations": sizes.usage.activations,
        "temporaries": sizes.usage.temporaries,
    }
    return Memory(parts, host)


def _weights(sizes: Sizes, layout: Layout) -> int:
    """Return the bytes of the trained weights: under ZeRO in 16 bits, and partitioned by stage 3."""
    if not layout.zero_stage:
        return sizes.trained
    full = sizes.compute_itemsize * sizes.trained_numel
    return math.ceil(full / layout.num_ranks) if layout.zero_stage == 3 else full


def _gradients(sizes: Sizes, layout: Layout) -> int:
    """Return the bytes of the gradients: ZeRO-2 and 3 partition them."""
    if not layout.zero_stage:
        return sizes.trained
    full = sizes.compute_itemsize * sizes.trained_numel
    return full if layout.zero_stage == 1 else math.ceil(full / layout.num_ranks)


def _communication(sizes: Sizes, layout: Layout, *, on_cpu: bool) -> int:
    """Return the bytes of the buffers through which ranks exchange gradients and parameters.

    DDP copies the gradients into buckets. ZeRO allocates one bucket of fixed size, and ZeRO-3 also the parameters that
    it keeps gathered.
    """
    if not layout.zero_stage:
        return sizes.trained if layout.num_ranks > 1 else 0
    bucket = min(BUCKET_NUMEL, sizes.trained_numel) if on_cpu else BUCKET_NUMEL
    gathered = 0
    if layout.zero_stage == 3 and (layout.num_ranks > 1 or layout.offload):
        gathered = min(LIVE_NUMEL, sizes.base_numel)
    return sizes.compute_itemsize * (bucket + gathered)
