"""The base of a merge: found, checked against the adapters' provenance, and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from pydantic import ValidationError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_accel.config.schema import ModelSection, QuantizationSection, RunConfig
from lora_accel.data.template import template_source
from lora_accel.errors import ArtifactError, ConfigError, DataError
from lora_accel.merging.job import TOKENIZER, MergeJob, MergeOptions
from lora_accel.merging.streaming import WeightTransform
from lora_accel.model.base import (
    build_on_meta_device,
    choose_dtype,
    load_base_model,
    quantize_round_trip,
    quantized_names,
)
from lora_accel.model.sizes import load_config, scale_rope
from lora_accel.model.tokenizer import check_model_folder, load_error_message, load_tokenizer
from lora_accel.saving.discovery import named_base, run_of
from lora_accel.saving.provenance import recorded_changes, sha256_of_text

HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
"""Files of a base to download; pickles only if there are no safetensors."""


class Base(NamedTuple):
    """A base model in a local folder."""

    name: str
    revision: str | None
    folder: Path
    config: PretrainedConfig
    rope_scaling: dict[str, Any] | None = None
    """`model.rope_scaling` with which the adapters were trained."""


def find_base(adapters: Sequence[Path], provenances: Sequence[dict[str, Any] | None], requested: str | None) -> Base:
    """Return the base of some adapters; downloads it if necessary.

    Args:
        requested: Hub id or folder; None = the base that the first adapter names.

    Raises:
        ArtifactError: the base cannot be read or is quantized, or the adapters were trained with different values of
            model.rope_scaling.
        ConfigError: the base does not support the adapters' rope_scaling.
    """
    rope_scaling, *others = [
        recorded_changes(provenance, str(adapter)).rope_scaling
        for adapter, provenance in zip(adapters, provenances, strict=True)
    ]
    if any(other != rope_scaling for other in others):
        raise ArtifactError(
            "the adapters were trained with different values of model.rope_scaling; merge them separately"
        )
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
    if rope_scaling is not None:
        scale_rope(config, rope_scaling)
    return Base(name, revision, folder, config, rope_scaling)


def _local_folder(name: str, revision: str | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES)))
    if not any(folder.glob("*.safetensors")):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*HUB_FILES, "*.bin"]))
    return folder


def read_base_config(base: Base) -> PretrainedConfig:
    """Return a new config object, since building a model from a config modifies it."""
    config = load_config(ModelSection(name_or_path=str(base.folder), rope_scaling=base.rope_scaling))
    config.use_cache = True
    return config


def load_base_fp32(base: Base, transform: WeightTransform | None) -> PreTrainedModel:
    section = ModelSection(name_or_path=str(base.folder), rope_scaling=base.rope_scaling)
    model = load_base_model(section, QuantizationSection(), recorded_dtype="auto")  # as stored, for `transform`
    if transform is not None:
        for name, parameter in model.named_parameters():
            parameter.data = transform(name, parameter.data)
    return model.float()


def make_transform(job: MergeJob, base: Base, options: MergeOptions) -> WeightTransform | None:
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
    model = build_on_meta_device(read_base_config(base))
    quantized = quantized_names(model)
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}

    def round_trip(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name not in quantized:
            return weight
        if isinstance(dtype, torch.dtype):
            weight = weight.to(dtype)
        return quantize_round_trip(weight, quantization, transposed=name in transposed)

    return round_trip


def check_base_hashes(jobs: Sequence[MergeJob], base: Base, hashes: dict[str, str], options: MergeOptions) -> None:
    """Check that the adapters were trained on this base, unless they have no provenance."""
    for job in jobs:
        difference = job.provenance and base_difference(job.provenance, base.name, hashes)
        if difference and not options.force:
            raise ArtifactError(f"{difference}; pass the right one with --base, or --force to merge anyway")


def base_difference(provenance: dict[str, Any], name: str, hashes: dict[str, str]) -> str:
    """Return how a base differs from the one in an adapter's provenance; empty = it does not."""
    expected = provenance["base"]["sha256"]
    if sorted(map(str, expected.values())) == sorted(hashes.values()):
        return ""
    trained_on = provenance["base"]["name_or_path"]
    return f"{name}: its weights are not those that the adapter was trained on ({trained_on})"


def load_adapter_tokenizer(job: MergeJob, base: Base) -> Any:
    """Return the adapter's tokenizer, which has the chat template of training, or else the base's.

    A checkpoint has no tokenizer: use that of the run's adapter, or else the base's with the chat template of the run.
    """
    run = run_of(job.adapter)
    for folder in (job.adapter, *([run / "adapter"] if run is not None and job.provenance is not None else [])):
        if (folder / TOKENIZER).is_file():
            return load_tokenizer(ModelSection(name_or_path=str(folder)))
    added = recorded_changes(job.provenance, str(job.adapter)).add_tokens
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(base.folder), add_tokens=added))
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
