"""Checkpoints: the adapter, the optimizer's moments and one integer. They know no topology."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lora_accel.config.optimizers import OPTIMIZERS, OptimizerSpec
from lora_accel.distributed.backend import Backend, backend_of
from lora_accel.distributed.collectives import on_all_ranks
from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.faults import fault_point
from lora_accel.model.adapter import trainable_parameters
from lora_accel.saving.adapter import (
    State,
    adapter_parameters,
    gather_adapter,
    read_tensors,
    restore_adapter,
    unwrap_peft_model,
    write_adapter,
    write_tensors,
)
from lora_accel.saving.atomic import atomic_folder, write_json
from lora_accel.saving.discovery import OPTIMIZER, STATE, Checkpoint, prune, step_folders
from lora_accel.saving.provenance import changes, changes_table, is_allowed, options_behind

SPARE_BYTES = 100_000
"""What a checkpoint holds beside its tensors, at most."""


def save_checkpoint(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    state: dict[str, Any],
    *,
    optimizer_name: str = "adamw",
    keep_last: int,
    gather: str = "auto",
    spare: str = "",
) -> Path:
    """Save the state after `state["step"]` steps into `folder/step-…`. Every process calls this.

    Only once the new one counts are older ones deleted.

    Args:
        optimizer_name: `training.optimizer`, which decides what moments there are.
        spare: a checkpoint folder that is never deleted.

    Raises:
        TrainingError: the disk is full, or a process failed; on all of them, and nothing saved before is touched.
    """
    final = folder / f"step-{state['step']:08d}"
    peft_model = unwrap_peft_model(accelerator, model)
    with on_all_ranks(accelerator, f"saving {final.name}"):
        fault_point("save.begin")
    backend, names = backend_of(accelerator), OPTIMIZERS[optimizer_name].moments
    adapter = gather_adapter(accelerator, model, gather=gather)
    moments = _moments(backend, peft_model, optimizer, names, keep=accelerator.is_main_process)
    with on_all_ranks(accelerator, f"saving {final.name}"):
        if accelerator.is_main_process:
            with atomic_folder(final) as temporary:
                write_adapter(peft_model, adapter, temporary)
                write_tensors(temporary / OPTIMIZER, moments)
                write_json(temporary / STATE, state)
            prune(folder, keep_last, spare)
    return final


def check_disk_space(
    accelerator: Accelerator, model: torch.nn.Module, folder: Path, keep_last: int, optimizer_name: str = "adamw"
) -> None:
    """Check that the disk has room for all checkpoints that exist at one time, and for the final adapter.

    Args:
        folder: of the checkpoints; its parent exists.
        keep_last: checkpoints that are kept.

    Raises:
        ConfigError: less is free.
    """
    backend = backend_of(accelerator)
    parameters = adapter_parameters(unwrap_peft_model(accelerator, model)).values()
    num_tensors = 1 + len(OPTIMIZERS[optimizer_name].moments)
    one = num_tensors * 4 * sum(backend.full_shape(p).numel() for p in parameters) + SPARE_BYTES  # float32
    standing = sum(file.lstat().st_size for path in step_folders(folder) for file in path.iterdir())
    needed = max((keep_last + 2) * one - standing, 2 * one)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise ConfigError(
            f"output_dir: {folder.parent} has {free / 1e6:,.1f} MB free, but {keep_last + 1} checkpoints of "
            f"{one / 1e6:,.1f} MB and the adapter need {needed / 1e6:,.1f} MB; make room, or name another folder"
        )


def check_changes(checkpoint: Checkpoint, provenance: dict[str, Any], allowed: list[str]) -> list[str]:
    """Refuse to go on with something else than what the checkpoint was made from.

    Args:
        allowed: `checkpoint.allow_changes`.

    Returns:
        What has changed and is allowed to, a line each.

    Raises:
        ArtifactError: the config, the data or the base differ in what changes the mathematics.
    """
    try:
        differences = changes(checkpoint.state["provenance"], provenance)
    except (KeyError, TypeError, AttributeError):
        raise ArtifactError(f"{checkpoint.folder / STATE}: does not say what it was made from") from None
    refused = [(key, then, now) for key, then, now in differences if not is_allowed(key, allowed)]
    if refused:
        words: list[str] = []
        for key, *_ in refused:
            if not is_allowed(key, words):
                words.append(options_behind(key)[0])
        raise ArtifactError(
            f"{checkpoint.folder} was made from something else (checkpoint -> now):\n{changes_table(refused)}\n"
            "Put these back to resume it, choose another output_dir, or go on with the change: "
            f"'checkpoint.allow_changes=[{', '.join(words)}]'"
        )
    return changes_table(differences).splitlines()


def load_checkpoint(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    checkpoint: Checkpoint,
    *,
    optimizer_name: str = "adamw",
) -> None:
    """Load a checkpoint into a prepared model and optimizer. Every rank calls this.

    Raises:
        ArtifactError: its tensors are not those of this model and optimizer.
    """
    backend, peft_model = backend_of(accelerator), unwrap_peft_model(accelerator, model)
    restore_adapter(peft_model, checkpoint.folder, backend)
    _restore_moments(backend, peft_model, optimizer, checkpoint, OPTIMIZERS[optimizer_name])


def _moments(
    backend: Backend, model: torch.nn.Module, optimizer: torch.optim.Optimizer, names: Sequence[str], *, keep: bool
) -> State:
    """Return the optimizer's moments in full, named `exp_avg.<parameter>` and so on.

    Args:
        keep: whether this rank needs them; every rank must take part.
    """
    moments: State = {}
    for name, parameter in trainable_parameters(model).items():
        for moment in names:
            value = backend.full_moment(optimizer, parameter, moment)
            if keep:
                moments[f"{moment}.{name}"] = value.detach().cpu()
    return moments


def _restore_moments(
    backend: Backend,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    checkpoint: Checkpoint,
    spec: OptimizerSpec,
) -> None:
    file = checkpoint.folder / OPTIMIZER
    saved, trained = read_tensors(file), trainable_parameters(model)
    shapes = {f"{moment}.{name}": backend.full_shape(p) for name, p in trained.items() for moment in spec.moments}
    if {key: tensor.shape for key, tensor in saved.items()} != shapes:
        raise ArtifactError(f"{file}: its tensors are not the moments of the parameters that are trained here")
    for name, tensor in saved.items():
        if tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
            raise ArtifactError(f"{file}: {name} is not finite in float32")
        if name.split(".")[0] in spec.non_negative and (tensor < 0).any():
            raise ArtifactError(f"{file}: {name} is a mean of squares and has negative values")
    moments = {
        parameter: {moment: saved[f"{moment}.{name}"] for moment in spec.moments} for name, parameter in trained.items()
    }
    # Every step updates every parameter once, unless it was skipped.
    num_updates = checkpoint.step - checkpoint.skipped - checkpoint.overflowed
    backend.write_moments(optimizer, num_updates, moments)
