"""Estimate activation memory: measure what forwards of a few tokens save for backward, and extrapolate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from lora_accel.batching.batch import MicroBatch
from lora_accel.config.optimizers import OPTIMIZERS
from lora_accel.model.fused_loss import CHUNK_NUMEL
from lora_accel.training.loss import summed_token_loss

HEADROOM = 1.25
"""Factor on the measured bytes: temporaries of a layer, and fragmentation."""
LOGITS = 3 * 4 * CHUNK_NUMEL
"""Bytes of a chunk of float32 logits, with their gradient and temporaries."""
USED_SHARE = 0.9
"""Share of the free memory that a micro-batch may take if its size is chosen."""
MIN_TOKENS, MAX_TOKENS = 2048, 32_768
"""Of a micro-batch on a GPU whose size is chosen: fewer do not fill it, and more are hardly faster."""


class ActivationCost(NamedTuple):
    """The bytes that a forward saves for backward, as a line through two measurements."""

    fixed: float
    per_token: float

    @classmethod
    def through(cls, small: int, large: int, num_tokens: int) -> ActivationCost:
        """Return the line through the bytes of `num_tokens` and of twice as many tokens."""
        per_token = max(0.0, (large - small) / num_tokens)
        return cls(max(0.0, small - per_token * num_tokens), per_token)

    def num_bytes(self, num_tokens: int) -> int:
        """Return the activation memory of a micro-batch, with temporaries."""
        return int(HEADROOM * (self.fixed + self.per_token * num_tokens)) + LOGITS

    def token_limit(self, free: float) -> int:
        """Return how many tokens of a micro-batch fit into `free` bytes, within `MIN_TOKENS` and `MAX_TOKENS`."""
        available = (USED_SHARE * free - LOGITS) / HEADROOM - self.fixed
        fitting = available / self.per_token if self.per_token else MAX_TOKENS
        return int(min(MAX_TOKENS, max(MIN_TOKENS, fitting)))


def saved_activation_bytes(model: torch.nn.Module, batch: MicroBatch) -> int:
    """Return the bytes that a forward saves for backward, the model's own tensors excluded."""
    saved: dict[int, torch.UntypedStorage] = {}  # keeps them alive, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter):
            return tensor  # under ZeRO-3 it is gathered for its layer only
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        summed_token_loss(model, batch)
    for tensor in (*model.parameters(), *model.buffers()):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in saved.values())


def num_layers_to_recompute(kept: int, recomputed: int, free: int, num_layers: int) -> int:
    """Return how many layers have to recompute their activations, so that the others' fit into memory.

    Layers are taken to save equally much.

    Args:
        kept: bytes of activations if no layer recomputes them.
        recomputed: bytes if all layers do.
        free: bytes that may be used.
        num_layers: 0 = unknown: all or none.
    """
    if not num_layers or kept <= recomputed:
        return num_layers
    per_layer = (kept - recomputed) / num_layers
    return min(num_layers, math.ceil((kept - free) / per_layer))


def update_bytes(trainable: Sequence[torch.nn.Parameter], optimizer: str) -> int:
    """Return the bytes of gradients and moments, which the first step allocates.

    Under ZeRO they are there before it or are sharded; then this is a bound.
    """
    moments = OPTIMIZERS[optimizer]
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trainable)
    return gradients + sum(
        moment.num_bytes for parameter in trainable for moment in moments.moments_of(tuple(parameter.shape)).values()
    )


def free_bytes(device: torch.device, num_local_ranks: int) -> int:
    """Return the memory that this process may still allocate, in bytes.

    Args:
        num_local_ranks: processes that share the machine's memory, if the device is the CPU.
    """
    if device.type == "mps":  # shares the machine's memory
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    if device.type != "cpu":
        module = torch.get_device_module(device)  # torch.accelerator would have it from torch 2.10 on
        free, _ = module.mem_get_info(device)
        reserved = getattr(module, "memory_reserved", module.memory_allocated)
        return int(free + reserved(device) - module.memory_allocated(device))
    free = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))  # limits of a container
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return int(free) // num_local_ranks
