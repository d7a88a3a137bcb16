"""The adapter with which a run begins (`adapter.init_from`): found, checked, and compared with the run's base."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from lora_accel.config.inherited import (
    MODEL_OPTIONS,
    describe_inherited,
    inherit,
    inheritable_options,
    keep_recorded,
)
from lora_accel.config.recorded import with_defaults
from lora_accel.config.schema import ModelSection, RunConfig
from lora_accel.console import Stage
from lora_accel.distributed.backend import Backend
from lora_accel.distributed.collectives import on_all_ranks
from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.logs import logger
from lora_accel.model.prequantized import stored_quantization
from lora_accel.saving.adapter_config import check_untrusted_config
from lora_accel.saving.atomic import read_json, sha256_of
from lora_accel.saving.base_identity import is_same_base
from lora_accel.saving.discovery import CONFIG, STATE
from lora_accel.saving.hub import find_adapter, recorded_name
from lora_accel.saving.lineage import Ancestor, make_lineage, read_lineage, trained_quantized
from lora_accel.saving.provenance import (
    Provenance,
    check_code,
    provenance_of,
    recorded_changes,
)
from lora_accel.saving.tensor_files import AdapterData, tensor_file

FORCE = "set adapter.init_from_force=true"


@dataclasses.dataclass(frozen=True)
class InitialAdapter:
    """The adapter with which a run begins."""

    name: str
    """`adapter.init_from`."""
    lineage: list[Ancestor]
    """The adapter itself, and those from which it descends, newest first."""
    data: AdapterData | None = None
    """None = the run resumes, and the adapter is not here any more, nor needed."""
    folder: Path | None = None
    """With its adapter_config.json; None for a loralib file."""
    provenance: dict[str, Any] | None = None
    """None = it was not saved by this package."""

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of the file with its tensors."""
        return self.lineage[0]["sha256"]


def prepare_initial_adapter(
    config: RunConfig, accelerator: Accelerator, recorded: Mapping[str, Any] | None
) -> tuple[RunConfig, InitialAdapter | None]:
    """Return the run config with the options of the adapter with which the run begins, and that adapter.

    Every rank calls this.

    Args:
        recorded: provenance of the checkpoint to resume from, if that run began with an adapter.

    Raises:
        ConfigError: the config sets an option to another value than the adapter has, or ranks see different adapters.
        ArtifactError: the adapter does not exist, or cannot be used.
        TrainingError: another rank failed.
    """
    if config.adapter.init_from is None:
        return config, None
    stage = "reading adapter.init_from"
    with Stage(stage, enabled=accelerator.is_local_main_process), on_all_ranks(accelerator, stage):
        complete, initial = resolve_initial_adapter(config, recorded)
    assert initial is not None
    hashes = gather_object([initial.sha256])
    if len(set(hashes)) > 1:
        rank = next(rank for rank, sha256 in enumerate(hashes) if sha256 != hashes[0])
        raise ConfigError(
            f"adapter.init_from: ranks 0 and {rank} see different adapters ({hashes[0][:12]}…, {hashes[rank][:12]}…); "
            "give all machines the same files"
        )
    if recorded is None:
        logger.info(
            f"beginning with the weights of {initial.name} (SHA-256 {initial.sha256[:12]}…); its options: "
            f"{describe_inherited(config, complete) or 'those of the config'}"
        )
    return complete, initial


def resolve_initial_adapter(
    config: RunConfig, recorded: Mapping[str, Any] | None = None
) -> tuple[RunConfig, InitialAdapter | None]:
    """Do the same as `prepare_initial_adapter` in one process, without a message.

    A run that resumes needs the adapter no more: if it is not here, its options and its hash are those of the
    checkpoint. One on the Hub is not downloaded again.
    """
    name = config.adapter.init_from
    if name is None:
        return config, None
    if recorded is not None and not os.path.lexists(name) and name == _recorded_name(recorded):
        return keep_recorded(config, recorded["config"]), InitialAdapter(
            name, read_lineage(recorded["init_from"], name)
        )
    with _named():
        initial = _read(config, name)
        changes = None if initial.provenance is None else recorded_changes(initial.provenance, name)
    assert initial.data is not None
    model = None if changes is None else {key: getattr(changes, key) for key in MODEL_OPTIONS}
    options = inheritable_options(initial.data.config)
    return inherit(config, options, model, named_modules=_trained_modules(initial.provenance)), initial


def check_vocabulary(base: torch.nn.Module, initial: InitialAdapter | None, backend: Backend) -> None:
    """Check that a base has the tokens of the adapter with which a run begins.

    Raises:
        ArtifactError: the adapter has more.
    """
    from lora_accel.saving.vocabulary import base_parameter, embedding_modules, saved_rows, trained_rows

    modules = embedding_modules(base)
    if initial is None or initial.data is None or not modules:
        return
    base_rows = {name: backend.full_shape(base_parameter(module))[0] for name, module in modules.items()}
    with _named():
        sizes = saved_rows(base_rows, initial.data.tensors, initial.name)
    size = max([*sizes, *(row + 1 for row in trained_rows(initial.data.config))], default=0)
    if size > max(base_rows.values()):
        raise ArtifactError(
            f"adapter.init_from: {initial.name} has a vocabulary of {size:,} tokens, the base one of "
            f"{max(base_rows.values()):,}; add the same tokens with model.add_tokens, as when it was trained"
        )


