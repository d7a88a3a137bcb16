"""Gather and save the tensors of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel

from lora_accel.distributed.backend import backend_of
from lora_accel.distributed.collectives import on_all_ranks
from lora_accel.errors import ArtifactError, TrainingError
from lora_accel.model.initial_adapter import has_initial_adapter, initial_names, join_initial, joined_config
from lora_accel.saving.atomic import MANIFEST, atomic_folder, write_json
from lora_accel.saving.discovery import CONFIG, WEIGHTS
from lora_accel.saving.hub import recorded_name
from lora_accel.saving.names import adapter_names, names_in_file
from lora_accel.saving.tensor_files import State, read_adapter, write_tensors


def save_adapter(
    accelerator: Accelerator,
    model: torch.nn.Module,
    folder: str | Path,
    *,
    bias: str | None = None,
    gather: str = "auto",
) -> None:
    """Save the adapter of a model to a folder that `PeftModel.from_pretrained` can load. Every rank calls this.

    Works in any Accelerate script. The write is atomic, and the files are read back and compared.

    Args:
        model: a PeftModel, or what `accelerator.prepare` returned for it.
        folder: a new folder, or one with an adapter saved before, which is replaced.
        bias: none, all or lora_only; None = the value in the adapter's config.
        gather: auto, state_dict or parameters; see `gather_adapter`.

    Raises:
        ArtifactError: the folder contains other files, an argument is invalid, a tensor is empty or missing, or the
            files read back differ.
        TrainingError: a disk is full, a tensor is not finite, or another rank failed.
    """
    final = Path(folder).resolve()
    _check_replaceable(final)
    state = gather_adapter(accelerator, model, bias=bias, gather=gather)
    with on_all_ranks(accelerator, f"saving {final.name}"):
        if accelerator.is_main_process:
            with atomic_folder(final) as temporary:
                write_adapter(unwrap_peft_model(accelerator, model), state, temporary, bias=bias)


def gather_adapter(
    accelerator: Accelerator, model: torch.nn.Module, *, bias: str | None = None, gather: str = "auto"
) -> State:
    """Gather an adapter's full tensors on the CPU, by parameter name. Every rank calls this.

    Args:
        bias: none, all or lora_only; None = the value in the adapter's config.
        gather: state_dict = `accelerator.get_state_dict`, which under DeepSpeed also copies the base model, and under
            ZeRO-3 gathers it on one rank | parameters = only the tensors to save | auto = parameters under DeepSpeed,
            else state_dict, which then copies nothing. Both return ZeRO's float32 masters where there are any.

    Returns:
        The tensors on the main process, an empty dict on the others.

    Raises:
        ArtifactError: an argument is invalid, or the model has no adapter.
    """
    if bias not in (None, "none", "all", "lora_only"):
        raise ArtifactError(f"bias={bias!r}: use none, all or lora_only")
    if gather not in ("auto", "state_dict", "parameters"):
        raise ArtifactError(f"gather={gather!r}: use auto, state_dict or parameters")
    peft_model = unwrap_peft_model(accelerator, model)
    parameters = dict(peft_model.named_parameters())
    names = adapter_names(peft_model, bias or peft_model.active_peft_config.bias) + initial_names(peft_model)
    remaining = {name: parameters[name] for name in names}
    backend = backend_of(accelerator)
    if gather == "auto":
        gather = backend.default_gather
    state: State = {}
    if gather == "state_dict":
        full = accelerator.get_state_dict(model)  # None on the other ranks under ZeRO-3
        if accelerator.is_main_process:
            full = {name.removeprefix("_orig_mod."): tensor for name, tensor in full.items()}  # torch.compile's prefix
            state = {name: _on_cpu(full[name]) for name in names}
        del full
        remaining = {name: parameter for name, parameter in remaining.items() if backend.has_master(parameter)}
    for name, tensor in backend.full_parameters(remaining):
        if accelerator.is_main_process:
            state[name] = _on_cpu(tensor)
    return state


def write_adapter(model: PeftModel, state: State, folder: Path, *, bias: str | None = None) -> None:
    """Write a gathered adapter into an existing folder, read it back and compare.

    An adapter that is trained with a frozen one (model/initial_adapter.py) is written as the sum of both.

    Raises:
        ArtifactError: a tensor is empty, PEFT would omit one, or the file read back differs.
        TrainingError: a tensor is not finite.
    """
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    if empty:
        raise ArtifactError(f"{folder}: {len(empty)} tensors are empty, {empty[0]} among them; they were not gathered")
    not_finite = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if not_finite:
        raise TrainingError(
            f"{not_finite[0]} is not finite after the update, so it is not saved; lower the learning rate"
        )
    saved: State = {}
    state = join_initial(state, model.active_adapter)
    for key, name in names_in_file(model, list(state)).items():
        is_tied = any(state[name] is tensor for tensor in saved.values())  # saved under both names
        saved[key] = state[name].clone() if is_tied else state[name]
    write_tensors(folder / WEIGHTS, saved)

    write_json(folder / CONFIG, saved_config(model, bias=bias))

    written = read_adapter(folder)
    if written.keys() != saved.keys() or any(not torch.equal(written[name], saved[name]) for name in saved):
        raise ArtifactError(f"{folder}: {WEIGHTS} differs from what was written; check the disk")


def saved_config(model: PeftModel, *, bias: str | None = None) -> dict[str, Any]:
    """Return the PEFT config with which a model's adapter is saved, as JSON values.

    Args:
        bias: see `gather_adapter`.
    """
    config = model.active_peft_config.to_dict()
    config |= {"inference_mode": True, "bias": bias or config["bias"]}
    if base := config.get("base_model_name_or_path"):
        config["base_model_name_or_path"], config["revision"] = recorded_name(base, config.get("revision"))
    if has_initial_adapter(model):
        config = joined_config(config)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(config.items())}


def unwrap_peft_model(accelerator: Accelerator, model: torch.nn.Module) -> PeftModel:
    """Return the PeftModel inside the wrapper of DDP, DeepSpeed or torch.compile.

    Raises:
        ArtifactError: the model has no adapter, or layers inside it were replaced by compiled ones.
    """
    inner = accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)
    if not isinstance(inner, PeftModel):
        raise ArtifactError(f"a {type(inner).__name__} has no adapter; create one with peft.get_peft_model")
    if any("_orig_mod" in name.split(".") for name, _ in inner.named_parameters()):
        raise ArtifactError(
            "layers inside the model were replaced by compiled ones, so PEFT would not find their tensors on loading; "
            "compile them in place (module.compile()), or compile the full model"
        )
    return inner


def _check_replaceable(folder: Path) -> None:
    """Check that a folder can be replaced without losing anything but an adapter."""
    if not folder.exists():
        return
    if not folder.is_dir() or Path.cwd().is_relative_to(folder):
        kind = "the working directory" if folder.is_dir() else "a file"
        raise ArtifactError(f"{folder}: is {kind}; choose a new folder")
    others = sorted({path.name for path in folder.iterdir()} - {WEIGHTS, CONFIG, MANIFEST})
    if others:
        raise ArtifactError(
            f"{folder}: contains other files that would be lost, {others[0]} among them; choose a new folder"
        )


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
