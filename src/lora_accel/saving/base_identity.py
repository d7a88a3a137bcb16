"""Which base an adapter was trained on: the tensors that transformers loads, by name and content.

A provenance records the hash of each weight file, and one hash of all tensors. Equal files are the same base. If files
differ, the tensors decide: a base that was saved in other shards, or as safetensors instead of a pickle, is the same.
Files that transformers does not load are not part of the base.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants, snapshot_download
from safetensors import SafetensorError, safe_open

from lora_accel.errors import ArtifactError, first_line
from lora_accel.model.weight_files import weight_files
from lora_accel.saving.atomic import sha256_of, write_text
from lora_accel.saving.tensor_files import read_pickle

RACY_SECONDS = 2.0
"""A file that changed this recently could change again without another time of change, so its hash is not kept."""
NAMES_OF_WEIGHTS = (
    r"model\.safetensors",
    r"model-\d+-of-\d+\.safetensors",
    r"pytorch_model\.bin",
    r"pytorch_model-\d+-of-\d+\.bin",
)
"""Names of weight files, in the order in which transformers looks for them."""


def base_folder(name_or_path: str, revision: str | None) -> Path:
    """Return the local folder of a base.

    Args:
        name_or_path: a folder, or a model in the Hub's cache.

    Raises:
        LocalEntryNotFoundError: the model is not in the Hub's cache.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    return Path(snapshot_download(name_or_path, revision=revision, local_files_only=True))


def has_weights(name_or_path: str, revision: str | None) -> bool:
    """Whether the weight files of a base are in its folder or in the Hub's cache."""
    try:
        return bool(weight_files(base_folder(name_or_path, revision)))
    except (ArtifactError, OSError):
        return False


def base_hashes(name_or_path: str, revision: str | None, *, cached: bool = False) -> dict[str, str]:
    """Return the SHA-256 of each weight file that transformers loads, by file name.

    Files in the Hub's cache are named by their hash, so they are not read.

    Args:
        name_or_path: a folder, or a model in the Hub's cache.
        cached: whether the hash of a file that did not change since it was last hashed need not be computed again.

    Raises:
        ArtifactError: the folder has no weight files.
        LocalEntryNotFoundError: the model is not in the Hub's cache.
    """
    files = weight_files(base_folder(name_or_path, revision))
    return {file.name: _blob_hash(file) or _file_hash(file, cached=cached) for file in files}


def tensors_hash(name_or_path: str, revision: str | None, *, cached: bool = False) -> str:
    """Return one hash of the tensors that transformers loads: of their names, dtypes, shapes and bytes.

    It does not depend on how they are divided among files, nor on the format of these.

    Args:
        cached: see `base_hashes`.

    Raises:
        ArtifactError: a file cannot be read.
        LocalEntryNotFoundError: the model is not in the Hub's cache.
    """
    key = _tensors_key(base_hashes(name_or_path, revision, cached=True)) if cached else ""
    if cached and (known := _kept(key)) is not None:
        return known
    tensors: dict[str, _Tensor] = {}
    for file in weight_files(base_folder(name_or_path, revision)):
        tensors |= _hash_tensors(file)
    # Of matrices with the same values one name counts: a tied head is stored in a pickle, but not in safetensors.
    names = {tensor: name for name, tensor in sorted(tensors.items()) if len(tensor.shape) > 1}
    lines = [f"{name} {tensor}" for name, tensor in sorted(tensors.items()) if names.get(tensor, name) == name]
    sha256 = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if cached:
        _keep(key, sha256)
    return sha256


def base_identity(name_or_path: str, revision: str | None) -> tuple[dict[str, str], str]:
    """Return `base_hashes` and `tensors_hash`, computed at the same time, so that the disk is read about once.

    Raises:
        ArtifactError: see there.
    """
    with ThreadPoolExecutor(1) as pool:
        hashes = pool.submit(base_hashes, name_or_path, revision)
        tensors = tensors_hash(name_or_path, revision)
        _keep(_tensors_key(hashes.result()), tensors)
        return hashes.result(), tensors


