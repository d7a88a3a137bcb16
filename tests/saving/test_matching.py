"""Adapters that other tools and versions named and saved give the logits that plain PEFT gives, or are rejected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lora_accel import load_adapter, merge_adapter
from lora_accel.config.schema import ModelSection, QuantizationSection
from lora_accel.errors import ArtifactError
from lora_accel.export.export import export_adapter
from lora_accel.inference.models import load_candidates
from lora_accel.merging.merge import merge_weighted
from lora_accel.saving.adapter_config import check_known_options
from lora_accel.saving.discovery import CONFIG, WEIGHTS
from tests.families import model_of

IDS = torch.arange(5, 29).reshape(2, 12)
OLD_SIZE, NEW_SIZE = 96, 110


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Return a folder with a tokenizer in base/."""
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path


def load_base(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "base")
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def merged_logits(folder: Path, **options: Any) -> torch.Tensor:
    merge_adapter(folder / "adapter", folder / "merged", base=str(folder / "base"), overwrite=True, **options)
    return logits(AutoModelForCausalLM.from_pretrained(folder / "merged"))


def save_adapter_on(base: PreTrainedModel, folder: Path, *, save_embeddings: Any = "auto", **options: Any) -> PeftModel:
    """Save an adapter whose tensors are all random with plain PEFT; return base + adapter."""
    options = {"target_modules": ["q_proj"], "init_lora_weights": False} | options
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **options)
    config.base_model_name_or_path = str(folder / "base")
    model = get_peft_model(base, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder / "adapter", save_embedding_layers=save_embeddings)
    return model


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = load_file(folder / "adapter" / WEIGHTS)
    save_file(change(tensors), folder / "adapter" / WEIGHTS, metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter" / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# Resized vocabularies

RESIZED: dict[str, dict[str, Any]] = {
    "not trained": {},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "input saved": {"modules_to_save": ["embed_tokens"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "new tokens": {"trainable_token_indices": list(range(OLD_SIZE, NEW_SIZE))},
    "last token": {"trainable_token_indices": [3, NEW_SIZE - 1]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [3, 100], "lm_head": [100]}},
    "LoRA on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "DoRA and head": {"use_dora": True, "modules_to_save": ["lm_head"]},
}


def save_resized(folder: Path, *, is_tied: bool = False, **options: Any) -> PeftModel:
    """Save a base, and an adapter on it with a larger vocabulary; return base + adapter."""
    model_of("llama", tie_word_embeddings=is_tied).save_pretrained(folder / "base")
    resized = load_base(folder)
    resized.resize_token_embeddings(NEW_SIZE)
    return save_adapter_on(resized, folder, **options)


@pytest.mark.parametrize(
    ("case", "is_tied"),
    [
        pytest.param(case, is_tied, marks=pytest.mark.slow if (number + is_tied) % 2 else ())
        for number, case in enumerate(RESIZED)
        for is_tied in (False, True)
    ],
)
def test_resized_vocabulary_gives_the_logits_of_peft(folder: Path, case: str, is_tied: bool) -> None:
    """Other tools resize the embeddings, and PEFT saves them under names that depend on what is trained."""
    trained = logits(save_resized(folder, is_tied=is_tied, **RESIZED[case]))
    plain = load_base(folder)
    plain.resize_token_embeddings(NEW_SIZE, mean_resizing=False)
    assert torch.equal(logits(PeftModel.from_pretrained(plain, folder / "adapter")), trained), "plain PEFT loads it"
    assert trained.shape[-1] == NEW_SIZE
    assert torch.equal(logits(load_adapter(load_base(folder), folder / "adapter")), trained)
    torch.testing.assert_close(merged_logits(folder, verify=True), trained, rtol=1e-4, atol=1e-5)


def test_lora_on_resized_embeddings_that_are_tied(folder: Path) -> None:
    trained = logits(save_resized(folder, is_tied=True, target_modules=["embed_tokens"]))
    assert torch.equal(logits(load_adapter(load_base(folder), folder / "adapter")), trained)
    torch.testing.assert_close(merged_logits(folder, verify=True), trained, rtol=1e-4, atol=1e-5)


def check_rejected(folder: Path, message: str, **options: Any) -> None:
    """Check that loading and merging raise, and that nothing is written."""
    with pytest.raises(ArtifactError, match=message):
        load_adapter(load_base(folder), folder / "adapter")
    with pytest.raises(ArtifactError, match=message):
        merged_logits(folder, verify=False, **options)
    assert not (folder / "merged").exists()


def test_vocabulary_whose_new_rows_are_in_no_file_raises(folder: Path) -> None:
    """PEFT saves only the embeddings with LoRA; the head's new rows are lost."""
    save_resized(folder, target_modules=["embed_tokens"])
    check_rejected(folder, r"lm_head.* save both embeddings")


@pytest.mark.parametrize(
    "name",
    ["lm_head.modules_to_save.weight", "lm_head.original_module.weight", "model.embed_tokens.original_module.weight"],
)
def test_saved_embeddings_that_differ_raise(folder: Path, name: str) -> None:
    save_resized(folder, modules_to_save=["embed_tokens", "lm_head"])
    key = f"base_model.model.{name}"
    change_tensors(folder, lambda tensors: tensors | {key: tensors[key] + 1})
    reason = "is saved twice, with different values" if "modules_to_save" in name else "are not those of this base"
    check_rejected(folder, reason)


def test_vocabulary_much_larger_than_the_base_raises(folder: Path) -> None:
    save_resized(folder)
    names = [f"base_model.model.{name}.weight" for name in ("lm_head", "model.embed_tokens")]
    change_tensors(folder, lambda tensors: tensors | {name: torch.zeros(200_000, 32) for name in names})
    check_rejected(folder, r"has a vocabulary of 200,000 tokens, the base one of 96")


@pytest.mark.parametrize("shape", [(), (NEW_SIZE,)])
def test_embeddings_that_are_no_matrix_raise(folder: Path, shape: tuple[int, ...]) -> None:
    save_resized(folder)
    change_tensors(folder, lambda tensors: tensors | {"base_model.model.lm_head.weight": torch.zeros(shape)})
    check_rejected(folder, r"lm_head\.weight has shape .*; embeddings have two dimensions")


# Names


@pytest.mark.parametrize(
    ("options", "adapter_name"),
    [
        ({}, "default"),
        ({"use_dora": True}, "sft"),
        ({"target_modules": ["embed_tokens", "v_proj"]}, "default"),
        ({"modules_to_save": ["lm_head"]}, "sft"),
        ({"trainable_token_indices": [3, 5]}, "default"),
    ],
    ids=["lora", "dora", "embedding", "head", "tokens"],
)
def test_names_with_the_name_of_the_adapter(folder: Path, options: dict[str, Any], adapter_name: str) -> None:
    """A state dict that was saved by hand has the names of the model's parameters."""
    model_of("llama").save_pretrained(folder / "base")
    model = save_adapter_on(load_base(folder), folder, **options)
    state = {
        name.replace(".default", f".{adapter_name}"): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert all(f".{adapter_name}" in name for name in state)
    save_file(state, folder / "adapter" / WEIGHTS)
    assert torch.equal(logits(load_adapter(load_base(folder), folder / "adapter")), logits(model))
    torch.testing.assert_close(merged_logits(folder), logits(model), rtol=1e-4, atol=1e-5)


def test_file_with_two_adapters_raises(folder: Path) -> None:
    model_of("llama").save_pretrained(folder / "base")
    save_adapter_on(load_base(folder), folder)
    change_tensors(
        folder,
        lambda tensors: {
            name.replace(".weight", f".{adapter}.weight"): tensor + number
            for name, tensor in tensors.items()
            for number, adapter in enumerate(("one", "two"))
        },
    )
    check_rejected(folder, r"two\.weight is saved twice, with different values; does the file have two adapters\?")


# Experts


def save_mixtral(folder: Path, **config: Any) -> dict[str, torch.Tensor]:
    """Save a Mixtral, and an adapter on its experts as PEFT saved it with transformers 4; return the merged weights."""
    model_of("mixtral").save_pretrained(folder / "base")
    weights = load_file(folder / "base" / "model.safetensors")
    torch.manual_seed(1)
    adapter = {}
    for name, weight in list(weights.items()):
        if name.split(".")[-2] not in config.get("target_modules", ("w1", "w2", "w3", "q_proj", "gate")):
            continue
        a, b = 0.05 * torch.randn(4, weight.shape[1]), 0.05 * torch.randn(weight.shape[0], 4)
        path = f"base_model.model.{name.removesuffix('.weight')}"
        adapter |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        weights[name] = weight + 2.0 * b @ a
    assert any("block_sparse_moe.experts.3.w2.lora_B" in name for name in adapter) or config
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter" / WEIGHTS, metadata={"format": "pt"})
    saved = {
        "base_model_name_or_path": str(folder / "base"),
        "lora_alpha": 8,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["w1", "w2", "w3", "q_proj", "gate"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter" / CONFIG).write_text(json.dumps(saved | config))
    return weights


since_peft_021 = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.21"), reason="this PEFT does not convert experts of transformers 4"
)


@since_peft_021
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # of PEFT, about its own patterns
def test_experts_of_transformers_4_are_merged_as_peft_converts_them(folder: Path) -> None:
    weights = save_mixtral(folder)
    loaded = load_adapter(load_base(folder), folder / "adapter")
    plain = PeftModel.from_pretrained(load_base(folder), folder / "adapter")
    assert torch.equal(logits(loaded), logits(plain))
    base = logits(load_base(folder))
    save_file(weights, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    by_hand = logits(load_base(folder))
    assert not torch.allclose(by_hand, base, atol=1e-2)
    torch.testing.assert_close(logits(loaded), by_hand, rtol=1e-4, atol=1e-5)


@since_peft_021
def test_merged_experts_have_the_weights_of_a_merge_by_hand(folder: Path) -> None:
    expected = save_mixtral(folder)
    merged_logits(folder)
    weights = load_file(folder / "merged" / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-6, atol=1e-7, msg=name)


@since_peft_021
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_rslora": True}, "use_rslora of experts that were trained with transformers 4"),
        ({"alpha_pattern": {"w2": 16}}, "alpha_pattern of experts"),
        ({"rank_pattern": {"w1": 8}}, "rank_pattern of experts"),
        ({"target_modules": ["w1", "w2"]}, "w3"),
        ({"use_dora": True}, "does not fit this base"),
    ],
    ids=["rslora", "alphas", "ranks", "without w3", "dora"],
)
def test_experts_that_peft_converts_wrongly_raise(folder: Path, config: dict[str, Any], message: str) -> None:
    """Two matrices become one with twice the rank and alpha, so that only alpha / r stays the same."""
    save_mixtral(folder, **config)
    check_rejected(folder, message)


def test_combining_experts_raises(folder: Path) -> None:
    save_mixtral(folder)
    shutil.copytree(folder / "adapter", folder / "other")
    adapters: list[tuple[str | Path, float]] = [(folder / name, 0.5) for name in ("adapter", "other")]
    with pytest.raises(ArtifactError, match=r"experts.*plain LoRA can be combined"):
        merge_weighted(adapters, folder / "merged", base=str(folder / "base"))
    assert not (folder / "merged").exists()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_experts_give_the_logits_of_peft(folder: Path, family: str) -> None:
    model_of(family).save_pretrained(folder / "base")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    trained = logits(save_adapter_on(load_base(folder), folder, target_parameters=parameters))
    assert torch.equal(logits(load_adapter(load_base(folder), folder / "adapter")), trained)
    torch.testing.assert_close(merged_logits(folder), trained, rtol=1e-4, atol=1e-5)


def test_biases_of_the_base_that_modules_to_save_replaces_are_ignored(folder: Path) -> None:
    model_of("phi").save_pretrained(folder / "base")
    trained = logits(save_adapter_on(load_base(folder), folder, bias="all", modules_to_save=["lm_head"]))
    assert any("original_module.bias" in name for name in load_file(folder / "adapter" / WEIGHTS)), "PEFT saves it"
    assert torch.equal(logits(load_adapter(load_base(folder), folder / "adapter")), trained)
    torch.testing.assert_close(merged_logits(folder), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(Version(peft.__version__) < Version("0.21"), reason="this PEFT has no VeLoRA")
def test_buffers_that_only_training_reads_are_ignored(folder: Path) -> None:
    from peft import VeloraConfig

    model_of("llama").save_pretrained(folder / "base")
    trained = logits(save_adapter_on(load_base(folder), folder, velora_config=VeloraConfig()))
    assert any("velora" in name for name in load_file(folder / "adapter" / WEIGHTS)), "PEFT saves its projections"
    assert torch.equal(logits(load_adapter(load_base(folder), folder / "adapter")), trained)
    torch.testing.assert_close(merged_logits(folder), trained, rtol=1e-4, atol=1e-5)


# Options of a newer PEFT


def test_option_that_the_installed_peft_does_not_know_raises_without_force(folder: Path) -> None:
    model_of("llama").save_pretrained(folder / "base")
    trained = logits(save_adapter_on(load_base(folder), folder))
    change_config(folder, use_brand_new_thing=True, peft_version="0.99.0")
    check_rejected(folder, r"use_brand_new_thing=.*does not know this option \(saved by PEFT 0\.99\.0\).* --force")
    assert torch.equal(logits(load_adapter(load_base(folder), folder / "adapter", force=True)), trained)
    torch.testing.assert_close(merged_logits(folder, force=True), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [3, "x", ["q_proj"], {"a": 1}])
def test_unknown_option_with_a_value_is_on(tmp_path: Path, value: Any) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "use_brand_new_thing": value}))
    with pytest.raises(ArtifactError, match="use_brand_new_thing="):
        check_known_options(tmp_path / CONFIG)


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_unknown_option_that_is_off_is_ignored(tmp_path: Path, value: Any) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "use_brand_new_thing": value}))
    check_known_options(tmp_path / CONFIG)


