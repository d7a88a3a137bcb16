"""A merged model equals PEFT's merge, has the logits of base + adapter, and is a complete model folder."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lora_accel import RunConfig, merge_adapter, run_training
from lora_accel.config.schema import ModelSection, QuantizationSection
from lora_accel.errors import ArtifactError, LoraAccelError, UserError
from lora_accel.merging import merge
from lora_accel.merging.merge import merge_checkpoints
from lora_accel.merging.shards import Weights
from lora_accel.merging.streaming import MergedTensors
from lora_accel.model.base import load_base_model
from lora_accel.saving.atomic import why_invalid, write_manifest
from lora_accel.saving.discovery import WEIGHTS
from tests.conftest import CHATML

IDS = torch.arange(5, 29).reshape(2, 12)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def file_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def trained(
    make_config: Callable[..., RunConfig], tiny_model: Callable[..., Path], tmp_path: Path
) -> Callable[..., Path]:
    """Train an adapter on a tiny model; return its folder."""

    def train(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: object) -> Path:
        changes = {"model": {"name_or_path": str(tiny_model(family, dtype))}} | changes
        return run_training(make_config(output_dir=str(tmp_path / "run"), **changes))

    return train


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2"])
def test_float32_merge_equals_peft_bitwise(
    trained: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path, family: str, bias: str
) -> None:
    adapter = trained(family, adapter={"bias": bias})
    provenance = merge_adapter(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")

    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model(family)), adapter)
    expected_logits = logits(peft_model)
    torch.testing.assert_close(logits(merged), expected_logits, rtol=1e-5, atol=1e-5)
    difference = (expected_logits - logits(AutoModelForCausalLM.from_pretrained(tiny_model(family)))).abs().max()
    assert difference > 1e-2, "the adapter must change the logits for this test to mean anything"
    assert 0 <= provenance["merged"]["agreement"]["moved"] < 1e-5

    expected = peft_model.merge_and_unload().state_dict()
    actual = merged.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_bfloat16_base_stays_bfloat16_and_is_rounded_once(
    trained: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = trained(dtype=torch.bfloat16)
    merge_adapter(adapter, tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16

    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama", torch.bfloat16), dtype=torch.float32)
    exact = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, exact[name].to(torch.bfloat16)), name


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}],
    ids=["dora", "rslora", "head", "embedding"],
)
def test_lora_variants_merge(trained: Callable[..., Path], tmp_path: Path, options: dict[str, object]) -> None:
    adapter = trained("qwen2", adapter=options)
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    merge_adapter(adapter, tmp_path / "merged")
    actual = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_dequantized_base_weights_equal_those_of_a_qlora_run(
    trained: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = trained(quantization={"bits": 4})
    provenance = merge_adapter(adapter, tmp_path / "merged", base_weights="dequantized")
    assert provenance["merged"]["base_weights"] == "dequantized"
    assert provenance["merged"]["agreement"]["moved"] < 1e-4
    quantized = load_base_model(ModelSection(name_or_path=str(tiny_model())), QuantizationSection(bits=4))
    layer = quantized.model.layers[0].mlp.down_proj
    dequantized = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    delta = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model()), adapter)
    delta = delta.base_model.model.model.layers[0].mlp.down_proj.get_delta_weight("default")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(merged[name], dequantized + delta, rtol=0, atol=1e-6)
    base = load_file(tiny_model() / "model.safetensors")
    assert (merged[name] - base[name]).std() > 1e-3
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"]), "the head is not quantized"


def test_dequantized_needs_a_quantized_base(trained: Callable[..., Path], tmp_path: Path) -> None:
    adapter = trained()
    with pytest.raises(ArtifactError, match="its base was not quantized in training; pass --base-weights original"):
        merge_adapter(adapter, tmp_path / "merged", base_weights="dequantized")
    (adapter / "provenance.json").unlink()
    with pytest.raises(ArtifactError, match="has no record of how its base was quantized"):
        merge_adapter(adapter, tmp_path / "merged", base_weights="dequantized")
    assert nothing_written(tmp_path)


def test_unknown_base_weights_raise_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--base-weights rounded: use original or dequantized"):
        merge_adapter(tmp_path / "none", tmp_path / "merged", base_weights="rounded")


def test_qlora_adapter_merges_into_the_unquantized_base(
    trained: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = trained(quantization={"bits": 4})
    merge_adapter(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    assert {tensor.dtype for tensor in merged.state_dict().values()} == {torch.float32}
    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    expected = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    assert all(torch.equal(merged.state_dict()[name], tensor) for name, tensor in expected.items())


def test_folder_is_complete_and_has_provenance(
    trained: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    license_file = tiny_model() / "LICENSE.txt"
    license_file.write_text("free")
    (tiny_model() / "LICENSES").mkdir()  # a folder is not copied
    adapter = trained()
    returned = merge_adapter(adapter, tmp_path / "merged")
    license_file.unlink()
    (tiny_model() / "LICENSES").rmdir()
    out = tmp_path / "merged"
    assert why_invalid(out) is None
    files = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "provenance.json"}
    assert files | {"manifest.json", "README.md", "LICENSE.txt"} <= file_names(out)
    card = (out / "README.md").read_text()
    assert f"# the local model {tiny_model().name} with a LoRA adapter merged into it" in card
    assert str(tiny_model()) not in card, "a path of this machine"
    assert not any("adapter" in name for name in file_names(out))
    assert AutoTokenizer.from_pretrained(out).chat_template == CHATML
    assert AutoConfig.from_pretrained(out).use_cache
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance == returned
    assert provenance["merged"]["base"] == str(tiny_model())
    assert provenance["adapter"] == json.loads((adapter / "provenance.json").read_text())


def test_merged_model_has_the_chat_template_of_training(
    trained: Callable[..., Path], make_config: Callable[..., RunConfig], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = {"name_or_path": str(tiny_model()), "chat_template": "alpaca"}
    adapter = run_training(make_config(model=model))
    merge_adapter(adapter, tmp_path / "merged")
    assert "### Response" in AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_bare_peft_adapter_gets_the_tokenizer_of_its_base(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model()),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    expected = logits(model)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == CHATML


# Errors. Nothing is written


def nothing_written(folder: Path) -> bool:
    return not [path for path in folder.iterdir() if "merged" in path.name]


def test_existing_folder_is_replaced_only_with_overwrite(trained: Callable[..., Path], tmp_path: Path) -> None:
    adapter, out = trained(), tmp_path / "merged"
    merge_adapter(adapter, out)
    first = (out / "manifest.json").stat().st_ino
    with pytest.raises(ArtifactError, match="already exists; choose another folder, or pass --overwrite"):
        merge_adapter(adapter, out)
    assert (out / "manifest.json").stat().st_ino == first
    merge_adapter(adapter, out, overwrite=True)
    assert (out / "manifest.json").stat().st_ino != first
    assert why_invalid(out) is None
    assert {path.name for path in tmp_path.iterdir() if "merged" in path.name} == {"merged"}


@pytest.mark.parametrize("name", ["mine.txt", "checkpoints/step-00000001/notes.txt"])
@pytest.mark.parametrize("is_ours", [False, True])
def test_files_of_the_user_are_never_overwritten(
    trained: Callable[..., Path], tmp_path: Path, name: str, is_ours: bool
) -> None:
    adapter, out = trained(), tmp_path / "merged"
    if is_ours:
        merge_adapter(adapter, out)
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("mine")
    before = file_names(out)
    with pytest.raises(ArtifactError, match=f"contains files that were not written here, and would be lost: {name}; "):
        merge_adapter(adapter, out, overwrite=True)
    assert (out / name).read_text() == "mine"
    assert file_names(out) == before


def test_linked_output_folder_is_replaced_on_its_own_disk(trained: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "merged").symlink_to(tmp_path / "disk" / "model")
    for _ in range(2):
        merge_adapter(trained(), tmp_path / "merged", overwrite=True)
        assert (tmp_path / "merged").is_symlink()
        assert why_invalid(tmp_path / "disk" / "model") is None
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]


def test_empty_output_folder_is_accepted(trained: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    merge_adapter(trained(), tmp_path / "merged")
    assert why_invalid(tmp_path / "merged") is None


@pytest.mark.parametrize("overwrite", [False, True])
def test_output_path_that_is_a_file_raises(trained: Callable[..., Path], tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "merged").write_text("mine")
    with pytest.raises(ArtifactError, match="merged"):
        merge_adapter(trained(), tmp_path / "merged", overwrite=overwrite)
    assert (tmp_path / "merged").read_text() == "mine"


@pytest.mark.parametrize("inside", [".", "..", "out"])
def test_output_folder_that_contains_the_adapter_raises(trained: Callable[..., Path], inside: str) -> None:
    """Replacing it would delete the adapter."""
    adapter = trained()
    before = file_names(adapter)
    if inside == "out":
        merge_adapter(adapter, adapter / "out", overwrite=True)  # inside the adapter's folder: deletes nothing
        assert file_names(adapter) == before | {"out"}
        return
    with pytest.raises(ArtifactError, match=r"contains the adapter|is a folder that cannot be replaced"):
        merge_adapter(adapter, adapter / inside, overwrite=True)
    assert file_names(adapter) == before


def test_output_folder_that_is_the_base_raises(
    trained: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = trained()
    copy = tmp_path / "base"
    shutil.copytree(tiny_model(), copy)
    write_manifest(copy)  # as a merged model has, so that it may be overwritten
    before = file_names(copy)
    with pytest.raises(ArtifactError, match="contains the base"):
        merge_adapter(adapter, copy, base=str(copy), overwrite=True)
    assert file_names(copy) == before


def test_different_base_weights_raise(
    trained: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = trained()
    other = tmp_path / "other"
    shutil.copytree(tiny_model(), other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="its weights are not those that the adapter was trained on"):
        merge_adapter(adapter, tmp_path / "merged", base=str(other))
    assert nothing_written(tmp_path)

    provenance = merge_adapter(adapter, tmp_path / "merged", base=str(other), force=True)
    assert provenance["merged"]["same_base"] is False
    assert provenance["merged"]["agreement"]["moved"] < 1e-4


@pytest.mark.parametrize("change", [{"num_hidden_layers": 1}, {"hidden_size": 48}, {"intermediate_size": 32}])
def test_base_of_another_shape_raises(
    trained: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path, change: dict[str, int]
) -> None:
    adapter, other = trained(), tmp_path / "other"
    shutil.copytree(tiny_model(), other)
    config = AutoConfig.from_pretrained(tiny_model(), **change)
    config.layer_types = None
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    for force in (False, True):
        with pytest.raises(
            ArtifactError, match=r"adapter: .*(do not belong to this adapter|has shape).*are these the base"
        ):
            merge_adapter(adapter, tmp_path / "merged", base=str(other), force=force)
    assert nothing_written(tmp_path)


def test_base_of_another_architecture_raises(
    trained: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="does not fit this base"):
        merge_adapter(trained(), tmp_path / "merged", base=str(tiny_model("gpt2")))
    assert nothing_written(tmp_path)


def test_moved_base_is_accepted(trained: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    adapter = trained()
    moved = tmp_path / "moved"
    shutil.copytree(tiny_model(), moved)
    provenance = merge_adapter(adapter, tmp_path / "merged", base=str(moved))
    assert provenance["merged"]["base"] == str(moved)


@pytest.mark.parametrize("missing", ["adapter_config.json", WEIGHTS])
def test_incomplete_adapter_raises(trained: Callable[..., Path], tmp_path: Path, missing: str) -> None:
    adapter = trained()
    (adapter / missing).unlink()
    with pytest.raises(ArtifactError, match=f"is not an adapter: {missing} is missing"):
        merge_adapter(adapter, tmp_path / "merged")
    assert nothing_written(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"base_model_name_or_path": null}', "{}"])
def test_adapter_config_without_a_base_raises(trained: Callable[..., Path], tmp_path: Path, text: str) -> None:
    adapter = trained()
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match="adapter"):
        merge_adapter(adapter, tmp_path / "merged")
    assert nothing_written(tmp_path)


@pytest.mark.parametrize(
    "provenance",
    [[], 3, {"base": []}, {"base": {"revision": 3}}, {"base": {"sha256": 3, "name_or_path": "x"}}, {"base": {}}],
)
def test_invalid_provenance_raises(trained: Callable[..., Path], tmp_path: Path, provenance: object) -> None:
    adapter = trained()
    (adapter / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(ArtifactError, match=r"provenance\.json"):
        merge_adapter(adapter, tmp_path / "merged")
    assert nothing_written(tmp_path)


def test_missing_base_raises(trained: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        merge_adapter(trained(), tmp_path / "merged", base=str(tmp_path / "absent"))
    assert nothing_written(tmp_path)


def test_nan_raises(trained: Callable[..., Path], tmp_path: Path) -> None:
    adapter = trained()
    weights = load_file(adapter / WEIGHTS)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, adapter / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="not finite"):
        merge_adapter(adapter, tmp_path / "merged")
    assert nothing_written(tmp_path)


def test_merge_with_wrong_logits_is_not_written(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One value of one tensor is wrong, or NaN."""
    adapter = trained()
    original = MergedTensors.read

    def read_with_error(error: float) -> Callable[..., torch.Tensor]:
        def read(self: MergedTensors, name: str) -> torch.Tensor:
            tensor = original(self, name).clone()
            if name == "model.layers.1.mlp.down_proj.weight":
                tensor[3, 5] += error
            return tensor

        return read

    for error in (0.1, float("nan")):
        monkeypatch.setattr(MergedTensors, "read", read_with_error(error))
        with pytest.raises(LoraAccelError, match=r"differ from base \+ adapter by .* nothing was written") as raised:
            merge_adapter(adapter, tmp_path / "merged", verify=True)
        assert raised.value.exit_code == 1
        assert nothing_written(tmp_path)
    monkeypatch.setattr(MergedTensors, "read", read_with_error(0.1))
    provenance = merge_adapter(adapter, tmp_path / "merged", verify=False)
    assert provenance["merged"]["agreement"] is None


