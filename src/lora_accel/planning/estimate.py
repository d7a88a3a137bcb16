"""The estimate of a run: its parameters, and the memory that each layout takes, without loading weights."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import psutil
import torch
from pydantic import ValidationError

from lora_accel.config.optimizers import OPTIMIZERS
from lora_accel.config.schema import RunConfig
from lora_accel.model.device import detect_device
from lora_accel.model.prequantized import stored_quantization
from lora_accel.model.recompute import recompute_layers
from lora_accel.planning.memory import Layout, Memory, Sizes, Usage, device_memory, layouts
from lora_accel.planning.micro_batches import choose_micro_batches
from lora_accel.planning.parameters import ParameterCount, count_by_kind
from lora_accel.planning.skeleton import Skeleton, build_skeleton
from lora_accel.planning.trace import Tracer, UntraceableError
from lora_accel.setup.data import PreparedData
from lora_accel.setup.memory import probe_batches, token_limit_by_data, with_tokens
from lora_accel.training.memory import MIN_TOKENS, ActivationCost, free_bytes

CONTEXT_BYTES = 600_000_000
"""What a process takes of a GPU beside tensors: its context and the workspaces of libraries. About, by experience."""
HEAP_FACTOR = 2
"""Memory of a process that trains on the CPU, relative to its tensors: glibc's heap keeps gaps between blocks.
Measured: 1.5 to 2.1 (docs/planning.md). With activation checkpointing, training returns freed memory instead."""


@dataclasses.dataclass(frozen=True)
class Available:
    """The memory of the devices that are there."""

    kind: str
    """cuda, rocm, cpu, …"""
    num_devices: int
    bytes: int
    """Free memory of one device, for the CPU of the machine."""
    host_bytes: int
    """Free memory of the machine."""
    framework: int
    """What a process takes beside tensors."""


@dataclasses.dataclass(frozen=True)
class Option:
    """A layout of the run, with its memory."""

    layout: Layout
    bits: int | None
    """4 or 8 if the base is quantized; None = 16 or 32 bits."""
    memory: Memory | None
    """None = not supported: ZeRO-3 cannot partition quantized weights."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a run needs."""

    parameters: list[ParameterCount]
    options: list[Option]
    available: Available
    micro_batch_tokens: int
    """Limit of a micro-batch, also where the config leaves it to `auto`."""
    micro_batch: tuple[int, int]
    """Rows and tokens per row of the largest micro-batch."""
    computed_share: float
    """Share of the run's tokens that are computed: below 1 if examples share prefixes."""
    recomputes: bool
    """Whether all layers recompute their activations. Then training returns freed memory, see `HEAP_FACTOR`."""
    untraced: str | None
    """Why activations and temporaries are unknown, and 0 in `options`; None = they are known."""

    def fits(self, option: Option) -> bool | None:
        """Return whether the devices that are there have the memory; None = unsupported, or unknown."""
        if option.memory is None:
            return False
        host = 0 if self.available.kind == "cpu" else option.memory.host * option.layout.num_ranks
        is_enough = self.needed_bytes(option) <= self.available.bytes and host <= self.available.host_bytes
        return None if is_enough and self.untraced else is_enough

    def needed_bytes(self, option: Option) -> int:
        """Return the memory that a supported option needs on a device; on the CPU, that of all its ranks."""
        assert option.memory is not None
        memory, framework = option.memory, self.available.framework
        if self.available.kind != "cpu":
            return memory.total + framework
        factor = 1 if self.recomputes else HEAP_FACTOR
        return (factor * (memory.total + memory.host) + framework) * option.layout.num_ranks


def find_available() -> Available:
    """Return the memory of this machine's accelerators, or of its CPU."""
    host = free_bytes(torch.device("cpu"), 1)
    kind = detect_device().kind
    if kind == "cpu":
        return Available(kind, 1, host, host, psutil.Process().memory_info().rss)
    device = torch.accelerator.current_accelerator()
    assert device is not None
    return Available(kind, torch.accelerator.device_count(), free_bytes(device, 1), host, CONTEXT_BYTES)


