"""AdamW over what is trainable, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from lora_accel.config.plan import Plan
from lora_accel.config.schema import TrainingSection


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], training: TrainingSection, *, fused: bool = True
) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov & Hutter, arXiv 1711.05101); decay falls on matrices, not on biases and norms.

    Args:
        fused: whether all parameters are updated in one kernel, where the device has it.
    """
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=training.learning_rate, fused=fused)


def learning_rate(step: int, training: TrainingSection, plan: Plan) -> float:
    """Return the learning rate of the 0-based step: a linear rise from 0, then the schedule's fall to 0.

    Same values as transformers' get_cosine_, get_linear_ and get_constant_schedule_with_warmup.
    """
    if step < plan.warmup_steps:
        return training.learning_rate * step / plan.warmup_steps
    progress = (step - plan.warmup_steps) / max(1, plan.total_steps - plan.warmup_steps)
    factor = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[training.scheduler]
    return training.learning_rate * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Write a learning rate into every group. There is no scheduler object, so none can drift or be lost."""
    for group in optimizer.param_groups:
        group["lr"] = value
