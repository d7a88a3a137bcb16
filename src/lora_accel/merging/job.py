"""What to merge and where to: options, jobs, and what an adapter's folder provides."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.merging.streaming import WeightTransform
from lora_accel.paths import real_path, why_not_writable
from lora_accel.saving.atomic import check_no_unlisted_files, read_json, sha256_of, why_invalid
from lora_accel.saving.base_identity import base_hashes, loaded_hashes
from lora_accel.saving.discovery import CONFIG
from lora_accel.saving.provenance import PROVENANCE
from lora_accel.saving.serving import NEVER_MERGED
from lora_accel.saving.tensor_files import tensor_file

TOKENIZER = "tokenizer_config.json"


class MergeOptions(NamedTuple):
    """The options of a merge."""

    base_weights: str = "original"
    """original | dequantized: quantized to 4 bits and dequantized, as a QLoRA run computes with them."""
    verify: bool | None = None
    """Whether to compare the merged model with base + adapter; None = if memory is sufficient."""
    max_shard_bytes: int | None = None
    """Size limit of a weight file; None = the files of the base."""
    overwrite: bool = False
    """Whether to replace an existing output folder."""
    force: bool = False
    """Whether to accept a base that the adapter was not trained on, and to ignore options that the installed PEFT does
    not know."""
    trust_remote_code: bool = False
    """Whether to run Python code from the base's folder."""


class MergeKeywords(TypedDict, total=False):
    """The fields of `MergeOptions` as keyword arguments."""

    base_weights: str
    verify: bool | None
    max_shard_bytes: int | None
    overwrite: bool
    force: bool
    trust_remote_code: bool


def make_options(keywords: MergeKeywords) -> MergeOptions:
    """Return the options of a merge.

    Raises:
        ConfigError: `base_weights` has another value.
    """
    options = MergeOptions(**keywords)
    if options.base_weights not in ("original", "dequantized"):
        raise ConfigError(f"--base-weights {options.base_weights}: use original or dequantized")
    return options


class MergeJob(NamedTuple):
    """One adapter to merge."""

    adapter: Path
    out: Path
    provenance: dict[str, Any] | None
    """Provenance of the adapter; None = it was not saved by this package."""
    source: str | dict[str, float]
    """The adapter as the user named it; for a combination, the folders and their weights."""
    combined: dict[str, Any] | None = None
    """Method and density of a combination."""


class PendingMerge(NamedTuple):
    """A merged model that is being written."""

    job: MergeJob
    folder: Path
    """The temporary folder."""
    hashes: dict[str, str]
    """SHA-256 of the files that have been written and synced."""
    tokenizer: Any
    """None = neither the adapter nor the base has one."""
    transform: WeightTransform | None


def check_mergeable(adapter: Path) -> None:
    """Check that an adapter's update is a change of the base's weights, so that a model folder can hold the sum.

    Raises:
        ArtifactError: it is not. Raised before the base is read.
    """
    config = read_json(adapter / CONFIG)
    for option, (name, why) in NEVER_MERGED.items():
        if config.get(option):
            raise ArtifactError(
                f"{adapter / CONFIG}: {option}: {name} cannot be merged: {why}; use base and adapter with lora-accel "
                "generate, or PEFT"
            )


def check_out_folder(out: Path, sources: dict[str, Path], *, overwrite: bool) -> None:
    """Check that an output folder can be created, and that replacing it would delete neither sources nor other files.

    Args:
        sources: folders that are read, by what they contain.

    Raises:
        ArtifactError: `out` is a file or cannot be written, exists although `overwrite` is False, or contains a source
            or files that were not written by this package.
    """
    if reason := why_not_writable(out, "folder"):
        raise ArtifactError(reason)
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ArtifactError(f"{out}: already exists; choose another folder, or pass --overwrite")
    for what, source in sources.items():
        if os.path.isdir(source) and real_path(source).is_relative_to(real_path(out)):
            raise ArtifactError(f"{out}: contains the {what}; choose another folder")
    check_no_unlisted_files(out)


def existing_merge(job: MergeJob, base: str, folder: Path, options: MergeOptions) -> dict[str, Any] | None:
    """Return the provenance of a job's output if it exists, is valid, and is what these options ask for.

    Args:
        base: name of the base.
        folder: of the base, whose weights may have changed since.
    """
    if not (job.out / PROVENANCE).is_file() or why_invalid(job.out, hashes=False) is not None:
        return None
    with contextlib.suppress(ArtifactError, KeyError, TypeError, AttributeError):
        existing = read_json(job.out / PROVENANCE)
        merged = existing["merged"]
        inputs = [merged[key] for key in ("adapter_sha256", "base", "base_weights", "max_shard_bytes")]
        requested = [adapter_hash(job.adapter), base, options.base_weights, options.max_shard_bytes]
        if inputs == requested and (merged["agreement"] is not None or not options.verify):
            hashes = base_hashes(str(folder), None, cached=True)
            return existing if loaded_hashes(existing["base"]["sha256"]) == loaded_hashes(hashes) else None
    return None


def adapter_hash(adapter: Path) -> str:
    """Return the SHA-256 of the file with an adapter's tensors."""
    return sha256_of(tensor_file(adapter))
