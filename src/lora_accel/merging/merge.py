"""Base + adapter to a plain model folder that everything else can load."""

from __future__ import annotations

import contextlib
import gc
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from huggingface_hub import snapshot_download
from pydantic import ValidationError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_accel.config.schema import ModelSection, QuantizationSection, RunConfig
from lora_accel.data.chat import template_source
from lora_accel.errors import ArtifactError, ConfigError, DataError, LoraAccelError
from lora_accel.faults import fault_point
from lora_accel.merging.combine import combined_adapter
from lora_accel.merging.shards import Weights, shard_layout, writing
from lora_accel.merging.streaming import Change, MergedTensors, NotStreamableError
from lora_accel.merging.verification import Agreement, compare, logits_of, logits_of_folder, token_ids
from lora_accel.model.base import (
    build_on_meta_device,
    choose_dtype,
    load_base_model,
    quantize_round_trip,
    quantized_names,
)
from lora_accel.model.tokenizer import check_folder, load_tokenizer, not_loaded
from lora_accel.saving.adapter import PICKLED, keeps_base_weights, load_adapter, read_adapter
from lora_accel.saving.atomic import atomic_folder, read_json, sha256_of, sync, why_invalid, write_json, write_text
from lora_accel.saving.discovery import CONFIG, WEIGHTS, list_checkpoints
from lora_accel.saving.provenance import base_hashes, merged_card, sha256_of_text, versions

PROVENANCE = "provenance.json"
TOKENIZER = "tokenizer_config.json"
ROOM = 1.3
"""How much memory a comparison takes, in times of the model in float32."""
WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
"""What of a base is fetched from the Hub; its pickles only where it has nothing else."""
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


class MergeOptions(NamedTuple):
    """How a merge is done."""

    base_weights: str = "original"
    """original | dequantized: packed to 4 bits and unpacked again, as the adapter of a QLoRA run saw them."""
    verify: bool | None = None
    """Compare the merged model with base + adapter; None = if the model fits into memory."""
    max_shard_bytes: int | None = None
    """Of a weight file; None = files as the base has them."""
    overwrite: bool = False
    force: bool = False
    """Take another base than that of training."""


class MergeJob(NamedTuple):
    """One adapter to be merged."""

    adapter: Path
    out: Path
    made_from: dict[str, Any] | None
    """The adapter's provenance; an adapter of PEFT alone has none."""
    told: str | dict[str, float]
    """The adapter as the person named it, or several with their weights."""
    combined: dict[str, Any] | None = None
    """How several became one."""


class PendingMerge(NamedTuple):
    """A merged model while it is made."""

    job: MergeJob
    folder: Path
    """The temporary one."""
    hashes: dict[str, str]
    """Of the files in it that are on the disk already."""
    tokenizer: Any
    change: Change | None


class Base(NamedTuple):
    """A base on this disk."""

    name: str
    revision: str | None
    folder: Path
    config: PretrainedConfig


