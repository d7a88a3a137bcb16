"""The identity of a base: the tensors that transformers loads, by name and content, in whatever files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_accel.errors import ArtifactError
from lora_accel.saving import base_identity
from lora_accel.saving.atomic import sha256_of
from lora_accel.saving.base_identity import base_hashes, has_weights, is_same_base, tensors_hash


@pytest.fixture
def base(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a copy of a base that a test may change."""
    shutil.copytree(tiny_model("qwen2"), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files that are read to hash them."""
    names: list[str] = []

    def record(path: Path) -> str:
        names.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(base_identity, "sha256_of", record)
    return names


def reshard(base: Path, out: Path) -> Path:
    """Save a base again, in several files."""
    shutil.copytree(base, out)
    (out / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(out, max_shard_size="20KB")
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    return out


def to_pickle(base: Path, out: Path) -> Path:
    """Save the same tensors as pytorch_model.bin."""
    shutil.copytree(base, out)
    torch.save(load_file(base / "model.safetensors"), out / "pytorch_model.bin")
    (out / "model.safetensors").unlink()
    return out


@pytest.mark.parametrize(
    "name",
    [
        "consolidated.safetensors",
        "training_args.bin",
        "pytorch_model.bin",
        "adapter_model.safetensors",
        "a.safetensors",
    ],
)
def test_files_that_are_not_loaded_do_not_count(base: Path, name: str) -> None:
    before = base_hashes(str(base), None), tensors_hash(str(base), None)
    assert before[0] == {"model.safetensors": sha256_of(base / "model.safetensors")}
    (base / name).write_bytes(b"something else")
    assert (base_hashes(str(base), None), tensors_hash(str(base), None)) == before


def test_a_stale_index_beside_a_single_file_does_not_count(base: Path) -> None:
    """transformers prefers model.safetensors."""
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00001.safetensors"}}')
    assert list(base_hashes(str(base), None)) == ["model.safetensors"]


@pytest.mark.parametrize("store", [reshard, to_pickle])
def test_the_same_tensors_in_other_files_are_the_same_base(
    base: Path, tmp_path: Path, store: Callable[[Path, Path], Path]
) -> None:
    other = store(base, tmp_path / "other")
    files, hashes = base_hashes(str(base), None), base_hashes(str(other), None)
    assert not set(hashes.values()) & set(files.values())
    recorded = {"sha256": files, "tensors_sha256": tensors_hash(str(base), None)}
    assert is_same_base(recorded, hashes, lambda: tensors_hash(str(other), None))
    del recorded["tensors_sha256"]  # an older provenance has only the files
    assert not is_same_base(recorded, hashes, lambda: tensors_hash(str(other), None))


def test_a_tied_head_is_the_same_base_in_both_formats(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """A pickle stores it under two names, safetensors under one."""
    base = tiny_model("opt")
    other = to_pickle(base, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.save(model.state_dict(), other / "pytorch_model.bin")
    assert len(model.state_dict()) > len(load_file(base / "model.safetensors"))
    assert tensors_hash(str(other), None) == tensors_hash(str(base), None)


@pytest.mark.parametrize("change", ["value", "name", "shape", "dtype", "swap"])
def test_another_tensor_is_another_base(base: Path, change: str) -> None:
    before = tensors_hash(str(base), None)
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    if change == "value":
        tensors[name][3, 5] += 1e-3
    elif change == "name":
        tensors["other"] = tensors.pop(name)
    elif change == "shape":
        tensors[name] = tensors[name].reshape(-1, 1)
    elif change == "dtype":
        tensors[name] = tensors[name].view(torch.int32)  # the same bytes
    else:
        other = "model.layers.1.self_attn.k_proj.weight"
        tensors[name], tensors[other] = tensors[other], tensors[name]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert tensors_hash(str(base), None) != before


def test_a_file_in_the_hub_cache_is_not_read(tmp_path: Path, hashed: list[str]) -> None:
    """It is named by its hash. Only in the Hub's cache: another store may name files otherwise."""
    for folder, expected in (("blobs", "ab" * 32), ("store", sha256_of)):
        blob = tmp_path / folder / ("ab" * 32)
        blob.parent.mkdir()
        blob.write_bytes(b"weights")
        snapshot = tmp_path / f"snapshot-{folder}"
        snapshot.mkdir()
        (snapshot / "model.safetensors").symlink_to(blob)
        value = expected if isinstance(expected, str) else expected(blob)
        assert base_hashes(str(snapshot), None) == {"model.safetensors": value}
    assert hashed == ["model.safetensors"]


def test_an_unchanged_file_is_hashed_once(base: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Any write to it is noticed, even if size and mtime stay the same. Without `cached` it is always read."""
    monkeypatch.setattr(base_identity, "RACY_SECONDS", -1.0)  # as if the file were old
    first = base_hashes(str(base), None, cached=True)
    assert base_hashes(str(base), None, cached=True) == first
    assert len(hashed) == 1
    assert base_hashes(str(base), None) == first
    assert len(hashed) == 2

    file = base / "model.safetensors"
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert base_hashes(str(base), None, cached=True) == {"model.safetensors": sha256_of(file)} != first


def test_the_hash_of_a_file_that_just_changed_is_not_kept(base: Path, hashed: list[str]) -> None:
    """It could change again within the resolution of its times."""
    (base / "model.safetensors").write_bytes(b"new")
    base_hashes(str(base), None, cached=True)
    base_hashes(str(base), None, cached=True)
    assert len(hashed) == 2


@pytest.mark.parametrize("damage", ["empty", "flipped", "folder"])
def test_a_damaged_record_is_not_used(base: Path, damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(base_identity, "RACY_SECONDS", -1.0)
    monkeypatch.setattr(base_identity.constants, "HF_HOME", str(tmp_path / "home"))
    expected = base_hashes(str(base), None, cached=True)
    (entry,) = (tmp_path / "home" / "lora_accel" / "base-hashes").iterdir()
    text = entry.read_text()
    if damage == "folder":
        entry.unlink()
        entry.mkdir()
    else:
        entry.write_text("" if damage == "empty" else ("1" if text[0] != "1" else "2") + text[1:])
    assert base_hashes(str(base), None, cached=True) == expected


def test_hashes_need_no_writable_cache(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(base_identity, "RACY_SECONDS", -1.0)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(base_identity.constants, "HF_HOME", str(tmp_path / "file"))
    assert base_hashes(str(base), None, cached=True) == base_hashes(str(base), None)


# Folders without weights


def test_a_folder_without_weights_raises(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"contains neither model\.safetensors nor pytorch_model\.bin"):
        base_hashes(str(tmp_path), None)
    assert not has_weights(str(tmp_path), None)


def test_shards_without_their_index_are_reported(base: Path, tmp_path: Path) -> None:
    other = reshard(base, tmp_path / "other")
    (other / "model.safetensors.index.json").unlink()
    with pytest.raises(
        ArtifactError, match=r"it has model-00001-of-\d+\.safetensors without model\.safetensors\.index"
    ):
        base_hashes(str(other), None)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "gone.safetensors"}, "gone.safetensors is missing"),
        ({"x": "../a.safetensors"}, "outside its folder"),
        ({"x": 3}, "outside its folder"),
        ({}, "is not a weight index"),
        ([], "is not a weight index"),
    ],
)
def test_an_invalid_index_raises(tmp_path: Path, weight_map: object, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ArtifactError, match=message):
        base_hashes(str(tmp_path), None)


def test_the_file_that_the_config_names_is_the_base(base: Path) -> None:
    """transformers_weights."""
    (base / "model.safetensors").rename(base / "other.safetensors")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    assert list(base_hashes(str(base), None)) == ["other.safetensors"]
    (base / "config.json").write_text(json.dumps(config | {"transformers_weights": "../other.safetensors"}))
    with pytest.raises(ArtifactError, match="outside its folder"):
        base_hashes(str(base), None)