def test_model_too_large_for_memory_is_not_verified(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    provenance = merge_adapter(trained(), tmp_path / "merged")
    assert provenance["merged"]["agreement"] is None
    assert "It was not compared" in (tmp_path / "merged" / "README.md").read_text()


def test_failed_write_leaves_nothing(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = trained()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "write_json", fail)  # called after model and tokenizer have been written
    with pytest.raises(OSError, match="No space left"):
        merge_adapter(adapter, tmp_path / "merged")
    assert nothing_written(tmp_path)


# All checkpoints of a run


@pytest.fixture
def run(trained: Callable[..., Path]) -> Path:
    """Return a run with two checkpoints and its adapter."""
    return trained(adapter={"bias": "all", "use_dora": True}, checkpoint={"every_steps": 3}).parent


def test_merge_checkpoints_reads_the_base_once(
    run: Path, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[str] = Counter()
    original = Weights._read

    def count_and_read(self: Weights, path: Path, name: str) -> torch.Tensor:
        reads[name] += path.parent == tiny_model()
        return original(self, path, name)

    monkeypatch.setattr(Weights, "_read", count_and_read)
    provenances = merge_checkpoints(run)
    assert set(reads.values()) == {1}
    assert file_names(run / "merged-all") == {"step-00000003", "step-00000006", "adapter"}
    names = [Path(provenance["merged"]["adapter"]).name for provenance in provenances]
    assert names == ["step-00000003", "step-00000006", "adapter"]
    for folder, name in [(run / "checkpoints" / "step-00000003", "step-00000003"), (run / "adapter", "adapter")]:
        merge_adapter(folder, tmp_path / "single", overwrite=True)
        expected = load_file(tmp_path / "single" / "model.safetensors")
        actual = load_file(run / "merged-all" / name / "model.safetensors")
        assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())
        assert why_invalid(run / "merged-all" / name) is None
        assert AutoTokenizer.from_pretrained(run / "merged-all" / name).chat_template == CHATML
    first, last = (load_file(run / "merged-all" / name / "model.safetensors") for name in ("step-00000003", "adapter"))
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], last["model.layers.0.mlp.up_proj.weight"])


