"""Merge adapters into their base. The result is a model folder that `from_pretrained` loads."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from typing_extensions import Unpack

from lora_accel.config.schema import ModelSection
from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.merging.base import (
    Base,
    base_difference,
    check_base_hashes,
    find_base,
    load_adapter_tokenizer,
    make_transform,
)
from lora_accel.merging.combine import combined_adapter
from lora_accel.merging.job import (
    PROVENANCE,
    TOKENIZER,
    MergeJob,
    MergeKeywords,
    MergeOptions,
    PendingMerge,
    adapter_hash,
    check_out_folder,
    existing_merge,
    provenance_of,
)
from lora_accel.merging.verification import Agreement
from lora_accel.merging.write import verify_merge, write_weights
from lora_accel.model.tokenizer import load_tokenizer
from lora_accel.saving.adapter import read_adapter
from lora_accel.saving.atomic import atomic_folder, write_json, write_text
from lora_accel.saving.discovery import CONFIG, list_checkpoints
from lora_accel.saving.provenance import base_hashes, merged_card, versions

COPIED_FILES = ("generation_config.json", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*")
"""Files of the base that are copied into the merged model."""


def merge_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    **keywords: Unpack[MergeKeywords],
) -> dict[str, Any]:
    """Merge an adapter into its base, and write a model folder with the adapter's tokenizer and chat template.

    Sums are computed in float32 and rounded once, to the dtype in which the base is stored. Modules are merged one at a
    time, so memory does not grow with the model. If transformers renames or fuses tensors while loading (a mixture of
    experts, for example), the full base is loaded. Adapters are never merged into quantized weights, which would round
    twice.

    Args:
        adapter: folder with adapter_config.json and adapter_model.safetensors: an adapter or a checkpoint.
        out: output folder.
        base: Hub id or folder; None = the base that the adapter names.
        **keywords: the fields of `MergeOptions`.

    Returns:
        The provenance of the merged model, which is also written to provenance.json.

    Raises:
        ArtifactError: the adapter is invalid, does not fit the base or was trained on other weights, or `out` exists.
        LoraAccelError: the merged model's logits differ from those of base + adapter. Nothing is written.
    """
    adapter, options = Path(adapter), MergeOptions(**keywords)
    provenance = provenance_of(adapter)
    read_adapter(adapter)
    base_model = find_base([adapter], [provenance], base)
    return _merge([MergeJob(adapter, Path(out), provenance, str(adapter))], base_model, options)[0]


def merge_weighted(
    adapters: Sequence[tuple[str | Path, float]],
    out: str | Path,
    *,
    how: str = "linear",
    density: float | None = None,
    base: str | None = None,
    **keywords: Unpack[MergeKeywords],
) -> dict[str, Any]:
    """Merge a weighted combination of adapters of one base; see `merge_adapter` and `combine.combined_adapter`."""
    options, folders = MergeOptions(**keywords), [Path(adapter) for adapter, _ in adapters]
    provenances = [provenance_of(folder) for folder in folders]
    for folder in folders:
        read_adapter(folder)
    base_model = find_base(folders, provenances, base)
    weights = {str(folder): weight for folder, (_, weight) in zip(folders, adapters, strict=True)}
    if len(weights) < len(folders):
        raise ConfigError("--adapter: an adapter is given twice; add up its weights")
    with combined_adapter(list(weights.items()), base_model.config, how=how, density=density) as combined:
        with_tokenizer = next((folder for folder in folders if (folder / TOKENIZER).is_file()), None)
        if with_tokenizer is not None:
            load_tokenizer(ModelSection(name_or_path=str(with_tokenizer))).save_pretrained(combined)
        provenance = next((provenance for provenance in provenances if provenance is not None), None)
        for other in provenances[1:]:
            difference = other and provenance and base_difference(provenance, base_model.name, other["base"]["sha256"])
            if difference and not options.force:
                raise ArtifactError(f"the adapters were trained on different bases: {difference}")
        job = MergeJob(combined, Path(out), provenance, weights, {"how": how, "density": density})
        return _merge([job], base_model, options)[0]


def merge_checkpoints(
    run: str | Path, *, base: str | None = None, **keywords: Unpack[MergeKeywords]
) -> list[dict[str, Any]]:
    """Merge every checkpoint of a run, and its final adapter, into RUN/merged/. The base is read once for all.

    A checkpoint that has been merged before with the same options is skipped.

    Returns:
        The provenance of each merged model, in the order of steps; `already` is set for those that were skipped.
    """
    run, options = Path(run), MergeOptions(**keywords)
    folders = [run / "checkpoints" / entry.name for entry in list_checkpoints(run, hashes=False) if not entry.reason]
    folders += [run / "adapter"] if (run / "adapter" / CONFIG).is_file() else []
    if not folders:
        raise ArtifactError(f"{run}: has neither a complete checkpoint nor an adapter to merge")
    provenances = [provenance_of(folder) for folder in folders]
    base_model = find_base(folders, provenances, base)
    jobs, merged = [], {}
    for folder, provenance in zip(folders, provenances, strict=True):
        job = MergeJob(folder, run / "merged" / folder.name, provenance, str(folder))
        existing = existing_merge(job, base_model.name, options)
        if existing is None:
            jobs.append(job)
        else:
            merged[job.out] = existing | {"already": True}
    options = options._replace(overwrite=True)  # existing outputs of these jobs are outdated or incomplete
    if jobs:
        merged |= dict(zip([job.out for job in jobs], _merge(jobs, base_model, options), strict=True))
    return [merged[run / "merged" / folder.name] for folder in folders]


def _merge(jobs: Sequence[MergeJob], base: Base, options: MergeOptions) -> list[dict[str, Any]]:
    """Merge adapters of one base, each into a folder of its own. Return the provenances."""
    for job in jobs:
        check_out_folder(job.out, {"adapter": job.adapter, "base": base.folder}, overwrite=options.overwrite)
    merges = [
        PendingMerge(job, Path(), {}, load_adapter_tokenizer(job, base), make_transform(job, base, options))
        for job in jobs
    ]
    provenances = []
    with ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as stack:
        hashing = pool.submit(base_hashes, str(base.folder), None)
        merges = [m._replace(folder=stack.enter_context(atomic_folder(m.job.out, m.hashes))) for m in merges]
        references = write_weights(merges, base, options, pool, hashing)
        check_base_hashes(jobs, base, hashing.result(), options)
        for merge, reference in zip(merges, references, strict=True):
            merge.tokenizer.save_pretrained(merge.folder)
            for file in (file for pattern in COPIED_FILES for file in base.folder.glob(pattern)):
                shutil.copyfile(file, merge.folder / file.name)
            provenance = _provenance(
                merge, base, options, hashing.result(), verify_merge(merge, base, options, reference)
            )
            write_json(merge.folder / PROVENANCE, provenance)
            write_text(merge.folder / "README.md", merged_card(provenance))
            provenances.append(provenance)
    return provenances


def _provenance(
    merge: PendingMerge, base: Base, options: MergeOptions, hashes: dict[str, str], agreement: Agreement | None
) -> dict[str, Any]:
    job = merge.job
    difference = None if job.provenance is None else base_difference(job.provenance, base.name, hashes)
    return {
        "merged": {
            "adapter": job.source,
            "combined": job.combined,
            "adapter_sha256": adapter_hash(job.adapter),
            "base": base.name,
            "base_weights": options.base_weights,
            "same_base": None if difference is None else not difference,  # None: the adapter has no hashes of its base
            "dtype": str(AutoConfig.from_pretrained(merge.folder).dtype).removeprefix("torch."),
            "agreement": None if agreement is None else agreement._asdict(),
        },
        "base": {"name_or_path": base.name, "revision": base.revision, "sha256": hashes},
        "packages": versions(),
        "num_threads": torch.get_num_threads(),
        "adapter": job.provenance,
    }
