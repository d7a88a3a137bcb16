"""Adapter tensors on disk: safetensors or pickle, checked when read."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_accel.errors import ArtifactError
from lora_accel.saving.adapter import State, read_tensors
from lora_accel.saving.atomic import write_bytes
from lora_accel.saving.untrusted import read_pickle

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class AdapterData(NamedTuple):
    """An adapter's tensors and config, both under the names of one format."""

    tensors: State
    config: dict[str, Any]


def read_tensor_file(path: Path) -> State:
    """Read tensors by name, from safetensors or a pickle.

    Raises:
        ArtifactError: the file cannot be read, contains anything but tensors, or fails `check_tensors`.
    """
    return check_tensors(path, read_tensors(path) if path.suffix == ".safetensors" else read_pickle(path))


def check_tensors(path: Path, tensors: State) -> State:
    """Check tensors of an untrusted file; return contiguous copies that share no storage.

    Raises:
        ArtifactError: a tensor is not a dense CPU tensor of finite floating-point values, or is empty.
    """
    for name, tensor in tensors.items():
        is_dense = tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.dtype in DTYPES
        # A pickle of a few bytes can expand one value to a tensor of terabytes.
        if not is_dense or not 0 < tensor.nbytes <= tensor.untyped_storage().nbytes():
            raise ArtifactError(f"{path}: {name} is not a dense floating-point tensor with data")
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
