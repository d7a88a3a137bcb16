"""Checkpoints: the adapter, the optimizer's moments and one integer. They know no topology."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from lora_accel.errors import ArtifactError
from lora_accel.saving import zero
from lora_accel.saving.commit import committed_folder, why_invalid, write_json
from lora_accel.saving.provenance import changes, changes_table
from lora_accel.saving.weights import (
    State,
    gather_adapter,
    read_tensors,
    restore_adapter,
    unwrapped,
    write_adapter,
)

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"


class Checkpoint(NamedTuple):
    """A checkpoint on disk whose manifest holds."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Return how many steps were done."""
        return int(self.state["step"])


def save_checkpoint(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    state: dict[str, Any],
    *,
    keep_last: int,
    gather: str = "auto",
) -> Path:
    """Save the state after `state["step"]` steps into `folder/step-…`. Every process calls this.

    Only once the new one counts are older ones deleted.
    """
    final = folder / f"step-{state['step']:08d}"
    peft_model = unwrapped(accelerator, model)
    adapter = gather_adapter(accelerator, model, gather=gather)
    moments = _moments(peft_model, optimizer, keep=accelerator.is_main_process)
    if accelerator.is_main_process:
        with committed_folder(final) as temporary:
            write_adapter(peft_model, adapter, temporary)
            save_file(moments, temporary / OPTIMIZER)
            write_json(temporary / STATE, state)
        for old in _step_folders(folder)[:-keep_last]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def find_checkpoint(folder: Path, resume: str) -> tuple[Checkpoint | None, list[str]]:
    """Find what to go on from.

    Args:
        folder: the run's checkpoints.
        resume: auto = the newest valid one | never | a checkpoint folder.

    Returns:
        The checkpoint, or None to begin afresh; and what was wrong with newer ones that are passed over.

    Raises:
        ArtifactError: the named one cannot be used, every one is damaged, or `never` meets a folder that has some.
    """
    if resume not in ("auto", "never"):
        named = Path(resume)
        if not named.is_dir():
            raise ArtifactError(
                f"checkpoint.resume: {resume} is no folder; say auto, never, or a folder of checkpoints/"
            )
        if reason := why_invalid(named):
            raise ArtifactError(f"checkpoint.resume: {resume} cannot be used: {reason}")
        return _open(named), []
    candidates = _step_folders(folder)
    if resume == "never" and candidates:
        raise ArtifactError(
            f"checkpoint.resume=never, but {folder} holds {len(candidates)} checkpoints; "
            "choose another output_dir, or delete them"
        )
    damaged: list[str] = []
    for candidate in reversed(candidates):
        reason = why_invalid(candidate)
        if reason is None:
            return _open(candidate), damaged
        damaged.append(f"{candidate.name}: {reason}")
    if damaged:
        raise ArtifactError(
            f"{folder}: every checkpoint is damaged, and beginning afresh would write over them; choose another "
            "output_dir, or move them away\n" + "\n".join(f"  {line}" for line in damaged)
        )
    return None, []


def refuse_changes(checkpoint: Checkpoint, provenance: dict[str, Any]) -> None:
    """Refuse to go on with something else than what the checkpoint was made from.

    Raises:
        ArtifactError: the config, the data or the base differ in what changes the mathematics.
    """
    differences = changes(checkpoint.state["provenance"], provenance)
    if differences:
        raise ArtifactError(
            f"{checkpoint.folder} was made from something else (checkpoint -> now):\n{changes_table(differences)}\n"
            "Put these back to resume it, or choose another output_dir."
        )


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


def _step_folders(folder: Path) -> list[Path]:
    """Return the folders that may be checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _open(folder: Path) -> Checkpoint:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return Checkpoint(folder, state | {"step": int(state["step"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / STATE}: cannot be read: {error!r}") from None


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
                value = optimizer.state[parameter][moment]
            if keep:
                moments[f"{moment}.{name}"] = value.detach().cpu()
    return moments


def _restore_moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    where = checkpoint.folder / OPTIMIZER
    saved, trained = read_tensors(where), _trained(model)
    shapes = {f"{moment}.{name}": zero.whole_shape(p) for name, p in trained.items() for moment in zero.MOMENTS}
    if {key: tensor.shape for key, tensor in saved.items()} != shapes:
        raise ArtifactError(f"{where}: its tensors are not the moments of what is trained here")
    moments = {
        parameter: {moment: saved[f"{moment}.{name}"] for moment in zero.MOMENTS} for name, parameter in trained.items()
    }
    # Each step updates each parameter once, so Adam's own count is the step.
    if any(map(zero.has_master, moments)):
        zero.write_moments(optimizer, checkpoint.step, moments)
        return
    for parameter, values in moments.items():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(checkpoint.step), device=parameter.device),
            **{name: value.to(parameter.device, torch.float32, copy=True) for name, value in values.items()},
        }


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
