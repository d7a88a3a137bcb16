"""How long a GPU would take for a list of kernels: a roofline (Williams et al., CACM 52(4), 2009) and the host's time.

Modeled, not measured. Ratios of two ways are the purpose: both have the same matrix products, so a ratio depends much
less on the assumptions than a time does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tests.device.traffic import Kernel


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU, and what a training step can use of it."""

    name: str
    peak_flops: float
    """Dense bfloat16 products with float32 sums, per second."""
    peak_bandwidth: float
    """Bytes per second of its memory."""
    compute_share: float = 0.7
    """Share of the peak that large products reach; an assumption."""
    bandwidth_share: float = 0.85
    """Share of the peak that element-wise kernels reach; an assumption."""
    kernel_seconds: float = 2e-6
    """To start and to drain a kernel on the device; an assumption."""
    launch_seconds: float = 6e-6
    """Of the host for each kernel: Python, autograd, dispatcher, allocator and driver; an assumption for eager mode."""


GPUS = (
    Gpu("H100 SXM", peak_flops=989e12, peak_bandwidth=3.35e12),  # NVIDIA H100 Tensor Core GPU datasheet
    Gpu("A100 80GB SXM", peak_flops=312e12, peak_bandwidth=2.039e12),  # NVIDIA A100 Tensor Core GPU datasheet
    Gpu("RTX 4090", peak_flops=165.2e12, peak_bandwidth=1.008e12),  # NVIDIA Ada GPU Architecture whitepaper, appendix A
)


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Modeled seconds of a forward and backward. The host works ahead of the device: the slower one decides."""

    device_seconds: float
    host_seconds: float

    @property
    def seconds(self) -> float:
        """Return the seconds of the step."""
        return max(self.device_seconds, self.host_seconds)

    @property
    def is_host_bound(self) -> bool:
        """Whether the device waits for the host."""
        return self.host_seconds > self.device_seconds


def step_time(kernels: Mapping[Kernel, int], gpu: Gpu) -> StepTime:
    """Return how long a GPU would take for kernels, each with its count."""
    device = sum(count * _kernel_seconds(kernel, gpu) for kernel, count in kernels.items())
    return StepTime(device, sum(kernels.values()) * gpu.launch_seconds)


def _kernel_seconds(kernel: Kernel, gpu: Gpu) -> float:
    compute = kernel.flop / (gpu.peak_flops * gpu.compute_share)
    memory = kernel.nbytes / (gpu.peak_bandwidth * gpu.bandwidth_share)
    return max(compute, memory) + gpu.kernel_seconds
