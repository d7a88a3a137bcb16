"""The base of a merge: found, checked against the adapters' provenance, and loaded."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from pydantic import ValidationError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from lora_accel.config.schema import Dtype, ModelSection, QuantizationSection, RunConfig
from lora_accel.data.template import template_source
from lora_accel.errors import ArtifactError, ConfigError, DataError, first_line
from lora_accel.logs import logger
from lora_accel.merging.job import TOKENIZER, MergeJob, MergeOptions, provenance_of
from lora_accel.merging.request import trained_quantized
from lora_accel.merging.shards import DequantizedWeights, Weights
from lora_accel.merging.streaming import WeightTransform
from lora_accel.model.base import (
    build_on_meta_device,
    check_base,
    choose_dtype,
    load_base_model,
    quantize_round_trip,
    quantized_names,
    stored_dtype,
)
from lora_accel.model.prequantized import describe, stored_quantization
from lora_accel.model.sizes import load_config
from lora_accel.model.tokenizer import (
    check_model_folder,
    has_tokenizer,
    is_hub_id,
    load_error_message,
    load_tokenizer,
    local_file,
)
from lora_accel.model.weights import find_weight_files
from lora_accel.saving.atomic import read_json
from lora_accel.saving.base_identity import base_hashes, is_same_base, tensors_hash
from lora_accel.saving.discovery import named_base, run_of
from lora_accel.saving.hub import missing_base, recorded_revision
from lora_accel.saving.provenance import recorded_changes, sha256_of_text

HUB_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
"""Files of a base to download besides its weights."""
CODE_FILES = "*.py"
"""Files of a base to download if its code is trusted."""


class Base(NamedTuple):
    """A base model in a local folder."""

    name: str
    revision: str | None
    folder: Path
    config: PretrainedConfig
    rope_scaling: dict[str, Any] | None = None
    """`model.rope_scaling` with which the adapters were trained."""
    trust_remote_code: bool = False
    """Whether to run Python code from the base's folder."""
    quantization: QuantizationSection | None = None
    """How its weights are stored; None = not quantized. `config` does not contain it."""

    @property
    def section(self) -> ModelSection:
        """Return the base as a section of a run config."""
        return ModelSection(
            name_or_path=str(self.folder), rope_scaling=self.rope_scaling, trust_remote_code=self.trust_remote_code
        )


