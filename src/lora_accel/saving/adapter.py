"""Select, gather, save and load the tensors of an adapter."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors.torch import save

from lora_accel.config.adapter_options import subtracts_initial_adapter
from lora_accel.distributed.backend import Backend, ReplicatedBackend, backend_of
from lora_accel.distributed.collectives import on_all_ranks
from lora_accel.errors import ArtifactError, TrainingError, first_line
from lora_accel.faults import fault_point
from lora_accel.model.initial_adapter import (
    has_initial_adapter,
    initial_names,
    join_initial,
    joined_config,
    joined_shape,
    split_initial,
)
from lora_accel.saving.atomic import MANIFEST, atomic_folder, read_json, write_json
from lora_accel.saving.discovery import CONFIG, WEIGHTS
from lora_accel.saving.hub import recorded_name
from lora_accel.saving.matching import (
    AdapterTensors,
    State,
    check_converted_config,
    embedding_rows,
    match_tensors,
    resize_vocabulary,
    write_embeddings,
)
from lora_accel.saving.untrusted import (
    check_known_options,
    check_tensors,
    check_untrusted_config,
    read_pickle,
    read_tensors,
)

PICKLED = "adapter_model.bin"
BASE_PRESERVING_INITS = ("gaussian", "orthogonal", "eva", "mica")
"""Values of init_lora_weights that do not change the base's weights, besides true and false."""
REPEATABLE_INITS = ("pissa", "olora")
"""Values that change them, as a function of the weights alone: PEFT repeats the change when it attaches the adapter."""


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


def load_adapter(
    base: torch.nn.Module, folder: str | Path, *, trainable: bool = False, force: bool = False
) -> PeftModel:
    """Load a saved adapter onto a base model. The file must contain exactly the adapter's tensors.

    Args:
        trainable: whether the adapter's parameters require gradients; otherwise the model is in eval mode.
        force: whether to ignore options of adapter_config.json that the installed PEFT does not know.

    Raises:
        ArtifactError: the folder is not an adapter, its config is not allowed (see untrusted.py), or its tensors do not
            match this base.
    """
    folder = Path(folder)
    check_adapter_files(folder, force=force)
    tensors = read_adapter(folder)
    base_rows = embedding_rows(base)
    resize_vocabulary(base, folder, tensors)
    model = attach_adapter(base, folder, trainable=trainable)
    # PEFT's from_pretrained would load base tensors from the file over the base, and only warn afterwards.
    matched = match_adapter(model, tensors, str(folder))
    write_embeddings(model, matched.embeddings, base_rows, folder)
    for key, parameter in adapter_parameters(model).items():
        ReplicatedBackend().write_parameter(parameter, matched.trained[key])
    return model if trainable else model.eval()


def match_adapter(
    model: PeftModel, tensors: Mapping[str, torch.Tensor], where: str, backend: Backend | None = None
) -> AdapterTensors:
    """Match the tensors of an adapter's file with a model that has the adapter; see `match_tensors`.

    Args:
        model: may be on the meta device.
        tensors: of the file.
        where: the adapter's folder, for messages.
        backend: None = the model is neither wrapped nor sharded.

    Raises:
        ArtifactError: they do not match.
    """
    return match_tensors(model, tensors, saved_shapes(model, backend), where)


