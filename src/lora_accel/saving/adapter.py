"""What of a model is saved (names), how it is collected (gather), written, and compared with what was meant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from lora_accel.distributed.backend import Backend, ReplicatedBackend, backend_of
from lora_accel.distributed.collectives import on_all_ranks
from lora_accel.errors import ArtifactError, TrainingError
from lora_accel.faults import fault_point
from lora_accel.saving.atomic import MANIFEST, atomic_folder, read_json, write_json
from lora_accel.saving.discovery import CONFIG, WEIGHTS
from lora_accel.saving.untrusted import check_untrusted_config, read_pickle

State = dict[str, torch.Tensor]
PICKLED = "adapter_model.bin"
PREFIX = "base_model.model."
"""What PEFT puts before the base's names."""
ITS_OWN = "are these the base and the adapter_config.json that it was trained with?"
UNCHANGING = ("gaussian", "orthogonal", "eva")
"""Ways to begin (init_lora_weights) that leave the base's weights alone, beside true and false."""
REPEATABLE = ("pissa", "olora")
"""Ways that change them, by a function of the weights alone: PEFT does it again when it puts the adapter on."""


def save_adapter(
    accelerator: Accelerator,
    model: torch.nn.Module,
    folder: str | Path,
    *,
    bias: str | None = None,
    gather: str = "auto",
) -> None:
    """Save the adapter of a model into a folder that `PeftModel.from_pretrained` loads. Every process calls this.

    Works in any Accelerate script. The folder appears whole or not at all, and what was written has been read back.

    Args:
        model: a PeftModel, or what `accelerator.prepare` made of it.
        bias: none, all or lora_only; None = as the adapter's config says.
        gather: auto, state_dict or parameters: see `gather_adapter`.

    Raises:
        ArtifactError: the folder holds anything else than an adapter saved before, an argument is none of these, or a
            tensor is empty or missing, or was not written as it is.
        TrainingError: a disk is full, a tensor is not finite, or another process has failed.
    """
    final = Path(folder).resolve()
    _refuse_to_replace(final)
    state = gather_adapter(accelerator, model, bias=bias, gather=gather)
    with on_all_ranks(accelerator, f"saving {final.name}"):
        if accelerator.is_main_process:
            with atomic_folder(final) as temporary:
                write_adapter(unwrap_peft_model(accelerator, model), state, temporary, bias=bias)


def load_adapter(base: torch.nn.Module, folder: str | Path, *, trainable: bool = False) -> PeftModel:
    """Put a saved adapter on a base model, every tensor accounted for.

    Raises:
        ArtifactError: the folder holds no adapter, its config is out of bounds (foreign.py), or its tensors are not
            those that this base expects.
    """
    folder = Path(folder)
    state = read_adapter(folder)
    rows = {name: len(weight) for name, weight in _embeddings(base).items()}
    resize_vocabulary(base, state)
    model = attach_adapter(base, folder, trainable=trainable)
    # PEFT's own from_pretrained would load base tensors that stand in the file over the base, and tell afterwards.
    for name, tensor in pop_base_embeddings(model, state).items():
        weight = _base_parameter(model, name).data
        check_same_embeddings(weight[: rows[name.removesuffix(".weight")]], tensor, f"{folder}: {name}")
        weight.copy_(tensor)
    _restore(model, state, str(folder), ReplicatedBackend())
    return model if trainable else model.eval()


