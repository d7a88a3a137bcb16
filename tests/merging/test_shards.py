"""Weight files are read and written a tensor at a time, in the format that safetensors reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_accel.errors import ArtifactError
from lora_accel.merging.shards import DTYPES, Kind, Weights, shard_layout, writing


def kind(tensor: torch.Tensor) -> Kind:
    return Kind(tensor.dtype, tuple(tensor.shape))


TENSORS = {
    "b.weight": torch.arange(6.0).reshape(2, 3),
    "a": torch.tensor(3.0, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "turned": torch.arange(6.0).reshape(2, 3).T,
    **{f"of {name}": torch.ones(3).to(dtype) for name, dtype in DTYPES.items()},
}


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_what_is_written_safetensors_reads(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    layout = shard_layout([[(name, kind(tensor)) for name, tensor in TENSORS.items()]], None)
    whole = [told for told in writing(tmp_path, layout, TENSORS.__getitem__, pool) if told is not None]
    assert whole == [("model.safetensors", hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest())]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_several_files_have_an_index_and_are_read_again(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    layout = shard_layout([[(name, kind(tensor)) for name, tensor in TENSORS.items()]], 24)
    files = [told[0] for told in writing(tmp_path, layout, TENSORS.__getitem__, pool) if told is not None]
    assert files == sorted(layout)
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == TENSORS.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    weights = Weights(tmp_path)
    assert weights.kinds == {name: kind(tensor) for name, tensor in TENSORS.items()}
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in TENSORS.items())


def test_another_tensor_than_announced_is_not_written(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    layout = shard_layout([[("a", Kind(torch.float32, (2,)))]], None)
    with pytest.raises(AssertionError, match="was announced"):
        list(writing(tmp_path, layout, lambda _: torch.zeros(3), pool))


@pytest.mark.parametrize("damage", ["cut", "empty", "none", "index", "missing"])
def test_what_cannot_be_read_is_told(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:50])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "none":
        file.unlink()
    elif damage == "index":
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    else:
        file.unlink()
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    with pytest.raises(ArtifactError):
        Weights(tmp_path)
