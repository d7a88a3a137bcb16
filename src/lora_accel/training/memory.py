"""Whether activations fit: what a forward keeps for the way back is measured on a few tokens, not guessed."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from lora_accel.training.loss import CHUNK, Batch, summed_token_loss

HEADROOM = 1.25
"""The whole micro-batch is taken to need so much more than its tokens' share: what a layer makes and drops again, and
memory in pieces."""


def kept_bytes(model: torch.nn.Module, batch: Batch) -> int:
    """Return the bytes that a forward keeps for the way back, the model's own tensors apart."""
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no place is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        summed_token_loss(model, batch)
    for tensor in (*model.parameters(), *model.buffers()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


def wanted_bytes(model: torch.nn.Module, batch: Batch, tokens: int) -> int:
    """Return the memory that a micro-batch of so many tokens will want, going by what a smaller one keeps."""
    ids: torch.Tensor = batch.inputs["input_ids"]
    logits = 3 * 4 * CHUNK  # float32, with their gradient and what is made on the way
    return int(HEADROOM * kept_bytes(model, batch) * tokens / ids.numel()) + logits


def free_bytes(device: torch.device, num_local_processes: int) -> int:
    """Return the memory that this process may still take."""
    if device.type != "cpu":
        # torch.accelerator's own is new in torch 2.10.
        memory = getattr(torch.accelerator, "get_memory_info", None) or torch.get_device_module(device).mem_get_info
        free, _ = memory(device)
        cached = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
        return int(free + cached)
    free = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))  # a container's
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return int(free) // num_local_processes