def attach_adapter(
    base: torch.nn.Module,
    folder: Path,
    *,
    name: str = "default",
    trainable: bool = False,
    on_meta_device: bool = False,
) -> PeftModel:
    """Put the adapter that a saved config describes on a base model; its tensors are still to come.

    Args:
        base: or a PeftModel, which then has one more.
        on_meta_device: the base has none, so nothing can be computed from its weights.

    Raises:
        ArtifactError: the config is out of bounds, PEFT refuses it, or it says that training began with a change of
            the base that cannot be repeated.
    """
    inner = base.get_base_model() if isinstance(base, PeftModel) else base
    check_untrusted_config(folder / CONFIG, [module for module, _ in inner.named_modules()])
    _refuse_changed_base(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = not trainable
        if on_meta_device:
            config.init_lora_weights = False
        if isinstance(base, PeftModel):
            base.add_adapter(name, config)
            base.set_adapter(name)
            return base
        return get_peft_model(base, config, adapter_name=name, autocast_adapter_dtype=True)
    except Exception as error:  # PEFT and torch raise many kinds at what a config may say
        raise ArtifactError(f"{folder}: does not fit this base: {_first_line(error)}") from None


def keeps_base_weights(folder: Path) -> bool:
    """Whether PEFT puts an adapter on without changing the base's weights first, as PiSSA and OLoRA do."""
    return read_json(folder / CONFIG).get("init_lora_weights") not in REPEATABLE


def resize_vocabulary(base: torch.nn.Module, state: State) -> None:
    """Give a base as many tokens as the embeddings in an adapter's file have."""
    for name, weight in _embeddings(base).items():
        rows = [state[key].shape[0] for key in _plain_keys(name) if key in state]
        rows += [state[key].shape[1] for key in (f"{PREFIX}{name}.lora_embedding_A",) if key in state]
        if rows and rows[0] != len(weight):
            base.resize_token_embeddings(rows[0], mean_resizing=False)  # type: ignore[operator]


def pop_base_embeddings(model: PeftModel, state: State) -> State:
    """Take the base's own embeddings out of an adapter's tensors; return them by their names in the base.

    PEFT saves them beside the adapter where the vocabulary was resized.
    """
    trained = adapter_parameters(model).keys()
    found = {
        f"{name}.weight": key
        for name in _embeddings(model.get_base_model())
        for key in _plain_keys(name)
        if key in state and key not in trained
    }
    return {name: state.pop(key) for name, key in found.items()}


def check_same_embeddings(base: torch.Tensor, saved: torch.Tensor, where: str) -> None:
    """Refuse embeddings in an adapter's file that are not those of the base, as far as both reach."""
    rows, coarse = min(len(base), len(saved)), min(base.dtype, saved.dtype, key=lambda dtype: dtype.itemsize)
    if base.shape[1:] != saved.shape[1:] or not torch.equal(base[:rows].cpu().to(coarse), saved[:rows].to(coarse)):
        raise ArtifactError(
            f"{where}: the embeddings saved with the adapter are not those of this base, though they were not trained; "
            "is this the base that it was trained on? (What is trained belongs into modules_to_save.)"
        )


def adapter_names(model: PeftModel, bias: str) -> list[str]:
    """Return the names of the parameters that an adapter consists of, in the model's order.

    LoRA's own tensors and `modules_to_save` always; biases by the rule, chosen by their exact names: `all` = every
    parameter called bias; `lora_only` = those of the layers that carry LoRA, which PEFT calls `….base_layer.bias`;
    `none` = not one.
    """
    added = _added_names(model)
    own = {name for name in added if model.active_adapter in name.split(".")}
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")} - added
    if bias == "none":
        biases = set()
    elif bias == "lora_only":
        biases = {name for name in biases if name.endswith(".base_layer.bias")}
    chosen = own | biases
    return [name for name, _ in model.named_parameters() if name in chosen]


def gather_adapter(
    accelerator: Accelerator, model: torch.nn.Module, *, bias: str | None = None, gather: str = "auto"
) -> State:
    """Collect an adapter's tensors, whole and on the CPU, by parameter name. Every process calls this.

    Args:
        gather: state_dict = `accelerator.get_state_dict`, which under DeepSpeed copies the whole base too, and under
            ZeRO-3 collects it on one rank | parameters = only the tensors that are saved | auto = parameters under
            DeepSpeed, else state_dict, which then copies nothing. Both give float32 masters where ZeRO holds some.

    Returns:
        The tensors on the main process, nothing on the others.
    """
    if bias not in (None, "none", "all", "lora_only"):
        raise ArtifactError(f"bias={bias!r}: say none, all or lora_only")
    if gather not in ("auto", "state_dict", "parameters"):
        raise ArtifactError(f"gather={gather!r}: say auto, state_dict or parameters")
    peft_model = unwrap_peft_model(accelerator, model)
    every = dict(peft_model.named_parameters())
    wanted = {name: every[name] for name in adapter_names(peft_model, bias or peft_model.active_peft_config.bias)}
    backend = backend_of(accelerator)
    if gather == "auto":
        gather = backend.default_gather
    state: State = {}
    if gather == "state_dict":
        full = accelerator.get_state_dict(model)  # None on the other ranks under ZeRO-3
        if accelerator.is_main_process:
            full = {name.removeprefix("_orig_mod."): tensor for name, tensor in full.items()}  # torch.compile's prefix
            state = {name: _on_cpu(full[name]) for name in wanted}
        del full
        wanted = {name: parameter for name, parameter in wanted.items() if backend.has_master(parameter)}
    for name, tensor in backend.full_parameters(wanted):
        if accelerator.is_main_process:
            state[name] = _on_cpu(tensor)
    return state


def write_adapter(model: PeftModel, state: State, folder: Path, *, bias: str | None = None) -> None:
    """Write a gathered adapter into an existing folder, read it back and compare.

    Raises:
        ArtifactError: a tensor is empty, PEFT would leave one out, or the file does not hold what was written.
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
    for key, name in _keys(model, list(state)).items():
        again = any(state[name] is tensor for tensor in saved.values())  # tied, and written under both names
        saved[key] = state[name].clone() if again else state[name]
    write_tensors(folder / WEIGHTS, saved)

    config = model.active_peft_config.to_dict()
    config |= {"inference_mode": True, "bias": bias or config["bias"]}
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    write_json(folder / CONFIG, dict(sorted(config.items())))

    written = read_adapter(folder)
    if written.keys() != saved.keys() or any(not torch.equal(written[name], saved[name]) for name in saved):
        raise ArtifactError(f"{folder}: {WEIGHTS} does not hold what was written; is the disk sound?")


def read_adapter(folder: Path) -> State:
    """Read an adapter's tensors by their names in the file.

    Raises:
        ArtifactError: the folder has no adapter, or its file cannot be read. An older `adapter_model.bin`, a pickle,
            is read as data only.
    """
    if (folder / CONFIG).is_file() and not (folder / WEIGHTS).exists() and (folder / PICKLED).is_file():
        return read_pickle(folder / PICKLED)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder}: no {name} in it, so it is no adapter")
    return read_tensors(folder / WEIGHTS)


def write_tensors(path: Path, tensors: State) -> None:
    """Write a safetensors file. Its bytes are made first: an adapter is small, and a full disk is then an OSError."""
    data = memoryview(save(tensors, metadata={"format": "pt"}))
    half = len(data) // 2
    with path.open("wb") as file:
        file.write(data[:half])
        file.flush()
        fault_point("save.mid_file")
        file.write(data[half:])


def read_tensors(path: Path) -> State:
    """Read a safetensors file.

    Raises:
        ArtifactError: it cannot be read.
    """
    try:
        state: State = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot be read: {_first_line(error)}") from None
    return state


def restore_adapter(model: PeftModel, folder: Path, backend: Backend | None = None) -> None:
    """Load saved weights into the adapter that a model already has. Every rank calls this.

    Args:
        backend: None = the model is neither wrapped nor sharded.

    Raises:
        ArtifactError: the file's tensors are not those of this adapter.
    """
    _restore(model, read_adapter(folder), str(folder), backend or ReplicatedBackend())


def adapter_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that an adapter consists of, by their names in the file."""
    parameters = dict(model.named_parameters())
    names = adapter_names(model, model.active_peft_config.bias)
    return {key: parameters[name] for key, name in _keys(model, names).items()}


def check_all_trained_is_saved(model: PeftModel) -> None:
    """Refuse a model of which a save would leave something out; cheap, so that it is known before the first step.

    Raises:
        ArtifactError: a trained parameter is not part of the adapter, or PEFT has no name for one of it.
    """
    saved = {id(parameter) for parameter in adapter_parameters(model).values()}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in saved]
    if lost:
        raise ArtifactError(f"adapter: {len(lost)} parameters would be trained and not saved, {lost[0]} among them")


