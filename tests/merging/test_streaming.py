"""A merge that reads the base a tensor at a time gives what PEFT gives on a whole model, to the last bit in float32."""

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
from lora_accel.merging import merge, streaming
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
FORMS: dict[str, dict[str, Any]] = {
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
def place(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with the tokenizer of a base to be."""
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path


def saved(base: PreTrainedModel, place: Path, **options: Any) -> PeftModel:
    """Save a base, put an adapter on it whose every tensor says something, save that too; return both together."""
    base.save_pretrained(place / "base")
    whole = options.pop("save_embedding_layers", False)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **{"init_lora_weights": False, **options})
    return with_adapter(AutoModelForCausalLM.from_pretrained(place / "base"), config, place / "adapter", whole)


def with_adapter(base: PreTrainedModel, config: LoraConfig, folder: Path, whole: bool = False) -> PeftModel:
    model = get_peft_model(base, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=whole)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def merged_model(place: Path, **options: Any) -> PreTrainedModel:
    options = {"base": str(place / "base"), "verify": False, "overwrite": True} | options
    merge_adapter(place / "adapter", place / "merged", **options)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(place / "merged")
    return model


def skip_on_older_peft(what: str) -> None:
    """Leave out what PEFT itself gets wrong before 0.21."""
    if Version(peft.__version__) < Version("0.21"):
        pytest.skip(f"PEFT {peft.__version__} {what}")


@pytest.mark.parametrize(
    "form",  # patterns are matched in a process of its own
    [pytest.param(form, marks=pytest.mark.launch) if form == "patterns" else form for form in FORMS],
)
@pytest.mark.parametrize("family", TARGETS)
def test_it_is_what_peft_merges_to_the_last_bit(place: Path, family: str, form: str) -> None:
    if form == "bias-lora-only":
        skip_on_older_peft("saves no biases under lora_only: merge reports them as missing")
    base = model_of(family, tie_word_embeddings=form == "tied")
    targets: Any = TARGETS[family]
    if form == "resized":
        base.save_pretrained(place / "base")
        base.resize_token_embeddings(104, mean_resizing=False)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=targets)
        both = with_adapter(base, config, place / "adapter", whole=True)
    else:
        both = saved(base, place, target_modules=targets, **FORMS[form])
    answers = logits(both)
    found = merged_model(place)
    torch.testing.assert_close(logits(found), answers, rtol=1e-4, atol=1e-5)
    expected = both.merge_and_unload(safe_merge=True).state_dict()
    ours = found.state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
    assert found.config.tie_word_embeddings == (form == "tied")


@pytest.mark.parametrize("options", [{}, {"bias": "all"}, {"bias": "lora_only"}], ids=["none", "all", "lora_only"])
def test_a_layer_is_added_to_a_few_rows_at_a_time(
    place: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    if options.get("bias") == "lora_only":
        skip_on_older_peft("saves no biases under lora_only: merge reports them as missing")
    """Layers of these sizes are one block otherwise. 7 rows: the last block is a shorter one."""
    monkeypatch.setattr(streaming, "BLOCK", 7 * 32)
    both = saved(model_of("qwen2"), place, target_modules=TARGETS["qwen2"], **options)
    ours = merged_model(place).state_dict()
    for name, tensor in both.merge_and_unload().state_dict().items():
        assert torch.equal(ours[name], tensor), name


def test_what_is_done_to_the_base_first_is_kept_in_the_dtype_that_the_base_is_stored_in(place: Path) -> None:
    """A QLoRA run in bfloat16 on a base in float32: weights pass through bfloat16, sums do not."""
    both = saved(model_of("llama"), place, target_modules=["q_proj"])

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(torch.bfloat16) if "_proj" in name else weight

    tensors = MergedTensors(
        place / "adapter", Weights(place / "base"), AutoConfig.from_pretrained(place / "base"), change=change
    )
    base = load_file(place / "base" / "model.safetensors")
    for layer in ("q_proj", "k_proj"):
        name = f"model.layers.0.self_attn.{layer}.weight"
        expected = base[name].to(torch.bfloat16).float()
        if layer == "q_proj":
            expected += both.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight("default")
        assert torch.equal(tensors.read(name), expected)


def test_all_of_these_but_the_experts_are_streamed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the equality above is not that of PEFT with itself."""

    def whole(*_: object) -> None:
        raise AssertionError("loaded whole")

    monkeypatch.setattr(merge, "_write_whole", whole)
    for family in set(TARGETS) - {"mixtral"}:
        saved(model_of(family), place, target_modules=TARGETS[family])
        merged_model(place)
    saved(model_of("mixtral"), place, target_modules=TARGETS["mixtral"])
    with pytest.raises(AssertionError, match="loaded whole"):
        merged_model(place)


def test_lora_on_the_parameters_of_experts(place: Path) -> None:
    both = saved(model_of("mixtral"), place, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    answers = logits(both)
    torch.testing.assert_close(logits(merged_model(place)), answers, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(answers, logits(AutoModelForCausalLM.from_pretrained(place / "base")), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "still_tied"),
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
def test_embeddings_and_head_that_were_one_are_parted_only_if_they_differ(
    place: Path, options: dict[str, Any], still_tied: bool
) -> None:
    """PEFT merges LoRA on one of two tied embeddings into both (huggingface/peft issue 2777)."""
    if options.get("ensure_weight_tying"):
        skip_on_older_peft("ties nothing: merge notices that logits differ")
    both = saved(model_of("llama", tie_word_embeddings=True), place, **options)
    answers = logits(both)
    found = merged_model(place, verify=True)
    torch.testing.assert_close(logits(found), answers, rtol=1e-4, atol=1e-5)
    assert AutoConfig.from_pretrained(place / "merged").tie_word_embeddings == still_tied
    names = load_file(place / "merged" / "model.safetensors").keys()
    assert ("lm_head.weight" in names) == (not still_tied)


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_an_adapter_that_began_with_a_change_of_the_base(place: Path, how: str) -> None:
    both = saved(model_of("llama"), place, target_modules=["q_proj"], init_lora_weights=how)
    answers = logits(both)
    torch.testing.assert_close(logits(merged_model(place)), answers, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["pissa_niter_4", "loftq", "corda", "lora_ga", "anything"])
def test_a_change_of_the_base_that_cannot_be_repeated_is_refused(place: Path, how: str) -> None:
    saved(model_of("llama"), place, target_modules=["q_proj"])
    file = place / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace('"init_lora_weights": false', f'"init_lora_weights": "{how}"'))
    with pytest.raises(ArtifactError, match=f"init_lora_weights='{how}' changed the base's weights"):
        merged_model(place)


def test_embeddings_of_another_base_are_refused(place: Path) -> None:
    """PEFT would load base tensors that stand in an adapter's file over the base."""
    saved(model_of("llama"), place, target_modules=["q_proj"], save_embedding_layers=True)
    other = model_of("llama")
    with torch.no_grad():
        other.get_input_embeddings().weight[3] += 1
    other.save_pretrained(place / "base")
    with pytest.raises(ArtifactError, match="the embeddings saved with the adapter are not those of this base"):
        merged_model(place)


def test_a_resized_vocabulary_without_its_embeddings_is_refused(place: Path) -> None:
    base = model_of("llama")
    base.save_pretrained(place / "base")
    base.resize_token_embeddings(104, mean_resizing=False)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "lm_head"])
    with_adapter(base, config, place / "adapter")
    with pytest.raises(ArtifactError, match="lm_head"):
        merged_model(place)


def test_a_sum_that_the_dtype_of_the_base_cannot_hold_is_refused(place: Path) -> None:
    """float16 ends at 65,504."""
    saved(model_of("llama").half(), place, target_modules=["q_proj"])
    file = place / "adapter" / "adapter_model.safetensors"
    tensors = {name: tensor * (1e4 if "lora_B" in name else 1e3) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(ArtifactError, match=r"q_proj\.weight is not finite when merged"):
        merged_model(place)
    assert not (place / "merged").exists()


def in_shards(place: Path) -> PeftModel:
    both = saved(model_of("llama"), place, target_modules=["q_proj", "down_proj"], bias="none")
    (place / "base" / "model.safetensors").unlink()
    model_of("llama").save_pretrained(place / "base", max_shard_size="20KB")
    assert len(list((place / "base").glob("*.safetensors"))) > 2
    return both


@pytest.mark.parametrize("size", [None, 9_000, 10**9])
def test_files_are_those_of_the_base_or_of_the_size_asked_for(place: Path, size: int | None) -> None:
    expected = in_shards(place).merge_and_unload().state_dict()
    ours = merged_model(place, max_shard_bytes=size).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    files = sorted((place / "merged").glob("*.safetensors"))
    of_base = {file.name for file in (place / "base").glob("*.safetensors")}
    if size is None:
        assert {file.name for file in files} == of_base
    elif size == 10**9:
        assert [file.name for file in files] == ["model.safetensors"]
    else:
        assert len(files) > len(of_base)
        assert max(sum(t.nbytes for t in load_file(file).values()) for file in files) <= 96 * 32 * 4


@pytest.mark.parametrize("index", [False, True])
def test_a_base_in_pickles_is_read_as_data(place: Path, index: bool) -> None:
    both = saved(model_of("llama"), place, target_modules=["q_proj"])
    tensors = load_file(place / "base" / "model.safetensors")
    (place / "base" / "model.safetensors").unlink()
    if index:
        names = sorted(tensors)
        parts = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
        for file, part in parts.items():
            torch.save({name: tensors[name] for name in part}, place / "base" / file)
        weight_map = {name: file for file, part in parts.items() for name in part}
        (place / "base" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(tensors, place / "base" / "pytorch_model.bin")
    expected = both.merge_and_unload().state_dict()
    ours = merged_model(place).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    assert not list((place / "merged").glob("*.bin"))


def test_an_adapter_in_a_pickle_is_read_as_data(place: Path) -> None:
    both = saved(model_of("llama"), place, target_modules=["q_proj"])
    torch.save(load_file(place / "adapter" / "adapter_model.safetensors"), place / "adapter" / "adapter_model.bin")
    (place / "adapter" / "adapter_model.safetensors").unlink()
    answers = logits(both)
    torch.testing.assert_close(logits(merged_model(place, verify=True)), answers, rtol=1e-4, atol=1e-5)


def test_a_tensor_of_the_base_is_read_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_shards(place)
    read: Counter[str] = Counter()
    real: Callable[..., torch.Tensor] = Weights._read

    def counted(self: Weights, file: Path, name: str) -> torch.Tensor:
        read[name] += 1
        return real(self, file, name)

    monkeypatch.setattr(Weights, "_read", counted)
    merged_model(place)
    assert set(read.values()) == {1}
    assert len(read) == len(model_of("llama").state_dict())
