"""Convert adapters between PEFT's format, PEFT's older pickle and loralib's checkpoints."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel

from lora_accel.config.schema import ModelSection
from lora_accel.errors import ArtifactError, ConfigError, did_you_mean
from lora_accel.export import loralib
from lora_accel.export.formats import FORMATS, ExportFormat
from lora_accel.export.tensors import AdapterData, check_tensors, check_written
from lora_accel.merging.job import check_out_folder
from lora_accel.model.base import build_on_meta_device
from lora_accel.model.tokenizer import check_model_folder, load_error_message
from lora_accel.saving.adapter import (
    adapter_parameters,
    attach_adapter,
    check_adapter_tensors,
    pop_base_embeddings,
    read_adapter,
)
from lora_accel.saving.atomic import atomic_folder, read_json, write_json
from lora_accel.saving.discovery import CONFIG
from lora_accel.saving.untrusted import check_untrusted_config

BASE_KEY = "base_model_name_or_path"


def export_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    format: str,
    base: str | None = None,
    alpha: float | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write an adapter in another format.

    If source or target is loralib's format, or `base` is given, every name and shape is checked against the base's
    modules. They are built from its config; its weights are not read.

    Args:
        adapter: a PEFT folder, a folder that this function wrote, or a file of `loralib.lora_state_dict`.
        out: output folder.
        format: a key of `FORMATS`: peft, peft-bin or loralib.
        base: Hub id or folder; None = the base that the adapter names.
        alpha: lora_alpha of a bare loralib file, which does not store it.
        overwrite: whether to replace an existing `out`.

    Returns:
        A summary of the output: format, adapter, out, base, bias, num_tensors, files.

    Raises:
        ConfigError: the format is unknown, or `alpha` is missing, invalid or not allowed.
        ArtifactError: the adapter cannot be read, does not fit the base or the format, or `out` exists.
    """
    adapter, out = Path(adapter), Path(out)
    if format not in FORMATS:
        raise ConfigError(f"--format={format}: unknown; use {', '.join(FORMATS)}{did_you_mean(format, FORMATS)}")
    target = FORMATS[format]
    is_loralib = adapter.is_file() or (adapter / loralib.CONFIG_FILE).is_file()
    config = _read_config(adapter, alpha)
    base_name = base or config.get(BASE_KEY)
    sources = {"adapter": adapter.parent if adapter.is_file() else adapter, "base": Path(str(base_name))}
    check_out_folder(out, sources, overwrite=overwrite)
    if not is_loralib:
        check_untrusted_config(adapter / CONFIG, ())
        if target.check_config is not None:
            target.check_config(adapter / CONFIG, config)

    model = _build_base(adapter, base_name) if is_loralib or base or target.convert is not None else None
    if is_loralib and model is not None:
        data = loralib.read_loralib(adapter, config, model, str(base_name))
    else:
        tensors = check_tensors(adapter, read_adapter(adapter))
        data = AdapterData(tensors, config | ({BASE_KEY: base} if base else {}))
    bias = data.config.get("bias")
    if model is not None:
        peft_model = _attach(adapter, data, model)
        if target.convert is not None:
            data = target.convert(adapter, data, peft_model)

    _write(adapter, out, data, target)
    return {
        "format": format,
        "adapter": str(adapter),
        "out": str(out),
        "base": base_name,
        "bias": bias,
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


def _build_base(adapter: Path, name: Any) -> PreTrainedModel:
    if not isinstance(name, str) or not name:
        raise ArtifactError(f"{adapter}: does not name its base model; pass --base")
    section = ModelSection(name_or_path=name)
    check_model_folder(section)
    try:
        return build_on_meta_device(AutoConfig.from_pretrained(name, trust_remote_code=False))
    except Exception as error:  # an invalid config raises many types
        raise ArtifactError(load_error_message(section, "config", error)) from None


def _attach(adapter: Path, data: AdapterData, model: PreTrainedModel) -> PeftModel:
    """Attach an adapter in PEFT's format to a base on the meta device, to verify that `load_adapter` accepts it.

    Raises:
        ArtifactError: PEFT rejects the config, or the tensors are not those that it expects.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / CONFIG, data.config)
        try:
            peft_model = attach_adapter(model, Path(folder), on_meta_device=True)
        except ArtifactError as error:
            raise ArtifactError(str(error).replace(folder, str(adapter))) from None
    tensors = dict(data.tensors)
    pop_base_embeddings(peft_model, tensors)
    expected = {key: parameter.shape for key, parameter in adapter_parameters(peft_model).items()}
    check_adapter_tensors(expected, tensors, str(adapter))
    return peft_model


def _write(adapter: Path, out: Path, data: AdapterData, target: ExportFormat) -> None:
    with atomic_folder(out) as temporary:
        target.write_tensors(temporary / target.tensors_file, data.tensors)
        check_written(temporary / target.tensors_file, data.tensors, target.read_tensors)
        write_json(temporary / target.config_file, data.config)
        for name in target.copied_files:
            if adapter.is_dir() and (adapter / name).is_file():
                shutil.copyfile(adapter / name, temporary / name)