def adapter_state(model: PeftModel) -> State:
    """Return an adapter's tensors by their names in the file, without copying them. One process, nothing sharded."""
    return {key: parameter.detach() for key, parameter in adapter_parameters(model).items()}


def unwrap_peft_model(accelerator: Accelerator, model: torch.nn.Module) -> PeftModel:
    """Return the PeftModel within the wrappers of DDP or DeepSpeed."""
    inner = accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)
    if not isinstance(inner, PeftModel):
        raise ArtifactError(f"a {type(inner).__name__} has no adapter; make one with peft.get_peft_model")
    if any("_orig_mod" in name.split(".") for name, _ in inner.named_parameters()):
        raise ArtifactError(
            "layers within the model were replaced by compiled ones, so its tensors have names that PEFT would not "
            "find again; compile in place (module.compile()), or the whole model"
        )
    return inner


def _refuse_to_replace(folder: Path) -> None:
    """Refuse a folder in which something would be lost: saving puts a new one in its place."""
    if not folder.exists():
        return
    if not folder.is_dir() or Path.cwd().is_relative_to(folder):
        raise ArtifactError(f"{folder}: is {'where this runs' if folder.is_dir() else 'a file'}; name a new folder")
    others = sorted({path.name for path in folder.iterdir()} - {WEIGHTS, CONFIG, MANIFEST})
    if others:
        raise ArtifactError(
            f"{folder}: holds other things, {others[0]} among them, that would be lost; name a new folder"
        )