# In use


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}], ids=["lora", "saved"])
def test_models_of_generate_and_evaluate_have_the_resized_vocabulary(folder: Path, options: dict[str, Any]) -> None:
    trained = logits(save_resized(folder, **options))
    section, base = ModelSection(name_or_path=str(folder / "base")), logits(load_base(folder))
    adapters = {"one": folder / "adapter", "two": folder / "adapter"}
    models = load_candidates(section, QuantizationSection(), adapters, None, with_base=True)
    for candidate, expected in zip(models, (base, trained, trained), strict=True):
        torch.testing.assert_close(logits(candidate.model), expected, rtol=1e-4, atol=1e-5, msg=candidate.name)


def test_every_command_rejects_an_unknown_option_without_force(folder: Path) -> None:
    model_of("llama").save_pretrained(folder / "base")
    save_adapter_on(load_base(folder), folder)
    change_config(folder, use_brand_new_thing=True)
    section, adapters = ModelSection(name_or_path=str(folder / "base")), {"one": folder / "adapter"}
    with pytest.raises(ArtifactError, match="use_brand_new_thing=True"):
        list(load_candidates(section, QuantizationSection(), adapters, None, with_base=False))
    assert len(list(load_candidates(section, QuantizationSection(), adapters, None, with_base=False, force=True))) == 1
    with pytest.raises(ArtifactError, match="use_brand_new_thing=True"):
        export_adapter(folder / "adapter", folder / "out", format="peft-bin")
    export_adapter(folder / "adapter", folder / "out", format="peft-bin", force=True)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}], ids=["lora", "saved"])
def test_pickle_of_a_resized_vocabulary(folder: Path, options: dict[str, Any]) -> None:
    trained = logits(save_resized(folder, **options))
    export_adapter(folder / "adapter", folder / "out", format="peft-bin", base=str(folder / "base"))
    assert torch.equal(logits(load_adapter(load_base(folder), folder / "out")), trained)