def attach_adapter(
    base: torch.nn.Module,
    folder: Path,
    *,
    name: str = "default",
    trainable: bool = False,
    on_meta_device: bool = False,
) -> PeftModel:
    """Add an adapter with a saved config to a base model. Does not load the adapter's tensors.

    Args:
        base: the base model, or a PeftModel that gets one more adapter.
        name: the adapter's name in PEFT.
        on_meta_device: whether the base is on the meta device, so that nothing can be computed from its weights.

    Raises:
        ArtifactError: the config is not allowed, PEFT rejects it, or training began with a change of the base that
            cannot be repeated.
    """
    inner = base.get_base_model() if isinstance(base, PeftModel) else base
    check_untrusted_config(folder / CONFIG, [module for module, _ in inner.named_modules()])
    _check_base_init(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = not trainable
        if on_meta_device:
            config.init_lora_weights = False
        if isinstance(base, PeftModel):
            base.add_adapter(name, config)
            base.set_adapter(name)
            model = base
        else:
            with warnings.catch_warnings():
                # PEFT adds these patterns when it converts experts, and then looks for them among modules only.
                warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys .*gate_up_proj")
                model = get_peft_model(base, config, adapter_name=name, autocast_adapter_dtype=True)
    except Exception as error:  # PEFT and torch raise many types of errors for invalid values
        raise ArtifactError(f"{folder}: does not fit this base: {first_line(error)}") from None
    check_converted_config(model, read_json(folder / CONFIG), str(folder))
    return model


def keeps_base_weights(folder: Path) -> bool:
    """Whether PEFT attaches an adapter without changing the base's weights. PiSSA, OLoRA and KaSA change them."""
    config = read_json(folder / CONFIG)
    return config.get("init_lora_weights") not in REPEATABLE_INITS and not config.get("kasa_config")


def adapter_names(model: PeftModel, bias: str) -> list[str]:
    """Return the names of an adapter's parameters, in the model's order.

    They are LoRA's own tensors, `modules_to_save`, and biases.

    Args:
        bias: all = every parameter named `bias` | lora_only = those of layers with LoRA, which PEFT names
            `….base_layer.bias` | none.
    """
    added = _added_names(model)
    own = {name for name in added if model.active_adapter in name.split(".")}
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")} - added
    if bias == "none":
        biases = set()
    elif bias == "lora_only":
        biases = {name for name in biases if name.endswith(".base_layer.bias")}
    names = own | biases
    return [name for name, _ in model.named_parameters() if name in names]


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
    for key, name in _keys(model, list(state)).items():
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


def read_adapter(folder: Path) -> State:
    """Read an adapter's tensors by their names in the file. Their data is mapped into memory, and read when it is used.

    Raises:
        ArtifactError: the folder is not an adapter, its file cannot be read, or a tensor has a dtype or layout that no
            adapter has. An older `adapter_model.bin`, a pickle, is read without running code.
    """
    path = tensor_file(folder)
    tensors = read_pickle(path) if path.name == PICKLED else read_tensors(path)
    check_tensors(path, tensors)
    return tensors


def tensor_file(folder: Path) -> Path:
    """Return the file with an adapter's tensors: safetensors, or else an older pickle.

    Raises:
        ArtifactError: the folder is not an adapter.
    """
    path = folder / WEIGHTS
    if (folder / CONFIG).is_file() and not path.exists() and (folder / PICKLED).is_file():
        path = folder / PICKLED
    for name in (CONFIG, path.name):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder}: is not an adapter: {name} is missing")
    return path


def check_adapter_files(folder: Path, *, force: bool = False) -> None:
    """Check an adapter as far as possible without its base: its files, its config, and the kinds of its tensors.

    Args:
        force: whether to ignore options of adapter_config.json that the installed PEFT does not know.

    Raises:
        ArtifactError: the adapter cannot be used.
    """
    read_adapter(folder)
    check_untrusted_config(folder / CONFIG, ())
    check_known_options(folder / CONFIG, force=force)


def write_tensors(path: Path, tensors: State) -> None:
    """Write a safetensors file. It is serialized in memory first, so that a full disk raises OSError."""
    data = memoryview(save(tensors, metadata={"format": "pt"}))
    half = len(data) // 2
    with path.open("wb") as file:
        file.write(data[:half])
        file.flush()
        fault_point("save.mid_file")
        file.write(data[half:])


def restore_adapter(model: PeftModel, folder: Path, backend: Backend | None = None) -> None:
    """Load saved weights into the adapter that a model already has. Every rank calls this.

    Args:
        backend: None = the model is neither wrapped nor sharded.

    Raises:
        ArtifactError: the file's tensors do not match this adapter.
    """
    backend = backend or ReplicatedBackend()
    is_joined = _is_joined(model, folder)
    expected = saved_shapes(model, backend, joined=is_joined)
    trained, embeddings = match_tensors(model, read_adapter(folder), expected, str(folder))
    if embeddings:
        raise ArtifactError(f"{folder}: contains {min(embeddings)} of the base, which is not restored here")
    parameters = dict(model.named_parameters())
    for key, name in _saved_names(model).items():
        values = split_initial(name, trained[key], model.active_adapter) if is_joined else {name: trained[key]}
        for own_name, value in values.items():
            backend.write_parameter(parameters[own_name], value)


def adapter_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Return an adapter's trained parameters by their names in the file."""
    parameters = dict(model.named_parameters())
    return {key: parameters[name] for key, name in _saved_names(model).items()}


