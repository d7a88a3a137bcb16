"""Fine-tune causal language models with LoRA and QLoRA in a hand-written loop on Hugging Face Accelerate.

The names below are imported when they are first used, so that importing the package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_accel.config.files import read_config
    from lora_accel.config.schema import RunConfig
    from lora_accel.merging.merge import merge_adapter
    from lora_accel.saving.adapter import load_adapter, save_adapter
    from lora_accel.train import run_training

__version__ = "0.1.0"

__all__ = [
    "RunConfig",
    "read_config",
    "run_training",
    "merge_adapter",
    "save_adapter",
    "load_adapter",
]

_HOMES = {
    "RunConfig": "lora_accel.config.schema",
    "read_config": "lora_accel.config.files",
    "run_training": "lora_accel.train",
    "merge_adapter": "lora_accel.merging.merge",
    "save_adapter": "lora_accel.saving.adapter",
    "load_adapter": "lora_accel.saving.adapter",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
