"""Weight files are read and written one tensor at a time, in the safetensors format."""

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
from lora_accel.merging.shards import DTYPES, TensorSpec, Weights, shard_layout, write_shards


def spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tensor.dtype, tuple(tensor.shape))


TENSORS = {
    "b.weight": torch.arange(6.0).reshape(2, 3),
    "a": torch.tensor(3.0, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    **{f"dtype {name}": torch.ones(3).to(dtype) for name, dtype in DTYPES.items()},
}


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_safetensors_reads_a_written_file(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    layout = shard_layout([[(name, spec(tensor)) for name, tensor in TENSORS.items()]], None)
    files = [file for file in write_shards(tmp_path, layout, TENSORS.__getitem__, pool) if file is not None]
    assert files == [("model.safetensors", hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest())]
    actual = load_file(tmp_path / "model.safetensors")
    assert actual.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_several_files_have_an_index_and_round_trip(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    layout = shard_layout([[(name, spec(tensor)) for name, tensor in TENSORS.items()]], 24)
    files = [file[0] for file in write_shards(tmp_path, layout, TENSORS.__getitem__, pool) if file is not None]
    assert files == sorted(layout)
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == TENSORS.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    weights = Weights(tmp_path)
    assert weights.specs == {name: spec(tensor) for name, tensor in TENSORS.items()}
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in TENSORS.items())


def test_tensor_other_than_declared_raises(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    layout = shard_layout([[("a", TensorSpec(torch.float32, (2,)))]], None)
    with pytest.raises(AssertionError, match="expected a TensorSpec"):
        list(write_shards(tmp_path, layout, lambda _: torch.zeros(3), pool))


@pytest.mark.parametrize("damage", ["truncated", "empty", "none", "index", "missing"])
def test_unreadable_weights_raise(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, file)
    if damage == "truncated":
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