def test_merge_checkpoints_skips_valid_outputs_and_replaces_corrupt_ones(run: Path) -> None:
    merge_checkpoints(run)
    times = {path: path.stat().st_mtime_ns for path in (run / "merged-all").glob("*/model.safetensors")}
    corrupt = run / "merged-all" / "adapter" / "model.safetensors"
    corrupt.write_bytes(corrupt.read_bytes()[:-1])
    times[corrupt] = corrupt.stat().st_mtime_ns
    provenances = merge_checkpoints(run)
    assert [provenance.get("already", False) for provenance in provenances] == [True, True, False]
    assert [path for path, time in times.items() if path.stat().st_mtime_ns != time] == [corrupt]
    assert why_invalid(run / "merged-all" / "adapter") is None
    (run / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"adapter: is not an adapter: adapter_model\.safetensors is missing"):
        merge_checkpoints(run)


def test_merge_checkpoints_repeats_a_merge_with_other_options(run: Path) -> None:
    def merged(**options: Any) -> list[bool]:
        return [provenance.get("already", False) for provenance in merge_checkpoints(run, **options)]

    assert merged(verify=False) == [False] * 3
    assert merged() == merged(verify=False) == [True] * 3
    assert merged(verify=True) == [False] * 3
    assert merged(verify=True) == merged(verify=False) == [True] * 3
    assert merged(max_shard_bytes=50_000) == [False] * 3
    assert len(list((run / "merged-all" / "adapter").glob("model-*.safetensors"))) > 1
    assert merged(max_shard_bytes=50_000) == [True] * 3
    assert merged() == [False] * 3


