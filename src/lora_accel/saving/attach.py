"""Load a saved adapter: onto a base model, or into the adapter that a model already has."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model

from lora_accel.config.adapter_options import BASE_PRESERVING_INITS, REPEATABLE_INITS, subtracts_initial_adapter
from lora_accel.distributed.backend import Backend, ReplicatedBackend
from lora_accel.errors import ArtifactError, first_line
from lora_accel.model.initial_adapter import has_initial_adapter, split_initial
from lora_accel.saving.adapter_config import check_known_options, check_untrusted_config
from lora_accel.saving.atomic import read_json
from lora_accel.saving.discovery import CONFIG
from lora_accel.saving.matching import AdapterTensors, check_converted_config, match_tensors
from lora_accel.saving.names import adapter_parameters, saved_names, saved_shapes
from lora_accel.saving.tensor_files import AdapterData, read_adapter
from lora_accel.saving.vocabulary import (
    base_parameter,
    check_same_embeddings,
    embedding_modules,
    embedding_rows,
    resize_vocabulary,
    write_embeddings,
)


def load_adapter(
    base: torch.nn.Module, folder: str | Path, *, trainable: bool = False, force: bool = False
) -> PeftModel:
    """Load a saved adapter onto a base model. The file must contain exactly the adapter's tensors.

    Args:
        trainable: whether the adapter's parameters require gradients; otherwise the model is in eval mode.
        force: whether to ignore options of adapter_config.json that the installed PEFT does not know.

    Raises:
        ArtifactError: the folder is not an adapter, its config is not allowed (see adapter_config.py), or its tensors
            do not match this base.
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
    check_base_init(folder)
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
    for key, name in saved_names(model).items():
        values = split_initial(name, trained[key], model.active_adapter) if is_joined else {name: trained[key]}
        for own_name, value in values.items():
            backend.write_parameter(parameters[own_name], value)


def begin_with_adapter(model: PeftModel, data: AdapterData, where: str, backend: Backend) -> None:
    """Write the tensors of another adapter into the new adapter that a model has. Every rank calls this.

    Args:
        model: has the options of the other adapter. If that one changed the base's weights when its training began
            (PiSSA, OLoRA), it has a frozen adapter instead, which stays as it is.
        where: the other adapter, for messages.

    Raises:
        ArtifactError: the tensors do not match the model.
    """
    check_converted_config(model, data.config, where)
    shapes = saved_shapes(model, backend, joined=False)
    trained, embeddings = match_tensors(model, data.tensors, shapes, where)
    modules = embedding_modules(model.get_base_model())
    weights = {name: base_parameter(modules[name.removesuffix(".weight")]) for name in sorted(embeddings)}
    for name, weight in backend.full_parameters(weights):
        check_same_embeddings(weight, embeddings[name], f"{where}: {name}")
    for key, parameter in adapter_parameters(model).items():
        backend.write_parameter(parameter, trained[key])


def check_adapter_files(folder: Path, *, force: bool = False, way_out: str = "pass --force") -> None:
    """Check an adapter as far as possible without its base: its files, its config, and the kinds of its tensors.

    Args:
        force: whether to ignore options of adapter_config.json that the installed PEFT does not know.
        way_out: how to set `force`, for messages.

    Raises:
        ArtifactError: the adapter cannot be used.
    """
    read_adapter(folder)
    check_untrusted_config(folder / CONFIG, ())
    check_known_options(folder / CONFIG, force=force, way_out=way_out)


def keeps_base_weights(folder: Path) -> bool:
    """Whether PEFT attaches an adapter without changing the base's weights. PiSSA, OLoRA and KaSA change them."""
    config = read_json(folder / CONFIG)
    return config.get("init_lora_weights") not in REPEATABLE_INITS and not config.get("kasa_config")


def check_base_init(folder: Path) -> None:
    """Check that the adapter's initialization left the base's weights unchanged, or can be repeated.

    Raises:
        ArtifactError: it changed them, and cannot be repeated.
    """
    init = read_json(folder / CONFIG).get("init_lora_weights", True)
    if isinstance(init, str) and init not in (*BASE_PRESERVING_INITS, *REPEATABLE_INITS):
        raise ArtifactError(
            f"{folder / CONFIG}: init_lora_weights={init!r} changed the base's weights when training began, in a way "
            "that cannot be repeated; convert the adapter where it was trained (PEFT's save_pretrained, "
            "path_initial_model_for_weight_conversion)"
        )


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