def find_base(
    adapters: Sequence[Path],
    provenances: Sequence[dict[str, Any] | None],
    requested: str | None,
    *,
    trust_remote_code: bool = False,
) -> Base:
    """Return the base of some adapters; downloads it if necessary.

    Args:
        requested: Hub id or folder; None = the base that the first adapter names.
        trust_remote_code: whether to run Python code from the base's folder.

    Raises:
        ArtifactError: the base cannot be read or is not complete, its code would have to run, or the adapters were
            trained with different values of model.rope_scaling.
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
    section = base_section(adapters[0], provenances[0], requested, trust_remote_code=trust_remote_code)
    name, revision = section.name_or_path, section.revision
    try:
        folder = _local_folder(name, revision, with_code=trust_remote_code)
    except ArtifactError:
        raise
    except Exception as error:  # huggingface_hub raises many types
        raise ArtifactError(load_error_message(section, "model", error)) from None
    base = Base(name, revision, folder, PretrainedConfig(), rope_scaling, trust_remote_code)
    check_base(base.section)
    return base._replace(config=read_base_config(base), quantization=stored_quantization(base.section))


def base_section(
    adapter: Path,
    provenance: dict[str, Any] | None,
    requested: str | None,
    *,
    named: str | None = None,
    trust_remote_code: bool = False,
    dtype: Dtype = "auto",
) -> ModelSection:
    """Return the base of an adapter as a section of a run config. Of a base on the Hub, only its config is downloaded.

    Args:
        requested: Hub id or folder; None = the base that the adapter names, in the revision that it records.
        named: the base that the adapter names; None = read its adapter_config.json.
        trust_remote_code: whether the base's own code may run.
        dtype: compute dtype.

    Raises:
        ArtifactError: the base does not exist here, or the adapter was trained with code of its base, which is not
            trusted.
    """
    name = requested or named or named_base(adapter)
    revision = None if requested else recorded_revision(adapter, provenance)
    try:
        section = ModelSection(name_or_path=name, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
    except ValidationError:  # NUL or surrogates, which no path has
        if requested:
            raise ArtifactError(f"--base {name!r}: there is no such folder") from None
        raise missing_base(adapter, name) from None
    if not requested and not os.path.isdir(name) and not is_hub_id(name):
        raise missing_base(adapter, name)
    check_model_folder(section)
    try:
        cached_file(name, "config.json", revision=revision)
    except Exception as error:  # huggingface_hub and its HTTP client raise many types
        if requested:
            raise ArtifactError(load_error_message(section, "model", error)) from None
        raise missing_base(adapter, name, f"which cannot be loaded: {first_line(error)}") from None
    _check_code(adapter, provenance, section)
    return section


def _check_code(adapter: Path, provenance: dict[str, Any] | None, section: ModelSection) -> None:
    """Check that the code with which an adapter was trained is trusted, if its base has any.

    transformers may have a class of its own for such a base, which would be used without a message.
    """
    config = (provenance or {}).get("config")
    model = config.get("model") if isinstance(config, dict) else None
    if section.trust_remote_code or not (isinstance(model, dict) and model.get("trust_remote_code") is True):
        return
    config_file = local_file(section, "config.json")
    if config_file is not None and read_json(config_file).get("auto_map"):
        raise ArtifactError(
            f"{adapter}: was trained with model.trust_remote_code=true, and {section.name_or_path} has Python code of "
            "its own; pass --trust-remote-code to run it"
        )


def _local_folder(name: str, revision: str | None, *, with_code: bool) -> Path:
    if Path(name).is_dir():
        return Path(name)
    # The weights first, and only those that are loaded; then the other files of the same commit.
    commit = find_weight_files(ModelSection(name_or_path=name, revision=revision))[0].parent.name
    patterns = [*HUB_FILES, *([CODE_FILES] if with_code else [])]
    return Path(snapshot_download(name, revision=commit, allow_patterns=patterns))


def read_base_config(base: Base) -> PretrainedConfig:
    """Return a new config object, since building a model from a config modifies it.

    Its dtype is the one in which the base's weights are stored, whatever the dtype in config.json.
    """
    config = load_config(base.section)
    config.use_cache, config.dtype = True, stored_dtype(base.section)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def load_base_fp32(base: Base, transform: WeightTransform | None) -> PreTrainedModel:
    """Load the base in float32, whatever it is stored in: nothing is rounded. Quantized weights are dequantized."""
    if base.quantization is None:
        model = load_base_model(base.section.model_copy(update={"dtype": "float32"}), QuantizationSection())
    else:
        dtype = str(base.config.dtype).removeprefix("torch.")
        model = load_base_model(base.section.model_copy(update={"dtype": dtype}), QuantizationSection()).dequantize()
    if transform is not None:
        for name, parameter in model.named_parameters():
            parameter.data = transform(name, parameter.data)
    return model.float()


def make_transform(job: MergeJob, base: Base, options: MergeOptions) -> WeightTransform | None:
    """Return the transform that `options.base_weights` asks for, None for the weights that `open_weights` reads.

    Raises:
        ConfigError: `options.base_weights` has another value.
        ArtifactError: the base is quantized and its original weights are asked for, or it is not known how the base was
            quantized in training.
    """
    if options.base_weights not in ("original", "dequantized"):
        raise ConfigError(f"--base-weights {options.base_weights}: use original or dequantized")
    if base.quantization is not None:
        if options.base_weights == "original":
            raise ArtifactError(
                f"{base.name}: is stored quantized ({describe(base.quantization)}): pass --base with the same model in "
                "16 or 32 bits, or --base-weights dequantized to merge into its dequantized weights"
            )
        return None
    if options.base_weights == "original":
        return None
    provenance = job.provenance or {}
    if trained_quantized(provenance):
        raise ArtifactError(
            f"{job.source}: was trained on weights that are stored quantized, in "
            f"{provenance['base']['name_or_path']}; to merge into those, pass that folder with --base. "
            "--base-weights original merges into the weights of this base"
        )
    try:
        config = RunConfig.model_validate(provenance["config"])
    except (KeyError, ValidationError):
        raise ArtifactError(
            f"{job.source}: has no record of how its base was quantized; pass --base-weights original"
        ) from None
    quantization = config.quantization
    if quantization.bits != 4:
        bits = "to 8 bits, not 4" if quantization.bits == 8 else "not quantized"
        raise ArtifactError(f"{job.source}: its base was {bits} in training; pass --base-weights original")
    base_dtype = str(provenance.get("base_dtype", "auto"))  # older provenances lack it: the dtype in config.json
    section = base.section.model_copy(update={"dtype": config.model.dtype})
    dtype = choose_dtype(section, str(provenance.get("mixed_precision")), None, base_dtype)
    model = build_on_meta_device(read_base_config(base), trust_remote_code=base.trust_remote_code)
    quantized = quantized_names(model)
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}

    def round_trip(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name not in quantized:
            return weight
        return quantize_round_trip(weight.to(dtype), quantization, transposed=name in transposed)

    return round_trip


def open_weights(base: Base) -> Weights:
    """Return the base's weights, dequantized if they are stored quantized."""
    return Weights(base.folder) if base.quantization is None else DequantizedWeights(base.folder)


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
    _check_code(adapter, provenance, section)
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


def load_adapter_tokenizer(job: MergeJob, base: Base) -> Any:
    """Return the adapter's tokenizer, which has the chat template of training, or else the base's; None = both lack it.

    A checkpoint has no tokenizer: use that of the run's adapter, or else the base's with the chat template of the run.
    """
    run = run_of(job.adapter)
    for folder in (job.adapter, *([run / "adapter"] if run is not None and job.provenance is not None else [])):
        if (folder / TOKENIZER).is_file():
            return load_tokenizer(ModelSection(name_or_path=str(folder)))
    added = recorded_changes(job.provenance, str(job.adapter)).add_tokens
    if job.provenance is None and not has_tokenizer(base.section):
        return None
    tokenizer = load_tokenizer(base.section.model_copy(update={"add_tokens": added}))
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