def test_merge_all_touches_no_other_merged_model(run: Path) -> None:
    """RUN/merged is what the summary of a run suggests for a merged adapter; `--all` has a folder of its own."""
    merge_adapter(run / "adapter", run / "merged")
    (run / "merged-all" / "adapter").mkdir(parents=True)
    (run / "merged-all" / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"would be lost: notes\.txt"):
        merge_checkpoints(run)
    assert (run / "merged-all" / "adapter" / "notes.txt").read_text() == "mine"
    (run / "merged-all" / "adapter" / "notes.txt").unlink()
    merge_checkpoints(run)
    assert why_invalid(run / "merged") is None
    assert not any(path.is_dir() for path in (run / "merged").iterdir())


@pytest.mark.parametrize("when", ["listed", "hashing", "writing"])
def test_checkpoint_that_is_deleted_during_merge_all_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """By the rotation of a run in progress."""
    module, name = {
        "listed": (merge, "provenance_of"),
        "hashing": (merge, "existing_merge"),
        "writing": (merge, "write_weights"),
    }[when]
    original = getattr(module, name)

    def delete_and_call(*args: Any, **keywords: Any) -> Any:
        shutil.rmtree(run / "checkpoints" / "step-00000003", ignore_errors=True)
        return original(*args, **keywords)

    monkeypatch.setattr(module, name, delete_and_call)
    with pytest.raises(ArtifactError, match=r"step-00000003: was deleted in the meantime, by a run in progress; merge"):
        merge_checkpoints(run)
    assert not (run / "merged-all").exists() or file_names(run / "merged-all") == set()


def test_checkpoint_without_an_adapter_gets_the_chat_template_of_its_run(
    trained: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = trained(model={"name_or_path": str(tiny_model()), "chat_template": "alpaca"})
    run = adapter.parent
    shutil.rmtree(adapter)
    merge_checkpoints(run)
    for merged in (run / "merged-all").iterdir():
        assert "### Response" in AutoTokenizer.from_pretrained(merged).chat_template
    provenance = json.loads((run / "provenance.json").read_text())
    provenance["config"]["model"]["chat_template"] = "chatml"
    (run / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(ArtifactError, match="the chat template of training was not found"):
        merge_adapter(run / "checkpoints" / "step-00000006", tmp_path / "merged")


def test_run_without_checkpoints_and_adapter_raises(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no checkpoints/ folder"):
        merge_checkpoints(tmp_path / "absent")
    shutil.rmtree(run / "adapter")
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="neither a complete checkpoint nor an adapter"):
        merge_checkpoints(run)
