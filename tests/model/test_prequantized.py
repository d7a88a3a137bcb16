"""Bases that are stored in 4 or 8 bits: recognized, recorded, and merged into full-precision or dequantized weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lora_accel.config.schema import ModelSection, QuantizationSection, RunConfig
from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.merging.merge import merge_adapter
from lora_accel.merging.shards import DequantizedWeights
from lora_accel.model.base import load_base_model, stored_dtype
from lora_accel.model.prequantized import check_quantization, stored_quantization
from lora_accel.train import run_training
from tests.conftest import CommandResult
from tests.families import model_of

OPTIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
QUERY = "model.layers.0.self_attn.q_proj.weight"
Quantized = Callable[[str], Path]


@pytest.fixture(scope="module")
def quantized(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """Return a function that saves the tiny model as bitsandbytes stores it, and returns its folder."""
    folders: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = folder = tmp_path_factory.mktemp(kind.replace(" ", "-"))
            options = BitsAndBytesConfig(**OPTIONS[kind])
            model = AutoModelForCausalLM.from_pretrained(
                tiny_model(), quantization_config=options, device_map={"": "cpu"}, dtype=torch.bfloat16
            )
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(tiny_model()).save_pretrained(folder)
        return folders[kind]

    return make


@pytest.fixture
def train(make_config: Callable[..., RunConfig], quantized: Quantized) -> Callable[..., Path]:
    """Return a function that trains one step on a quantized base and returns the adapter's folder."""

    def run(kind: str = "nf4", **changes: Any) -> Path:
        model = {"name_or_path": str(quantized(kind)), "dtype": "float32"}
        return run_training(make_config(**{"model": model, "training": {"max_steps": 1}} | changes))

    return run


def section_of(folder: Path) -> ModelSection:
    return ModelSection(name_or_path=str(folder))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("nf4", {"bits": 4, "type": "nf4", "double_quant": False, "compute_dtype": "float32"}),
        ("nf4 double", {"bits": 4, "type": "nf4", "double_quant": True, "compute_dtype": "float32"}),
        ("fp4", {"bits": 4, "type": "fp4", "double_quant": False, "compute_dtype": "float32"}),
    ],
)
def test_the_stored_quantization_is_recognized(quantized: Quantized, kind: str, expected: dict[str, Any]) -> None:
    stored = stored_quantization(section_of(quantized(kind)))
    assert stored is not None
    assert stored.model_dump() == expected
    assert stored_dtype(section_of(quantized(kind))) == torch.bfloat16


def test_a_base_that_is_not_quantized(tiny_model: Callable[..., Path]) -> None:
    assert stored_quantization(section_of(tiny_model())) is None


def test_experts_that_cannot_be_written_after_dequantizing_are_an_error(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers fuses Mixtral's experts when it loads them, and cannot divide quantized ones again."""
    source = tmp_path / "source"
    model_of("mixtral").save_pretrained(source)
    AutoTokenizer.from_pretrained(tiny_model()).save_pretrained(source)
    options = BitsAndBytesConfig(**OPTIONS["nf4"])
    base = AutoModelForCausalLM.from_pretrained(source, quantization_config=options, device_map={"": "cpu"})
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="pass --base with the same model in 16 or 32 bits"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "base"), base_weights="dequantized")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "asked", "message"),
    [
        ("int8", {"bits": 4}, r"quantization.bits=4: .* is stored with bitsandbytes, 8 bits"),
        ("nf4", {"bits": 8}, r"quantization.bits=8: .* is stored with bitsandbytes, 4 bits \(nf4\)"),
        ("nf4", {"bits": 4, "type": "fp4"}, "quantization.type=fp4"),
        ("nf4", {"bits": 4, "double_quant": True}, "quantization.double_quant=True"),
    ],
)
def test_another_quantization_is_an_error(
    quantized: Quantized, make_config: Callable[..., RunConfig], kind: str, asked: dict[str, Any], message: str
) -> None:
    config = make_config(model={"name_or_path": str(quantized(kind))}, quantization=asked)
    with pytest.raises(ConfigError, match=message):
        run_training(config)
    assert not Path(config.output_dir).exists()


def test_the_stored_quantization_may_be_asked_for(quantized: Quantized) -> None:
    for asked in ({}, {"bits": 4}, {"bits": 4, "type": "nf4", "double_quant": False}):
        section = QuantizationSection.model_validate(asked)
        assert check_quantization(section_of(quantized("nf4")), section) is not None
        assert load_base_model(section_of(quantized("nf4")), section).is_quantized


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors"])
def test_other_quantizations_are_not_supported(tiny_model: Callable[..., Path], tmp_path: Path, method: str) -> None:
    base = Path(shutil.copytree(tiny_model(), tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method, "bits": 4}}))
    with pytest.raises(ArtifactError, match=f"quantized with {method}, which is not supported.*16 or 32 bits"):
        load_base_model(section_of(base), QuantizationSection())


