"""Other tools' formats: PEFT's older pickle, and loralib's checkpoints (https://github.com/microsoft/LoRA), both ways.

loralib calls a module's matrices `<module>.lora_A` (r x in) and `<module>.lora_B` (out x r). They are PEFT's, under
other names, and are scaled by lora_alpha / r. So an adapter goes there and back to the last bit.
"""

from __future__ import annotations

import io
import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_accel.config.schema import ModelSection
from lora_accel.errors import ArtifactError, ConfigError, did_you_mean
from lora_accel.merging.merge import check_out_folder
from lora_accel.model.base import build_on_meta_device
from lora_accel.model.tokenizer import FILES, check_folder, not_loaded
from lora_accel.saving import adapter as weights
from lora_accel.saving.adapter import State
from lora_accel.saving.atomic import atomic_folder, read_json, write_bytes, write_json
from lora_accel.saving.discovery import CONFIG, WEIGHTS
from lora_accel.saving.untrusted import check_untrusted_config, read_pickle

LORALIB, TOLD = "lora.pt", "loralib.json"
FORMATS = {"peft": (WEIGHTS, CONFIG), "peft-bin": (weights.PICKLED, CONFIG), "loralib": (LORALIB, TOLD)}
"""In which file the tensors lie, and in which what is told of them."""
CARRIED = [name for name in FILES if name != "config.json"] + ["provenance.json"]
"""What is copied from folder to folder: tokenizer, template, origin. The card tells how PEFT loads an adapter."""
BASE = "base_model_name_or_path"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYERS = (torch.nn.Linear, Conv1D, torch.nn.Embedding)
"""Of exactly these classes; one derived from them may compute otherwise (scaled or shifted embeddings do)."""
PLAIN = re.compile(
    "(alpha|rank)_pattern|auto_mapping|base_model_name_or_path|bias|eva_config|(exclude|target)_modules|task_type|r|"
    "fan_in_fan_out|inference_mode|init_lora_weights|layers_(pattern|to_transform)|lora_(alpha|dropout)|megatron_core|"
    "peft_(type|version)|qalora_group_size|revision|use_rslora"
)
"""Keys of an adapter's config that loralib can express, or that do not change what the tensors mean."""
MERGE = "merge the adapter instead: lora-accel merge ADAPTER OUT"


class Lora(NamedTuple):
    """An adapter's tensors, by their names in one of the formats, and what that format tells of them."""

    tensors: State
    told: dict[str, Any]


