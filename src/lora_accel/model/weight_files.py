"""The files of a model folder from which transformers loads its weights. Any other file there is not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_accel.errors import ArtifactError

SAFETENSORS = "model.safetensors"
BIN = "pytorch_model.bin"


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers loads, in the order of their names.

    It takes the first that exists of model.safetensors, its index, pytorch_model.bin and its index, unless the config
    names another file.

    Raises:
        ArtifactError: there are none, an index names a file outside the folder, or one that is missing.
    """
    named = _read_json(folder / "config.json").get("transformers_weights")
    if isinstance(named, str) and named != Path(named).name:
        raise ArtifactError(f"{folder / 'config.json'}: transformers_weights={named!r} is outside its folder")
    for name in (named,) if isinstance(named, str) else (SAFETENSORS, BIN):
        index = folder / (name if name.endswith(".index.json") else f"{name}.index.json")
        if (folder / name).is_file() and not name.endswith(".index.json"):
            return [folder / name]
        if index.is_file():
            return _indexed_files(index)
    raise ArtifactError(f"{folder}: contains neither {SAFETENSORS} nor {BIN}{_shards_hint(folder)}")


def _indexed_files(index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"{index}: is not a weight index")
    for file in weight_map.values():
        if not isinstance(file, str) or file != Path(file).name:
            raise ArtifactError(f"{index}: names {file!r}, which is outside its folder")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ArtifactError(
            f"{index.parent}: {missing[0]} is missing, which {index.name} names; download the model again"
        )
    return files


def _shards_hint(folder: Path) -> str:
    """Return how to use a folder whose weight files lack their index; empty if there are none."""
    shards = sorted(file.name for suffix in ("safetensors", "bin") for file in folder.glob(f"*-of-*.{suffix}"))
    if not shards:
        return ""
    index = f"{SAFETENSORS if shards[0].endswith('.safetensors') else BIN}.index.json"
    return f"; it has {shards[0]} without {index}, which lists the tensors of each file: download that file too"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