def merge_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    options: MergeOptions | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Merge an adapter into its base: an ordinary model folder with the adapter's tokenizer and template.

    Sums are formed in float32 and rounded once, to the dtype that the base is stored in, a tensor at a time: memory
    does not grow with the model. Where names are rewritten while loading (a mixture of experts, say), the base is
    loaded whole. Never merged into packed weights, which would round twice.

    Args:
        adapter: a folder with adapter_config.json and adapter_model.safetensors: an adapter or a checkpoint.
        out: the folder to make.
        base: a Hub id or folder instead of the one that the adapter names.
        options: see `MergeOptions`; its fields may also be given one by one.

    Returns:
        The provenance of the merged model, which is also written into it.

    Raises:
        ArtifactError: the adapter is none, does not fit its base, was trained on other weights, or `out` is there.
        LoraAccelError: the merged model does not answer as base + adapter do. Nothing is written.
    """
    adapter, options = Path(adapter), _options(options, changes)
    made_from = provenance_of(adapter)
    read_adapter(adapter)
    found = _base_of([adapter], [made_from], base)
    return _merge([MergeJob(adapter, Path(out), made_from, str(adapter))], found, options)[0]


def merge_weighted(
    adapters: Sequence[tuple[str | Path, float]],
    out: str | Path,
    *,
    how: str = "linear",
    density: float | None = None,
    base: str | None = None,
    options: MergeOptions | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Merge a weighted combination of adapters of one base; see `merge_adapter` and `combine.combined_adapter`."""
    options, folders = _options(options, changes), [Path(adapter) for adapter, _ in adapters]
    provenances = [provenance_of(folder) for folder in folders]
    for folder in folders:
        read_adapter(folder)
    found = _base_of(folders, provenances, base)
    told = {str(folder): weight for folder, (_, weight) in zip(folders, adapters, strict=True)}
    with combined_adapter(list(told.items()), found.config, how=how, density=density) as combined:
        for source in [folder / TOKENIZER for folder in folders if (folder / TOKENIZER).is_file()][:1]:
            load_tokenizer(ModelSection(name_or_path=str(source.parent))).save_pretrained(combined)
        made_from = next((made for made in provenances if made is not None), None)
        for other in provenances[1:]:
            reason = other and made_from and _differs(made_from, found.name, other["base"]["sha256"])
            if reason and not options.force:
                raise ArtifactError(f"the adapters were trained on different bases: {reason}")
        job = MergeJob(combined, Path(out), made_from, told, {"how": how, "density": density})
        return _merge([job], found, options)[0]


def merge_checkpoints(
    run: str | Path, *, base: str | None = None, options: MergeOptions | None = None, **changes: Any
) -> list[dict[str, Any]]:
    """Merge every checkpoint of a run, and its final adapter, into folders of `RUN/merged/`; the base is read once.

    What has been merged already, from the same bytes and in the same way, is left as it is.

    Returns:
        The provenance of each, in the order of steps.
    """
    run, options = Path(run), _options(options, changes)
    folders = [run / "checkpoints" / entry.name for entry in list_checkpoints(run, hashes=False) if not entry.reason]
    folders += [run / "adapter"] if (run / "adapter" / CONFIG).is_file() else []
    if not folders:
        raise ArtifactError(f"{run}: has neither a whole checkpoint nor an adapter to merge")
    provenances = [provenance_of(folder) for folder in folders]
    found = _base_of(folders, provenances, base)
    jobs, done = [], {}
    for folder, made_from in zip(folders, provenances, strict=True):
        job = MergeJob(folder, run / "merged" / folder.name, made_from, str(folder))
        there = _merged_already(job, found, options)
        if there is None:
            jobs.append(job)
        else:
            done[job.out] = there | {"already": True}
    options = options._replace(overwrite=True)  # what is there is older, or not whole
    done |= dict(zip([job.out for job in jobs], _merge(jobs, found, options) if jobs else [], strict=True))
    return [done[run / "merged" / folder.name] for folder in folders]


def provenance_of(adapter: Path) -> dict[str, Any] | None:
    """Return what an adapter was made from; a checkpoint lies in a run, which tells it.

    Raises:
        ArtifactError: it tells nothing of the base.
    """
    places = [adapter / PROVENANCE]
    if adapter.absolute().parent.name == "checkpoints":
        places.append(adapter.absolute().parent.parent / PROVENANCE)
    file = next((place for place in places if place.exists()), None)
    if file is None:
        return None
    made_from = read_json(file)
    made_on = made_from.get("base")
    if (
        not isinstance(made_on, dict)
        or not isinstance(made_on.get("revision"), (str, type(None)))
        or not isinstance(made_on.get("name_or_path"), str)
        or not isinstance(made_on.get("sha256"), dict)
    ):
        raise ArtifactError(f"{file}: does not say which base the adapter was trained on")
    return made_from


