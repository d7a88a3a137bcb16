"""Read an adapter to export, and attach it to its base, which is built on the meta device."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.merging.base import base_section
from lora_accel.merging.trained_on import check_trained_on
from lora_accel.model.base import build_on_meta_device
from lora_accel.model.sizes import load_config
from lora_accel.saving import loralib
from lora_accel.saving.atomic import read_json, write_json
from lora_accel.saving.attach import attach_adapter, match_adapter
from lora_accel.saving.base_identity import has_weights
from lora_accel.saving.discovery import CONFIG
from lora_accel.saving.hub import recorded_name, recorded_revision
from lora_accel.saving.provenance import provenance_of
from lora_accel.saving.tensor_files import AdapterData, State, read_adapter
from lora_accel.saving.vocabulary import resize_vocabulary

BASE_KEY = "base_model_name_or_path"


def read_config(adapter: Path, alpha: float | None) -> dict[str, Any]:
    """Return the content of adapter_config.json or loralib.json; for a bare loralib file, its alpha."""
    if adapter.is_file():
        if alpha is None or not (math.isfinite(alpha) and alpha > 0):
            raise ConfigError(f"--alpha={alpha}: {adapter} does not store lora_alpha; pass the value used in training")
        return {"lora_alpha": loralib.as_int(alpha)}
    if alpha is not None:
        raise ConfigError(f"--alpha={alpha}: only allowed for a bare loralib file; {adapter} stores its lora_alpha")
    file = adapter / (loralib.CONFIG_FILE if (adapter / loralib.CONFIG_FILE).is_file() else CONFIG)
    if not file.is_file():
        raise ArtifactError(f"{adapter}: is not an adapter: it has neither {CONFIG} nor {loralib.CONFIG_FILE}")
    return read_json(file)


def is_base_here(adapter: Path, config: dict[str, Any]) -> bool:
    """Whether the base that an adapter names is in its folder or in the Hub's cache. Nothing is downloaded."""
    named = config.get(BASE_KEY)
    try:
        return isinstance(named, str) and has_weights(named, recorded_revision(adapter, provenance_of(adapter)))
    except ValueError:  # no folder's name, nor a Hub id
        return False


def build_base(
    adapter: Path, config: dict[str, Any], requested: str | None, *, force: bool, trust_remote_code: bool
) -> PreTrainedModel:
    """Return the adapter's base on the meta device; check its weights if they are here."""
    named = config.get(BASE_KEY)
    if not requested and not (isinstance(named, str) and named):
        raise ArtifactError(f"{adapter}: does not name its base model; pass --base")
    section = base_section(adapter, provenance_of(adapter), requested, named=named, trust_remote_code=trust_remote_code)
    if has_weights(section.name_or_path, section.revision):
        check_trained_on(adapter, section, force=force, way_out="pass the right one with --base")
    return build_on_meta_device(load_config(section), trust_remote_code=trust_remote_code)


def read_data(adapter: Path, config: dict[str, Any], base: str | None, model: PreTrainedModel | None) -> AdapterData:
    """Return an adapter in PEFT's format. Its config names the requested base, if there is one.

    Args:
        model: the base on the meta device, which loralib's names need.
    """
    if loralib.is_loralib(adapter) and model is not None:
        return loralib.read_loralib(adapter, config, model, recorded_name(str(base or config.get(BASE_KEY)), None)[0])
    renamed = dict(zip((BASE_KEY, "revision"), recorded_name(base, None), strict=True)) if base else {}
    return AdapterData(read_adapter(adapter), config | renamed)


def attach(adapter: Path, data: AdapterData, model: PreTrainedModel) -> tuple[PeftModel, State]:
    """Attach an adapter in PEFT's format to a base on the meta device, to verify that `load_adapter` accepts it.

    Returns:
        The model, and the tensors by PEFT's names; embeddings of a resized base by their names in the base.

    Raises:
        ArtifactError: PEFT rejects the config, or the tensors are not those that it expects.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / CONFIG, data.config)
        try:
            resize_vocabulary(model, Path(folder), data.tensors)
            peft_model = attach_adapter(model, Path(folder), on_meta_device=True)
        except ArtifactError as error:
            raise ArtifactError(str(error).replace(folder, str(adapter))) from None
    trained, embeddings = match_adapter(peft_model, data.tensors, str(adapter))
    return peft_model, trained | embeddings