def test_zero3_is_not_supported(quantized: Quantized) -> None:
    from transformers.integrations import HfDeepSpeedConfig

    active = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    with pytest.raises(ConfigError, match="ZeRO-3 does not support a base that is stored in 4 or 8 bits"):
        load_base_model(section_of(quantized("nf4")), QuantizationSection())
    del active


def test_a_quantized_module_cannot_be_saved_in_full(train: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"modules_to_save: v_proj is quantized \(model.layers.0.self_attn.v_proj\)"):
        train(adapter={"target_modules": ["q_proj"], "modules_to_save": ["v_proj"]})


def test_a_module_that_is_not_quantized_can_be_saved_in_full(train: Callable[..., Path]) -> None:
    train(adapter={"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_train_record_and_merge(
    train: Callable[..., Path],
    quantized: Quantized,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    command: Callable[..., CommandResult],
    kind: str,
) -> None:
    adapter = train(kind)
    base = json.loads((adapter / "provenance.json").read_text())["base"]
    assert base["quantization"]["bits"] == {"nf4": 4, "int8": 8}[kind]

    result = command("merge", adapter, tmp_path / "out")
    assert result.returncode == 2
    assert "--base-weights dequantized" in result.stderr
    assert "is stored quantized (bitsandbytes" in result.stderr

    result = command("merge", adapter, tmp_path / "full", "--base", tiny_model())
    assert result.returncode == 0
    assert f"whether {tiny_model()} is the same model in 16 or 32 bits was not checked" in result.stdout
    assert "--force" not in result.stdout

    result = command("merge", adapter, tmp_path / "none", "--base", tiny_model(), "--base-weights", "dequantized")
    assert result.returncode == 2
    assert "pass that folder with --base. --base-weights original" in result.stderr
    assert str(quantized(kind)) in result.stderr

    result = command("merge", adapter, tmp_path / "dequantized", "--base-weights", "dequantized")
    assert result.returncode == 0
    assert "note:" not in result.stdout

    if kind == "nf4":
        merged = tmp_path / "dequantized"
        assert command("generate", "hello", "--adapter", adapter, "--merged", merged).returncode == 0


@pytest.mark.parametrize("kind", OPTIONS)
def test_dequantized_weights_are_those_that_transformers_computes_with(quantized: Quantized, kind: str) -> None:
    weights = DequantizedWeights(quantized(kind))
    model = load_base_model(section_of(quantized(kind)), QuantizationSection()).dequantize()
    expected = model.state_dict()
    assert sorted(weights.specs) == sorted(expected)
    for name, spec in weights.specs.items():
        assert spec.shape == tuple(expected[name].shape)
        actual = weights.read(name).to(spec.dtype)
        torch.testing.assert_close(actual, expected[name].to(spec.dtype), rtol=1e-2 if kind == "int8" else 0, atol=0)


def test_merge_into_dequantized_weights(quantized: Quantized, train: Callable[..., Path], tmp_path: Path) -> None:
    adapter = train("nf4 double")
    provenance = merge_adapter(adapter, tmp_path / "out", base_weights="dequantized", verify=True)
    assert provenance["merged"]["same_base"] is True
    assert provenance["merged"]["agreement"]["mean_moved"] < 0.03
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    merged, base = load_file(tmp_path / "out/model.safetensors"), DequantizedWeights(quantized("nf4 double"))
    assert merged.keys() == base.specs.keys()
    assert not torch.equal(merged[QUERY], base.read(QUERY))
    assert torch.equal(merged["model.embed_tokens.weight"], base.read("model.embed_tokens.weight"))


DAMAGES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "no scales": lambda t: t.pop(f"{QUERY}.absmax"),
    "no state": lambda t: t.pop(f"{QUERY}.quant_state.bitsandbytes__nf4"),
    "no weight": lambda t: t.pop(QUERY),
    "few scales": lambda t: t.update({f"{QUERY}.absmax": t[f"{QUERY}.absmax"][:1].clone()}),
    "short weight": lambda t: t.update({QUERY: t[QUERY][:10].clone()}),
    "state": lambda t: t.update({f"{QUERY}.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_parts_are_an_error(quantized: Quantized, tmp_path: Path, damage: Callable[..., Any]) -> None:
    base = Path(shutil.copytree(quantized("nf4"), tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    damage(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=QUERY):
        load_base_model(section_of(base), QuantizationSection())
    with pytest.raises(ArtifactError, match=QUERY):
        DequantizedWeights(base)
