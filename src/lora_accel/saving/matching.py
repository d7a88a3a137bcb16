"""Match the tensors of an adapter's file with a model that has the adapter, whatever tool or version named them.

Besides PEFT's own names of today these are accepted, as `PeftModel.from_pretrained` does:

- names with the adapter's name in them (`….lora_A.default.weight`), of a state dict that was saved by hand
- a second copy of modules_to_save (`….modules_to_save.weight`), and the embeddings of a base whose vocabulary was
  resized (`….weight`, `….base_layer.weight`, `….original_module.weight`, `….token_adapter.base_layer.weight`)
- experts as transformers 4 named them, one module each; transformers 5 stores all in one parameter
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

from lora_accel.errors import ArtifactError, first_line
from lora_accel.saving.atomic import read_json
from lora_accel.saving.discovery import CONFIG

State = dict[str, torch.Tensor]
PREFIX = "base_model.model."
"""PEFT's prefix of the base model's names."""
WRAPPER_NAMES = ("base_layer", "original_module", "token_adapter")
"""Names that PEFT's wrappers add to the path of a base parameter."""
NAMED_ADAPTER = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|lora_velora_embed|modules_to_save"
    r"|trainable_tokens_delta)\.[^.]+(?=\.|$)"
)
"""The name of an adapter after the part of PEFT that it belongs to."""
MAGNITUDE = ".lora_magnitude_vector"
MISMATCH_HINT = "are these the base and the adapter_config.json that it was trained with?"
MAX_ADDED_ROWS = 100_000
"""Tokens that an adapter may add to a base beyond doubling its vocabulary."""


class AdapterTensors(NamedTuple):
    """The tensors of an adapter's file, matched with a model."""

    trained: State
    """By PEFT's names in a file."""
    embeddings: State
    """The base's embeddings, which PEFT saves if the vocabulary was resized, by their names in the base."""


def plain_name(key: str) -> str:
    """Return the name in the base of a base tensor in an adapter's file."""
    parts = key.removeprefix(PREFIX).split(".")
    return ".".join(part for part in parts if part not in WRAPPER_NAMES)


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


# The vocabulary


