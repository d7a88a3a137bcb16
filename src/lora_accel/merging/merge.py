"""Merge adapters into their base. The result is a model folder that `from_pretrained` loads."""

from __future__ import annotations

import contextlib
import gc
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, TypeVar

import psutil
import torch
from huggingface_hub import snapshot_download
from pydantic import ValidationError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from typing_extensions import Unpack

from lora_accel.config.schema import ModelSection, QuantizationSection, RunConfig
from lora_accel.data.chat import template_source
from lora_accel.errors import ArtifactError, ConfigError, DataError, LoraAccelError
from lora_accel.faults import fault_point
from lora_accel.merging.combine import combined_adapter
from lora_accel.merging.shards import Weights, shard_layout, write_shards
from lora_accel.merging.streaming import MergedTensors, NotStreamableError, WeightTransform
from lora_accel.merging.verification import Agreement, compare, logits_of, logits_of_folder, token_ids
from lora_accel.model.base import (
    build_on_meta_device,
    choose_dtype,
    load_base_model,
    quantize_round_trip,
    quantized_names,
)
from lora_accel.model.tokenizer import check_model_folder, load_error_message, load_tokenizer
from lora_accel.saving.adapter import PICKLED, keeps_base_weights, load_adapter, read_adapter
from lora_accel.saving.atomic import atomic_folder, read_json, sha256_of, sync, why_invalid, write_json, write_text
from lora_accel.saving.discovery import CONFIG, WEIGHTS, list_checkpoints, named_base, run_of
from lora_accel.saving.provenance import base_hashes, merged_card, sha256_of_text, versions