def export_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    format: str,
    base: str | None = None,
    alpha: float | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write an adapter in another format: PEFT's, PEFT's older pickle, or loralib's.

    Where loralib's is one of the two, or `base` is given, every name and shape is checked against the base's modules.
    They are built from its config; its weights are not read.

    Args:
        adapter: a folder of PEFT's, one that this function made, or a file of `loralib.lora_state_dict`.
        out: the folder to make.
        format: peft, peft-bin or loralib.
        base: a Hub id or folder instead of the one that the adapter names.
        alpha: lora_alpha of a file of loralib's, which does not tell it.
        overwrite: replace `out` if it is there.

    Returns:
        What was written: format, adapter, out, base, bias, num_tensors, files.

    Raises:
        ConfigError: there is no such format, or `alpha` is missing or out of place.
        ArtifactError: the adapter cannot be read, does not fit the base or the format, or `out` is there.
    """
    adapter, out = Path(adapter), Path(out)
    if format not in FORMATS:
        raise ConfigError(f"--format={format}: say {', '.join(FORMATS)}{did_you_mean(format, FORMATS)}")
    from_loralib = adapter.is_file() or (adapter / TOLD).is_file()
    told = _told(adapter, alpha)
    name = base or told.get(BASE)
    sources = {"adapter": adapter.parent if adapter.is_file() else adapter, "base": Path(str(name))}
    check_out_folder(out, sources, overwrite=overwrite)
    if not from_loralib:
        check_untrusted_config(adapter / CONFIG, ())
        if format == "loralib":
            _refuse_what_loralib_lacks(adapter / CONFIG, told)

    model = _base_on_meta_device(adapter, name) if from_loralib or format == "loralib" or base else None
    if from_loralib and model is not None:
        lora = _from_loralib(adapter, told, model, str(name))
    else:
        lora = Lora(_checked(adapter, weights.read_adapter(adapter)), told | ({BASE: base} if base else {}))
    written = {"format": format, "adapter": str(adapter), "out": str(out), "base": name, "bias": lora.told.get("bias")}
    if model is not None:
        fitted = _fitted(adapter, lora, model)
        lora = _to_loralib(adapter, lora, fitted) if format == "loralib" else lora

    tensors_file, told_file = FORMATS[format]
    with atomic_folder(out) as temporary:
        _write(temporary / tensors_file, lora.tensors)
        write_json(temporary / told_file, lora.told)
        for carried in [*CARRIED, *(["README.md"] if format != "loralib" else [])]:
            if adapter.is_dir() and (adapter / carried).is_file():
                shutil.copyfile(adapter / carried, temporary / carried)
    return written | {"num_tensors": len(lora.tensors), "files": sorted(path.name for path in out.iterdir())}


def _told(adapter: Path, alpha: float | None) -> dict[str, Any]:
    """Return what is told of an adapter's tensors: adapter_config.json, loralib.json, or of a bare file its alpha."""
    if adapter.is_file():
        if alpha is None or not (math.isfinite(alpha) and alpha > 0):
            raise ConfigError(f"--alpha={alpha}: {adapter} does not tell its lora_alpha; give that of its training")
        return {"lora_alpha": _whole(alpha)}
    if alpha is not None:
        raise ConfigError(f"--alpha={alpha}: only a bare file of loralib's needs it; {adapter} tells its own")
    file = adapter / (TOLD if (adapter / TOLD).is_file() else CONFIG)
    if not file.is_file():
        raise ArtifactError(f"{adapter}: no {CONFIG} and no {TOLD} in it, so it is no adapter")
    return read_json(file)


def _base_on_meta_device(adapter: Path, name: Any) -> PreTrainedModel:
    if not isinstance(name, str) or not name:
        raise ArtifactError(f"{adapter}: names no base model; say --base")
    section = ModelSection(name_or_path=name)
    check_folder(section)
    try:
        return build_on_meta_device(AutoConfig.from_pretrained(name, trust_remote_code=False))
    except Exception as error:  # a config may be wrong in many ways
        raise ArtifactError(not_loaded(section, "config", error)) from None


def _fitted(adapter: Path, lora: Lora, model: PreTrainedModel) -> PeftModel:
    """Put an adapter on a base without memory, which proves that `load_adapter` will take it as it stands."""
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / CONFIG, lora.told)
        try:
            fitted = weights.attach_adapter(model, Path(folder), on_meta_device=True)
        except ArtifactError as error:
            raise ArtifactError(str(error).replace(folder, str(adapter))) from None
    state = dict(lora.tensors)
    weights.pop_base_embeddings(fitted, state)
    expected = {key: parameter.shape for key, parameter in weights.adapter_parameters(fitted).items()}
    weights.check_tensor_names(expected, state, str(adapter))
    return fitted


