"""Read and write the weight files of a model folder one tensor at a time.

Only one tensor is in memory at a time. Format: https://github.com/huggingface/safetensors
(8 bytes with the length of the header, the header in JSON, then the concatenated bytes of the tensors).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from lora_accel.errors import ArtifactError
from lora_accel.model.headers import DTYPES, StoredTensor, main_dtype, read_header
from lora_accel.model.prequantized import dequantized, dequantized_headers, quantized_parts
from lora_accel.model.weight_files import check_index_paths, weight_files
from lora_accel.saving.tensor_files import read_pickle

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class TensorSpec(NamedTuple):
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Return the size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


Layout = dict[str, list[tuple[str, TensorSpec]]]
"""The tensors of each file, in order."""


class Weights:
    """The tensors of a model folder, by name. Each is read from its file when it is requested.

    A pickle (`.bin`) is loaded with `weights_only`: it cannot run code.

    Raises:
        ArtifactError: there are no weights, an index is invalid, or a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        check_index_paths(folder)
        self.files: dict[str, list[str]] = {}
        """Names of the tensors of each file, in the order in which the file stores them."""
        self.specs: dict[str, TensorSpec] = {}
        self._paths: dict[str, Path] = {}
        self._pickle_cache: tuple[Path | None, dict[str, torch.Tensor]] = (None, {})
        self._last: tuple[str, torch.Tensor] | None = None
        for file in weight_files(folder):
            self._add_file(file)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor. The last one is cached, since concurrent merges of one base request it in turn."""
        if self._last is None or self._last[0] != name:
            self._last = None  # free it before the next one is read
            self._last = (name, self._read(self._paths[name], name))
        return self._last[1]

    def _add_file(self, path: Path) -> None:
        if path.suffix == ".bin":
            specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in self._load_pickle(path).items()}
        else:
            specs = {name: TensorSpec(_dtype(path, name, t.dtype), t.shape) for name, t in read_header(path).items()}
        self.files[path.name] = list(specs)
        self.specs |= specs
        self._paths |= dict.fromkeys(specs, path)

    def _read(self, path: Path, name: str) -> torch.Tensor:
        if path.suffix == ".bin":
            return self._load_pickle(path)[name]
        try:
            # Opened for each tensor: pages that were read through a mapping count as memory until it is closed.
            with safe_open(path, "pt") as tensors:
                tensor: torch.Tensor = tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{path}: {name} cannot be read: {error}") from None
        return tensor

    def _load_pickle(self, path: Path) -> dict[str, torch.Tensor]:
        if self._pickle_cache[0] != path:
            self._pickle_cache = (path, read_pickle(path))
        return self._pickle_cache[1]


class DequantizedWeights(Weights):
    """The weights of a model folder that bitsandbytes stores in 4 or 8 bits, each dequantized when it is requested.

    Raises:
        ArtifactError: see `Weights`; also, if the parts of a weight are missing.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        stored = {name: StoredTensor(*spec) for name, spec in self.specs.items()}
        self._parts = quantized_parts(stored)
        """{name of a weight: {key of a part: name of its tensor}}"""
        headers, dtype = dequantized_headers(str(folder), stored, self._stored), main_dtype(stored)
        self.specs = {
            name: TensorSpec(dtype, x.shape) if name in self._parts else self.specs[name] for name, x in headers.items()
        }
        self.files = {file: [name for name in names if name in self.specs] for file, names in self.files.items()}

    def _read(self, path: Path, name: str) -> torch.Tensor:
        if name not in self._parts:
            return super()._read(path, name)
        return dequantized({key: self._stored(part) for key, part in self._parts[name].items()})

    def _stored(self, name: str) -> torch.Tensor:
        return super()._read(self._paths[name], name)


class ShardWriter:
    """Writes one safetensors file.

    Args:
        tensors: names and specs of all tensors, in the order in which they will be written.
    """

    def __init__(self, path: Path, tensors: Sequence[tuple[str, TensorSpec]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, spec in tensors:
            header[name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [end, end + spec.num_bytes],
            }
            end += spec.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # aligns the tensors to 8 bytes
        self._remaining = list(reversed(tensors))
        self._file: BinaryIO = path.open("wb")
        self._hash = hashlib.sha256()
        self._append(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor, which must have the declared name, dtype and shape."""
        expected, spec = self._remaining.pop()
        if (name, tensor.dtype, tuple(tensor.shape)) != (expected, spec.dtype, spec.shape):
            raise AssertionError(f"expected {expected} {spec}, got {name} {tensor.dtype} {tuple(tensor.shape)}")
        self._append(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> str:
        """Close the file; return its SHA-256."""
        self._file.close()
        return self._hash.hexdigest()

    def _append(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)  # of the data in memory: saves a read, and detects a corrupt write


def write_shards(
    folder: Path, layout: Layout, read: Callable[[str], torch.Tensor], pool: ThreadPoolExecutor
) -> Iterator[tuple[str, str] | None]:
    """Write weight files one tensor per iteration, and an index if there are several files.

    Args:
        read: returns a tensor by name; called once for each.
        pool: writes a tensor while `read` computes the next one.

    Yields:
        None after each tensor; name and SHA-256 of each file when it is complete.
    """
    for file, tensors in layout.items():
        writer = ShardWriter(folder / file, tensors)
        pending: Future[None] | None = None
        try:
            for name, _ in tensors:
                tensor = read(name)
                if pending is not None:
                    pending.result()
                pending = pool.submit(writer.write, name, tensor)
                yield None
        finally:
            if pending is not None:
                pending.result()
            sha256 = writer.close()
        yield file, sha256
    if len(layout) > 1:
        weight_map = {name: file for file, tensors in layout.items() for name, _ in tensors}
        size = sum(spec.num_bytes for tensors in layout.values() for _, spec in tensors)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")


def shard_layout(groups: Sequence[Sequence[tuple[str, TensorSpec]]], max_bytes: int | None) -> Layout:
    """Assign tensors to files, which get the names that transformers expects.

    Args:
        groups: the tensors of each of the base's files.
        max_bytes: size limit of a file; None = one file per group. A larger tensor gets a file of its own.
    """
    if max_bytes is not None:
        shards: list[list[tuple[str, TensorSpec]]] = [[]]
        size = 0
        for name, spec in (tensor for group in groups for tensor in group):
            if shards[-1] and size + spec.num_bytes > max_bytes:
                shards.append([])
                size = 0
            shards[-1].append((name, spec))
            size += spec.num_bytes
        groups = shards
    if len(groups) == 1:
        return {WEIGHTS: list(groups[0])}
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": list(group) for n, group in enumerate(groups, start=1)}


def _dtype(path: Path, name: str, stored: torch.dtype | str) -> torch.dtype:
    if isinstance(stored, str):
        raise ArtifactError(f"{path}: {name} is stored as {stored}; merge into a base in 16 or 32 bits")
    return stored
