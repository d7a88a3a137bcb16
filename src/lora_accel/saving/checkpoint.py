"""Checkpoints: the adapter, the optimizer's moments and a small JSON state, independent of backend and rank count."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
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
from lora_accel.saving.adapter import gather_adapter, unwrap_peft_model, write_adapter
from lora_accel.saving.atomic import atomic_folder, sha256_of, sync, write_json
from lora_accel.saving.attach import restore_adapter
from lora_accel.saving.discovery import OPTIMIZER, STATE, WEIGHTS, Checkpoint, prune, step_folder, step_folders
from lora_accel.saving.names import adapter_parameters, saved_shapes
from lora_accel.saving.output_dir import check_exists
from lora_accel.saving.provenance import Provenance, changes, changes_table, is_allowed, options_for_key
from lora_accel.saving.tensor_files import State, read_tensors, write_tensors

METADATA_BYTES = 200_000
"""Upper bound for everything in a checkpoint except its tensors."""


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
    protected: Iterable[str | Path] = (),
) -> Path:
    """Save the state after `state["step"]` steps as `folder/step-…`. Every rank calls this.

    Older checkpoints are deleted only after the new one is committed.

    Args:
        optimizer_name: `training.optimizer`, which determines the moments to save.
        keep_last: number of checkpoints to keep.
        gather: see `gather_adapter`.
        protected: checkpoint folders that are not deleted.

    Returns:
        The new checkpoint's folder.

    Raises:
        TrainingError: on every rank, if the disk is full or a rank failed. Earlier checkpoints are left unchanged.
    """
    final = step_folder(folder, state["step"])
    peft_model = unwrap_peft_model(accelerator, model)
    with on_all_ranks(accelerator, f"saving {final.name}"):
        fault_point("save.begin")
    backend, spec = backend_of(accelerator), OPTIMIZERS[optimizer_name]
    adapter = gather_adapter(accelerator, model, gather=gather)
    moments = _moments(backend, peft_model, optimizer, spec, keep=accelerator.is_main_process)
    with on_all_ranks(accelerator, f"saving {final.name}"):
        if accelerator.is_main_process:
            check_exists(folder.parent)
            hashes: dict[str, str] = {}
            with atomic_folder(final, hashes) as temporary:
                write_adapter(peft_model, adapter, temporary)
                write_tensors(temporary / OPTIMIZER, moments)
                for name in (WEIGHTS, OPTIMIZER):
                    sync(temporary / name)
                    hashes[name] = sha256_of(temporary / name)
                write_json(temporary / STATE, state | {"files": hashes})
            prune(folder, keep_last, protected)
    return final


def check_disk_space(
    accelerator: Accelerator, model: torch.nn.Module, folder: Path, keep_last: int, optimizer_name: str = "adamw"
) -> None:
    """Check that the disk has space for all checkpoints that exist at the same time and for the final adapter.

    Args:
        folder: checkpoint folder; its parent exists.
        keep_last: number of checkpoints to keep.

    Raises:
        ConfigError: there is too little free space.
    """
    backend, peft_model = backend_of(accelerator), unwrap_peft_model(accelerator, model)
    shapes, spec = map(backend.full_shape, adapter_parameters(peft_model).values()), OPTIMIZERS[optimizer_name]
    moment_bytes = sum(moment.num_bytes for shape in shapes for moment in spec.moments_of(shape).values())
    num_saved = sum(shape.numel() for shape in saved_shapes(peft_model, backend).values())
    checkpoint_bytes = 4 * num_saved + moment_bytes + METADATA_BYTES  # float32
    existing = sum(file.lstat().st_size for path in step_folders(folder) for file in path.iterdir())
    needed = max((keep_last + 2) * checkpoint_bytes - existing, 2 * checkpoint_bytes)
    free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free  # it may be a link to another disk
    if free < needed:
        raise ConfigError(
            f"output_dir: {folder.parent} has {free / 1e6:,.1f} MB free, but {keep_last + 1} checkpoints of "
            f"{checkpoint_bytes / 1e6:,.1f} MB and the adapter need {needed / 1e6:,.1f} MB; free up space, or choose "
            "another output_dir"
        )


def check_changes(checkpoint: Checkpoint, provenance: Provenance, allowed: list[str]) -> list[str]:
    """Check that every input that affects the result is the same as in the checkpoint.

    Args:
        allowed: `checkpoint.allow_changes`.

    Returns:
        One line per change that `allowed` covers.

    Raises:
        ArtifactError: something else has changed, or the checkpoint has no valid provenance.
    """
    try:
        differences = changes(checkpoint.state["provenance"], provenance)
    except (KeyError, TypeError, AttributeError):
        raise ArtifactError(f"{checkpoint.folder / STATE}: the provenance is missing or invalid") from None
    rejected = [difference for difference in differences if not is_allowed(difference[0], allowed)]
    if rejected:
        options: list[str] = []
        for key, *_ in rejected:
            if not is_allowed(key, options):
                options.append(options_for_key(key)[0])
        raise ArtifactError(
            f"{checkpoint.folder} was created with different inputs (checkpoint -> now):\n{changes_table(rejected)}\n"
            "Restore them, choose another output_dir, or allow the change and resume: "
            f"'checkpoint.allow_changes=[{', '.join(options)}]'"
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
        ArtifactError: its tensors do not match this model and optimizer.
    """
    backend, peft_model = backend_of(accelerator), unwrap_peft_model(accelerator, model)
    restore_adapter(peft_model, checkpoint.folder, backend)
    _restore_moments(backend, peft_model, optimizer, checkpoint, OPTIMIZERS[optimizer_name])


