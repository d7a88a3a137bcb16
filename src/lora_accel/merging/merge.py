"""Merge adapters into their base. The result is a model folder that `from_pretrained` loads."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Unpack

from lora_accel.config.schema import ModelSection
from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.merging.base import CODE_FILES, Base, find_base
from lora_accel.merging.base_weights import make_transform
from lora_accel.merging.combine import check_method, combined_adapter
from lora_accel.merging.job import (
    TOKENIZER,
    MergeJob,
    MergeKeywords,
    MergeOptions,
    PendingMerge,
    adapter_hash,
    check_mergeable,
    check_out_folder,
    existing_merge,
    make_options,
)
from lora_accel.merging.request import ALL
from lora_accel.merging.tokenizer import load_adapter_tokenizer
from lora_accel.merging.trained_on import base_difference, check_base_hashes
from lora_accel.merging.verification import Agreement
from lora_accel.merging.write import verify_merge, write_weights
from lora_accel.model.portable import restore_config_keys, save_tokenizer
from lora_accel.model.sizes import load_config
from lora_accel.model.tokenizer import load_tokenizer, tokens_without_embedding
from lora_accel.paths import why_not_writable
from lora_accel.saving.atomic import atomic_folder, write_json, write_text
from lora_accel.saving.attach import check_adapter_files
from lora_accel.saving.base_identity import base_hashes, have_same_base
from lora_accel.saving.cards import merged_card
from lora_accel.saving.discovery import CONFIG, run_of
from lora_accel.saving.hub import find_adapter, recorded_name
from lora_accel.saving.listing import list_checkpoints
from lora_accel.saving.provenance import PROVENANCE, provenance_of, versions
from lora_accel.saving.results import RunResults, read_results

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
        adapter: folder with adapter_config.json and adapter_model.safetensors: an adapter or a checkpoint. Or a Hub id.
        out: output folder.
        base: Hub id or folder; None = the base that the adapter names.
        **keywords: the fields of `MergeOptions`.

    Returns:
        The provenance of the merged model, which is also written to provenance.json.

    Raises:
        ConfigError: an option is invalid.
        ArtifactError: the adapter is invalid, does not fit the base or was trained on other weights, or `out` exists.
        LoraAccelError: the merged model's logits differ from those of base + adapter. Nothing is written.
    """
    source, adapter, options = str(adapter), find_adapter(adapter), make_options(keywords)
    check_out_folder(Path(out), {"adapter": adapter}, overwrite=options.overwrite)
    provenance = provenance_of(adapter)
    check_adapter_files(adapter, force=options.force)
    check_mergeable(adapter)
    base_model = find_base([adapter], [provenance], base, trust_remote_code=options.trust_remote_code)
    return _merge([MergeJob(adapter, Path(out), provenance, source)], base_model, options)[0]


def merge_weighted(
    adapters: Sequence[tuple[str | Path, float]],
    out: str | Path,
    *,
    how: str = "linear",
    density: float | None = None,
    base: str | None = None,
    **keywords: Unpack[MergeKeywords],
) -> dict[str, Any]:
    """Merge a weighted combination of adapters of one base; see `merge_adapter` for the rest.

    Args:
        adapters: folder or Hub id, and weight of each.
        how, density: see `combine.combined_adapter`.

    Raises:
        ConfigError: `how` or `density` is invalid, or an adapter is given twice.
        ArtifactError: the adapters were trained on different bases, or cannot be combined.
    """
    check_method(how, density)
    options, folders = make_options(keywords), [find_adapter(adapter) for adapter, _ in adapters]
    weights = {str(folder): weight for folder, (_, weight) in zip(folders, adapters, strict=True)}
    if len(weights) < len(folders):
        raise ConfigError("--adapter: an adapter is given twice; add up its weights")
    for folder in folders:
        check_out_folder(Path(out), {"adapter": folder}, overwrite=options.overwrite)
    provenances = [provenance_of(folder) for folder in folders]
    for folder in folders:
        check_adapter_files(folder, force=options.force)
        check_mergeable(folder)
    if not options.force:
        _check_same_base(folders, provenances)
    base_model = find_base(folders, provenances, base, trust_remote_code=options.trust_remote_code)
    trusted = base_model.trust_remote_code
    with combined_adapter(
        list(weights.items()), base_model.config, how=how, density=density, trust_remote_code=trusted
    ) as combined:
        with_tokenizer = next((folder for folder in folders if (folder / TOKENIZER).is_file()), None)
        if with_tokenizer is not None:
            save_tokenizer(load_tokenizer(ModelSection(name_or_path=str(with_tokenizer))), combined)
        provenance = next((provenance for provenance in provenances if provenance is not None), None)
        job = MergeJob(combined, Path(out), provenance, weights, {"how": how, "density": density})
        return _merge([job], base_model, options)[0]


def _check_same_base(folders: Sequence[Path], provenances: Sequence[dict[str, Any] | None]) -> None:
    """Check that adapters were trained on the same base. Those without provenance pass.

    Raises:
        ArtifactError: they were not.
    """
    recorded = [(folder, known["base"]) for folder, known in zip(folders, provenances, strict=True) if known]
    for folder, base in recorded[1:]:
        if not have_same_base(recorded[0][1], base):
            raise ArtifactError(
                f"--adapter: {recorded[0][0]} and {folder} were trained on different bases: their provenance.json "
                "records other hashes of the base's weights; pass --force to combine them anyway"
            )


