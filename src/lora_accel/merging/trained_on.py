"""Whether a base is the one that an adapter was trained on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_accel.config.schema import ModelSection
from lora_accel.errors import ArtifactError
from lora_accel.logs import logger
from lora_accel.merging.base import Base
from lora_accel.merging.job import MergeJob, MergeOptions
from lora_accel.model.prequantized import stored_quantization
from lora_accel.saving.base_identity import base_hashes, is_same_base, tensors_hash
from lora_accel.saving.lineage import trained_quantized
from lora_accel.saving.provenance import check_code, provenance_of


def check_base_hashes(jobs: Sequence[MergeJob], base: Base, hashes: dict[str, str], options: MergeOptions) -> None:
    """Check that the adapters were trained on this base, unless they have no provenance.

    Raises:
        ArtifactError: one was not, and `options.force` is not set.
    """
    for job in jobs:
        if job.provenance and trained_quantized(job.provenance) and base.quantization is None:
            continue  # the same model in 16 or 32 bits cannot be recognized by a hash; the report has a note
        difference = job.provenance and base_difference(job.provenance, base.name, str(base.folder), None, hashes)
        if difference and not options.force:
            raise ArtifactError(f"{difference}; pass the right one with --base, or --force to merge anyway")


def check_trained_on(adapter: Path, section: ModelSection, *, force: bool, way_out: str) -> None:
    """Check that an adapter was trained on a base that is here, as a merge does. One without provenance passes.

    The hash of a file that did not change since the last command is not computed again, but a base is rejected only
    after its files were read.

    Args:
        force: whether to accept another base, with a note.
        way_out: how to pass the right base.

    Raises:
        ArtifactError: it was trained on other weights.
    """
    provenance = provenance_of(adapter)
    if provenance is None:
        return
    check_code(adapter, provenance, section)
    if trained_quantized(provenance) and stored_quantization(section) is None:
        logger.warning(
            f"note: {adapter} was trained on quantized weights ({provenance['base']['name_or_path']}); whether "
            f"{section.name_or_path} is the same model was not checked"
        )
        return
    name, revision = section.name_or_path, section.revision
    known = base_hashes(name, revision, cached=True)
    if is_same_base(provenance["base"], known, lambda: tensors_hash(name, revision, cached=True)):
        return
    hashes = base_hashes(name, revision)
    difference = base_difference(provenance, name, name, revision, hashes)
    if difference and not force:
        raise ArtifactError(f"{adapter}: {difference}; {way_out}, or pass --force to use this one anyway")
    if difference:
        logger.warning(f"note: --force: {difference}")


def base_difference(
    provenance: dict[str, Any], name: str, location: str, revision: str | None, hashes: dict[str, str]
) -> str:
    """Return how a base differs from the one in an adapter's provenance; empty = it does not.

    Args:
        name: of the base, for the message.
        location, revision: folder of the base, or its Hub id and revision.
        hashes: `base_hashes` of the base.
    """
    if is_same_base(provenance["base"], hashes, lambda: _tensors_hash(location, revision, *sorted(hashes.items()))):
        return ""
    trained_on = provenance["base"]["name_or_path"]
    return f"{name}: its weights are not those that the adapter was trained on ({trained_on})"


@functools.lru_cache(maxsize=1)
def _tensors_hash(location: str, revision: str | None, *_: tuple[str, str]) -> str:
    """Return the hash of the tensors of a base whose files have known hashes; reads it only once."""
    return tensors_hash(location, revision)
