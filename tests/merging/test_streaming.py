"""A streamed merge equals PEFT's merge of a loaded model, bitwise in float32."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lora_accel import merge_adapter
from lora_accel.errors import ArtifactError
from lora_accel.merging import streaming, write
from lora_accel.merging.shards import Weights
from lora_accel.merging.streaming import MergedTensors
from tests.families import model_of

IDS = torch.arange(5, 29).reshape(2, 12)
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "gemma": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "opt": ["q_proj", "v_proj", "fc1"],
    "mixtral": ["q_proj", "v_proj"],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias-all": {"bias": "all"},
    "bias-lora-only": {"bias": "lora_only"},
    "head": {"modules_to_save": ["lm_head"]},
    "tied": {},
    "resized": {},
    "patterns": {"rank_pattern": {"c_proj|v_proj": 2}, "alpha_pattern": {"c_attn|q_proj": 3}},
}


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Return a folder with a tokenizer in base/."""
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path


def save_base_and_adapter(base: PreTrainedModel, folder: Path, **options: Any) -> PeftModel:
    """Save a base and an adapter whose tensors are all random; return base + adapter."""
    base.save_pretrained(folder / "base")
    save_embeddings = options.pop("save_embedding_layers", False)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **{"init_lora_weights": False, **options})
    loaded = AutoModelForCausalLM.from_pretrained(folder / "base")
    return save_random_adapter(loaded, config, folder / "adapter", save_embeddings)


def save_random_adapter(
    base: PreTrainedModel, config: LoraConfig, adapter: Path, save_embeddings: bool = False
) -> PeftModel:
    model = get_peft_model(base, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(adapter, save_embedding_layers=save_embeddings)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def merge_and_load(folder: Path, **options: Any) -> PreTrainedModel:
    options = {"base": str(folder / "base"), "verify": False, "overwrite": True} | options
    merge_adapter(folder / "adapter", folder / "merged", **options)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "merged")
    return model


def skip_on_older_peft(reason: str) -> None:
    """Skip a case that PEFT gets wrong before 0.21."""
    if Version(peft.__version__) < Version("0.21"):
        pytest.skip(f"PEFT {peft.__version__} {reason}")


@pytest.mark.parametrize(
    "variant",  # patterns are matched in a separate process
    [pytest.param(variant, marks=pytest.mark.launch) if variant == "patterns" else variant for variant in VARIANTS],
)
@pytest.mark.parametrize("family", TARGETS)
def test_merge_equals_peft_bitwise(folder: Path, family: str, variant: str) -> None:
    if variant == "bias-lora-only":
        skip_on_older_peft("saves no biases under lora_only: merge reports them as missing")
    base = model_of(family, tie_word_embeddings=variant == "tied")
    targets: Any = TARGETS[family]
    if variant == "resized":
        base.save_pretrained(folder / "base")
        base.resize_token_embeddings(104, mean_resizing=False)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=targets)
        peft_model = save_random_adapter(base, config, folder / "adapter", save_embeddings=True)
    else:
        peft_model = save_base_and_adapter(base, folder, target_modules=targets, **VARIANTS[variant])
    expected_logits = logits(peft_model)
    merged = merge_and_load(folder)
    torch.testing.assert_close(logits(merged), expected_logits, rtol=1e-4, atol=1e-5)
    expected = peft_model.merge_and_unload(safe_merge=True).state_dict()
    actual = merged.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    assert merged.config.tie_word_embeddings == (variant == "tied")


@pytest.mark.parametrize("options", [{}, {"bias": "all"}, {"bias": "lora_only"}], ids=["none", "all", "lora_only"])
def test_blockwise_merge_equals_peft_bitwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """With blocks of 7 rows a layer has several, and the last one is shorter."""
    if options.get("bias") == "lora_only":
        skip_on_older_peft("saves no biases under lora_only: merge reports them as missing")
    monkeypatch.setattr(streaming, "BLOCK_NUMEL", 7 * 32)
    peft_model = save_base_and_adapter(model_of("qwen2"), folder, target_modules=TARGETS["qwen2"], **options)
    actual = merge_and_load(folder).state_dict()
    for name, tensor in peft_model.merge_and_unload().state_dict().items():
        assert torch.equal(actual[name], tensor), name


