"""Saved tokenizers and configs have the names that the base's own files have, which transformers 4 reads too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_accel.config.schema import ModelSection
from lora_accel.merging.merge import merge_adapter
from lora_accel.model.portable import NEW_CLASSES, restore_config_keys, save_tokenizer
from lora_accel.model.tokenizer import load_tokenizer

TEXT = "hello<|im_start|> world<|im_end|>"
COMMON = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}


def read(file: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return value


@pytest.fixture
def base_tokenizer(tmp_path: Path, tokenizer_factory: Callable[..., PreTrainedTokenizerFast]) -> Callable[..., Path]:
    """Return a function that saves a tokenizer whose tokenizer_config.json is as transformers 4 writes it."""

    def make(kind: str | None = "PreTrainedTokenizerFast", **changes: Any) -> Path:
        folder = tmp_path / "base"
        tokenizer_factory(additional_special_tokens=["<|im_start|>"]).save_pretrained(folder)
        values = {key: value for key, value in read(folder / "tokenizer_config.json").items() if key != "backend"}
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
        values |= {"tokenizer_class": kind, "clean_up_tokenization_spaces": False} | changes
        kept = {key: value for key, value in values.items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(kept), encoding="utf-8")
        return folder

    return make


@pytest.mark.parametrize(
    "kind", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2TokenizerFast"]
)
def test_tokenizer_keeps_the_class_of_the_base(base_tokenizer: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    base = base_tokenizer(kind, add_bos_token=False)
    tokenizer, out = load_tokenizer(ModelSection(name_or_path=str(base))), tmp_path / "out"
    out.mkdir()
    save_tokenizer(tokenizer, out)
    stored, saved = read(base / "tokenizer_config.json"), read(out / "tokenizer_config.json")
    assert saved["tokenizer_class"] == kind
    assert not {"is_local", "local_files_only", "name_or_path", "backend"} & set(saved)
    assert str(tmp_path) not in json.dumps(saved)
    assert "extra_special_tokens" not in saved, "transformers 4 fails on a list"
    assert saved["additional_special_tokens"] == stored["additional_special_tokens"] == ["<|im_start|>"]
    assert saved["add_bos_token"] is False, "transformers 4 would add a start token to a Llama prompt"
    again = load_tokenizer(ModelSection(name_or_path=str(out)))
    assert again(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert again.extra_special_tokens == tokenizer.extra_special_tokens


def test_a_class_of_transformers_5_is_kept_and_a_missing_one_is_set(
    base_tokenizer: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    for kind, expected in ((NEW_CLASSES[0], NEW_CLASSES[0]), (None, "PreTrainedTokenizerFast")):
        base = base_tokenizer(kind)
        if kind is None:  # the class then follows from config.json, which an adapter's folder lacks
            AutoConfig.for_model("llama", **COMMON).save_pretrained(base)
        save_tokenizer(load_tokenizer(ModelSection(name_or_path=str(base))), tmp_path / "out")
        saved = read(tmp_path / "out" / "tokenizer_config.json")
        if kind is None and Version(transformers.__version__) < Version("5.3"):
            expected = "CodeLlamaTokenizer"  # what it loads for Llama
        assert saved["tokenizer_class"] == expected
        assert "is_local" not in saved


def test_class_of_an_older_adapter_is_that_of_the_base(base_tokenizer: Callable[..., Path], tmp_path: Path) -> None:
    base = base_tokenizer()
    load_tokenizer(ModelSection(name_or_path=str(base))).save_pretrained(tmp_path / "adapter")
    assert read(tmp_path / "adapter" / "tokenizer_config.json")["tokenizer_class"] == NEW_CLASSES[0]
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tmp_path / "adapter")))
    (tmp_path / "merged").mkdir()
    save_tokenizer(tokenizer, tmp_path / "merged", base / "tokenizer_config.json")
    assert read(tmp_path / "merged" / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": LLAMA3, "torch_dtype": "bfloat16"},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6, "torch_dtype": "float16"},
    "gemma3": {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 10000, "rope_scaling": None},
    "phi": {"model_type": "phi", "rope_theta": 1e4, "partial_rotary_factor": 0.4, "torch_dtype": "float32"},
    "new": {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_keeps_the_keys_of_the_base(tmp_path: Path, name: str) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(COMMON | CONFIGS[name] | {"quantization_config": None}))
    config = AutoConfig.from_pretrained(base)
    config.save_pretrained(out)
    restore_config_keys(out / "config.json", base / "config.json", config.to_dict())
    saved = read(out / "config.json")
    assert {key: saved.get(key) for key in CONFIGS[name]} == CONFIGS[name]
    assert {"rope_parameters", "dtype"} & set(saved) == {"rope_parameters", "dtype"} & set(CONFIGS[name])
    again = AutoConfig.from_pretrained(out)
    assert getattr(again, "rope_parameters", None) == getattr(config, "rope_parameters", None)
    assert again.dtype == config.dtype


def test_a_scaling_that_training_added_is_written_under_the_older_names(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(COMMON | CONFIGS["qwen2"]))
    config = AutoConfig.from_pretrained(base)
    parsed = config.to_dict()
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
    config.save_pretrained(out)
    restore_config_keys(out / "config.json", base / "config.json", parsed)
    saved = read(out / "config.json")
    assert (saved["rope_theta"], saved["rope_scaling"]) == (1e6, {"rope_type": "linear", "factor": 2.0})
    assert "rope_parameters" not in saved
    assert AutoConfig.from_pretrained(out).rope_parameters == config.rope_parameters


def test_nested_text_config_is_restored_too(tmp_path: Path) -> None:
    base = {"model_type": "outer", "text_config": COMMON | CONFIGS["qwen2"]}
    parsed = {"text_config": {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}}
    (tmp_path / "base.json").write_text(json.dumps(base))
    (tmp_path / "out.json").write_text(json.dumps(base | {"text_config": COMMON | parsed["text_config"]}))
    restore_config_keys(tmp_path / "out.json", tmp_path / "base.json", parsed)
    text = read(tmp_path / "out.json")["text_config"]
    assert text["rope_theta"] == 1e6
    assert "rope_parameters" not in text


def test_merged_model_has_the_names_of_the_base(
    base_tokenizer: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_tokenizer()
    for file in tiny_model().iterdir():
        if file.suffix == ".safetensors":
            (base / file.name).symlink_to(file)
    values = read(tiny_model() / "config.json")
    rope = values.pop("rope_parameters")
    values |= {"rope_theta": rope["rope_theta"], "torch_dtype": values.pop("dtype")}
    (base / "config.json").write_text(json.dumps(values), encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", verify=False)
    saved = read(tmp_path / "merged" / "config.json")
    assert (saved["rope_theta"], saved["torch_dtype"]) == (rope["rope_theta"], "float32")
    assert not {"rope_parameters", "dtype"} & set(saved)
    tokenizer = read(tmp_path / "merged" / "tokenizer_config.json")
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "is_local" not in tokenizer
