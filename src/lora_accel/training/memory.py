"""Estimate activation memory: measure what a forward of a few tokens saves for backward, and extrapolate."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from lora_accel.batching.batch import MicroBatch
from lora_accel.model.fused_loss import CHUNK_NUMEL
from lora_accel.training.loss import summed_token_loss

HEADROOM = 1.25
"""Factor on the measured bytes per token: temporaries of a layer, and fragmentation."""


def saved_activation_bytes(model: torch.nn.Module, batch: MicroBatch) -> int:
    """Return the bytes that a forward saves for backward, the model's own tensors excluded."""
    saved: dict[int, torch.UntypedStorage] = {}  # keeps them alive, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        summed_token_loss(model, batch)
    for tensor in (*model.parameters(), *model.buffers()):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in saved.values())


def estimate_activation_bytes(model: torch.nn.Module, probe_batch: MicroBatch, num_tokens: int) -> int:
    """Return the activation memory of a micro-batch of `num_tokens`, extrapolated from a smaller one."""
    logits = 3 * 4 * CHUNK_NUMEL  # float32, with their gradient and temporaries
    per_batch = saved_activation_bytes(model, probe_batch)
    return int(HEADROOM * per_batch * num_tokens / probe_batch.input_ids.numel()) + logits


def free_bytes(device: torch.device, num_local_ranks: int) -> int:
    """Return the memory that this process may still allocate, in bytes.

    Args:
        num_local_ranks: processes that share the machine's memory, if the device is the CPU.
    """
    if device.type != "cpu":
        # torch.accelerator.get_memory_info exists from torch 2.10 on.
        memory = getattr(torch.accelerator, "get_memory_info", None) or torch.get_device_module(device).mem_get_info
        free, _ = memory(device)
        cached = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
        return int(free + cached)
    free = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))  # limits of a container
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return int(free) // num_local_ranks