def _added_names(model: PeftModel) -> set[str]:
    """Return the names of the parameters that PEFT added, for any adapter, or put copies in the place of."""
    return {
        f"{layer}.{name}"
        for layer, module in model.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        for name, _ in module.named_parameters()
        if "base_layer" not in name.split(".")
    }


def _keys(model: PeftModel, names: list[str]) -> dict[str, str]:
    """Return under which names in a file PEFT saves which parameters; of tied ones it may save both."""
    # PEFT renames tensors, so it is handed numbers in their place and tells where each went.
    numbers = _peft_state(model, {name: torch.tensor(number) for number, name in enumerate(names)})
    keys = {key: names[int(number)] for key, number in numbers.items()}
    lost = sorted(set(names) - set(keys.values()))
    if lost:
        kept = len(names) - len(lost)
        raise ArtifactError(f"adapter: PEFT saves {kept} of {len(names)} tensors of this adapter, and not {lost[0]}")
    return keys


def _peft_state(model: PeftModel, state: Mapping[str, torch.Tensor]) -> State:
    """Return tensors under the names that PEFT gives them in a file."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first[id(parameter)] in state:  # tied: PEFT looks for it under every name
            state = {name: state[first[id(parameter)]], **state}
    # What is saved has been decided. PEFT would leave out the base's biases by the rule it was trained with, or take
    # one twice, so it sees none; save_embedding_layers, when asked to decide for itself, would ask the Hub.
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


def check_tensor_names(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse tensors that are not those of an adapter: by name, shape, kind, and whether they are finite."""
    missing, unexpected = (
        sorted(expected.keys() - found.keys()),
        sorted(found.keys() - expected.keys()),
    )
    if missing or unexpected:
        raise ArtifactError(
            f"{where}: {len(missing)} tensors are missing{_example(missing)}, "
            f"{len(unexpected)} do not belong to this adapter{_example(unexpected)}; {ITS_OWN}"
        )
    for name, tensor in found.items():
        if tensor.shape != expected[name]:
            raise ArtifactError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, the model expects {tuple(expected[name])}; {ITS_OWN}"
            )
        if not tensor.dtype.is_floating_point:
            raise ArtifactError(f"{where}: {name} holds {tensor.dtype}, not floating point")
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{where}: {name} holds values that are not finite")


def _restore(model: PeftModel, state: State, where: str, backend: Backend) -> None:
    parameters = adapter_parameters(model)
    check_tensor_names({key: backend.full_shape(parameter) for key, parameter in parameters.items()}, state, where)
    for key, parameter in parameters.items():
        backend.write_parameter(parameter, state[key])


def _refuse_changed_base(folder: Path) -> None:
    how = read_json(folder / CONFIG).get("init_lora_weights", True)
    if isinstance(how, str) and how not in (*UNCHANGING, *REPEATABLE):
        raise ArtifactError(
            f"{folder / CONFIG}: init_lora_weights={how!r} changed the base's weights when training began, in a way "
            "that cannot be repeated; convert the adapter where it was trained (PEFT's save_pretrained, "
            "path_initial_model_for_weight_conversion)"
        )


def _embeddings(base: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of input and output embeddings by the modules' names; the latter may be none."""
    ends = [getattr(base, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    return {
        name: getattr(module, "weight", torch.empty(0))  # PEFT's wrappers show the weight that they wrap
        for name, module in base.named_modules()
        if any(module is end for end in ends)
    }


def _plain_keys(name: str) -> tuple[str, str]:
    return f"{PREFIX}{name}.weight", f"{PREFIX}{name}.base_layer.weight"


def _base_parameter(model: PeftModel, name: str) -> torch.nn.Parameter:
    module = model.get_base_model().get_submodule(name.rpartition(".")[0])
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    parameter: torch.nn.Parameter = getattr(module, "original_module", module).weight
    return parameter


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _example(names: list[str]) -> str:
    return f" (such as {names[0]})" if names else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
