"""Fused operations of decoder layers and of the loss: less is saved for backward, less is read and written.

Each module holds one operation and its reference, table.py lists the kernels that compute them on GPUs.
"""

from __future__ import annotations

from torch import nn

from lora_accel.model.kernels.gates import patch_gates
from lora_accel.model.kernels.norms import patch_norms
from lora_accel.model.kernels.rotary import patch_rotary


def patch_base(model: nn.Module) -> None:
    """Patch the frozen norms, the gated MLPs and the rotary embeddings of a base model of transformers."""
    patch_norms(model)
    patch_gates(model)
    patch_rotary(model)
