"""Which parameters of a model are its adapter, and the name of each in the adapter's file.

A parameter is called `base_model.model.….q_proj.lora_A.default.weight`, and its tensor in a file the same without the
adapter's name, `default`. Base weights have PEFT's prefix and the names of its wrappers in both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper

from lora_accel.distributed.backend import Backend, ReplicatedBackend
from lora_accel.errors import ArtifactError
from lora_accel.model.initial_adapter import has_initial_adapter, joined_shape
from lora_accel.saving.tensor_files import State

PREFIX = "base_model.model."
"""PEFT's prefix of the base model's names."""
WRAPPER_NAMES = ("base_layer", "original_module", "token_adapter")
"""Names that PEFT's wrappers add to the path of a base parameter."""
NAMED_ADAPTER = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|lora_velora_embed|modules_to_save"
    r"|trainable_tokens_delta)\.[^.]+(?=\.|$)"
)
"""The name of an adapter after the part of PEFT that it belongs to."""


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


def adapter_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Return an adapter's trained parameters by their names in the file."""
    parameters = dict(model.named_parameters())
    return {key: parameters[name] for key, name in saved_names(model).items()}


def saved_shapes(
    model: PeftModel, backend: Backend | None = None, *, joined: bool | None = None
) -> dict[str, torch.Size]:
    """Return the shapes of an adapter's tensors by their names in the file.

    Args:
        backend: None = the model is neither wrapped nor sharded.
        joined: whether the file has the frozen adapter, too; None = if the model has one.
    """
    backend, parameters = backend or ReplicatedBackend(), dict(model.named_parameters())
    shapes = {key: (name, backend.full_shape(parameters[name])) for key, name in saved_names(model).items()}
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


def plain_name(key: str) -> str:
    """Return the name in the base of a base tensor in an adapter's file."""
    parts = key.removeprefix(PREFIX).split(".")
    return ".".join(part for part in parts if part not in WRAPPER_NAMES)


def saved_names(model: PeftModel) -> dict[str, str]:
    """Return name in the file -> name of the trained parameter."""
    return names_in_file(model, adapter_names(model, model.active_peft_config.bias))


def names_in_file(model: PeftModel, names: list[str]) -> dict[str, str]:
    """Return name in the file -> parameter name. PEFT may save tied parameters under both names."""
    # PEFT renames tensors, so pass numbers instead and see which name each one gets.
    numbers = _peft_state(model, {name: torch.tensor(number) for number, name in enumerate(names)})
    keys = {key: names[int(number)] for key, number in numbers.items()}
    lost = sorted(set(names) - set(keys.values()))
    if lost:
        kept = len(names) - len(lost)
        raise ArtifactError(f"adapter: PEFT saves {kept} of {len(names)} tensors of this adapter, and not {lost[0]}")
    return keys


def _added_names(model: PeftModel) -> set[str]:
    """Return the names of all parameters that PEFT added, for any adapter, including copies of saved modules."""
    return {
        f"{layer}.{name}"
        for layer, module in model.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        for name, _ in module.named_parameters()
        if "base_layer" not in name.split(".")
    }


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