def _refuse_what_loralib_lacks(file: Path, config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        plain = PLAIN.fullmatch(key) and (key != "init_lora_weights" or value in (True, *weights.UNCHANGING))
        if value and not plain:
            raise ArtifactError(f"{file}: {key}={str(value)[:60]!r} has no counterpart in loralib; {MERGE}")


def _to_loralib(adapter: Path, lora: Lora, fitted: PeftModel) -> Lora:
    """Return an adapter under loralib's names; what is told is the rank and the alpha that give the same scaling."""
    model, active = fitted.get_base_model(), fitted.active_adapter
    wrapped = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    layers = {path: layer.get_base_layer() for path, layer in wrapped.items()}
    for path, layer in layers.items():
        if type(layer) not in LAYERS:
            raise ArtifactError(f"{adapter}: {path} is of {type(layer).__name__}, unknown to loralib; {MERGE}")
    names = {peft: name for name, peft in _peft_names(layers, model).items()}
    for name in sorted(lora.tensors.keys() - names.keys()):
        raise ArtifactError(f"{adapter}: {name} is no part of LoRA, so loralib has no place for it; {MERGE}")

    # rsLoRA scales by alpha / sqrt(r), loralib by alpha / r.
    power = 0.5 if lora.told.get("use_rslora") else 0
    ranks = {path: layer.r[active] for path, layer in wrapped.items()}
    alphas = {path: _whole(layer.lora_alpha[active] * ranks[path] ** power) for path, layer in wrapped.items()}
    r, alpha = _split(ranks)[0], _split(alphas)[0]
    others = {p: {"r": ranks[p], "lora_alpha": alphas[p]} for p in layers if (ranks[p], alphas[p]) != (r, alpha)}
    told = {BASE: lora.told.get(BASE), "bias": lora.told.get("bias", "none"), "r": r, "lora_alpha": alpha}
    told |= {"modules": others, "target_modules": list(layers)}
    return Lora({names[name]: tensor for name, tensor in lora.tensors.items()}, told)


def _from_loralib(adapter: Path, told: Mapping[str, Any], model: PreTrainedModel, base: str) -> Lora:
    """Read a checkpoint of loralib's; return it under PEFT's names, with a config for it."""
    file = adapter if adapter.is_file() else adapter / LORALIB
    state = _read(file)
    layers = _layers_of(file, state, model)
    names = _peft_names(layers, model)
    ranks = {path: state[f"{path}.lora_A"].shape[0] for path in layers}
    r, rank_pattern = _split(ranks)
    alpha, alpha_pattern = _split(_alphas(adapter, told, ranks))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        r=r,
        lora_alpha=alpha,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        target_modules=_targets(layers, model),
        bias=_bias_mode(file, state, names, layers),
        fan_in_fan_out=any(type(layer) is Conv1D for layer in layers.values()),
    ).to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(config.items())}
    return Lora({names[name]: tensor for name, tensor in state.items()}, config)


def _peft_names(layers: Mapping[str, torch.nn.Module], model: torch.nn.Module) -> dict[str, str]:
    """Return PEFT's name in a file for each of loralib's. `layers` carry LoRA; PEFT may have wrapped `model`."""
    names = {}
    for path in [name.removesuffix(".bias") for name, _ in model.named_parameters() if name.endswith(".bias")]:
        path = path.removesuffix(".base_layer")
        names[f"{path}.bias"] = f"{weights.PREFIX}{path}{'.base_layer' if path in layers else ''}.bias"
    for path, layer in layers.items():
        for part in "AB":
            end = f"lora_embedding_{part}" if type(layer) is torch.nn.Embedding else f"lora_{part}.weight"
            names[f"{path}.lora_{part}"] = f"{weights.PREFIX}{path}.{end}"
    return names


