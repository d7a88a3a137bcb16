"""Checkpoints: the adapter, the optimizer's moments and one integer. They know no topology."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.faults import reach
from lora_accel.saving import zero
from lora_accel.saving.commit import committed_folder, write_json
from lora_accel.saving.history import OPTIMIZER, STATE, Checkpoint, prune, step_folders
from lora_accel.saving.provenance import changes, changes_table, is_allowed, options_behind
from lora_accel.saving.ranks import together
from lora_accel.saving.weights import (
    State,
    adapter_parameters,
    gather_adapter,
    read_tensors,
    restore_adapter,
    unwrapped,
    write_adapter,
    write_tensors,
)

SPARE_BYTES = 100_000
"""What a checkpoint holds beside its tensors, at most."""


def save_checkpoint(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    state: dict[str, Any],
    *,
    keep_last: int,
    gather: str = "auto",
    spare: str = "",
) -> Path:
    """Save the state after `state["step"]` steps into `folder/step-…`. Every process calls this.

    Only once the new one counts are older ones deleted.

    Args:
        spare: a checkpoint folder that is never deleted.

    Raises:
        TrainingError: the disk is full, or a process failed; on all of them, and nothing saved before is touched.
    """
    final = folder / f"step-{state['step']:08d}"
    peft_model = unwrapped(accelerator, model)
    with together(accelerator, f"saving {final.name}"):
        reach("save.begin")
    adapter = gather_adapter(accelerator, model, gather=gather)
    moments = _moments(peft_model, optimizer, keep=accelerator.is_main_process)
    with together(accelerator, f"saving {final.name}"):
        if accelerator.is_main_process:
            with committed_folder(final) as temporary:
                write_adapter(peft_model, adapter, temporary)
                write_tensors(temporary / OPTIMIZER, moments)
                write_json(temporary / STATE, state)
            prune(folder, keep_last, spare)
    return final


def refuse_full_disk(accelerator: Accelerator, model: torch.nn.Module, folder: Path, keep_last: int) -> None:
    """Refuse to begin where the checkpoints that will stand at once, and the final adapter, find no room.

    Args:
        folder: where checkpoints will be; the folder that it is in exists.

    Raises:
        ConfigError: less is free.
    """
    parameters = adapter_parameters(unwrapped(accelerator, model)).values()
    one = 3 * 4 * sum(zero.whole_shape(p).numel() for p in parameters) + SPARE_BYTES  # float32, with two moments
    standing = sum(file.lstat().st_size for path in step_folders(folder) for file in path.iterdir())
    needed = max((keep_last + 2) * one - standing, 2 * one)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise ConfigError(
            f"output_dir: {folder.parent} has {free / 1e6:,.1f} MB free, but {keep_last + 1} checkpoints of "
            f"{one / 1e6:,.1f} MB and the adapter need {needed / 1e6:,.1f} MB; make room, or name another folder"
        )


def refuse_changes(checkpoint: Checkpoint, provenance: dict[str, Any], allowed: list[str]) -> list[str]:
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
) -> int:
    """Put a checkpoint into a model and its optimizer, both prepared; return the step to go on from.

    Raises:
        ArtifactError: its tensors are not those that this model expects.
    """
    peft_model = unwrapped(accelerator, model)
    restore_adapter(peft_model, checkpoint.folder)
    _restore_moments(peft_model, optimizer, checkpoint)
    return checkpoint.step


def _moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool) -> State:
    """Return Adam's two moments of each trained parameter, named `exp_avg.<parameter>` and so on, whole.

    Args:
        keep: whether this process wants them; under DeepSpeed all must take part.
    """
    moments: State = {}
    for name, parameter in _trained(model).items():
        for moment in zero.MOMENTS:
            if zero.has_master(parameter):
                value = zero.whole_moment(parameter, moment)
            else:
                begun = optimizer.state.get(parameter, {})  # nothing in it before the first update
                value = begun[moment] if begun else torch.zeros_like(parameter, dtype=torch.float32)
            if keep:
                moments[f"{moment}.{name}"] = value.detach().cpu()
    return moments


def _restore_moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    where = checkpoint.folder / OPTIMIZER
    saved, trained = read_tensors(where), _trained(model)
    shapes = {f"{moment}.{name}": zero.whole_shape(p) for name, p in trained.items() for moment in zero.MOMENTS}
    if {key: tensor.shape for key, tensor in saved.items()} != shapes:
        raise ArtifactError(f"{where}: its tensors are not the moments of what is trained here")
    for name, tensor in saved.items():
        if tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
            raise ArtifactError(f"{where}: {name} is not finite in float32")
        if name.startswith("exp_avg_sq.") and (tensor < 0).any():
            raise ArtifactError(f"{where}: {name} is a mean of squares and holds negative values")
    moments = {
        parameter: {moment: saved[f"{moment}.{name}"] for moment in zero.MOMENTS} for name, parameter in trained.items()
    }
    # Each step updates each parameter once, but for those that were skipped: so many updates Adam has counted.
    updates = checkpoint.step - checkpoint.skipped - checkpoint.overflowed
    if any(map(zero.has_master, moments)):
        zero.write_moments(optimizer, updates, moments)
        return
    for parameter, values in moments.items():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(updates), device=parameter.device),
            **{name: value.to(parameter.device, torch.float32, copy=True) for name, value in values.items()},
        }


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