def test_transform_does_not_change_the_dtype_of_the_merged_model(folder: Path) -> None:
    """Like a QLoRA run in bfloat16 on a float32 base: weights are rounded to bfloat16, sums are not."""
    peft_model = save_base_and_adapter(model_of("llama"), folder, target_modules=["q_proj"])

    def transform(name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(torch.bfloat16) if "_proj" in name else weight

    tensors = MergedTensors(
        folder / "adapter", Weights(folder / "base"), AutoConfig.from_pretrained(folder / "base"), transform=transform
    )
    base = load_file(folder / "base" / "model.safetensors")
    for layer in ("q_proj", "k_proj"):
        name = f"model.layers.0.self_attn.{layer}.weight"
        expected = base[name].to(torch.bfloat16).float()
        if layer == "q_proj":
            expected += peft_model.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight("default")
        assert torch.equal(tensors.read(name), expected)


def test_every_family_except_mixture_of_experts_is_streamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would compare PEFT with itself."""

    def fail(*_: object) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(write, "_merge_loaded", fail)
    for family in set(TARGETS) - {"mixtral"}:
        save_base_and_adapter(model_of(family), folder, target_modules=TARGETS[family])
        merge_and_load(folder)
    save_base_and_adapter(model_of("mixtral"), folder, target_modules=TARGETS["mixtral"])
    with pytest.raises(AssertionError, match="the base was loaded"):
        merge_and_load(folder)


def test_lora_on_the_parameters_of_experts(folder: Path) -> None:
    peft_model = save_base_and_adapter(
        model_of("mixtral"), folder, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"]
    )
    expected_logits = logits(peft_model)
    torch.testing.assert_close(logits(merge_and_load(folder)), expected_logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected_logits, logits(AutoModelForCausalLM.from_pretrained(folder / "base")), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "stays_tied"),
    [
        ({"target_modules": ["embed_tokens"]}, False),
        ({"target_modules": ["lm_head"]}, False),
        ({"target_modules": ["embed_tokens", "lm_head"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7, 11]}}, True),
    ],
    ids=["embedding", "head", "both", "saved", "saved-tied", "embedding-tied", "tokens"],
)
def test_tied_embeddings_are_untied_only_if_they_differ(
    folder: Path, options: dict[str, Any], stays_tied: bool
) -> None:
    """PEFT merges LoRA on one of two tied embeddings into peft_model (huggingface/peft issue 2777)."""
    if options.get("ensure_weight_tying"):
        skip_on_older_peft("ties nothing: merge notices that logits differ")
    peft_model = save_base_and_adapter(model_of("llama", tie_word_embeddings=True), folder, **options)
    expected_logits = logits(peft_model)
    merged = merge_and_load(folder, verify=True)
    torch.testing.assert_close(logits(merged), expected_logits, rtol=1e-4, atol=1e-5)
    assert AutoConfig.from_pretrained(folder / "merged").tie_word_embeddings == stays_tied
    names = load_file(folder / "merged" / "model.safetensors").keys()
    assert ("lm_head.weight" in names) == (not stays_tied)


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_initialization_that_changes_the_base_is_repeated(folder: Path, how: str) -> None:
    peft_model = save_base_and_adapter(model_of("llama"), folder, target_modules=["q_proj"], init_lora_weights=how)
    expected_logits = logits(peft_model)
    torch.testing.assert_close(logits(merge_and_load(folder)), expected_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["pissa_niter_4", "loftq", "corda", "lora_ga", "anything"])
def test_initialization_that_cannot_be_repeated_raises(folder: Path, how: str) -> None:
    save_base_and_adapter(model_of("llama"), folder, target_modules=["q_proj"])
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace('"init_lora_weights": false', f'"init_lora_weights": "{how}"'))
    with pytest.raises(ArtifactError, match=f"init_lora_weights='{how}' changed the base's weights"):
        merge_and_load(folder)


def test_saved_embeddings_of_another_base_raise(folder: Path) -> None:
    """PEFT would overwrite the base with the base tensors of an adapter's file."""
    save_base_and_adapter(model_of("llama"), folder, target_modules=["q_proj"], save_embedding_layers=True)
    other = model_of("llama")
    with torch.no_grad():
        other.get_input_embeddings().weight[3] += 1
    other.save_pretrained(folder / "base")
    with pytest.raises(ArtifactError, match="the embeddings saved with the adapter are not those of this base"):
        merge_and_load(folder)


def test_resized_vocabulary_without_saved_embeddings_raises(folder: Path) -> None:
    base = model_of("llama")
    base.save_pretrained(folder / "base")
    base.resize_token_embeddings(104, mean_resizing=False)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "lm_head"])
    save_random_adapter(base, config, folder / "adapter")
    with pytest.raises(ArtifactError, match="lm_head"):
        merge_and_load(folder)


