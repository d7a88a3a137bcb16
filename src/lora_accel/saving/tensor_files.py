"""Safetensors files and pickles: written, and read with limits.

A file may be of unknown origin: reading it runs no code, and takes neither much memory nor long.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from lora_accel.errors import ArtifactError, first_line
from lora_accel.faults import fault_point
from lora_accel.json_text import first_duplicate
from lora_accel.saving.discovery import CONFIG, WEIGHTS

State = dict[str, torch.Tensor]
PICKLED = "adapter_model.bin"
MAX_TENSORS = 100_000
MAX_NAME_LENGTH = 1000
MAX_HEADER_BYTES = 20_000_000
"""Of a safetensors header, about 160 bytes per tensor."""
MAX_PICKLE_BYTES = 8_000_000
"""Of the part of a pickle that names the tensors. Python reads it instruction by instruction."""
MAX_PICKLE_READS = 500_000
"""Limit for the pickles before torch 1.6, where this part has no size of its own."""
MAX_SPARSENESS = 16
"""Size of a file per byte on disk. A file of holes could claim any size."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Supported dtypes of an adapter's tensors."""


class AdapterData(NamedTuple):
    """An adapter's tensors and config, both under the names of one format."""

    tensors: State
    config: dict[str, Any]


def read_adapter(folder: Path) -> State:
    """Read an adapter's tensors by their names in the file. Their data is mapped into memory, and read when it is used.

    Raises:
        ArtifactError: the folder is not an adapter, its file cannot be read, or a tensor has a dtype or layout that no
            adapter has. An older `adapter_model.bin`, a pickle, is read without running code.
    """
    path = tensor_file(folder)
    tensors = read_pickle(path) if path.name == PICKLED else read_tensors(path)
    check_tensors(path, tensors)
    return tensors


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


def tensor_file(folder: Path) -> Path:
    """Return the file with an adapter's tensors: safetensors, or else an older pickle.

    Raises:
        ArtifactError: the folder is not an adapter.
    """
    if not os.path.isdir(folder):  # a typo, most often
        raise ArtifactError(f"{folder}: is not an adapter: there is no such folder")
    path = folder / WEIGHTS
    if (folder / CONFIG).is_file() and not path.exists() and (folder / PICKLED).is_file():
        path = folder / PICKLED
    for name in (CONFIG, path.name):
        if not (folder / name).is_file():
            inner = folder / "adapter"
            hint = f"; {inner} is one" if (inner / CONFIG).is_file() else ""  # the folder of a run
            raise ArtifactError(f"{folder}: is not an adapter: {name} is missing{hint}")
    return path


def write_tensors(path: Path, tensors: State) -> None:
    """Write a safetensors file. It is serialized in memory first, so that a full disk raises OSError."""
    data = memoryview(save(tensors, metadata={"format": "pt"}))
    half = len(data) // 2
    with path.open("wb") as file:
        file.write(data[:half])
        file.flush()
        fault_point("save.mid_file")
        file.write(data[half:])


def check_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check the kinds of an adapter's tensors, without reading their values.

    Raises:
        ArtifactError: there are none or too many, or one is not a dense floating-point tensor with data on CPU.
    """
    if not tensors:
        raise ArtifactError(f"{path}: contains no tensors; an adapter that was not gathered or saved is empty")
    num_bytes = 0
    for name, tensor in tensors.items():
        if len(name) > MAX_NAME_LENGTH or not name.isprintable():
            raise ArtifactError(f"{path}: {name[:60]!r} is not the name of a tensor")
        is_dense = (
            type(tensor) in (torch.Tensor, torch.nn.Parameter)
            and tensor.device.type == "cpu"
            and tensor.layout == torch.strided
            and not tensor.is_nested
        )
        if not is_dense or tensor.is_complex() or tensor.is_quantized:
            raise ArtifactError(f"{path}: {name} is not a dense floating-point tensor with data")
        if tensor.dtype not in DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ArtifactError(f"{path}: {name} is stored as {dtype}; save the adapter in 16 or 32 bits")
        # A pickle of a few bytes can expand one value to a tensor of terabytes.
        if not 0 < tensor.nbytes <= tensor.untyped_storage().nbytes():
            raise ArtifactError(f"{path}: {name} is not a dense floating-point tensor with data")
        num_bytes += tensor.nbytes
    if num_bytes > 2 * path.stat().st_size:  # tied tensors share their data
        raise ArtifactError(f"{path}: its tensors share their data, and have {num_bytes:,} bytes")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file. The data is mapped into memory, not read.

    Raises:
        ArtifactError: the file cannot be read, or its header is too large or names a tensor twice.
    """
    try:
        _check_header(path)
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, RecursionError, MemoryError) as error:
        raise ArtifactError(f"{path}: cannot be read: {first_line(error) or type(error).__name__}") from None
    return tensors


