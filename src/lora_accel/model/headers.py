"""What the headers of weight files declare: the name, dtype and shape of each tensor. No weights are read."""

from __future__ import annotations

import collections
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from lora_accel.errors import ArtifactError, first_line
from lora_accel.paths import has_access

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of dtypes."""
MAX_TENSORS, MAX_NAME = 500_000, 1_000
"""Tensors of a file, and characters of their names. The largest models have 200,000 tensors in all their files."""


class StoredTensor(NamedTuple):
    """A tensor as the header of its file declares it."""

    dtype: torch.dtype | str
    """A string if torch has no such dtype."""
    shape: tuple[int, ...]

    @property
    def is_floating_point(self) -> bool:
        """Whether the values are floating-point numbers."""
        return isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point


def read_headers(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Return the tensors that weight files declare, by name, each file in the order in which it stores them.

    Raises:
        ArtifactError: a file cannot be read, or holds anything but tensors.
    """
    return {name: tensor for file in files for name, tensor in read_header(file).items()}


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors that one weight file declares; see `read_headers`. A pickle runs no code."""
    if file.exists() and not has_access(file, os.R_OK):  # safetensors reports "no such file"
        raise ArtifactError(f"{file}: this user may not read it; change its permissions")
    if file.suffix != ".safetensors":
        return _read_pickle_header(file)
    tensors = {}
    try:
        with safe_open(file, "pt") as content:
            names = content.offset_keys()
            if len(names) > MAX_TENSORS or any(len(name) > MAX_NAME for name in names):
                raise ArtifactError(f"{file}: has more tensors, or longer names, than any model")
            for name in names:
                declared = content.get_slice(name)
                dtype = declared.get_dtype()
                tensors[name] = StoredTensor(DTYPES.get(dtype, dtype), tuple(declared.get_shape()))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file}: cannot be read: {first_line(error)}; is the download complete?") from None
    return tensors


def read_tensor(files: Sequence[Path], name: str) -> torch.Tensor:
    """Return one tensor of weight files.

    Raises:
        KeyError: no header declares it.
    """
    for file in files:
        if file.suffix != ".safetensors":
            tensors: dict[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True)
            if name in tensors:
                return tensors[name]
            continue
        with safe_open(file, "pt") as content:
            if name in content.keys():  # noqa: SIM118
                found: torch.Tensor = content.get_tensor(name)
                return found
    raise KeyError(name)


def main_dtype(tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """Return the floating-point dtype of most elements; float32 if there are none."""
    counts: collections.Counter[torch.dtype] = collections.Counter()
    for tensor in tensors.values():
        if isinstance(tensor.dtype, torch.dtype) and tensor.dtype.is_floating_point:
            counts[tensor.dtype] += math.prod(tensor.shape)
    return counts.most_common(1)[0][0] if counts else torch.float32


def _read_pickle_header(file: Path) -> dict[str, StoredTensor]:
    try:
        try:
            content = torch.load(file, map_location="meta", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be memory-mapped
            content = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:  # a damaged pickle raises many types
        raise ArtifactError(f"{file}: cannot be read: {first_line(error)}; code in a pickle is not run") from None
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        for name, tensor in content.items()
    ):
        raise ArtifactError(f"{file}: should contain a dict of tensors by name")
    return {name: StoredTensor(tensor.dtype, tuple(tensor.shape)) for name, tensor in content.items()}