def _merge(jobs: Sequence[MergeJob], base: Base, options: MergeOptions) -> list[dict[str, Any]]:
    """Merge adapters of one base, each into its own folder."""
    for job in jobs:
        check_out_folder(job.out, {"adapter": job.adapter, "base": base.folder}, overwrite=options.overwrite)
    made = [PendingMerge(job, Path(), {}, _tokenizer_of(job, base), _change(job, base, options)) for job in jobs]
    told = []
    with ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as stack:
        hashed = pool.submit(base_hashes, str(base.folder), None)
        made = [m._replace(folder=stack.enter_context(atomic_folder(m.job.out, m.hashes))) for m in made]
        references = _write_weights(made, base, options, pool, hashed)
        _same_base(jobs, base, hashed.result(), options)
        for each, reference in zip(made, references, strict=True):
            each.tokenizer.save_pretrained(each.folder)
            for pattern in ("generation_config.json", *LICENCES):
                for file in base.folder.glob(pattern):
                    shutil.copyfile(file, each.folder / file.name)
            provenance = _provenance(each, base, options, hashed.result(), _agreement(each, base, options, reference))
            write_json(each.folder / PROVENANCE, provenance)
            write_text(each.folder / "README.md", merged_card(provenance))
            told.append(provenance)
    return told


def _write_weights(
    made: Sequence[PendingMerge],
    base: Base,
    options: MergeOptions,
    pool: ThreadPoolExecutor,
    hashed: Future[dict[str, str]],
) -> list[list[torch.Tensor] | None]:
    """Write weights and configs; return the logits of base + adapter for those whose base had to be loaded whole.

    Threads write and hash a tensor while the next is formed, and sync files: none of it needs Python's lock.
    """
    try:
        if not all(keeps_base_weights(each.job.adapter) for each in made):
            raise NotStreamableError("PEFT changes the base's weights when it puts the adapter on")
        weights = Weights(base.folder)
        merged = [MergedTensors(m.job.adapter, weights, _config_of(base), change=m.change) for m in made]
    except NotStreamableError:
        return [_write_whole(each, base, options) for each in made]
    with ThreadPoolExecutor(1) as writer, _threads_spared(2):  # one writes and one hashes the base meanwhile
        running: dict[int, Iterator[tuple[str, str] | None]] = {}
        for number, (each, tensors) in enumerate(zip(made, merged, strict=True)):
            tensors.config.save_pretrained(each.folder)
            layout = shard_layout(list(tensors.groups()), options.max_shard_bytes)
            running[number] = writing(each.folder, layout, tensors.read, writer)
        syncing: list[Future[None]] = []
        while running:  # in turn, a tensor each, so that a tensor of the base is read once for all
            for number in list(running):
                try:
                    whole = next(running[number])
                except StopIteration:
                    del running[number]
                    continue
                if whole is not None:
                    fault_point("merge.mid")
                    file, made[number].hashes[file] = whole
                    syncing.append(pool.submit(sync, made[number].folder / file))
                    if hashed.done():
                        _same_base([each.job for each in made], base, hashed.result(), options)
    for synced in syncing:
        synced.result()
    return [None] * len(made)


