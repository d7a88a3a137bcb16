"""Resize a base to the vocabulary of an adapter that has more tokens, and write the saved embeddings into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

from lora_accel.errors import ArtifactError
from lora_accel.saving.atomic import read_json
from lora_accel.saving.discovery import CONFIG
from lora_accel.saving.names import NAMED_ADAPTER, plain_name
from lora_accel.saving.tensor_files import State

MAX_ADDED_ROWS = 100_000
"""Tokens that an adapter may add to a base beyond doubling its vocabulary."""


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
    sizes = saved_rows(base_rows, tensors, str(folder))
    trained = trained_rows(read_json(folder / CONFIG))
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
    trained = trained_rows(read_json(folder / CONFIG))
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


def embedding_rows(base: torch.nn.Module) -> dict[str, int]:
    """Return the number of tokens in each of the embeddings, by module name."""
    # PEFT's wrappers expose the wrapped weight.
    return {name: len(getattr(module, "weight", ())) for name, module in embedding_modules(base).items()}


def embedding_modules(base: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the input and output embeddings by module name. A model may have no output embeddings."""
    embeddings = [getattr(base, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    return {
        name: module for name, module in base.named_modules() if any(module is embedding for embedding in embeddings)
    }


def base_parameter(module: Any) -> torch.nn.Parameter:
    """Return the base's weight of a module that PEFT may have wrapped."""
    while isinstance(module, BaseTunerLayer) or hasattr(module, "original_module"):
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    parameter: torch.nn.Parameter = module.weight
    return parameter


def saved_rows(base_rows: Mapping[str, int], tensors: Mapping[str, torch.Tensor], where: str) -> set[int]:
    """Return the sizes of the vocabulary in an adapter's file; none if it has no embeddings.

    Args:
        base_rows: see `embedding_rows`.
        where: the adapter, for messages.

    Raises:
        ArtifactError: the embeddings have different sizes.
    """
    sizes = set()
    for key, tensor in tensors.items():
        name = plain_name(NAMED_ADAPTER.sub(r".\1", key, count=1)).replace(".modules_to_save.", ".", 1)
        module, _, leaf = name.rpartition(".")
        if module not in base_rows or leaf not in ("weight", "lora_embedding_A"):
            continue
        if tensor.ndim != 2:
            raise ArtifactError(f"{where}: {key} has shape {tuple(tensor.shape)}; embeddings have two dimensions")
        sizes.add(tensor.shape[0 if leaf == "weight" else 1])
    if len(sizes) > 1:
        raise ArtifactError(f"{where}: its embeddings have different numbers of tokens: {sorted(sizes)}")
    return sizes


def trained_rows(config: Mapping[str, Any]) -> set[int]:
    """Return the rows of the embeddings that an adapter trains: `trainable_token_indices` of its config."""
    indices = config.get("trainable_token_indices") or []
    lists = list(indices.values()) if isinstance(indices, dict) else [indices]
    return {row for rows in lists if isinstance(rows, list) for row in rows if type(row) is int and row >= 0}
