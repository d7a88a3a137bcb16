"""Adapter tensors on disk: safetensors or pickle, checked when read."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_accel.errors import ArtifactError
from lora_accel.saving.atomic import write_bytes
from lora_accel.saving.tensor_files import State, check_tensors, read_pickle, read_tensors


class AdapterData(NamedTuple):
    """An adapter's tensors and config, both under the names of one format."""

    tensors: State
    config: dict[str, Any]


def read_tensor_file(path: Path) -> State:
    """Read tensors by name, from safetensors or a pickle.

    Raises:
        ArtifactError: the file cannot be read, contains anything but dense tensors, or a value is not finite.
    """
    tensors = read_tensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    check_tensors(path, tensors)
    return finite_copies(path, tensors)


def finite_copies(path: Path, tensors: State) -> State:
    """Return contiguous copies of tensors that share no storage.

    Raises:
        ArtifactError: a value is not finite.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{path}: {name} has values that are not finite")
    return {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}


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
