"""The weight files of a model folder: read a tensor at a time, written a tensor at a time.

Memory holds one tensor, whatever the size of model and files. Format: https://github.com/huggingface/safetensors
(8 bytes for the length of the header, the header in JSON, then the tensors' bytes end to end).
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
from lora_accel.model.base import check_index_paths
from lora_accel.saving.untrusted import read_pickle

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"


class Kind(NamedTuple):
    """What a tensor looks like."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Return its size."""
        return math.prod(self.shape) * self.dtype.itemsize


Layout = dict[str, list[tuple[str, Kind]]]
"""Which file holds which tensors, in their order."""


class Weights:
    """The tensors of a model folder, by name; each is read from its file when it is asked for.

    Raises:
        ArtifactError: there are no weights, an index is wrong, or a file cannot be read. A pickle (`.bin`) is read as
            data only: code in it is refused, not run.
    """

    def __init__(self, folder: Path) -> None:
        check_index_paths(folder)
        self.files: dict[str, list[str]] = {}
        """Names of tensors by the file that holds them, in the order in which they lie there."""
        self.kinds: dict[str, Kind] = {}
        self._file_of: dict[str, Path] = {}
        self._unpickled: tuple[Path | None, dict[str, torch.Tensor]] = (None, {})
        self._last: tuple[str, torch.Tensor] | None = None
        for file in _weight_files(folder):
            self._look_into(folder / file)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor. What was asked for last is kept: several merges of one base ask in turn."""
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next one is there
            self._last = (name, self._read(self._file_of[name], name))
        return self._last[1]

    def _look_into(self, file: Path) -> None:
        kinds = {}
        if file.suffix == ".bin":
            kinds = {name: Kind(t.dtype, tuple(t.shape)) for name, t in self._pickle(file).items()}
        else:
            try:
                with safe_open(file, "pt") as tensors:
                    for name in tensors.offset_keys():
                        told = tensors.get_slice(name)
                        kinds[name] = Kind(_dtype(file, name, told.get_dtype()), tuple(told.get_shape()))
            except (OSError, SafetensorError) as error:
                raise ArtifactError(f"{file}: cannot be read: {error}") from None
        self.files[file.name] = list(kinds)
        self.kinds |= kinds
        self._file_of |= dict.fromkeys(kinds, file)

    def _read(self, file: Path, name: str) -> torch.Tensor:
        if file.suffix == ".bin":
            return self._pickle(file)[name]
        try:
            # Opened for each: what a file's mapping has read counts as memory until it is closed.
            with safe_open(file, "pt") as tensors:
                tensor: torch.Tensor = tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{file}: {name} cannot be read: {error}") from None
        return tensor

    def _pickle(self, file: Path) -> dict[str, torch.Tensor]:
        if self._unpickled[0] != file:
            self._unpickled = (file, read_pickle(file))
        return self._unpickled[1]


class ShardWriter:
    """Writes one safetensors file, whose tensors are known beforehand, in their order."""

    def __init__(self, path: Path, layout: Sequence[tuple[str, Kind]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, kind in layout:
            header[name] = {
                "dtype": NAMES[kind.dtype],
                "shape": list(kind.shape),
                "data_offsets": [end, end + kind.num_bytes],
            }
            end += kind.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
        self._left = list(reversed(layout))
        self._file: BinaryIO = path.open("wb")
        self._hash = hashlib.sha256()
        self._put(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor; it must be the one that was announced."""
        expected, kind = self._left.pop()
        if (name, tensor.dtype, tuple(tensor.shape)) != (expected, kind.dtype, kind.shape):
            raise AssertionError(f"{name} {tensor.dtype} {tuple(tensor.shape)}: {expected} {kind} was announced")
        self._put(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> str:
        """End the file; return its SHA-256."""
        self._file.close()
        return self._hash.hexdigest()

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)  # here, not from the file: it costs no reading, and tells what should stand there


def writing(
    folder: Path, layout: Layout, read: Callable[[str], torch.Tensor], pool: ThreadPoolExecutor
) -> Iterator[tuple[str, str] | None]:
    """Write weight files, and their index if they are several; one tensor at each turn.

    Args:
        pool: writes a tensor while the next is made.

    Yields:
        None after a tensor, and the name and the SHA-256 of each file when it is whole.
    """
    for file, group in layout.items():
        writer = ShardWriter(folder / file, group)
        written: Future[None] | None = None
        try:
            for name, _ in group:
                tensor = read(name)
                if written is not None:
                    written.result()
                written = pool.submit(writer.write, name, tensor)
                yield None
        finally:
            if written is not None:
                written.result()
            sha256 = writer.close()
        yield file, sha256
    if len(layout) > 1:
        weight_map = {name: file for file, group in layout.items() for name, _ in group}
        size = sum(kind.num_bytes for group in layout.values() for _, kind in group)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")


def shard_layout(groups: Sequence[Sequence[tuple[str, Kind]]], max_bytes: int | None) -> Layout:
    """Return which file holds which tensors, under the names that transformers looks for.

    Args:
        groups: the base's own files.
        max_bytes: of a file; None = as the groups are. A tensor that is larger has a file of its own.
    """
    if max_bytes is not None:
        cut: list[list[tuple[str, Kind]]] = [[]]
        size = 0
        for item in (item for group in groups for item in group):
            if cut[-1] and size + item[1].num_bytes > max_bytes:
                cut.append([])
                size = 0
            cut[-1].append(item)
            size += item[1].num_bytes
        groups = cut
    if len(groups) == 1:
        return {WEIGHTS: list(groups[0])}
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": list(group) for n, group in enumerate(groups, start=1)}


def _weight_files(folder: Path) -> list[str]:
    for single in (WEIGHTS, BIN):
        index = folder / (INDEX if single == WEIGHTS else f"{BIN}.index.json")
        if (folder / single).is_file():
            return [single]
        if index.is_file():  # its form and that it stays in its folder was seen to above
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [file for file in files if not (folder / file).is_file()]
            if missing:
                raise ArtifactError(f"{folder}: {missing[0]} is missing, which {index.name} names")
            return files
    raise ArtifactError(f"{folder}: no {WEIGHTS} and no {BIN} in it")


def _dtype(file: Path, name: str, told: str) -> torch.dtype:
    if told not in DTYPES:
        raise ArtifactError(f"{file}: {name} is stored as {told}; merge into a base in 16 or 32 bits")
    return DTYPES[told]