@contextlib.contextmanager
def _threads_spared(number: int) -> Iterator[None]:
    """Leave torch that many threads less."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - number))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_whole(made: PendingMerge, base: Base, options: MergeOptions) -> list[torch.Tensor]:
    """Load everything, let PEFT merge, and save; return the logits of base + adapter, which cost nothing more here."""
    stored = base.config.dtype or torch.float32
    model = load_adapter(_in_float32(base, made.change), made.job.adapter)
    reference = logits_of(model, token_ids(made.tokenizer, model.config.vocab_size))
    try:
        merged = model.merge_and_unload(safe_merge=True).to(stored)
    except ValueError as error:  # what safe_merge raises where a sum is not finite
        raise ArtifactError(f"{made.job.told}: {error}") from None
    merged.config.use_cache, merged.config.dtype = True, stored
    size = {} if options.max_shard_bytes is None else {"max_shard_size": options.max_shard_bytes}
    merged.save_pretrained(made.folder, **size)
    fault_point("merge.mid")
    return reference


def _agreement(
    made: PendingMerge, base: Base, options: MergeOptions, reference: list[torch.Tensor] | None
) -> Agreement | None:
    """Compare what was written with base + adapter; None if it was not asked for, or does not fit into memory.

    Args:
        reference: the logits of base + adapter if they are known; then it is always done: the model fits.
    """
    kinds = Weights(made.folder).kinds.values()
    need = ROOM * sum(kind.num_bytes * 4 / kind.dtype.itemsize for kind in kinds)
    fits = need < psutil.virtual_memory().available
    if reference is None and not (fits if options.verify is None else options.verify):
        return None
    rows = token_ids(made.tokenizer, AutoConfig.from_pretrained(made.folder).vocab_size)
    if reference is None:
        reference = logits_of(load_adapter(_in_float32(base, made.change), made.job.adapter), rows)
        gc.collect()
    coarsest = min((kind.dtype for kind in kinds if kind.dtype.is_floating_point), key=lambda dtype: dtype.itemsize)
    agreement = compare(reference, logits_of_folder(made.folder, rows), coarsest)
    if not agreement.holds:
        raise LoraAccelError(
            f"{made.job.out}: the merged model's logits differ from base + adapter by {agreement.mean_moved:.3g} of "
            f"their spread on average, over the limit of {agreement.limit:.3g}; nothing was written"
        )
    return agreement


def _in_float32(base: Base, change: Change | None) -> PreTrainedModel:
    section = ModelSection(name_or_path=str(base.folder))
    model = load_base_model(section, QuantizationSection(), kept_dtype="auto")  # as stored: what `change` is given
    if change is not None:
        for name, parameter in model.named_parameters():
            parameter.data = change(name, parameter.data)
    return model.float()


def _provenance(
    made: PendingMerge, base: Base, options: MergeOptions, weights: dict[str, str], agreement: Agreement | None
) -> dict[str, Any]:
    job = made.job
    differs = None if job.made_from is None else _differs(job.made_from, base.name, weights)
    return {
        "merged": {
            "adapter": job.told,
            "combined": job.combined,
            "adapter_sha256": _adapter_hash(job.adapter),
            "base": base.name,
            "base_weights": options.base_weights,
            "same_base": None if differs is None else not differs,  # None: the adapter tells nothing of its base
            "dtype": str(AutoConfig.from_pretrained(made.folder).dtype).removeprefix("torch."),
            "agreement": None if agreement is None else agreement._asdict(),
        },
        "base": {"name_or_path": base.name, "revision": base.revision, "sha256": weights},
        "packages": versions(),
        "num_threads": torch.get_num_threads(),
        "adapter": job.made_from,
    }


def _change(job: MergeJob, base: Base, options: MergeOptions) -> Change | None:
    """Return what is done to the base's weights first, or None."""
    if options.base_weights == "original":
        return None
    if options.base_weights != "dequantized":
        raise ConfigError(f"--base-weights {options.base_weights}: say original or dequantized")
    try:
        trained = RunConfig.model_validate((job.made_from or {})["config"])
    except (KeyError, ValidationError):
        raise ArtifactError(
            f"{job.told}: does not say how its base was quantised; say --base-weights original"
        ) from None
    quantization = trained.quantization
    if quantization.bits != 4:
        raise ArtifactError(f"{job.told}: its base was not held in 4 bits; say --base-weights original")
    made_from = job.made_from or {}
    kept = str(made_from.get("base_dtype", "auto"))  # older ones do not name it: as stored
    dtype = choose_dtype(trained.model, str(made_from.get("mixed_precision")), None, kept)
    model = build_on_meta_device(_config_of(base))
    packed = quantized_names(model)
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name not in packed:
            return weight
        held = weight.to(dtype) if isinstance(dtype, torch.dtype) else weight
        return quantize_round_trip(held, quantization, transposed=name in transposed)

    return change