PROVENANCE = "provenance.json"
TOKENIZER = "tokenizer_config.json"
VERIFY_MEMORY_FACTOR = 1.3
"""Memory that verification needs, as a multiple of the model's size in float32."""
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
"""Files of a base to download; pickles only if there are no safetensors."""
COPIED_FILES = ("generation_config.json", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*")
"""Files of the base that are copied into the merged model."""

T = TypeVar("T")


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
    """Whether to accept a base that the adapter was not trained on."""


class MergeKeywords(TypedDict, total=False):
    """The fields of `MergeOptions` as keyword arguments."""

    base_weights: str
    verify: bool | None
    max_shard_bytes: int | None
    overwrite: bool
    force: bool


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
    transform: WeightTransform | None


class Base(NamedTuple):
    """A base model in a local folder."""

    name: str
    revision: str | None
    folder: Path
    config: PretrainedConfig


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
    base_model = _find_base([adapter], [provenance], base)
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
    base_model = _find_base(folders, provenances, base)
    weights = {str(folder): weight for folder, (_, weight) in zip(folders, adapters, strict=True)}
    if len(weights) < len(folders):
        raise ConfigError("--adapter: an adapter is given twice; add up its weights")
    with combined_adapter(list(weights.items()), base_model.config, how=how, density=density) as combined:
        with_tokenizer = next((folder for folder in folders if (folder / TOKENIZER).is_file()), None)
        if with_tokenizer is not None:
            load_tokenizer(ModelSection(name_or_path=str(with_tokenizer))).save_pretrained(combined)
        provenance = next((provenance for provenance in provenances if provenance is not None), None)
        for other in provenances[1:]:
            difference = other and provenance and _base_difference(provenance, base_model.name, other["base"]["sha256"])
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
    base_model = _find_base(folders, provenances, base)
    jobs, merged = [], {}
    for folder, provenance in zip(folders, provenances, strict=True):
        job = MergeJob(folder, run / "merged" / folder.name, provenance, str(folder))
        existing = _existing_merge(job, base_model, options)
        if existing is None:
            jobs.append(job)
        else:
            merged[job.out] = existing | {"already": True}
    options = options._replace(overwrite=True)  # existing outputs of these jobs are outdated or incomplete
    if jobs:
        merged |= dict(zip([job.out for job in jobs], _merge(jobs, base_model, options), strict=True))
    return [merged[run / "merged" / folder.name] for folder in folders]


def provenance_of(adapter: Path) -> dict[str, Any] | None:
    """Return an adapter's provenance; that of a checkpoint is in its run. None if there is none.

    Raises:
        ArtifactError: it does not name the base.
    """
    files = [adapter / PROVENANCE]
    if (run := run_of(adapter)) is not None:
        files.append(run / PROVENANCE)
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return None
    provenance = read_json(file)
    base = provenance.get("base")
    if (
        not isinstance(base, dict)
        or not isinstance(base.get("revision"), (str, type(None)))
        or not isinstance(base.get("name_or_path"), str)
        or not isinstance(base.get("sha256"), dict)
    ):
        raise ArtifactError(f"{file}: does not name the base that the adapter was trained on")
    return provenance


def _merge(jobs: Sequence[MergeJob], base: Base, options: MergeOptions) -> list[dict[str, Any]]:
    """Merge adapters of one base, each into a folder of its own. Return the provenances."""
    for job in jobs:
        check_out_folder(job.out, {"adapter": job.adapter, "base": base.folder}, overwrite=options.overwrite)
    merges = [
        PendingMerge(job, Path(), {}, _load_adapter_tokenizer(job, base), _make_transform(job, base, options))
        for job in jobs
    ]
    provenances = []
    with ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as stack:
        hashing = pool.submit(base_hashes, str(base.folder), None)
        merges = [m._replace(folder=stack.enter_context(atomic_folder(m.job.out, m.hashes))) for m in merges]
        references = _write_weights(merges, base, options, pool, hashing)
        _check_base_hashes(jobs, base, hashing.result(), options)
        for merge, reference in zip(merges, references, strict=True):
            merge.tokenizer.save_pretrained(merge.folder)
            for file in (file for pattern in COPIED_FILES for file in base.folder.glob(pattern)):
                shutil.copyfile(file, merge.folder / file.name)
            provenance = _provenance(merge, base, options, hashing.result(), _verify(merge, base, options, reference))
            write_json(merge.folder / PROVENANCE, provenance)
            write_text(merge.folder / "README.md", merged_card(provenance))
            provenances.append(provenance)
    return provenances


def _write_weights(
    merges: Sequence[PendingMerge],
    base: Base,
    options: MergeOptions,
    pool: ThreadPoolExecutor,
    hashing: Future[dict[str, str]],
) -> list[list[torch.Tensor] | None]:
    """Write the weights and config.json of each model.

    Returns:
        For each model the logits of base + adapter, if the base had to be loaded, or None.
    """
    try:
        if not all(keeps_base_weights(merge.job.adapter) for merge in merges):
            raise NotStreamableError("the adapter's initialization changes the base's weights")
        weights = Weights(base.folder)
        models = [MergedTensors(m.job.adapter, weights, _read_config(base), transform=m.transform) for m in merges]
    except NotStreamableError:
        return [_merge_loaded(merge, base, options) for merge in merges]
    # While a tensor is computed, threads write and hash the last one, hash the base and sync files, without the GIL.
    with ThreadPoolExecutor(1) as writer, _fewer_torch_threads(2):
        shards = []
        for merge, tensors in zip(merges, models, strict=True):
            tensors.config.save_pretrained(merge.folder)
            layout = shard_layout(list(tensors.groups()), options.max_shard_bytes)
            shards.append(write_shards(merge.folder, layout, tensors.read, writer))
        syncing: list[Future[None]] = []
        for number, written in _round_robin(shards):  # so that a tensor of the base is read once for all merges
            if written is None:
                continue
            fault_point("merge.mid")
            file, sha256 = written
            merges[number].hashes[file] = sha256
            syncing.append(pool.submit(sync, merges[number].folder / file))
            if hashing.done():
                _check_base_hashes([merge.job for merge in merges], base, hashing.result(), options)
    for synced in syncing:
        synced.result()
    return [None] * len(merges)


def _round_robin(iterators: Sequence[Iterator[T]]) -> Iterator[tuple[int, T]]:
    """Yield one item of each iterator in turn, with the iterator's index, until all are exhausted."""
    active = dict(enumerate(iterators))
    while active:
        for index, iterator in list(active.items()):
            try:
                item = next(iterator)
            except StopIteration:
                del active[index]
            else:
                yield index, item


@contextlib.contextmanager
def _fewer_torch_threads(number: int) -> Iterator[None]:
    """Reduce torch's threads by a number, for other threads that compute at the same time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - number))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _merge_loaded(merge: PendingMerge, base: Base, options: MergeOptions) -> list[torch.Tensor]:
    """Load the full base, let PEFT merge, and save.

    Returns:
        The logits of base + adapter, which are cheap to compute while both are loaded.
    """
    stored_dtype = base.config.dtype or torch.float32
    model = load_adapter(_load_base_fp32(base, merge.transform), merge.job.adapter)
    reference = logits_of(model, token_ids(merge.tokenizer, model.config.vocab_size))
    try:
        merged = model.merge_and_unload(safe_merge=True).to(stored_dtype)
    except ValueError as error:  # raised by safe_merge if a sum is not finite
        raise ArtifactError(f"{merge.job.source}: {error}") from None
    merged.config.use_cache, merged.config.dtype = True, stored_dtype
    size = {} if options.max_shard_bytes is None else {"max_shard_size": options.max_shard_bytes}
    merged.save_pretrained(merge.folder, **size)
    fault_point("merge.mid")
    return reference


def _verify(
    merge: PendingMerge, base: Base, options: MergeOptions, reference: list[torch.Tensor] | None
) -> Agreement | None:
    """Compare the written model with base + adapter.

    Args:
        reference: logits of base + adapter; None = not computed yet. If they are given, the model fits into memory and
            is always compared.

    Returns:
        None if verification is disabled or memory is insufficient.
    """
    specs = Weights(merge.folder).specs.values()
    needed = VERIFY_MEMORY_FACTOR * sum(spec.num_bytes * 4 / spec.dtype.itemsize for spec in specs)
    fits = needed < psutil.virtual_memory().available
    if reference is None and not (fits if options.verify is None else options.verify):
        return None
    rows = token_ids(merge.tokenizer, AutoConfig.from_pretrained(merge.folder).vocab_size)
    if reference is None:
        reference = logits_of(load_adapter(_load_base_fp32(base, merge.transform), merge.job.adapter), rows)
        gc.collect()
    dtypes = (spec.dtype for spec in specs if spec.dtype.is_floating_point)
    least_precise = min(dtypes, key=lambda dtype: dtype.itemsize)
    agreement = compare(reference, logits_of_folder(merge.folder, rows), least_precise)
    if not agreement.is_within_limit:
        raise LoraAccelError(
            f"{merge.job.out}: the merged model's logits differ from base + adapter by {agreement.mean_moved:.3g} "
            f"standard deviations on average, above the limit of {agreement.limit:.3g}; nothing was written"
        )
    return agreement


def _load_base_fp32(base: Base, transform: WeightTransform | None) -> PreTrainedModel:
    section = ModelSection(name_or_path=str(base.folder))
    model = load_base_model(section, QuantizationSection(), recorded_dtype="auto")  # as stored, for `transform`
    if transform is not None:
        for name, parameter in model.named_parameters():
            parameter.data = transform(name, parameter.data)
    return model.float()


def _provenance(
    merge: PendingMerge, base: Base, options: MergeOptions, hashes: dict[str, str], agreement: Agreement | None
) -> dict[str, Any]:
    job = merge.job
    difference = None if job.provenance is None else _base_difference(job.provenance, base.name, hashes)
    return {
        "merged": {
            "adapter": job.source,
            "combined": job.combined,
            "adapter_sha256": _adapter_hash(job.adapter),
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


def _make_transform(job: MergeJob, base: Base, options: MergeOptions) -> WeightTransform | None:
    """Return the transform that `options.base_weights` asks for, None for the original weights."""
    if options.base_weights == "original":
        return None
    if options.base_weights != "dequantized":
        raise ConfigError(f"--base-weights {options.base_weights}: use original or dequantized")
    provenance = job.provenance or {}
    try:
        config = RunConfig.model_validate(provenance["config"])
    except (KeyError, ValidationError):
        raise ArtifactError(
            f"{job.source}: has no record of how its base was quantized; pass --base-weights original"
        ) from None
    quantization = config.quantization
    if quantization.bits != 4:
        raise ArtifactError(f"{job.source}: its base was not quantized to 4 bits; pass --base-weights original")
    base_dtype = str(provenance.get("base_dtype", "auto"))  # older provenances lack it: as stored
    dtype = choose_dtype(config.model, str(provenance.get("mixed_precision")), None, base_dtype)
    model = build_on_meta_device(_read_config(base))
    quantized = quantized_names(model)
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}

    def round_trip(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name not in quantized:
            return weight
        if isinstance(dtype, torch.dtype):
            weight = weight.to(dtype)
        return quantize_round_trip(weight, quantization, transposed=name in transposed)

    return round_trip


def _find_base(adapters: Sequence[Path], provenances: Sequence[dict[str, Any] | None], requested: str | None) -> Base:
    """Return the base of some adapters; downloads it if necessary.

    Args:
        requested: Hub id or folder; None = the base that the first adapter names.
    """
    name = requested or named_base(adapters[0])
    revision = None if requested or provenances[0] is None else provenances[0]["base"].get("revision")
    section = ModelSection(name_or_path=name, revision=revision)
    check_model_folder(section)
    try:
        folder = _local_folder(name, revision)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # huggingface_hub and transformers raise many types
        raise ArtifactError(load_error_message(section, "model", error)) from None
    if getattr(config, "quantization_config", None):
        raise ArtifactError(f"{name}: is a quantized model; pass --base with the model in 16 or 32 bits")
    return Base(name, revision, folder, config)


def _local_folder(name: str, revision: str | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES)))
    if not any(folder.glob("*.safetensors")):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*HUB_FILES, "*.bin"]))
    return folder


def _read_config(base: Base) -> PretrainedConfig:
    """Return a new config object, since building a model from a config modifies it."""
    config: PretrainedConfig = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    config.use_cache = True
    return config


def check_out_folder(out: Path, sources: dict[str, Path], *, overwrite: bool) -> None:
    """Check that an output folder can be created, and that replacing it would not delete its sources.

    Args:
        sources: folders that are read, by what they contain.

    Raises:
        ArtifactError: `out` is a file, exists although `overwrite` is False, or contains a source.
    """
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out}: is a file; choose a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ArtifactError(f"{out}: already exists; choose another folder, or pass --overwrite")
    for what, source in sources.items():
        if source.is_dir() and source.resolve().is_relative_to(out.resolve()):
            raise ArtifactError(f"{out}: contains the {what}; choose another folder")


def _check_base_hashes(jobs: Sequence[MergeJob], base: Base, hashes: dict[str, str], options: MergeOptions) -> None:
    """Check that the adapters were trained on this base, unless they have no provenance."""
    for job in jobs:
        difference = job.provenance and _base_difference(job.provenance, base.name, hashes)
        if difference and not options.force:
            raise ArtifactError(f"{difference}; pass the right one with --base, or --force to merge anyway")


def _base_difference(provenance: dict[str, Any], name: str, hashes: dict[str, str]) -> str:
    """Return how a base differs from the one in an adapter's provenance; empty = it does not."""
    expected = provenance["base"]["sha256"]
    if sorted(map(str, expected.values())) == sorted(hashes.values()):
        return ""
    trained_on = provenance["base"]["name_or_path"]
    return f"{name}: its weights are not those that the adapter was trained on ({trained_on})"


def _existing_merge(job: MergeJob, base: Base, options: MergeOptions) -> dict[str, Any] | None:
    """Return the provenance of a job's output if it exists, is valid, and has the same adapter and base."""
    if not (job.out / PROVENANCE).is_file() or why_invalid(job.out, hashes=False) is not None:
        return None
    with contextlib.suppress(ArtifactError, KeyError, TypeError):
        existing = read_json(job.out / PROVENANCE)
        inputs = [existing["merged"][key] for key in ("adapter_sha256", "base", "base_weights")]
        if inputs == [_adapter_hash(job.adapter), base.name, options.base_weights]:
            return existing
    return None


def _load_adapter_tokenizer(job: MergeJob, base: Base) -> Any:
    """Return the adapter's tokenizer, which has the chat template of training, or else the base's.

    A checkpoint has no tokenizer: use that of the run's adapter, or else the base's with the chat template of the run.
    """
    run = run_of(job.adapter)
    for folder in (job.adapter, *([run / "adapter"] if run is not None and job.provenance is not None else [])):
        if (folder / TOKENIZER).is_file():
            return load_tokenizer(ModelSection(name_or_path=str(folder)))
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(base.folder)))
    if job.provenance is not None:
        try:
            source = template_source(job.provenance["config"]["model"]["chat_template"]) or tokenizer.chat_template
        except (KeyError, TypeError, DataError):
            source = None
        if source is None or sha256_of_text(source) != job.provenance.get("chat_template_sha256"):
            raise ArtifactError(
                f"{job.source}: the chat template of training was not found (model.chat_template in the run's "
                "config.yaml); merge the run's adapter/, or restore the template"
            )
        tokenizer.chat_template = source
    return tokenizer


def _adapter_hash(adapter: Path) -> str:
    return sha256_of(next(path for name in (WEIGHTS, PICKLED) if (path := adapter / name).is_file()))