def make_estimate(
    config: RunConfig, data: PreparedData, mixed_precision: str, num_ranks: int, *, has_4_bits: bool = True
) -> Estimate:
    """Estimate a run. With `activation_checkpointing: auto` no layer recomputes its activations here.

    Args:
        mixed_precision: no, bf16 or fp16.
        num_ranks: number of training processes.
        has_4_bits: whether to estimate the same run on a base in 4 bits, too.

    Raises:
        ArtifactError, ConfigError: see `build_skeleton`.
    """
    available = find_available()
    device = torch.device("cpu" if available.kind == "cpu" else "cuda" if available.kind == "rocm" else available.kind)
    skeleton = build_skeleton(config, mixed_precision, device)
    parameters = count_by_kind(skeleton.model)
    limit = config.training.micro_batch_tokens
    if limit == "auto":
        limit = _token_limit(config, data, skeleton, available, num_ranks)
        config = with_tokens(config, limit)
    batch, _, computed = choose_micro_batches(config, data, packed=skeleton.packed, min_saving=skeleton.min_saving)
    variants = [(config.quantization.bits, skeleton)]
    four_bits = with_4_bits(config) if has_4_bits and not skeleton.quantized else None
    if four_bits is not None:
        variants.append((4, build_skeleton(four_bits, mixed_precision, device)))
    options, untraced = [], None
    for bits, variant in variants:
        sizes, usage = model_sizes(config, variant), Usage(0, 0, 0)
        try:
            usage = trace_usage(variant, batch, config)
        except UntraceableError as error:
            untraced = str(error)
        sizes = dataclasses.replace(sizes, usage=usage)
        for layout in layouts(num_ranks):
            is_supported = not (variant.quantized and layout.zero_stage == 3)
            memory = device_memory(sizes, layout, on_cpu=available.kind == "cpu") if is_supported else None
            options.append(Option(layout, bits if variant.quantized else None, memory))
    rows, width = batch.input_ids.shape
    recomputes = config.training.activation_checkpointing is True
    return Estimate(parameters, options, available, limit, (rows, width), computed, recomputes, untraced)


def _token_limit(
    config: RunConfig, data: PreparedData, skeleton: Skeleton, available: Available, num_ranks: int
) -> int:
    """Return the tokens of a micro-batch as training would choose them (setup/memory.py), from traces."""
    if available.kind == "cpu" or config.training.micro_batch_size is not None:
        return token_limit_by_data(config, data, packed=skeleton.packed, min_saving=skeleton.min_saving)
    free = available.bytes - available.framework
    free -= device_memory(model_sizes(config, skeleton), Layout(num_ranks)).total
    small, large = probe_batches(data, packed=skeleton.packed)
    try:
        saved = [trace_usage(skeleton, batch, config).activations for batch in (small, large)]
    except UntraceableError:
        return MIN_TOKENS
    return ActivationCost.through(saved[0], saved[1], small.input_ids.numel()).token_limit(free)


def with_4_bits(config: RunConfig) -> RunConfig | None:
    """Return a config with its base in 4 bits; None if it has bits already, or its other options do not allow it."""
    if config.quantization.bits is not None or stored_quantization(config.model) is not None:
        return None
    four_bits = config.model_copy(update={"quantization": config.quantization.model_copy(update={"bits": 4})})
    return four_bits if is_supported(four_bits) else None


def is_supported(config: RunConfig) -> bool:
    """Whether the sections of a config can be combined."""
    try:
        RunConfig.model_validate(config.model_dump())
    except ValidationError:
        return False
    return True


def model_sizes(config: RunConfig, skeleton: Skeleton) -> Sizes:
    """Return the sizes of a model, without the usage of a micro-batch."""
    named = [*skeleton.model.named_parameters(), *skeleton.model.named_buffers()]
    trained = [parameter for parameter in skeleton.model.parameters() if parameter.requires_grad]
    dtype, spec = skeleton.autocast or torch.float32, OPTIMIZERS[config.training.optimizer]
    return Sizes(
        base=sum(skeleton.stored_bytes(name, tensor) for name, tensor in named if not tensor.requires_grad),
        base_numel=sum(tensor.numel() for _, tensor in named if not tensor.requires_grad),
        trained_numel=sum(parameter.numel() for parameter in trained),
        trained=sum(parameter.numel() * parameter.element_size() for parameter in trained),
        moments=sum(moment.num_bytes for p in trained for moment in spec.moments_of(tuple(p.shape)).values()),
        compute_itemsize=dtype.itemsize,
        usage=Usage(0, 0, 0),
    )


def trace_usage(skeleton: Skeleton, batch: Any, config: RunConfig) -> Usage:
    """Return what a micro-batch allocates. Replaces the parameters of the skeleton.

    Raises:
        UntraceableError: the model's code needs the values of its tensors.
    """
    if config.training.activation_checkpointing is True:
        recompute_layers(skeleton.model)
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # the error is reported here
    return Tracer(skeleton).usage(batch)


def as_dict(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate as plain values, with sizes in bytes."""
    counts = estimate.parameters
    return {
        "parameters": {
            "total": sum(count.numel for count in counts),
            "trained": sum(count.numel for count in counts if count.is_trained),
            "kinds": [count._asdict() for count in counts],
        },
        "memory": {
            "available": dataclasses.asdict(estimate.available),
            "micro_batch_tokens": estimate.micro_batch_tokens,
            "micro_batch": {"rows": estimate.micro_batch[0], "tokens": estimate.micro_batch[1]},
            "computed_share": estimate.computed_share,
            "recomputes_activations": estimate.recomputes,
            "untraced": estimate.untraced,
            "options": [
                {
                    "layout": option.layout.name,
                    **dataclasses.asdict(option.layout),
                    "bits": option.bits,
                    "is_supported": option.memory is not None,
                    "parts": option.memory.parts if option.memory else None,
                    "total_bytes": option.memory.total if option.memory else None,
                    "host_bytes": option.memory.host if option.memory else None,
                    "fits": estimate.fits(option),
                }
                for option in estimate.options
            ],
        },
    }
