"""The optimizer over the trainable parameters."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

from lora_accel.config.optimizers import OPTIMIZERS
from lora_accel.config.schema import RunConfig, TrainingSection, chosen_options
from lora_accel.errors import ConfigError, first_line


def make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter],
    training: TrainingSection,
    *,
    factors: Mapping[str, float] | None = None,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """Construct `training.optimizer`. Weight decay applies to matrices, not to biases and norms.

    Args:
        parameters: by name.
        factors: learning rate of parameters by name, in multiples of the base rate; 1 for all others.
        fused: whether the device supports updating all parameters in one kernel.

    Raises:
        ConfigError: the optimizer does not support a parameter, or not this device.
    """
    spec = OPTIMIZERS[training.optimizer]
    groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if spec.is_matrix_only and _full_ndim(parameter) != 2:
            raise ConfigError(
                f"training.optimizer={training.optimizer} supports matrices only, but {name} is none; do not train it "
                "(adapter.bias=none), or use adamw"
            )
        is_vector, factor = _full_ndim(parameter) < 2, (factors or {}).get(name, 1.0)
        groups.setdefault((is_vector, factor), []).append(parameter)
    module, _, class_name = spec.path.rpartition(".")
    options = spec.arguments(chosen_options(training.optimizer_options)) | {"lr": training.learning_rate}
    if spec.has_fused:
        options["fused"] = fused
    optimizer_class = getattr(importlib.import_module(module), class_name)
    if module.startswith("bitsandbytes"):
        _check_device(optimizer_class, options, next(iter(parameters.values())).device, training.optimizer)
    optimizer: torch.optim.Optimizer = optimizer_class(
        [
            {
                "params": group,
                "weight_decay": 0.0 if is_vector else training.weight_decay,
                "lr": training.learning_rate * factor,
                "lr_factor": factor,
            }
            for (is_vector, factor), group in sorted(groups.items(), key=lambda item: item[0])
        ],
        **options,
    )
    return optimizer


def learning_rate_factors(
    parameters: Mapping[str, torch.nn.Parameter], embeddings: set[str], config: RunConfig
) -> dict[str, float]:
    """Return the learning rate of parameters by name, in multiples of `training.learning_rate`; of others it is 1.

    LoRA+ (Hayou et al., arXiv 2402.12354): B matrices learn faster than A matrices. As in the authors' code and in
    PEFT, so do vectors, such as biases.

    Args:
        parameters: all trained parameters, by name.
        embeddings: names of those in the embeddings and the head.

    Raises:
        ConfigError: there is a learning rate for embeddings, but none is trained.
    """
    embedding_rate = config.training.embedding_learning_rate
    if embedding_rate is not None and not embeddings:
        raise ConfigError(
            "training.embedding_learning_rate: nothing in the embeddings or the head is trained; remove it, or train "
            "them (model.add_tokens, adapter.modules_to_save)"
        )
    factors = {}
    for name, parameter in parameters.items():
        if embedding_rate is not None and name in embeddings:
            factors[name] = embedding_rate / config.training.learning_rate
        elif _full_ndim(parameter) < 2 or "lora_B" in name or "lora_embedding_B" in name:
            factors[name] = config.adapter.loraplus_ratio
    return factors


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group to its multiple of the base rate."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_factor", 1.0)


def _full_ndim(parameter: torch.nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO-3, the parameter is a flat shard


def _check_device(optimizer_class: Any, options: Mapping[str, Any], device: torch.device, name: str) -> None:
    """Check by an update of zeros that bitsandbytes has the optimizer's kernels for this device.

    Raises:
        ConfigError: it does not.
    """
    trial = torch.nn.Parameter(torch.zeros(64, 64, device=device))
    trial.grad = torch.zeros_like(trial)
    try:
        optimizer_class([trial], **options).step()
    except (NotImplementedError, RuntimeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"training.optimizer={name}: the installed bitsandbytes does not support it on {device.type}: "
            f"{first_line(error)}. Upgrade bitsandbytes, or use training.optimizer=adamw"
        ) from None