def read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """Read a file that torch.save wrote from a dict of tensors, without running code in it.

    Raises:
        ArtifactError: it cannot be read, or contains anything but tensors by name.
    """
    try:
        _check_on_disk(file)
        if zipfile.is_zipfile(file):
            _check_archive(file)
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        else:  # the format before torch 1.6, which cannot be memory-mapped
            with _LimitedReads(file) as stream:
                tensors = torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ArtifactError(f"{file}: contains more than tensors; code in a pickle is not run") from None
    except Exception as error:  # a forged pickle raises many types
        raise ArtifactError(f"{file}: cannot be read: {first_line(error) or type(error).__name__}") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise ArtifactError(f"{file}: should contain a dict of tensors by name")
    return dict(tensors)


def _check_header(path: Path) -> None:
    """Check the size of a safetensors header, and that no name is in it twice: readers would take either tensor."""
    with path.open("rb") as file:
        _check_on_disk(path)
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {length:,} bytes, more than {MAX_HEADER_BYTES:,}")
        names = json.loads(file.read(length), object_pairs_hook=_reject_duplicates)
        if len(names) > MAX_TENSORS + 1:  # and the metadata
            raise ValueError(f"it has {len(names):,} tensors, more than {MAX_TENSORS:,}")


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError(f"{first_duplicate([name for name, _ in pairs])} is in its header twice")
    return names


def _check_on_disk(path: Path) -> None:
    """Check that a large file has its data on disk."""
    status = path.stat()
    on_disk = status.st_blocks * 512  # 0 on file systems that do not know it
    if status.st_size > 2**30 and 0 < on_disk * MAX_SPARSENESS < status.st_size:
        raise ValueError(f"it has {status.st_size:,} bytes, but only {on_disk:,} of them are on disk")


def _check_archive(file: Path) -> None:
    """Check that the archive of a pickle is not compressed, and that its list of tensors is of ordinary size."""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 66_000))  # the last record of an archive, with its comment
        tail = stream.read()
    directory_bytes = int.from_bytes(tail[(end := tail.rfind(b"PK\x05\x06")) + 12 : end + 16], "little")
    if directory_bytes > MAX_HEADER_BYTES and directory_bytes != 2**32 - 1:  # which refers to another record
        raise ValueError(f"its archive has a directory of {directory_bytes:,} bytes")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, so it could expand to any size; save it with torch.save")
    size = sum(entry.file_size for entry in entries if entry.filename.endswith("data.pkl"))
    if size > MAX_PICKLE_BYTES or len(entries) > MAX_TENSORS:
        raise ValueError(f"its list of tensors has {size:,} bytes, more than {MAX_PICKLE_BYTES:,}; use safetensors")


class _LimitedReads(io.BufferedReader):
    """A file for the pickles before torch 1.6, with a limit on the number of reads: one or two per instruction."""

    def __init__(self, file: Path) -> None:
        super().__init__(io.FileIO(file))
        self._num_reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._count()
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        self._count()
        return super().readline(size)

    def _count(self) -> None:
        self._num_reads += 1
        if self._num_reads > MAX_PICKLE_READS:
            raise ValueError("its list of tensors is too long; use safetensors")
