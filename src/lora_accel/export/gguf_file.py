"""GGUF files: written one tensor at a time, read back and compared.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package writes and reads it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_accel.errors import ArtifactError, ConfigError, did_you_mean

OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")
"""Values of `--outtype`, in llama.cpp's spelling. auto = as stored."""
STORED = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f32"}
BLOCK, BLOCK_BYTES = 32, 34
"""Values of a block of q8_0, and its size: a scale in float16 and a byte per value."""
MAX_FLOAT16 = 65504.0


class GgufTensor(NamedTuple):
    """A tensor of a GGUF file, as its header declares it."""

    name: str
    shape: tuple[int, ...]
    outtype: str
    """A value of `OUTTYPES` except auto."""

    @property
    def num_bytes(self) -> int:
        """Return the size in the file."""
        numel = math.prod(self.shape)
        return {"f32": 4 * numel, "q8_0": numel // BLOCK * BLOCK_BYTES}.get(self.outtype, 2 * numel)


def check_outtype(outtype: str, allowed: Sequence[str] = OUTTYPES) -> None:
    """Check `--outtype`, and that the gguf package is installed.

    Raises:
        ConfigError: it is unknown or not allowed, or the package is missing.
    """
    if outtype not in allowed:
        raise ConfigError(f"--outtype={outtype}: unknown; use {', '.join(allowed)}{did_you_mean(outtype, allowed)}")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("--format=gguf needs the package gguf: pip install 'lora-accel[gguf]'")


def stored_outtype(dtype: torch.dtype) -> str:
    """Return the outtype that holds a dtype without loss (float64: as float32)."""
    return STORED[dtype]


def tensor_outtype(outtype: str, shape: Sequence[int]) -> str:
    """Return how to store one tensor. llama.cpp reads vectors as float32; q8_0 needs rows of complete blocks."""
    if len(shape) == 1:
        return "f32"
    return "f16" if outtype == "q8_0" and shape[-1] % BLOCK else outtype


def write_gguf(
    path: Path, writer: Any, tensors: Sequence[GgufTensor], load: Callable[[GgufTensor], torch.Tensor]
) -> None:
    """Write a GGUF file, read it back and compare it with what was written.

    Args:
        writer: a GGUFWriter with all metadata.
        load: returns a tensor in llama.cpp's layout. It is called once for each, in order, so one is in memory.

    Raises:
        ArtifactError: a value does not fit into float16, or the file is not what was written.
    """
    import gguf
    import numpy as np

    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.outtype.upper()]
        # With any dtype but uint8, the writer takes the shape as it is.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, raw_dtype=kind)
    metadata = {key: value.value for key, value in writer.kv_data[0].items()}
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    hashes = []
    try:
        for tensor in tensors:
            data = _encoded(tensor, load(tensor))
            hashes.append(hashlib.sha256(data).hexdigest())
            writer.write_tensor_data(data)
    finally:
        writer.close()
    _check_written(path, metadata, tensors, hashes)


def _encoded(tensor: GgufTensor, values: torch.Tensor) -> Any:
    """Return the bytes of a tensor as a numpy array."""
    import gguf

    values = values.contiguous()
    if tuple(values.shape) != tensor.shape:
        raise AssertionError(f"{tensor.name}: expected {tensor.shape}, got {tuple(values.shape)}")
    if tensor.outtype == "bf16":
        return values.to(torch.bfloat16).view(torch.int16).numpy()
    if tensor.outtype == "f16" and values.dtype != torch.float16:
        largest = values.abs().max().item()
        if largest > MAX_FLOAT16:
            raise ArtifactError(
                f"{tensor.name}: has values up to {largest:.3g}, more than float16 holds; pass --outtype bf16"
            )
        values = values.to(torch.float16)
    if tensor.outtype == "f16":
        return values.numpy()
    full = values.float().numpy()
    return full if tensor.outtype == "f32" else gguf.quantize(full, gguf.GGMLQuantizationType.Q8_0)


def _check_written(path: Path, metadata: dict[str, Any], tensors: Sequence[GgufTensor], hashes: Sequence[str]) -> None:
    """Open a file with gguf's reader, and compare metadata and tensors with what was written."""
    import gguf

    problem = ArtifactError(f"{path}: does not match what was written; check the disk")
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise problem from error
    if fields.keys() != metadata.keys() or not all(_is_same(fields[key], metadata[key]) for key in fields):
        raise problem
    written = [
        (
            GgufTensor(x.name, tuple(int(size) for size in reversed(x.shape)), x.tensor_type.name.lower()),
            hashlib.sha256(x.data.tobytes()).hexdigest(),
        )
        for x in reader.tensors
    ]
    if written != list(zip(tensors, hashes, strict=True)):
        raise problem


def _is_same(read: Any, written: Any) -> bool:
    """Whether a value that was read is the one that was written: floats are stored in 32 bits."""
    if isinstance(written, (list, tuple)):
        return len(read) == len(written) and all(map(_is_same, read, written))
    if isinstance(written, float):
        return math.isclose(read, written, rel_tol=1e-6)
    return bool(read == written)