@contextlib.contextmanager
def fits_base(initial: InitialAdapter | None, base: torch.nn.Module) -> Iterator[None]:
    """Check that PEFT can match the patterns of the adapter's config in time, and name it if the block raises.

    Raises:
        ArtifactError: a pattern is not allowed, or the options of the adapter do not fit the base.
    """
    if initial is None or initial.data is None:
        yield
        return
    if initial.folder is not None:
        with _named():
            check_untrusted_config(initial.folder / CONFIG, [name for name, _ in base.named_modules()])
    try:
        yield
    except ConfigError as error:
        raise ArtifactError(
            f"adapter.init_from: {initial.name} does not fit {getattr(base, 'name_or_path', 'this base')}: {error}"
        ) from None


def check_origin(initial: InitialAdapter, config: RunConfig, provenance: Provenance) -> None:
    """Check that the adapter with which a run begins was trained on the base of the run. One without provenance passes.

    Logs a note if that was not checked, or if the adapter was trained with another chat template.

    Args:
        provenance: of this run.

    Raises:
        ArtifactError: it was trained on another base, and adapter.init_from_force is not set.
    """
    trained, base = initial.provenance, provenance["base"]
    if trained is None:
        return
    if trained_quantized(trained) and stored_quantization(config.model) is None:
        logger.warning(
            f"note: {initial.name} was trained on quantized weights ({trained['base']['name_or_path']}); whether "
            f"{config.model.name_or_path} is the same model was not checked"
        )
    elif not is_same_base(trained["base"], base["sha256"], lambda: base["tensors_sha256"]):
        difference = (
            f"{initial.name} was not trained on the weights of {config.model.name_or_path}, but on others "
            f"({trained['base']['name_or_path']})"
        )
        if not config.adapter.init_from_force:
            raise ArtifactError(
                f"adapter.init_from: {difference}; set model.name_or_path to that base, or {FORCE} to use this one"
            )
        logger.warning(f"note: adapter.init_from_force: {difference}")
    if trained.get("chat_template_sha256", provenance["chat_template_sha256"]) != provenance["chat_template_sha256"]:
        logger.warning(
            f"note: {initial.name} was trained with another chat template than this run; to use the same one, set "
            "model.chat_template as in its run"
        )


def _recorded_name(recorded: Mapping[str, Any]) -> Any:
    """Return the `adapter.init_from` of a checkpoint."""
    section = with_defaults(recorded["config"]).get("adapter")
    return section.get("init_from") if isinstance(section, dict) else None


def _trained_modules(provenance: Mapping[str, Any] | None) -> Any:
    """Return `adapter.target_modules` of the run that trained an adapter; None if it is not recorded."""
    config = (provenance or {}).get("config")
    section = config.get("adapter") if isinstance(config, dict) else None
    return section.get("target_modules") if isinstance(section, dict) else None


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Name the option in the messages of errors."""
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"adapter.init_from: {error}") from None


def _read(config: RunConfig, name: str) -> InitialAdapter:
    """Find an adapter, check it as far as possible without the base's weights, and read it."""
    from lora_accel.saving import loralib
    from lora_accel.saving.attach import check_adapter_files, check_base_init
    from lora_accel.saving.tensor_files import read_adapter

    adapter = find_adapter(name)
    _check_is_adapter(adapter)
    provenance = provenance_of(adapter)
    check_code(adapter, provenance, config.model, "set model.trust_remote_code=true")
    if loralib.is_loralib(adapter):
        data, folder, file = _read_loralib(config, adapter), None, loralib.tensors_file(adapter)
    else:
        check_adapter_files(adapter, force=config.adapter.init_from_force, way_out=FORCE)
        check_base_init(adapter)
        data, folder, file = (
            AdapterData(read_adapter(adapter), read_json(adapter / CONFIG)),
            adapter,
            tensor_file(adapter),
        )
    step = read_json(adapter / STATE).get("step") if (adapter / STATE).is_file() else None
    recorded, revision = recorded_name(str(adapter), None) if adapter.is_dir() else (os.path.abspath(adapter), None)
    named_base = data.config.get("base_model_name_or_path")
    lineage = make_lineage(recorded, revision, sha256_of(file), base=named_base, provenance=provenance, step=step)
    return InitialAdapter(name, lineage, data, folder, provenance)


def _check_is_adapter(adapter: Path) -> None:
    """Check that a path is not a run, which is easily taken for its adapter.

    Raises:
        ArtifactError: it is one, or does not exist.
    """
    if not os.path.lexists(adapter):
        raise ArtifactError(f"{adapter}: there is no such folder; paths are relative to the working directory")
    inner = adapter / "adapter"
    if not (adapter / CONFIG).exists() and (inner / CONFIG).is_file():
        raise ArtifactError(f"{adapter} is the folder of a run; name its adapter, {inner}")


def _read_loralib(config: RunConfig, adapter: Path) -> AdapterData:
    """Read an adapter in loralib's format, whose names and shapes need those of the base."""
    from lora_accel.model.base import build_on_meta_device
    from lora_accel.model.sizes import load_config
    from lora_accel.saving import loralib

    section = config.adapter
    if adapter.is_dir():
        options = read_json(adapter / loralib.CONFIG_FILE)
    elif "alpha" in section.model_fields_set:
        options = {"lora_alpha": loralib.as_int(section.alpha)}
    else:
        raise ArtifactError(f"{adapter} does not store lora_alpha; set adapter.alpha to the value used in training")
    model = ModelSection.model_validate(config.model.model_dump() | {"add_tokens": None})
    base = build_on_meta_device(load_config(model), trust_remote_code=model.trust_remote_code)
    return loralib.read_loralib(adapter, options, base, config.model.name_or_path)