def _moments(
    backend: Backend, model: torch.nn.Module, optimizer: torch.optim.Optimizer, spec: OptimizerSpec, *, keep: bool
) -> State:
    """Return the optimizer's moments in full, named `exp_avg.<parameter>` and so on.

    Args:
        keep: whether this rank needs them. Reading them is collective, so every rank calls this.
    """
    moments: State = {}
    for name, parameter in trainable_parameters(model).items():
        for moment, (shape, dtype) in spec.moments_of(backend.full_shape(parameter)).items():
            value = backend.full_moment(optimizer, parameter, moment)
            if keep and value is None:
                value = torch.zeros(shape, dtype=getattr(torch, dtype))
            if keep and value is not None:
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
    layouts = {name: spec.moments_of(backend.full_shape(parameter)) for name, parameter in trained.items()}
    expected_moments = {f"{key}.{name}": moment for name, layout in layouts.items() for key, moment in layout.items()}
    shapes = {key: moment.shape for key, moment in expected_moments.items()}
    if {key: tuple(tensor.shape) for key, tensor in saved.items()} != {k: tuple(shape) for k, shape in shapes.items()}:
        names = saved.keys() | shapes.keys()
        name = min(key for key in names if key not in saved or key not in shapes or saved[key].shape != shapes[key])
        found = f"has shape {tuple(saved[name].shape)}" if name in saved else "is missing"
        expected = f"expected is {tuple(shapes[name])}" if name in shapes else "it is not expected"
        raise ArtifactError(
            f"{file}: its tensors are not the moments of the parameters that are trained here: {name} {found}, "
            f"{expected}"
        )
    for name, tensor in saved.items():
        dtype = expected_moments[name].dtype
        if tensor.dtype != getattr(torch, dtype) or not torch.isfinite(tensor).all():
            raise ArtifactError(f"{file}: {name} is not {dtype}, or not finite")
        if name.split(".")[0] in spec.non_negative and (tensor < 0).any():
            raise ArtifactError(f"{file}: {name} has negative values, which this moment cannot have")
    moments = {
        parameter: {moment: saved[f"{moment}.{name}"] for moment in layouts[name]}
        for name, parameter in trained.items()
    }
    # Every step updates every parameter once, unless the step was skipped.
    num_updates = checkpoint.step - checkpoint.skipped - checkpoint.overflowed
    backend.write_moments(optimizer, num_updates, moments, has_int_step=spec.has_int_step)