def _base_of(adapters: Sequence[Path], provenances: Sequence[dict[str, Any] | None], asked: str | None) -> Base:
    """Find the base of adapters on this disk, or fetch it."""
    name = asked or read_json(adapters[0] / CONFIG).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise ArtifactError(f"{adapters[0]}: names no base model; say --base")
    revision = None if asked or provenances[0] is None else provenances[0]["base"].get("revision")
    section = ModelSection(name_or_path=name, revision=revision)
    check_folder(section)
    try:
        folder = _fetched(name, revision)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the Hub's client and transformers raise many kinds
        raise ArtifactError(not_loaded(section, "model", error)) from None
    if getattr(config, "quantization_config", None):
        raise ArtifactError(f"{name}: is quantised itself; say --base with the model in 16 or 32 bits")
    return Base(name, revision, folder, config)


def _fetched(name: str, revision: str | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(WANTED)))
    if not any(folder.glob("*.safetensors")):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*WANTED, "*.bin"]))
    return folder


def _config_of(base: Base) -> PretrainedConfig:
    """Return a config of one's own: building a model from it changes it."""
    config: PretrainedConfig = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    config.use_cache = True
    return config


def check_out_folder(out: Path, sources: dict[str, Path], *, overwrite: bool) -> None:
    """Refuse a folder that is there already, or whose replacement would delete what it is made from."""
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ArtifactError(f"{out}: is there already; choose another folder, or say --overwrite")
    for what, source in sources.items():
        if source.is_dir() and source.resolve().is_relative_to(out.resolve()):
            raise ArtifactError(f"{out}: holds the {what} itself; choose another folder")


def _same_base(jobs: Sequence[MergeJob], base: Base, found: dict[str, str], options: MergeOptions) -> None:
    """Refuse another base than the one that the adapters were trained on. A bare PEFT adapter tells nothing of it."""
    for job in jobs:
        reason = job.made_from and _differs(job.made_from, base.name, found)
        if reason and not options.force:
            raise ArtifactError(f"{reason}; say --base with the right one (or --force, to merge all the same)")


def _differs(made_from: dict[str, Any], name: str, found: dict[str, str]) -> str:
    """Return how a base differs from that of training; empty = not at all."""
    expected = made_from["base"]["sha256"]
    if sorted(map(str, expected.values())) == sorted(found.values()):
        return ""
    trained_on = made_from["base"]["name_or_path"]
    return f"{name}: its weights are not those that the adapter was trained on ({trained_on})"


def _merged_already(job: MergeJob, base: Base, options: MergeOptions) -> dict[str, Any] | None:
    """Return the provenance of what a job would make, if that is there."""
    if not (job.out / PROVENANCE).is_file() or why_invalid(job.out, hashes=False) is not None:
        return None
    with contextlib.suppress(ArtifactError, KeyError, TypeError):
        there = read_json(job.out / PROVENANCE)
        made = [there["merged"][key] for key in ("adapter_sha256", "base", "base_weights")]
        if made == [_adapter_hash(job.adapter), base.name, options.base_weights]:
            return there
    return None


def _tokenizer_of(job: MergeJob, base: Base) -> Any:
    """Return the adapter's tokenizer, which carries the template of training, or else the base's.

    A checkpoint has none: that of its run's adapter is the same, or else the base's with the template of the run.
    """
    run = job.adapter.absolute().parent.parent
    for folder in (job.adapter, run / "adapter"):
        if (folder / TOKENIZER).is_file() and (folder == job.adapter or job.made_from is not None):
            return load_tokenizer(ModelSection(name_or_path=str(folder)))
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(base.folder)))
    if job.made_from is not None:
        try:
            source = template_source(job.made_from["config"]["model"]["chat_template"]) or tokenizer.chat_template
        except (KeyError, TypeError, DataError):
            source = None
        if source is None or sha256_of_text(source) != job.made_from.get("chat_template_sha256"):
            raise ArtifactError(
                f"{job.told}: the chat template of its training is not to be found (model.chat_template in the run's "
                "config.yaml); merge the run's adapter/, or put the template back"
            )
        tokenizer.chat_template = source
    return tokenizer


def _adapter_hash(adapter: Path) -> str:
    return sha256_of(next(path for name in (WEIGHTS, PICKLED) if (path := adapter / name).is_file()))


def _options(options: MergeOptions | None, changes: dict[str, Any]) -> MergeOptions:
    return (options or MergeOptions())._replace(**changes)
