"""The formats in which `export_adapter` writes an adapter.

To add a format, add an entry to `FORMATS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel

from lora_accel.export.tensors import write_pickle
from lora_accel.model.tokenizer import FILES
from lora_accel.saving import loralib
from lora_accel.saving.discovery import CONFIG, WEIGHTS
from lora_accel.saving.tensor_files import PICKLED, AdapterData, State, read_tensor_file, write_tensors

COMMON_FILES = (*(name for name in FILES if name != "config.json"), "provenance.json")
"""Tokenizer, chat template and provenance."""
PEFT_FILES = (*COMMON_FILES, "README.md")
"""The card shows how PEFT loads the adapter."""


@dataclasses.dataclass(frozen=True)
class ExportFormat:
    """How to write a format."""

    tensors_file: str
    config_file: str
    copied_files: tuple[str, ...]
    """Files to copy from the source's folder, if they exist."""
    write_tensors: Callable[[Path, State], None]
    read_tensors: Callable[[Path], State] = read_tensor_file
    """Reads them back, to compare with what was written."""
    check_config: Callable[[Path, Mapping[str, Any]], None] | None = None
    """Raises ArtifactError if an adapter_config.json has options that the format does not support."""
    convert: Callable[[Path, AdapterData, PeftModel], AdapterData] | None = None
    """Converts from PEFT's names and config. The model is the adapter on its base, on the meta device."""


FORMATS: dict[str, ExportFormat] = {
    "peft": ExportFormat(WEIGHTS, CONFIG, PEFT_FILES, write_tensors),
    "peft-bin": ExportFormat(PICKLED, CONFIG, PEFT_FILES, write_pickle),
    "loralib": ExportFormat(
        loralib.TENSORS_FILE,
        loralib.CONFIG_FILE,
        COMMON_FILES,
        write_pickle,
        check_config=loralib.check_config,
        convert=loralib.from_peft,
    ),
}
