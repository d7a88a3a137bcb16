"""Export to GGUF: a model folder to a model file, an adapter to a LoRA file; a Modelfile for Ollama beside it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_accel.config.schema import ModelSection
from lora_accel.data.template import ChatTemplate
from lora_accel.errors import ArtifactError
from lora_accel.export import source
from lora_accel.export.gguf_file import OUTTYPES, GgufTensor, check_outtype, stored_outtype
from lora_accel.export.gguf_lora import OUTTYPES as LORA_OUTTYPES
from lora_accel.export.gguf_lora import write_lora
from lora_accel.export.gguf_model import read_model, write_model
from lora_accel.export.modelfile import MODELFILE, modelfile
from lora_accel.merging.job import check_out_folder
from lora_accel.model.headers import main_dtype
from lora_accel.model.tokenizer import has_tokenizer, load_tokenizer
from lora_accel.saving.adapter_config import check_known_options, check_untrusted_config
from lora_accel.saving.atomic import atomic_folder, write_text
from lora_accel.saving.discovery import CONFIG
from lora_accel.saving.provenance import provenance_of
from lora_accel.saving.tensor_files import finite_copies

GGUF = "gguf"
COPIED_FILES = ("provenance.json", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*")


def export_gguf(
    folder: Path,
    out: Path,
    *,
    outtype: str,
    base: str | None,
    overwrite: bool,
    force: bool,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Write a model folder or an adapter as a GGUF file. See `export_adapter` for the options and the summary.

    Raises:
        ConfigError: the outtype is unknown, or the package gguf is not installed.
        ArtifactError: the folder cannot be read, GGUF cannot hold it, or `out` exists.
    """
    is_adapter = (folder / CONFIG).is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        raise ArtifactError(
            f"{folder}: is neither an adapter ({CONFIG}) nor a model folder (config.json); import a loralib file with "
            "--format peft first"
        )
    check_outtype(outtype, LORA_OUTTYPES if is_adapter else OUTTYPES)
    sources = {"adapter" if is_adapter else "model": folder, "base": Path(str(base))}
    check_out_folder(out, sources, overwrite=overwrite)
    if is_adapter:
        return _export_lora(folder, out, outtype, base, force=force, trust_remote_code=trust_remote_code)
    return _export_model(folder, out, outtype)


def _export_model(folder: Path, out: Path, outtype: str) -> dict[str, Any]:
    model = read_model(folder)
    outtype = stored_outtype(main_dtype(model.stored)) if outtype == "auto" else outtype
    file = f"model-{outtype}.gguf"
    with atomic_folder(out) as temporary:
        tensors = write_model(temporary / file, model, outtype)
        write_text(temporary / MODELFILE, modelfile(model.template, file, is_raw=_is_raw(folder)))
        _copy_files(folder, temporary)
    return _summary(folder, out, outtype, tensors)


def _export_lora(
    adapter: Path, out: Path, outtype: str, base: str | None, *, force: bool, trust_remote_code: bool
) -> dict[str, Any]:
    check_untrusted_config(adapter / CONFIG, ())
    check_known_options(adapter / CONFIG, force=force)
    config = source.read_config(adapter, None)
    model = source.build_base(adapter, config, base, force=force, trust_remote_code=trust_remote_code)
    data = source.read_data(adapter, config, base, model)
    peft_model, state = source.attach(adapter, data, model)
    data = data._replace(tensors=finite_copies(adapter, state))
    section = ModelSection(name_or_path=str(adapter))
    template = ChatTemplate(load_tokenizer(section)) if has_tokenizer(section) else None
    if outtype == "auto":
        outtype = stored_outtype(next(iter(data.tensors.values())).dtype)
    file = f"adapter-{outtype}.gguf"
    with atomic_folder(out) as temporary:
        tensors = write_lora(temporary / file, adapter, data, peft_model, outtype)
        text = modelfile(template, file, is_adapter=True, is_raw=_is_raw(adapter))
        write_text(temporary / MODELFILE, text)
        _copy_files(adapter, temporary)
    return _summary(adapter, out, outtype, tensors)


def _is_raw(folder: Path) -> bool:
    """Whether a model was trained on prompts without a chat template."""
    provenance = provenance_of(folder) or {}
    trained = provenance.get("adapter") if "merged" in provenance else provenance
    return isinstance(trained, dict) and trained.get("prompt_format") == "raw"


def _copy_files(source_folder: Path, folder: Path) -> None:
    for file in (file for pattern in COPIED_FILES for file in source_folder.glob(pattern) if file.is_file()):
        shutil.copyfile(file, folder / file.name)


def _summary(folder: Path, out: Path, outtype: str, tensors: Sequence[GgufTensor]) -> dict[str, Any]:
    return {
        "format": GGUF,
        "adapter": str(folder),
        "out": str(out),
        "outtype": outtype,
        "num_tensors": len(tensors),
        "files": sorted(path.name for path in out.iterdir()),
    }