def merge_checkpoints(
    run: str | Path, *, base: str | None = None, **keywords: Unpack[MergeKeywords]
) -> list[dict[str, Any]]:
    """Merge every checkpoint of a run, and its final adapter, into RUN/merged-all/. The base is read once for all.

    A checkpoint that has been merged before with the same base and options is skipped.

    Returns:
        The provenance of each merged model, in the order of steps; `already` is set for those that were skipped.

    Raises:
        ArtifactError: the run has nothing to merge, or a run in progress deleted a checkpoint in the meantime; see also
            `merge_adapter`.
    """
    run, options = Path(run), make_options(keywords)
    folders = [run / "checkpoints" / entry.name for entry in list_checkpoints(run, hashes=False) if not entry.reason]
    folders += [run / "adapter"] if (run / "adapter" / CONFIG).is_file() else []
    if not folders:
        raise ArtifactError(f"{run}: has neither a complete checkpoint nor an adapter to merge")
    if reason := why_not_writable(run / ALL, "folder"):
        raise ArtifactError(reason)
    try:
        return _merge_folders(folders, run / ALL, base, options)
    except Exception:
        deleted = [folder for folder in folders if not folder.is_dir()]
        if not deleted:
            raise
        raise ArtifactError(
            f"{deleted[0]}: was deleted in the meantime, by a run in progress; merge again, or after the run has ended"
        ) from None


def _merge_folders(folders: Sequence[Path], out: Path, base: str | None, options: MergeOptions) -> list[dict[str, Any]]:
    """Merge adapters of one run, each into a folder of its own name in `out`."""
    for folder in folders:
        check_adapter_files(folder, force=options.force)
        check_mergeable(folder)
    provenances = [provenance_of(folder) for folder in folders]
    base_model = find_base(folders, provenances, base, trust_remote_code=options.trust_remote_code)
    jobs, merged = [], {}
    for folder, provenance in zip(folders, provenances, strict=True):
        job = MergeJob(folder, out / folder.name, provenance, str(folder))
        existing = existing_merge(job, base_model.name, base_model.folder, options)
        if existing is None:
            jobs.append(job)
        else:
            merged[job.out] = existing | {"already": True}
    options = options._replace(overwrite=True)  # existing outputs of these jobs are outdated or incomplete
    if jobs:
        merged |= dict(zip([job.out for job in jobs], _merge(jobs, base_model, options), strict=True))
    return [merged[out / folder.name] for folder in folders]


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
            if merge.tokenizer is not None:
                save_tokenizer(merge.tokenizer, merge.folder, base.folder / "tokenizer_config.json")
            base_section = ModelSection(name_or_path=str(base.folder), trust_remote_code=base.trust_remote_code)
            restore_config_keys(
                merge.folder / "config.json", base.folder / "config.json", load_config(base_section).to_dict()
            )
            copied = (*COPIED_FILES, *([CODE_FILES] if base.trust_remote_code else []))
            for file in (file for pattern in copied for file in base.folder.glob(pattern) if file.is_file()):
                shutil.copyfile(file, merge.folder / file.name)
            provenance = _provenance(
                merge, base, options, hashing.result(), verify_merge(merge, base, options, reference)
            )
            write_json(merge.folder / PROVENANCE, provenance)
            results, step = _results(merge.job), checkpoint_step(merge.job.adapter)
            card = merged_card(provenance, results, step=step, base_folder=base.folder)
            write_text(merge.folder / "README.md", card)
            provenances.append(provenance)
    return provenances


def checkpoint_step(adapter: Path) -> int | None:
    """Return the step of a checkpoint folder; None if the folder is none."""
    found = re.fullmatch(r"step-(\d+)", adapter.name)
    return int(found[1]) if found else None


def _results(job: MergeJob) -> RunResults | None:
    """Return the results of the run of one adapter, up to the step of its weights; None if they are not known."""
    run = job.adapter.parent if job.adapter.name == "adapter" else run_of(job.adapter)
    if job.combined is not None or run is None:
        return None
    exported = (job.provenance or {}).get("exported")
    last = exported.get("step") if isinstance(exported, dict) else None
    return read_results(run, checkpoint_step(job.adapter) or (last if isinstance(last, int) else None))


def _provenance(
    merge: PendingMerge, base: Base, options: MergeOptions, hashes: dict[str, str], agreement: Agreement | None
) -> dict[str, Any]:
    job = merge.job
    same = job.provenance and not base_difference(job.provenance, base.name, str(base.folder), None, hashes)
    name, revision = recorded_name(base.name, base.revision)
    config = load_config(ModelSection(name_or_path=str(merge.folder), trust_remote_code=base.trust_remote_code))
    return {
        "merged": {
            "adapter": job.source,
            "combined": job.combined,
            "adapter_sha256": adapter_hash(job.adapter),
            "base": base.name,
            "base_weights": options.base_weights,
            "max_shard_bytes": options.max_shard_bytes,
            "same_base": same,  # None: the adapter has no hashes of its base
            "has_tokenizer": merge.tokenizer is not None,
            "tokens_without_embedding": []
            if merge.tokenizer is None
            else tokens_without_embedding(merge.tokenizer, config.get_text_config().vocab_size),
            "dtype": str(config.dtype).removeprefix("torch."),
            "agreement": None if agreement is None else agreement._asdict(),
        },
        "base": {"name_or_path": name, "revision": revision, "sha256": hashes},
        "packages": versions(),
        "num_threads": torch.get_num_threads(),
        "adapter": job.provenance,
    }
