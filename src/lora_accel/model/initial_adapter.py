"""PiSSA and OLoRA, trained so that the result is plain LoRA on the unchanged base.

These initializations begin with A0 and B0 that are not zero, and PEFT subtracts their product from the base's weights.
The trained adapter then fits only weights that no one else has, and pissa_niter_N, which is random, never repeats them.
Here the base keeps its weights. A second adapter, which is frozen, subtracts the product:

    W x - s B0 A0 x + s B A x  =  W x + s [B | -B0] [A; A0] x

The right side is plain LoRA of twice the rank, and the form in which checkpoints and the final adapter are saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Embedding, LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx

from lora_accel.errors import ConfigError

INITIAL = "subtracted_initial"
"""PEFT's name of the frozen adapter."""
_FIRST = ("lora_A", "lora_embedding_A")
_SECOND = ("lora_B", "lora_embedding_B")


def add_initial_adapter(model: PeftModel, init: str, exact_in: torch.dtype = torch.float32) -> None:
    """Initialize the active adapter by PiSSA or OLoRA, and add the frozen adapter that subtracts its initial value.

    Args:
        model: with an adapter that was added with init_lora_weights=True.
        init: pissa, pissa_niter_N or olora.
        exact_in: dtype to which A0 and B0 are rounded. DeepSpeed keeps float32 masters only of what is trained: a run
            in 16 bits that resumes there would subtract other values than it began with.

    Raises:
        ConfigError: a layer is not linear, or the rank exceeds the size of its weight.
    """
    layers = {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    trained, active = {p for p in model.parameters() if p.requires_grad}, model.active_adapter
    for name, layer in layers.items():
        _initialize(name, layer, active, init, exact_in)
    config = model.active_peft_config
    model.add_adapter(
        INITIAL,
        LoraConfig(
            task_type=config.task_type,
            r=config.r,
            lora_alpha=config.lora_alpha,
            rank_pattern=dict(config.rank_pattern or {}),
            alpha_pattern=dict(config.alpha_pattern or {}),
            use_rslora=config.use_rslora,
            target_modules=list(layers),
        ),
    )
    for layer in layers.values():
        layer.set_adapter([active, INITIAL])
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad = parameter in trained
        if (initial := parameters.get(initial_name(name, active))) is not None:
            # The halves of B have different signs, so that the adapters add up to nothing.
            initial.data = parameter.data.clone() if _part(name) in _FIRST else -parameter.data


def has_initial_adapter(model: PeftModel) -> bool:
    """Whether a model has the frozen adapter."""
    return INITIAL in model.peft_config


def initial_names(model: PeftModel) -> list[str]:
    """Return the names of the frozen adapter's parameters, in the model's order."""
    return [name for name, _ in model.named_parameters() if INITIAL in name.split(".")]


def initial_name(name: str, active: str) -> str:
    """Return the name of the frozen counterpart of an adapter's parameter; "" if it is not a part of A or B."""
    parts = name.split(".")
    if active not in parts or not _part(name):
        return ""
    return ".".join(INITIAL if part == active else part for part in parts)


def join_initial(state: Mapping[str, torch.Tensor], active: str) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors in the form in which they are saved: A and B of twice the rank.

    Args:
        state: by parameter name, those of the frozen adapter included. Without them, it is returned as it is.
        active: name of the trained adapter.
    """
    joined = dict(state)
    for name in state:
        if (initial := joined.pop(initial_name(name, active), None)) is not None:
            joined[name] = torch.cat([state[name], initial], dim=_rank_dim(name))
    return joined


def split_initial(name: str, saved: torch.Tensor, active: str) -> dict[str, torch.Tensor]:
    """Return the trained and the frozen tensor of a joined A or B by parameter name; undoes `join_initial`."""
    if not (initial := initial_name(name, active)):
        return {name: saved}  # a bias, or a module that is trained in full
    return dict(zip((name, initial), saved.chunk(2, dim=_rank_dim(name)), strict=True))


def joined_shape(name: str, shape: torch.Size, active: str) -> torch.Size:
    """Return the shape of a parameter after `join_initial`: A and B have twice the rank.

    Args:
        shape: of the trained parameter.
    """
    if not initial_name(name, active):
        return shape
    return torch.Size(2 * size if dim == _rank_dim(name) else size for dim, size in enumerate(shape))


def joined_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the PEFT config of the saved adapter: plain LoRA of twice the rank with the same scaling.

    The scaling is alpha / r, or alpha / sqrt(r) with use_rslora.
    """
    factor = math.sqrt(2) if config.get("use_rslora") else 2
    return dict(config) | {
        "init_lora_weights": True,
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {key: 2 * rank for key, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in (config.get("alpha_pattern") or {}).items()},
    }


def _initialize(name: str, layer: Any, active: str, init: str, exact_in: torch.dtype) -> None:
    """Initialize one layer's A and B by PEFT, from a copy of the base's weight, which PEFT would change."""
    if isinstance(layer, Embedding):
        return  # PEFT's default for embeddings: A is zero
    base, parts = layer.get_base_layer(), [layer.lora_A[active], layer.lora_B[active]]
    if not all(isinstance(part, torch.nn.Linear) for part in parts) or isinstance(layer, ParamWrapper):
        raise ConfigError(f"adapter.init_lora_weights={init} does not support {name}, which is not a linear layer")
    with gather_params_ctx(base.weight, modifier_rank=None):
        weight = dequantize_module_weight(base).detach().to(torch.float32, copy=True)
    if layer.r[active] > min(weight.shape):
        size = " x ".join(map(str, weight.shape))
        raise ConfigError(
            f"adapter.r: init_lora_weights={init} supports r up to {min(weight.shape)} for {name}, {size}"
        )
    device, dtype = parts[0].weight.device, parts[0].weight.dtype
    layer.base_layer = torch.nn.Module()
    try:
        if init == "olora":  # which does not transpose the weights of Conv1D
            layer.base_layer.weight = torch.nn.Parameter(weight.T if layer.fan_in_fan_out else weight, False)
            layer.olora_init(active)
        else:
            layer.base_layer.weight = torch.nn.Parameter(weight, False)
            layer.pissa_init(active, init)
    finally:
        layer.base_layer = base
    for part in parts:
        part.weight.data = part.weight.data.to(exact_in).to(device, dtype).contiguous()


def _part(name: str) -> str:
    """Return lora_A, lora_B, lora_embedding_A or lora_embedding_B if a name contains it, else ""."""
    return next((part for part in name.split(".") if part in (*_FIRST, *_SECOND)), "")


def _rank_dim(name: str) -> int:
    return 0 if _part(name) in _FIRST else 1
