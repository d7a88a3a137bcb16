"""Match the tensors of an adapter's file with a model that has the adapter, whatever tool or version named them.

Besides PEFT's own names of today these are accepted, as `PeftModel.from_pretrained` does:

- names with the adapter's name in them (`….lora_A.default.weight`), of a state dict that was saved by hand
- a second copy of modules_to_save (`….modules_to_save.weight`), and the embeddings of a base whose vocabulary was
  resized (`….weight`, `….base_layer.weight`, `….original_module.weight`, `….token_adapter.base_layer.weight`)
- experts as transformers 4 named them, one module each; transformers 5 stores all in one parameter
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from peft import PeftModel

from lora_accel.errors import ArtifactError, first_line
from lora_accel.saving.names import NAMED_ADAPTER, PREFIX, plain_name
from lora_accel.saving.tensor_files import State
from lora_accel.saving.vocabulary import embedding_modules

MAGNITUDE = ".lora_magnitude_vector"
MISMATCH_HINT = "are these the base and the adapter_config.json that it was trained with?"


class AdapterTensors(NamedTuple):
    """The tensors of an adapter's file, matched with a model."""

    trained: State
    """By PEFT's names in a file."""
    embeddings: State
    """The base's embeddings, which PEFT saves if the vocabulary was resized, by their names in the base."""


def match_tensors(
    model: PeftModel, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size], where: str
) -> AdapterTensors:
    """Match the tensors of an adapter's file with a model that has the adapter. Values are read last.

    Args:
        model: may be on the meta device.
        tensors: of the file.
        expected: shapes of the adapter's tensors by PEFT's names in a file.
        where: the adapter's folder, for messages.

    Raises:
        ArtifactError: a tensor is missing, does not belong to the adapter, is there twice with different values, or has
            a wrong shape, dtype or values that are not finite.
    """
    if tensors.keys() - expected.keys():
        _match(model, _converted(model, {name: x.to("meta") for name, x in tensors.items()}, where), expected, where)
        tensors = _converted(model, tensors, where)
    trained, embeddings = _match(model, tensors, expected, where)
    for name, tensor in (trained | embeddings).items():
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{where}: {name} contains values that are not finite")
    return AdapterTensors(trained, embeddings)


def _match(
    model: PeftModel, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size], where: str
) -> AdapterTensors:
    """Match tensors by name and shape. The values of those that are there twice are compared, unless they are meta."""
    matched = AdapterTensors({}, {})
    base_names = {f"{name}.weight" for name in embedding_modules(model.get_base_model())}
    aliases, unused = _tied_keys(model, expected), _unused_keys(model)
    unexpected = []
    for name, tensor in tensors.items():
        possible = (aliases.get(key, key) for key in _possible_keys(name))
        key = next((key for key in possible if key in expected), None)
        if key is not None:
            _add(matched.trained, key, tensor, f"{where}: {name}")
        elif name.startswith(PREFIX) and plain_name(name) in base_names:
            _add(matched.embeddings, plain_name(name), tensor, f"{where}: {name}")
        elif NAMED_ADAPTER.sub(r".\1", name, count=1) not in unused:
            unexpected.append(name)
    missing = sorted(expected.keys() - matched.trained.keys())
    if missing or unexpected:
        raise ArtifactError(
            f"{where}: {len(missing)} tensors are missing{_example(missing)}, "
            f"{len(unexpected)} do not belong to this adapter{_example(sorted(unexpected))}; {MISMATCH_HINT}"
        )
    for name, tensor in matched.trained.items():
        if tensor.shape != expected[name]:
            raise ArtifactError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, the model expects {tuple(expected[name])}; "
                f"{MISMATCH_HINT}"
            )
        if not tensor.dtype.is_floating_point:
            raise ArtifactError(f"{where}: {name} is stored as {tensor.dtype}, not as floating point")
    return matched


def _tied_keys(model: PeftModel, expected: Mapping[str, torch.Size]) -> dict[str, str]:
    """Return the other names of tied tensors of an adapter -> the names that PEFT expects in a file."""
    by_parameter: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_parameter.setdefault(id(parameter), []).append(NAMED_ADAPTER.sub(r".\1", name, count=1))
    tied = [names for names in by_parameter.values() if len(names) > 1]
    return {name: key for names in tied for key in names if key in expected for name in names if name not in expected}


def _unused_keys(model: PeftModel) -> set[str]:
    """Return the names in a file of tensors that PEFT saves with an adapter and that its model does not read.

    They are VeLoRA's projections, which only training reads, and with bias=all the base's biases of modules_to_save.
    """
    names = [name for name, _ in model.named_buffers() if "lora_" in name]
    names += [name for name, _ in model.named_parameters() if name.endswith(".original_module.bias")]
    return {NAMED_ADAPTER.sub(r".\1", name, count=1) for name in names}


def _possible_keys(name: str) -> Iterator[str]:
    """Yield the names that PEFT could give to a tensor in a file, the tensor's own name first."""
    yield name
    for short in (name, NAMED_ADAPTER.sub(r".\1", name, count=1)):
        yield short.replace(".modules_to_save.", ".", 1)
        if short.endswith(f"{MAGNITUDE}.weight"):
            yield short.removesuffix(".weight")


def _add(state: State, key: str, tensor: torch.Tensor, where: str) -> None:
    other = state.setdefault(key, tensor)
    is_same = other.shape == tensor.shape and (tensor.is_meta or torch.equal(other, tensor))
    if other is not tensor and not is_same:
        raise ArtifactError(f"{where} is saved twice, with different values; does the file have two adapters?")


def _converted(model: PeftModel, tensors: Mapping[str, torch.Tensor], where: str) -> Mapping[str, torch.Tensor]:
    """Return tensors of experts as transformers 5 stores them, by PEFT's conversion."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:  # before PEFT 0.19
        return tensors
    try:
        converted: State = convert_peft_adapter_state_dict_for_transformers(
            model=model,
            peft_config=model.active_peft_config,
            adapter_state_dict=dict(tensors),
            adapter_name=model.active_adapter,
        )
    except Exception as error:  # forged shapes raise many types
        raise ArtifactError(f"{where}: does not fit this base: {first_line(error)}") from None
    return converted


def check_converted_config(model: PeftModel, saved: Mapping[str, Any], where: str) -> None:
    """Check that PEFT's conversion of experts from transformers 4 to 5, if there was one, keeps every module's scaling.

    Two modules become one of twice the rank and alpha, which is exact for alpha / r alone.

    Raises:
        ArtifactError: it does not.
    """
    if set(model.active_peft_config.target_parameters or ()) == set(saved.get("target_parameters") or ()):
        return
    changed = [key for key in ("use_rslora", "rank_pattern", "alpha_pattern") if saved.get(key)]
    if changed:
        raise ArtifactError(
            f"{where}: {', '.join(changed)} of experts that were trained with transformers 4, one module each, cannot "
            "be converted to those of transformers 5; merge the adapter with the versions that trained it"
        )


def _example(names: list[str]) -> str:
    return f" (such as {names[0]})" if names else ""
