"""The base of some adapters: found, downloaded if necessary, and checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from pydantic import ValidationError
from transformers import PretrainedConfig
from transformers.utils import cached_file

from lora_accel.config.schema import Dtype, ModelSection, QuantizationSection
from lora_accel.errors import ArtifactError, first_line
from lora_accel.model.base import check_base, stored_dtype
from lora_accel.model.prequantized import stored_quantization
from lora_accel.model.sizes import load_config
from lora_accel.model.tokenizer import check_model_folder, is_hub_id, load_error_message
from lora_accel.model.weight_files import find_weight_files
from lora_accel.saving.discovery import named_base
from lora_accel.saving.hub import missing_base, recorded_revision
from lora_accel.saving.provenance import check_code, recorded_changes

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
    check_code(adapter, provenance, section)
    return section


def read_base_config(base: Base) -> PretrainedConfig:
    """Return a new config object, since building a model from a config modifies it.

    Its dtype is the one in which the base's weights are stored, whatever the dtype in config.json.
    """
    config = load_config(base.section)
    config.use_cache, config.dtype = True, stored_dtype(base.section)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _local_folder(name: str, revision: str | None, *, with_code: bool) -> Path:
    if Path(name).is_dir():
        return Path(name)
    # The weights first, and only those that are loaded; then the other files of the same commit.
    commit = find_weight_files(ModelSection(name_or_path=name, revision=revision))[0].parent.name
    patterns = [*HUB_FILES, *([CODE_FILES] if with_code else [])]
    return Path(snapshot_download(name, revision=commit, allow_patterns=patterns))
