"""Fine-tune causal language models with LoRA and QLoRA in a hand-written loop on Hugging Face Accelerate.

The names below are imported at first use, so that importing the package does not import torch. docs/python.md shows
how to use them. `lora_accel.train` is the module; the loop is `lora_accel.training.loop.train`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lora_accel.processes import end_on_interrupt

if TYPE_CHECKING:
    from lora_accel.config.files import read_config
    from lora_accel.config.schema import RunConfig
    from lora_accel.errors import (
        ArtifactError,
        ConfigError,
        DataError,
        Interrupted,
        LoraAccelError,
        TrainingError,
        UserError,
    )
    from lora_accel.inference.evaluation import evaluate
    from lora_accel.inference.generation import generate
    from lora_accel.merging.merge import merge_adapter, merge_checkpoints, merge_weighted
    from lora_accel.saving.adapter import save_adapter
    from lora_accel.saving.attach import load_adapter
    from lora_accel.setup.data import prepare_data
    from lora_accel.setup.model import prepare_model
    from lora_accel.train import run_training

end_on_interrupt()

__version__ = "0.1.0"

__all__ = [
    # Train
    "RunConfig",
    "read_config",
    "run_training",
    # Use the adapter
    "generate",
    "evaluate",
    "merge_adapter",
    "merge_weighted",
    "merge_checkpoints",
    # In your own Accelerate script
    "save_adapter",
    "load_adapter",
    "prepare_data",
    "prepare_model",
    # Errors
    "LoraAccelError",
    "UserError",
    "ConfigError",
    "DataError",
    "ArtifactError",
    "TrainingError",
    "Interrupted",
]

_MODULES = {
    "config.files": ("read_config",),
    "config.schema": ("RunConfig",),
    "errors": (
        *("LoraAccelError", "UserError", "ConfigError", "DataError", "ArtifactError"),
        *("TrainingError", "Interrupted"),
    ),
    "inference.evaluation": ("evaluate",),
    "inference.generation": ("generate",),
    "merging.merge": ("merge_adapter", "merge_checkpoints", "merge_weighted"),
    "saving.adapter": ("save_adapter",),
    "saving.attach": ("load_adapter",),
    "setup.data": ("prepare_data",),
    "setup.model": ("prepare_model",),
    "train": ("run_training",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