def saved_shapes(
    model: PeftModel, backend: Backend | None = None, *, joined: bool | None = None
) -> dict[str, torch.Size]:
    """Return the shapes of an adapter's tensors by their names in the file.

    Args:
        backend: None = the model is neither wrapped nor sharded.
        joined: whether the file has the frozen adapter, too; None = if the model has one.
    """
    backend, parameters = backend or ReplicatedBackend(), dict(model.named_parameters())
    shapes = {key: (name, backend.full_shape(parameters[name])) for key, name in _saved_names(model).items()}
    if not (has_initial_adapter(model) if joined is None else joined):
        return {key: shape for key, (_, shape) in shapes.items()}
    return {key: joined_shape(name, shape, model.active_adapter) for key, (name, shape) in shapes.items()}


def check_all_trained_is_saved(model: PeftModel) -> None:
    """Check that saving the adapter would include every trained parameter. Cheap, so it runs before the first step.

    Raises:
        ArtifactError: a trained parameter is not part of the adapter, or PEFT would omit one.
    """
    saved = {id(parameter) for parameter in adapter_parameters(model).values()}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in saved]
    if lost:
        raise ArtifactError(f"adapter: {len(lost)} parameters would be trained and not saved, {lost[0]} among them")


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


def _added_names(model: PeftModel) -> set[str]:
    """Return the names of all parameters that PEFT added, for any adapter, including copies of saved modules."""
    return {
        f"{layer}.{name}"
        for layer, module in model.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        for name, _ in module.named_parameters()
        if "base_layer" not in name.split(".")
    }


def _saved_names(model: PeftModel) -> dict[str, str]:
    """Return name in the file -> name of the trained parameter."""
    return _keys(model, adapter_names(model, model.active_peft_config.bias))


def _keys(model: PeftModel, names: list[str]) -> dict[str, str]:
    """Return name in the file -> parameter name. PEFT may save tied parameters under both names."""
    # PEFT renames tensors, so pass numbers instead and see which name each one gets.
    numbers = _peft_state(model, {name: torch.tensor(number) for number, name in enumerate(names)})
    keys = {key: names[int(number)] for key, number in numbers.items()}
    lost = sorted(set(names) - set(keys.values()))
    if lost:
        kept = len(names) - len(lost)
        raise ArtifactError(f"adapter: PEFT saves {kept} of {len(names)} tensors of this adapter, and not {lost[0]}")
    return keys


def _peft_state(model: PeftModel, state: Mapping[str, torch.Tensor]) -> State:
    """Return tensors under the names that PEFT uses in a file."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first[id(parameter)] in state:  # tied: PEFT looks for it under every name
            state = {name: state[first[id(parameter)]], **state}
    # `state` is already complete. PEFT would drop biases of the base according to its config, or duplicate one, so they
    # are added afterwards. save_embedding_layers="auto" would query the Hub.
    added = _added_names(model)
    biases = {name: tensor for name, tensor in state.items() if name.endswith(".bias") and name not in added}
    config = model.active_peft_config
    trained_with, config.bias = config.bias, "none"
    try:
        named: State = get_peft_model_state_dict(
            model,
            state_dict={name: tensor for name, tensor in state.items() if name not in biases},
            adapter_name=model.active_adapter,
            save_embedding_layers=False,
        )
    finally:
        config.bias = trained_with
    return named | biases


def _is_joined(model: PeftModel, folder: Path) -> bool:
    """Whether a checkpoint has the frozen adapter, too. Earlier versions changed the base instead.

    Raises:
        ArtifactError: it has not, and the initialization was random.
    """
    init = read_json(folder / CONFIG).get("init_lora_weights", True)
    if not subtracts_initial_adapter(init):
        return has_initial_adapter(model)
    if has_initial_adapter(model) and init not in REPEATABLE_INITS:
        raise ArtifactError(
            f"{folder}: an earlier version saved it without the values of its initialization ({init}), which is "
            "random, so it cannot be resumed; choose another output_dir"
        )
    return False


def _check_base_init(folder: Path) -> None:
    """Check that the adapter's initialization left the base's weights unchanged, or can be repeated."""
    init = read_json(folder / CONFIG).get("init_lora_weights", True)
    if isinstance(init, str) and init not in (*BASE_PRESERVING_INITS, *REPEATABLE_INITS):
        raise ArtifactError(
            f"{folder / CONFIG}: init_lora_weights={init!r} changed the base's weights when training began, in a way "
            "that cannot be repeated; convert the adapter where it was trained (PEFT's save_pretrained, "
            "path_initial_model_for_weight_conversion)"
        )


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