def is_same_base(recorded: Mapping[str, Any], hashes: Mapping[str, str], tensors: Callable[[], str]) -> bool:
    """Whether a base is the one that a provenance records.

    Args:
        recorded: the entry `base` of a provenance. Those of earlier versions list every weight file in the base's
            folder, and do not have `tensors_sha256`.
        hashes: `base_hashes` of the base.
        tensors: returns its `tensors_hash`; only called if the files differ.
    """
    if loaded_hashes(recorded["sha256"]) == loaded_hashes(hashes):
        return True
    expected = recorded.get("tensors_sha256")
    return expected is not None and expected == tensors()


def have_same_base(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the entries `base` of two provenances record the same base."""
    return is_same_base(one, other["sha256"], lambda: str(other.get("tensors_sha256")))


def loaded_hashes(sha256: Mapping[str, Any]) -> list[str]:
    """Return the sorted hashes of those weight files in a record that transformers loads, judged by their names."""
    for pattern in NAMES_OF_WEIGHTS:
        if names := [name for name in sha256 if re.fullmatch(pattern, name)]:
            return sorted(str(sha256[name]) for name in names)
    return sorted(map(str, sha256.values()))


def _blob_hash(file: Path) -> str | None:
    """Return the hash of a file in the Hub's cache, which is its name there; None for any other file."""
    blob = file.resolve()
    is_blob = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
    return blob.name if is_blob else None


def _file_hash(file: Path, *, cached: bool) -> str:
    """Return the SHA-256 of a file, and keep it for the next command, if the cache can be written to.

    It is found again by path, size, inode and times of change, as in git's index: whatever writes to a file sets them.
    """
    path, before = file.resolve(), file.stat()
    key = f"file {path}\n{before.st_size} {before.st_mtime_ns} {before.st_ctime_ns} {before.st_ino}"
    if cached and (known := _kept(key)) is not None:
        return known
    sha256 = sha256_of(file)
    if time.time() - max(before.st_mtime, before.st_ctime) > RACY_SECONDS:
        _keep(key, sha256)
    return sha256


def _tensors_key(hashes: Mapping[str, str]) -> str:
    return "\n".join(["tensors", *sorted(hashes.values())])


def _kept(key: str) -> str | None:
    """Return a kept hash; None if there is none, or if its file was damaged."""
    try:
        sha256, check = _entry(key).read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return sha256 if check == _checksum(key, sha256) else None


def _keep(key: str, sha256: str) -> None:
    """Keep a hash for later commands. On a full disk, or in a folder of another user, it is not kept."""
    with contextlib.suppress(OSError):
        _entry(key).parent.mkdir(parents=True, exist_ok=True)
        write_text(_entry(key), f"{sha256} {_checksum(key, sha256)}\n")


def _entry(key: str) -> Path:
    return Path(constants.HF_HOME) / "lora_accel" / "base-hashes" / hashlib.sha256(key.encode()).hexdigest()


def _checksum(key: str, sha256: str) -> str:
    return hashlib.sha256(f"{key} {sha256}".encode()).hexdigest()


class _Tensor(NamedTuple):
    """What identifies the content of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


def _hash_tensors(file: Path) -> dict[str, _Tensor]:
    """Return what identifies each tensor of a file, by name."""
    if file.suffix == ".bin":
        return {name: _hash_tensor(tensor) for name, tensor in read_pickle(file).items()}
    hashes = {}
    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
        for name in names:
            # Opened for each tensor: pages that were read through a mapping count as memory until it is closed.
            with safe_open(file, "pt") as tensors:
                hashes[name] = _hash_tensor(tensors.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file}: cannot be read: {first_line(error)}") from None
    return hashes


def _hash_tensor(tensor: torch.Tensor) -> _Tensor:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return _Tensor(str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(data.numpy().data).hexdigest())
