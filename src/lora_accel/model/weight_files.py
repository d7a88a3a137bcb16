"""The files of a model from which transformers loads its weights. Any other file in its folder is not read."""

from __future__ import annotations

import contextlib
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from lora_accel.config.schema import ModelSection
from lora_accel.errors import ArtifactError
from lora_accel.model.json_files import read_object

SAFETENSORS = "model.safetensors"
BIN = "pytorch_model.bin"


def find_weight_files(section: ModelSection) -> list[Path]:
    """Return the weight files that transformers loads for a base; downloads them if necessary.

    Raises:
        ArtifactError: there are none, an index is invalid, or a file that it names is missing.
    """
    folder = Path(section.name_or_path)
    return weight_files(folder if folder.is_dir() else _download(section))


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers loads, in the order of their names.

    It takes the first that exists of model.safetensors, its index, pytorch_model.bin and its index, unless the config
    names another file.

    Raises:
        ArtifactError: there are none, an index names a file outside the folder, or one that is missing.
    """
    named = (read_object(folder / "config.json") or {}).get("transformers_weights")
    if isinstance(named, str) and named != Path(named).name:
        raise ArtifactError(f"{folder / 'config.json'}: transformers_weights={named!r} is outside its folder")
    for name in (named,) if isinstance(named, str) else (SAFETENSORS, BIN):
        index = folder / (name if name.endswith(".index.json") else f"{name}.index.json")
        if (folder / name).is_file() and not name.endswith(".index.json"):
            return [folder / name]
        if index.is_file():
            return _indexed_files(index)
    raise ArtifactError(f"{folder}: contains neither {SAFETENSORS} nor {BIN}{_shards_hint(folder)}")


def check_index_paths(folder: Path) -> None:
    """Check that every weight index names only files in its own folder: transformers would follow any path.

    Raises:
        ArtifactError: an index names a file outside its folder, or is not a weight index.
    """
    for index in sorted(folder.glob("*.index.json")):
        _indexed_names(index)


def _indexed_files(index: Path) -> list[Path]:
    """Return the weight files that an index names, each once."""
    files = [index.parent / name for name in sorted(set(_indexed_names(index)))]
    if not files:
        raise ArtifactError(f"{index}: is not a weight index")
    if missing := [file.name for file in files if not file.is_file()]:
        raise ArtifactError(
            f"{index.parent}: {missing[0]} is missing, which {index.name} names; download the model again"
        )
    return files


def _indexed_names(index: Path) -> list[str]:
    """Return the file of each tensor in an index."""
    weight_map = (read_object(index) or {}).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ArtifactError(f"{index}: is not a weight index")
    for name in weight_map.values():
        if not isinstance(name, str) or name != Path(name).name:
            raise ArtifactError(f"{index}: names {name!r}, which is outside its folder")
    return list(weight_map.values())


def _download(section: ModelSection) -> Path:
    """Download the weight files of a model on the Hub, unless they are in its cache; return their folder."""

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(section.name_or_path, name, revision=section.revision))
        except EntryNotFoundError:  # also: offline, and not in the cache
            return None

    for name in (SAFETENSORS, BIN):
        if (file := fetch(name)) is not None:
            return file.parent
        if (index := fetch(f"{name}.index.json")) is not None:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                shards = set((read_object(index) or {})["weight_map"].values())
                for shard in sorted(shards):
                    if shard == Path(shard).name:  # weight_files reports any other
                        fetch(shard)
            return index.parent
    raise ArtifactError(
        f"{section.name_or_path}: {SAFETENSORS} or {BIN} is neither in the Hub's cache nor can it be downloaded"
    )


def _shards_hint(folder: Path) -> str:
    """Return how to use a folder whose weight files lack their index; empty if there are none."""
    shards = sorted(file.name for suffix in ("safetensors", "bin") for file in folder.glob(f"*-of-*.{suffix}"))
    if not shards:
        return ""
    index = f"{SAFETENSORS if shards[0].endswith('.safetensors') else BIN}.index.json"
    return f"; it has {shards[0]} without {index}, which lists the tensors of each file: download that file too"