def test_overflow_in_the_dtype_of_the_base_raises(folder: Path) -> None:
    """The maximum of float16 is 65,504."""
    save_base_and_adapter(model_of("llama").half(), folder, target_modules=["q_proj"])
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = {name: tensor * (1e4 if "lora_B" in name else 1e3) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(ArtifactError, match=r"q_proj\.weight is not finite when merged"):
        merge_and_load(folder)
    assert not (folder / "merged").exists()


def save_sharded(folder: Path) -> PeftModel:
    peft_model = save_base_and_adapter(model_of("llama"), folder, target_modules=["q_proj", "down_proj"], bias="none")
    (folder / "base" / "model.safetensors").unlink()
    model_of("llama").save_pretrained(folder / "base", max_shard_size="20KB")
    assert len(list((folder / "base").glob("*.safetensors"))) > 2
    return peft_model


@pytest.mark.parametrize("size", [None, 9_000, 10**9])
def test_files_are_those_of_the_base_or_of_max_shard_bytes(folder: Path, size: int | None) -> None:
    expected = save_sharded(folder).merge_and_unload().state_dict()
    actual = merge_and_load(folder, max_shard_bytes=size).state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    files = sorted((folder / "merged").glob("*.safetensors"))
    base_names = {file.name for file in (folder / "base").glob("*.safetensors")}
    if size is None:
        assert {file.name for file in files} == base_names
    elif size == 10**9:
        assert [file.name for file in files] == ["model.safetensors"]
    else:
        assert len(files) > len(base_names)
        assert max(sum(t.nbytes for t in load_file(file).values()) for file in files) <= 96 * 32 * 4


@pytest.mark.parametrize("index", [False, True])
def test_pickled_base(folder: Path, index: bool) -> None:
    peft_model = save_base_and_adapter(model_of("llama"), folder, target_modules=["q_proj"])
    tensors = load_file(folder / "base" / "model.safetensors")
    (folder / "base" / "model.safetensors").unlink()
    if index:
        names = sorted(tensors)
        parts = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
        for file, part in parts.items():
            torch.save({name: tensors[name] for name in part}, folder / "base" / file)
        weight_map = {name: file for file, part in parts.items() for name in part}
        (folder / "base" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(tensors, folder / "base" / "pytorch_model.bin")
    expected = peft_model.merge_and_unload().state_dict()
    actual = merge_and_load(folder).state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert not list((folder / "merged").glob("*.bin"))


def test_pickled_adapter(folder: Path) -> None:
    peft_model = save_base_and_adapter(model_of("llama"), folder, target_modules=["q_proj"])
    torch.save(load_file(folder / "adapter" / "adapter_model.safetensors"), folder / "adapter" / "adapter_model.bin")
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    expected_logits = logits(peft_model)
    torch.testing.assert_close(logits(merge_and_load(folder, verify=True)), expected_logits, rtol=1e-4, atol=1e-5)


def test_each_base_tensor_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sharded(folder)
    reads: Counter[str] = Counter()
    original: Callable[..., torch.Tensor] = Weights._read

    def count_and_read(self: Weights, path: Path, name: str) -> torch.Tensor:
        reads[name] += 1
        return original(self, path, name)

    monkeypatch.setattr(Weights, "_read", count_and_read)
    merge_and_load(folder)
    assert set(reads.values()) == {1}
    assert len(reads) == len(model_of("llama").state_dict())
