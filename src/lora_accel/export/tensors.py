"""Adapter tensors on disk: written, and compared with what was written."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import torch

from lora_accel.errors import ArtifactError
from lora_accel.saving.atomic import write_bytes
from lora_accel.saving.tensor_files import State


def write_pickle(path: Path, tensors: State) -> None:
    """Write tensors with `torch.save`."""
    data = io.BytesIO()
    torch.save(tensors, data)
    write_bytes(path, data.getvalue())


def check_written(path: Path, tensors: State, read: Callable[[Path], State]) -> None:
    """Read a file back and compare.

    Raises:
        ArtifactError: it does not have the tensors that were written.
    """
    written = read(path)
    if written.keys() != tensors.keys() or any(not torch.equal(written[name], tensors[name]) for name in tensors):
        raise ArtifactError(f"{path}: does not match what was written; check the disk")
