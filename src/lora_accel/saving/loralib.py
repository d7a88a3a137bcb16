"""loralib's checkpoints (https://github.com/microsoft/LoRA), to and from PEFT's format.

loralib names a module's matrices `<module>.lora_A` [r, in] and `<module>.lora_B` [out, r], and scales by
lora_alpha / r. They are PEFT's matrices under other names, so a round trip is exact. `loralib.lora_state_dict` does not
store alpha; this package writes it to loralib.json.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_accel.config.adapter_options import BASE_PRESERVING_INITS
from lora_accel.errors import ArtifactError, did_you_mean
from lora_accel.saving.names import PREFIX
from lora_accel.saving.tensor_files import AdapterData, State, read_tensor_file

TENSORS_FILE, CONFIG_FILE = "lora.pt", "loralib.json"
LAYERS = (torch.nn.Linear, Conv1D, torch.nn.Embedding)
"""Supported layer types. Subclasses are not: they may compute something else, such as scaled embeddings."""
SUPPORTED_KEYS = re.compile(
    "(alpha|rank)_pattern|auto_mapping|base_model_name_or_path|bias|eva_config|(exclude|target)_modules|task_type|r|"
    "fan_in_fan_out|inference_mode|init_lora_weights|layers_(pattern|to_transform)|lora_(alpha|dropout)|megatron_core|"
    "peft_(type|version)|qalora_group_size|revision|use_rslora"
)
"""Keys of adapter_config.json that loralib can express, or that do not change what the tensors mean."""
MERGE_INSTEAD = "merge the adapter instead: lora-accel merge ADAPTER OUT"


def is_loralib(adapter: Path) -> bool:
    """Whether an adapter is a file of loralib, or a folder that was exported in loralib's format."""
    return adapter.is_file() or (adapter / CONFIG_FILE).is_file()