def embedding_modules(base: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the input and output embeddings by module name. A model may have no output embeddings."""
    embeddings = [getattr(base, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    return {
        name: module for name, module in base.named_modules() if any(module is embedding for embedding in embeddings)
    }


def embedding_rows(base: torch.nn.Module) -> dict[str, int]:
    """Return the number of tokens in each of the embeddings, by module name."""
    # PEFT's wrappers expose the wrapped weight.
    return {name: len(getattr(module, "weight", ())) for name, module in embedding_modules(base).items()}


def resize_vocabulary(base: torch.nn.Module, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Resize a base's embeddings to the vocabulary of an adapter: to the rows in its file, or those that it trains.

    Args:
        folder: of the adapter.
        tensors: of its file.

    Raises:
        ArtifactError: the adapter trains some rows that the base lacks, and not all of them, or its vocabulary is much
            larger than the base's.
    """
    base_rows = embedding_rows(base)
    if not base_rows:
        return
    old_size = max(base_rows.values())
    sizes = _saved_rows(base_rows, tensors, folder)
    trained = _trained_rows(folder)
    new_size = max(sizes, default=old_size)
    if trained and max(trained) >= new_size:
        new_size = max(trained) + 1
        if sum(row >= old_size for row in trained) < new_size - old_size or sizes:
            raise ArtifactError(
                f"{folder / CONFIG}: trainable_token_indices has {max(trained)}, but the base has {old_size:,} "
                "tokens and the adapter does not train all in between; is this the base that it was trained on?"
            )
    if new_size > 2 * old_size + MAX_ADDED_ROWS:
        raise ArtifactError(f"{folder}: has a vocabulary of {new_size:,} tokens, the base one of {old_size:,}")
    if any(rows != new_size for rows in base_rows.values()) and (sizes or new_size != old_size):
        base.resize_token_embeddings(new_size, mean_resizing=False)  # type: ignore[operator]


def _saved_rows(base_rows: Mapping[str, int], tensors: Mapping[str, torch.Tensor], folder: Path) -> set[int]:
    """Return the sizes of the vocabulary in an adapter's file; none if it has no embeddings."""
    sizes = set()
    for key, tensor in tensors.items():
        name = plain_name(NAMED_ADAPTER.sub(r".\1", key, count=1)).replace(".modules_to_save.", ".", 1)
        module, _, leaf = name.rpartition(".")
        if module not in base_rows or leaf not in ("weight", "lora_embedding_A"):
            continue
        if tensor.ndim != 2:
            raise ArtifactError(f"{folder}: {key} has shape {tuple(tensor.shape)}; embeddings have two dimensions")
        sizes.add(tensor.shape[0 if leaf == "weight" else 1])
    if len(sizes) > 1:
        raise ArtifactError(f"{folder}: its embeddings have different numbers of tokens: {sorted(sizes)}")
    return sizes


def _trained_rows(folder: Path) -> set[int]:
    """Return the rows of the embeddings that an adapter trains: `trainable_token_indices` of its config."""
    indices = read_json(folder / CONFIG).get("trainable_token_indices") or []
    lists = list(indices.values()) if isinstance(indices, dict) else [indices]
    return {row for rows in lists if isinstance(rows, list) for row in rows if type(row) is int and row >= 0}


def check_same_embeddings(base: torch.Tensor, saved: torch.Tensor, where: str) -> None:
    """Check that the embeddings in an adapter's file are those of the base, for the tokens that both have.

    Raises:
        ArtifactError: they differ.
    """
    rows, coarse = min(len(base), len(saved)), min(base.dtype, saved.dtype, key=lambda dtype: dtype.itemsize)
    if base.shape[1:] != saved.shape[1:] or not torch.equal(base[:rows].cpu().to(coarse), saved[:rows].to(coarse)):
        raise ArtifactError(
            f"{where}: the embeddings saved with the adapter are not those of this base, though they were not trained; "
            "is this the base that it was trained on? (Trained embeddings must be in modules_to_save.)"
        )


def write_embeddings(model: PeftModel, saved: State, base_rows: Mapping[str, int], folder: Path) -> None:
    """Write the embeddings of a resized base, as an adapter's file has them, into the base of a model.

    Args:
        saved: by their names in the base.
        base_rows: number of tokens of each of the embeddings before the vocabulary was resized.

    Raises:
        ArtifactError: they are not those of this base, or the adapter's file lacks the rows that the base lacks.
    """
    modules = embedding_modules(model.get_base_model())
    written = set()
    for name, tensor in saved.items():
        weight = base_parameter(modules[name.removesuffix(".weight")])
        check_same_embeddings(weight.data[: base_rows[name.removesuffix(".weight")]], tensor, f"{folder}: {name}")
        weight.data.copy_(tensor)
        written.add(id(weight))
    trained = _trained_rows(folder)
    for name, module in modules.items():
        weight, old = base_parameter(module), base_rows.get(name, 0)
        has_rows = (
            id(weight) in written
            or isinstance(module, ModulesToSaveWrapper)
            or (isinstance(module, TrainableTokensWrapper) and trained.issuperset(range(old, len(weight))))
        )
        if len(weight) > old and not has_rows:
            raise ArtifactError(
                f"{folder}: the adapter's vocabulary has {len(weight):,} tokens and {name} of the base {old:,}, but "
                "its file has no embeddings for the others; save both embeddings (PEFT: save_embedding_layers=True)"
            )


def base_parameter(module: Any) -> torch.nn.Parameter:
    """Return the base's weight of a module that PEFT may have wrapped."""
    while isinstance(module, BaseTunerLayer) or hasattr(module, "original_module"):
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    parameter: torch.nn.Parameter = module.weight
    return parameter


def _example(names: list[str]) -> str:
    return f" (such as {names[0]})" if names else ""
