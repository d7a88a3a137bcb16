"""The parameters of a model by kind: what a run trains, and what it does not."""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import torch


class ParameterCount(NamedTuple):
    """The parameters of one kind."""

    kind: str
    """Such as `q_proj: LoRA A`, or `norms`."""
    num_tensors: int
    numel: int
    is_trained: bool


ADDED = {
    "lora_A": "LoRA A",
    "lora_B": "LoRA B",
    "lora_embedding_A": "LoRA A",
    "lora_embedding_B": "LoRA B",
    "lora_magnitude_vector": "DoRA magnitude",
    "modules_to_save": "all weights",
    "trainable_tokens_delta": "token rows",
}
"""PEFT's names of what it adds to a module -> the kind in tables."""


def count_by_kind(model: Any) -> list[ParameterCount]:
    """Return the parameters of a PEFT model by kind: those that are trained, then the others, largest first.

    Args:
        model: may be on the meta device; its base is not quantized.
    """
    base = model.get_base_model()
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    own = {id(weight): "head" for weight in _weights(head)}
    own |= {id(weight): "embeddings" for weight in _weights(embeddings)}  # tied to the head or not
    counts: dict[tuple[str, bool], list[int]] = collections.defaultdict(lambda: [0, 0])
    for name, parameter in model.named_parameters():
        trained = parameter.requires_grad
        kind = _trained_kind(name) if trained else own.get(id(parameter)) or _frozen_kind(name, parameter)
        counts[kind, trained][0] += 1
        counts[kind, trained][1] += parameter.numel()
    rows = [ParameterCount(kind, num, numel, trained) for (kind, trained), (num, numel) in counts.items()]
    return sorted(rows, key=lambda row: (not row.is_trained, -row.numel))


def _weights(module: Any) -> list[torch.Tensor]:
    """Return the base weights of an embedding or a head, which PEFT may have wrapped."""
    if module is None:
        return []
    return [parameter for parameter in module.parameters() if not parameter.requires_grad and parameter.ndim == 2]


def _trained_kind(name: str) -> str:
    """Return the kind of a trained parameter: `….q_proj.lora_A.default.weight` -> `q_proj: LoRA A`."""
    parts = [part for part in name.split(".") if part not in ("default", "base_layer", "token_adapter")]
    for number, part in enumerate(parts):
        if part in ADDED:
            return f"{parts[number - 1]}: {ADDED[part]}"
    return f"{parts[-2]}: {parts[-1]}"


def _frozen_kind(name: str, parameter: torch.Tensor) -> str:
    """Return the kind of a frozen parameter: experts, norms, biases, or the name of its module."""
    parts = [part for part in name.split(".") if part not in ("default", "base_layer", "original_module")]
    if "experts" in parts:
        return "experts"
    if parts[-1] == "bias":
        return "biases"
    return "norms" if parameter.ndim == 1 else parts[-2] if parts[-1] == "weight" else parts[-1]