def tensors_file(adapter: Path) -> Path:
    """Return the file with the tensors of an adapter in loralib's format: a bare file, or the one in its folder."""
    return adapter if adapter.is_file() else adapter / TENSORS_FILE


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Check that loralib supports every option of an adapter_config.json.

    Raises:
        ArtifactError: it does not; the message names the key.
    """
    for key, value in config.items():
        is_supported = SUPPORTED_KEYS.fullmatch(key) is not None
        if key == "init_lora_weights":
            is_supported = value in (True, *BASE_PRESERVING_INITS)
        if value and not is_supported:
            raise ArtifactError(f"{path}: loralib does not support {key}={str(value)[:60]!r}; {MERGE_INSTEAD}")


def from_peft(adapter: Path, data: AdapterData, peft_model: PeftModel) -> AdapterData:
    """Convert an adapter from PEFT's format. Ranks and alphas are chosen to give the same scaling.

    Args:
        adapter: where it was read from, for messages.
        peft_model: the adapter on its base; may be on the meta device.

    Raises:
        ArtifactError: loralib does not support a layer or a tensor.
    """
    model, active = peft_model.get_base_model(), peft_model.active_adapter
    lora_layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    layers = {path: layer.get_base_layer() for path, layer in lora_layers.items()}
    for path, layer in layers.items():
        if type(layer) not in LAYERS:
            raise ArtifactError(f"{adapter}: {path} is a {type(layer).__name__}, not supported here; {MERGE_INSTEAD}")
    names = {peft: name for name, peft in _peft_names(layers, model).items()}
    for name in sorted(data.tensors.keys() - names.keys()):
        raise ArtifactError(f"{adapter}: {name} is not a LoRA tensor that loralib supports; {MERGE_INSTEAD}")

    # rsLoRA scales by alpha / sqrt(r), loralib by alpha / r.
    power = 0.5 if data.config.get("use_rslora") else 0
    ranks = {path: layer.r[active] for path, layer in lora_layers.items()}
    alphas = {path: as_int(layer.lora_alpha[active] * ranks[path] ** power) for path, layer in lora_layers.items()}
    r, alpha = _most_common(ranks), _most_common(alphas)
    config = {
        "base_model_name_or_path": data.config.get("base_model_name_or_path"),
        "bias": data.config.get("bias", "none"),
        "r": r,
        "lora_alpha": alpha,
        "modules": {p: {"r": ranks[p], "lora_alpha": alphas[p]} for p in layers if (ranks[p], alphas[p]) != (r, alpha)},
        "target_modules": list(layers),
    }
    return AdapterData({names[name]: tensor for name, tensor in data.tensors.items()}, config)


def read_loralib(adapter: Path, config: Mapping[str, Any], model: PreTrainedModel, base: str) -> AdapterData:
    """Read a loralib checkpoint and convert it to PEFT's format.

    Args:
        adapter: a folder with lora.pt, or a bare file.
        config: content of loralib.json; for a bare file, its lora_alpha alone.
        model: the base; may be on the meta device.
        base: name of the base, for PEFT's config.

    Raises:
        ArtifactError: the tensors do not fit the base or the config.
    """
    file = tensors_file(adapter)
    state = read_tensor_file(file)
    layers = _lora_layers(file, state, model)
    names = _peft_names(layers, model)
    ranks = {path: state[f"{path}.lora_A"].shape[0] for path in layers}
    alphas = _alphas(adapter / CONFIG_FILE, config, ranks)
    peft_config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        r=_most_common(ranks),
        lora_alpha=_most_common(alphas),
        rank_pattern=_pattern(ranks),
        alpha_pattern=_pattern(alphas),
        target_modules=_target_modules(layers, model),
        bias=_bias_mode(file, state, names, layers),
        fan_in_fan_out=any(type(layer) is Conv1D for layer in layers.values()),
    ).to_dict()
    peft_config = {k: sorted(value) if isinstance(value, set) else value for k, value in sorted(peft_config.items())}
    return AdapterData({names[name]: tensor for name, tensor in state.items()}, peft_config)


def as_int(number: float) -> float:
    """Return an integral number as an int, as configs usually write it."""
    return int(number) if float(number).is_integer() else number


def _peft_names(layers: Mapping[str, torch.nn.Module], model: torch.nn.Module) -> dict[str, str]:
    """Return the name in PEFT's file for each of loralib's names.

    Args:
        layers: the layers with LoRA, by path.
        model: the base, with or without PEFT's wrappers.
    """
    names = {}
    for path in [name.removesuffix(".bias") for name, _ in model.named_parameters() if name.endswith(".bias")]:
        path = path.removesuffix(".base_layer")
        names[f"{path}.bias"] = f"{PREFIX}{path}{'.base_layer' if path in layers else ''}.bias"
    for path, layer in layers.items():
        for part in "AB":
            suffix = f"lora_embedding_{part}" if type(layer) is torch.nn.Embedding else f"lora_{part}.weight"
            names[f"{path}.lora_{part}"] = f"{PREFIX}{path}.{suffix}"
    return names


def _lora_layers(file: Path, state: State, model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Return the base's modules for which a checkpoint has LoRA, by path. Checks every name and shape."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    layers = {}
    for name, tensor in state.items():
        path, _, part = name.rpartition(".")
        problem = None
        if part not in ("lora_A", "lora_B", "bias"):
            problem = "is not <module>.lora_A, .lora_B or .bias; save the result of loralib.lora_state_dict(model)"
        elif path not in modules:
            problem = f"belongs to no module of {model.name_or_path}{did_you_mean(path, modules)}; check --base"
        elif part != "bias":
            layers[path] = modules[path]
            problem = _matrix_problem(state, path, modules[path])
        elif name not in parameters or parameters[name].shape != tensor.shape:
            problem = f"has shape {tuple(tensor.shape)}, and the base has no such bias"
        if problem:
            raise ArtifactError(f"{file}: {name} {problem}")
    if not layers:
        raise ArtifactError(f"{file}: is not a loralib checkpoint: it has no lora_A")
    return layers


def _matrix_problem(state: State, path: str, layer: torch.nn.Module) -> str | None:
    """Return the problem with the matrices of a module, None if there is none."""
    if type(layer) not in LAYERS:
        return f"belongs to a {type(layer).__name__}; only Linear, Conv1D and Embedding are supported"
    if f"{path}.lora_A" not in state or f"{path}.lora_B" not in state:
        return "is incomplete: its module needs both lora_A and lora_B"
    a, b = state[f"{path}.lora_A"].shape, state[f"{path}.lora_B"].shape
    shape: torch.Size = layer.weight.shape  # type: ignore[assignment]
    num_out, num_in = shape if type(layer) is torch.nn.Linear else reversed(shape)
    if a == (*a[:1], num_in) and b == (num_out, *a[:1]):
        return None
    problem = f"has a wrong shape: lora_A {tuple(a)}, lora_B {tuple(b)}; the base expects (r, {num_in}), ({num_out}, r)"
    if len(a) == len(b) == 2 and a[1] == num_in and a[0] % b[1] == 0 and num_out * (a[0] // b[1]) % b[0] == 0:
        problem += ". These are shapes of loralib.MergedLinear, whose groups are not stored; merge it with loralib "
        problem += "(model.eval())"
    return problem


def _alphas(file: Path, config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Return the alpha of each module; checks that its rank is the one in the config."""
    modules = config.get("modules") or {}
    alphas: dict[str, float] = {}
    for path, rank in ranks.items():
        entry = modules.get(path, config) if isinstance(modules, dict) else None
        r, alpha = (entry.get("r", rank), entry.get("lora_alpha")) if isinstance(entry, dict) else (None, None)
        if r != rank or isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ArtifactError(f"{file}: r={r!r}, lora_alpha={alpha!r} are invalid for {path}, which has rank {rank}")
        alphas[path] = alpha
    return alphas


def _most_common(values: Mapping[str, float]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _pattern(values: Mapping[str, float]) -> dict[str, float]:
    """Return a PEFT pattern of the values other than the most common one.

    Keys are the modules' last names where these determine the value, else full paths.
    """
    by_name: dict[str, set[float]] = {}
    for path, value in values.items():
        by_name.setdefault(_last_name(path), set()).add(value)
    default = _most_common(values)
    return {
        _last_name(path) if len(by_name[_last_name(path)]) == 1 else f"^{path}": value
        for path, value in values.items()
        if value != default
    }


def _target_modules(layers: Mapping[str, torch.nn.Module], model: PreTrainedModel) -> list[str]:
    """Return the layers' last names if these match no other module of the base, else their full paths."""
    names = {_last_name(path) for path in layers}
    matched = {path for path, _ in model.named_modules() if _last_name(path) in names}
    return sorted(names if matched == layers.keys() else layers)


def _bias_mode(file: Path, state: State, names: Mapping[str, str], layers: Mapping[str, torch.nn.Module]) -> str:
    saved = {name for name in state if name.endswith(".bias")}
    all_biases = {name for name in names if name.endswith(".bias")}
    lora_biases = {name for name in all_biases if name.removesuffix(".bias") in layers}
    for mode, biases in (("none", set[str]()), ("all", all_biases), ("lora_only", lora_biases)):
        if saved == biases:
            return mode
    raise ArtifactError(
        f"{file}: has {len(saved)} biases, {min(saved)} among them; PEFT needs all {len(all_biases)} of the base, or "
        f"the {len(lora_biases)} of the layers with LoRA. Save with loralib.lora_state_dict(model, bias=…)"
    )


def _last_name(path: str) -> str:
    return path.rpartition(".")[2]
