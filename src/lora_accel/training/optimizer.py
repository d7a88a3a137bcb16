"""The optimizer over the trainable parameters."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch

from lora_accel.config.optimizers import OPTIMIZERS
from lora_accel.config.schema import TrainingSection


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], training: TrainingSection, *, fused: bool = True
) -> torch.optim.Optimizer:
    """Construct `training.optimizer`. Weight decay applies to matrices, not to biases and norms.

    Args:
        fused: whether the device supports updating all parameters in one kernel.
    """
    spec = OPTIMIZERS[training.optimizer]
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    module, _, name = spec.path.rpartition(".")
    options: dict[str, Any] = {"lr": training.learning_rate, **spec.options}
    if spec.has_fused:
        options["fused"] = fused
    optimizer: torch.optim.Optimizer = getattr(importlib.import_module(module), name)(
        [group for group in groups if group["params"]], **options
    )
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value
