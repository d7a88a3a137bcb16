"""Convert adapters between PEFT's format, PEFT's older pickle and loralib's checkpoints, and to GGUF."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lora_accel.errors import ConfigError, did_you_mean
from lora_accel.export import source
from lora_accel.export.formats import FORMATS, ExportFormat
from lora_accel.export.gguf import GGUF, export_gguf
from lora_accel.export.tensors import check_written
from lora_accel.logs import logger
from lora_accel.merging.job import check_out_folder
from lora_accel.saving import loralib
from lora_accel.saving.adapter_config import check_known_options, check_untrusted_config
from lora_accel.saving.atomic import atomic_folder, write_json
from lora_accel.saving.discovery import CONFIG
from lora_accel.saving.hub import find_adapter
from lora_accel.saving.tensor_files import AdapterData, finite_copies


def export_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    format: str,
    outtype: str | None = None,
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
        adapter: a PEFT folder, a folder that this function wrote, or a file of `loralib.lora_state_dict`. For gguf also
            a model folder, such as a merged model.
        out: output folder.
        format: a key of `FORMATS`: peft, peft-bin or loralib; or gguf.
        outtype: how gguf stores the weights, a value of `gguf_file.OUTTYPES`; None = as they are stored.
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
    if format == GGUF:
        options: dict[str, Any] = {"base": base, "overwrite": overwrite, "force": force}
        if alpha is not None:
            raise ConfigError(f"--alpha={alpha}: only allowed for a bare loralib file")
        return export_gguf(adapter, out, outtype=outtype or "auto", trust_remote_code=trust_remote_code, **options)
    if format not in FORMATS:
        known = (*FORMATS, GGUF)
        raise ConfigError(f"--format={format}: unknown; use {', '.join(known)}{did_you_mean(format, known)}")
    if outtype is not None:
        raise ConfigError(f"--outtype={outtype}: only allowed with --format gguf")
    target, config = FORMATS[format], source.read_config(adapter, alpha)
    base_name = base or config.get(source.BASE_KEY)
    sources = {"adapter": adapter.parent if adapter.is_file() else adapter, "base": Path(str(base_name))}
    check_out_folder(out, sources, overwrite=overwrite)
    if not loralib.is_loralib(adapter):
        check_untrusted_config(adapter / CONFIG, ())
        if target.check_config is not None:
            target.check_config(adapter / CONFIG, config)
        check_known_options(adapter / CONFIG, force=force)

    model = None
    if loralib.is_loralib(adapter) or base or target.convert is not None or source.is_base_here(adapter, config):
        model = source.build_base(adapter, config, base, force=force, trust_remote_code=trust_remote_code)
    else:
        logger.warning(f"note: {base_name} is not here, so names and shapes were not checked; --base names its folder")
    read = source.read_data(adapter, config, base, model)
    data = _converted(adapter, read, model, target)
    _write(adapter, out, data, target)
    return {
        "format": format,
        "adapter": str(adapter),
        "out": str(out),
        "base": base_name,
        "bias": read.config.get("bias"),
        "num_tensors": len(data.tensors),
        "files": sorted(path.name for path in out.iterdir()),
    }


def _converted(adapter: Path, data: AdapterData, model: PreTrainedModel | None, target: ExportFormat) -> AdapterData:
    """Return an adapter in another format, after a check that it fits the base, if that is known."""
    if model is not None:
        peft_model, tensors = source.attach(adapter, data, model)
        if target.convert is not None:
            data = target.convert(adapter, data._replace(tensors=tensors), peft_model)
    return data._replace(tensors=finite_copies(adapter, data.tensors))


def _write(adapter: Path, out: Path, data: AdapterData, target: ExportFormat) -> None:
    """Write the output folder, read its tensors back and compare them."""
    with atomic_folder(out) as temporary:
        target.write_tensors(temporary / target.tensors_file, data.tensors)
        check_written(temporary / target.tensors_file, data.tensors, target.read_tensors)
        write_json(temporary / target.config_file, data.config)
        for name in target.copied_files:
            if adapter.is_dir() and (adapter / name).is_file():
                shutil.copyfile(adapter / name, temporary / name)