def _layers_of(file: Path, state: State, model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Return the modules of the base that a checkpoint of loralib's has LoRA for; every name and shape is checked."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    layers = {}
    for name, tensor in state.items():
        path, _, part = name.rpartition(".")
        why = None
        if part not in ("lora_A", "lora_B", "bias"):
            why = "is none of <module>.lora_A, .lora_B and .bias; save what loralib.lora_state_dict(model) gives"
        elif path not in modules:
            why = f"belongs to no module of {model.name_or_path}{did_you_mean(path, modules)}; is --base right?"
        elif part != "bias":
            layers[path] = modules[path]
            why = _wrong_pair(state, path, modules[path])
        elif name not in parameters or parameters[name].shape != tensor.shape:
            why = f"has shape {tuple(tensor.shape)}, and the base has no such bias"
        if why:
            raise ArtifactError(f"{file}: {name} {why}")
    if not layers:
        raise ArtifactError(f"{file}: holds no lora_A, so it is no checkpoint of loralib's")
    return layers


def _wrong_pair(state: State, path: str, layer: torch.nn.Module) -> str | None:
    """Return what is wrong with the matrices of a module, if anything is."""
    if type(layer) not in LAYERS:
        return f"is for {type(layer).__name__}, and only Linear, Conv1D and Embedding are read"
    if f"{path}.lora_A" not in state or f"{path}.lora_B" not in state:
        return "stands there alone, without the other of lora_A and lora_B"
    a, b = state[f"{path}.lora_A"].shape, state[f"{path}.lora_B"].shape
    shape: torch.Size = layer.weight.shape  # type: ignore[assignment]
    num_out, num_in = shape if type(layer) is torch.nn.Linear else reversed(shape)
    if a == (*a[:1], num_in) and b == (num_out, *a[:1]):
        return None
    why = f"has a wrong shape: lora_A {tuple(a)}, lora_B {tuple(b)}; the base expects (r, {num_in}), ({num_out}, r)"
    if len(a) == len(b) == 2 and a[1] == num_in and a[0] % b[1] == 0 and num_out * (a[0] // b[1]) % b[0] == 0:
        why += ". Those are of loralib.MergedLinear, whose groups are not told; let loralib merge it (model.eval())"
    return why


def _alphas(adapter: Path, told: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    modules = told.get("modules") or {}
    alphas: dict[str, float] = {}
    for path, rank in ranks.items():
        own = modules.get(path, told) if isinstance(modules, dict) else None
        r, alpha = (own.get("r", rank), own.get("lora_alpha")) if isinstance(own, dict) else (None, None)
        if r != rank or isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ArtifactError(f"{adapter / TOLD}: r={r!r}, lora_alpha={alpha!r}: not those of {path}, of rank {rank}")
        alphas[path] = alpha
    return alphas


def _split(values: Mapping[str, float]) -> tuple[Any, dict[str, float]]:
    """Return the commonest value, and in PEFT's way what differs: by last names if these decide it, else by paths."""
    by_name: dict[str, set[float]] = {}
    for path, value in values.items():
        by_name.setdefault(_last(path), set()).add(value)
    keys = {path: _last(path) if len(by_name[_last(path)]) == 1 else f"^{path}" for path in values}
    default = Counter(values.values()).most_common(1)[0][0]
    return default, {keys[path]: value for path, value in values.items() if value != default}


def _targets(layers: Mapping[str, torch.nn.Module], model: PreTrainedModel) -> list[str]:
    """Return the layers' last names if these select exactly them in the base, else their whole paths."""
    names = {_last(path) for path in layers}
    selected = {path for path, _ in model.named_modules() if _last(path) in names}
    return sorted(names if selected == layers.keys() else layers)


def _bias_mode(file: Path, state: State, names: Mapping[str, str], layers: Mapping[str, torch.nn.Module]) -> str:
    found = {name for name in state if name.endswith(".bias")}
    every = {name for name in names if name.endswith(".bias")}
    own = {name for name in every if name.removesuffix(".bias") in layers}
    for mode, biases in (("none", set[str]()), ("all", every), ("lora_only", own)):
        if found == biases:
            return mode
    raise ArtifactError(
        f"{file}: holds {len(found)} biases, {min(found)} among them; PEFT takes all {len(every)} of the base, or the "
        f"{len(own)} of the layers that carry LoRA. Save with loralib.lora_state_dict(model, bias=…)"
    )


def _whole(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _read(file: Path) -> State:
    return _checked(file, weights.read_tensors(file) if file.suffix == ".safetensors" else read_pickle(file))


def _checked(where: Path, tensors: State) -> State:
    """Return copies of tensors from a stranger's file, each whole and on its own."""
    for name, tensor in tensors.items():
        plain = tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.dtype in DTYPES
        # A pickle may say that one number is repeated a trillion times.
        if not plain or not 0 < tensor.nbytes <= tensor.untyped_storage().nbytes():
            raise ArtifactError(f"{where}: {name} is no ordinary tensor of floating-point numbers")
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{where}: {name} holds values that are not finite")
    return {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}


def _write(path: Path, tensors: State) -> None:
    """Write tensors as the name's end says, read them back and compare."""
    if path.suffix == ".safetensors":
        weights.write_tensors(path, tensors)
    else:
        data = io.BytesIO()
        torch.save(tensors, data)
        write_bytes(path, data.getvalue())
    written = _read(path)
    if written.keys() != tensors.keys() or any(not torch.equal(written[name], tensors[name]) for name in tensors):
        raise ArtifactError(f"{path}: does not hold what was written; is the disk sound?")
