"""Convert adapters between PEFT's format, PEFT's older pickle and loralib's checkpoints."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from lora_accel.errors import ArtifactError, ConfigError, did_you_mean
from lora_accel.export.formats import FORMATS, ExportFormat
from lora_accel.export.tensors import check_written
from lora_accel.logs import logger
from lora_accel.merging.base import base_section
from lora_accel.merging.job import check_out_folder
from lora_accel.merging.trained_on import check_trained_on
from lora_accel.model.base import build_on_meta_device
from lora_accel.model.sizes import load_config
from lora_accel.saving import loralib
from lora_accel.saving.adapter_config import check_known_options, check_untrusted_config
from lora_accel.saving.atomic import atomic_folder, read_json, write_json
from lora_accel.saving.attach import attach_adapter, match_adapter
from lora_accel.saving.base_identity import has_weights
from lora_accel.saving.discovery import CONFIG
from lora_accel.saving.hub import find_adapter, recorded_name, recorded_revision
from lora_accel.saving.provenance import provenance_of
from lora_accel.saving.tensor_files import AdapterData, State, finite_copies, read_adapter
from lora_accel.saving.vocabulary import resize_vocabulary

BASE_KEY = "base_model_name_or_path"


def export_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    format: str,
    base: str | None = None,
    alpha: float | None = None,
    overwrite: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write an adapter in another format.

    Every name and shape is checked against the base's modules, which are built from its config. Its weights are only
    compared with those of training, if both are known. Between PEFT's formats the base is not needed: if it is not
    here, nothing is checked, with a note.

    Args:
        adapter: a PEFT folder, a folder that this function wrote, or a file of `loralib.lora_state_dict`.
        out: output folder.
        format: a key of `FORMATS`: peft, peft-bin or loralib.
        base: Hub id or folder; None = the base that the adapter names.
        alpha: lora_alpha of a bare loralib file, which does not store it.
        overwrite: whether to replace an existing `out`.
        force: whether to ignore options of adapter_config.json that the installed PEFT does not know, and to accept a
            base that the adapter was not trained on.
        trust_remote_code: whether to run the base's own code.

    Returns:
        A summary of the output: format, adapter, out, base, bias, num_tensors, files.

    Raises:
        ConfigError: the format is unknown, or `alpha` is missing, invalid or not allowed.
        ArtifactError: the adapter cannot be read, does not fit the base or the format, or `out` exists.
    """
    adapter, out = find_adapter(adapter), Path(out)
    if format not in FORMATS:
        raise ConfigError(f"--format={format}: unknown; use {', '.join(FORMATS)}{did_you_mean(format, FORMATS)}")
    target, config = FORMATS[format], _read_config(adapter, alpha)
    base_name = base or config.get(BASE_KEY)
    sources = {"adapter": adapter.parent if adapter.is_file() else adapter, "base": Path(str(base_name))}
    check_out_folder(out, sources, overwrite=overwrite)
    if not loralib.is_loralib(adapter):
        check_untrusted_config(adapter / CONFIG, ())
        if target.check_config is not None:
            target.check_config(adapter / CONFIG, config)
        check_known_options(adapter / CONFIG, force=force)

    model = None
    if loralib.is_loralib(adapter) or base or target.convert is not None or _is_base_here(adapter, config):
        model = _build_base(adapter, config, base, force=force, trust_remote_code=trust_remote_code)
    else:
        logger.warning(f"note: {base_name} is not here, so names and shapes were not checked; --base names its folder")
    source = _read(adapter, config, base, model)
    data = _converted(adapter, source, model, target)
    _write(adapter, out, data, target)
    return {
        "format": format,
        "adapter": str(adapter),
        "out": str(out),
        "base": base_name,
        "bias": source.config.get("bias"),
        "num_tensors": len(data.tensors),
        "files": sorted(path.name for path in out.iterdir()),
    }


def _read_config(adapter: Path, alpha: float | None) -> dict[str, Any]:
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


def _is_base_here(adapter: Path, config: dict[str, Any]) -> bool:
    """Whether the base that an adapter names is in its folder or in the Hub's cache. Nothing is downloaded."""
    named = config.get(BASE_KEY)
    try:
        return isinstance(named, str) and has_weights(named, recorded_revision(adapter, provenance_of(adapter)))
    except ValueError:  # no folder's name, nor a Hub id
        return False


def _build_base(
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


def _read(adapter: Path, config: dict[str, Any], base: str | None, model: PreTrainedModel | None) -> AdapterData:
    """Return an adapter in PEFT's format. Its config names the requested base, if there is one.

    Args:
        model: the base on the meta device, which loralib's names need.
    """
    if loralib.is_loralib(adapter) and model is not None:
        return loralib.read_loralib(adapter, config, model, recorded_name(str(base or config.get(BASE_KEY)), None)[0])
    renamed = dict(zip((BASE_KEY, "revision"), recorded_name(base, None), strict=True)) if base else {}
    return AdapterData(read_adapter(adapter), config | renamed)


def _converted(adapter: Path, data: AdapterData, model: PreTrainedModel | None, target: ExportFormat) -> AdapterData:
    """Return an adapter in another format, after a check that it fits the base, if that is known."""
    if model is not None:
        peft_model, tensors = _attach(adapter, data, model)
        if target.convert is not None:
            data = target.convert(adapter, data._replace(tensors=tensors), peft_model)
    return data._replace(tensors=finite_copies(adapter, data.tensors))


def _attach(adapter: Path, data: AdapterData, model: PreTrainedModel) -> tuple[PeftModel, State]:
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


def _write(adapter: Path, out: Path, data: AdapterData, target: ExportFormat) -> None:
    """Write the output folder, read its tensors back and compare them."""
    with atomic_folder(out) as temporary:
        target.write_tensors(temporary / target.tensors_file, data.tensors)
        check_written(temporary / target.tensors_file, data.tensors, target.read_tensors)
        write_json(temporary / target.config_file, data.config)
        for name in target.copied_files:
            if adapter.is_dir() and (adapter / name).is_file():
                shutil.copyfile(adapter / name, temporary / name)
