"""A merged model is what PEFT would merge, answers as base + adapter do, and is an ordinary model folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lora_accel import RunConfig, merge_adapter, run_training
from lora_accel.errors import ArtifactError, LoraAccelError, UserError
from lora_accel.saving import merge
from lora_accel.saving.commit import why_invalid
from lora_accel.saving.history import WEIGHTS
from tests.conftest import CHATML, fill_by_formula

IDS = torch.arange(5, 29).reshape(2, 12)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def trained(
    make_config: Callable[..., RunConfig], tiny_model: Callable[..., Path], tmp_path: Path
) -> Callable[..., Path]:
    """Train an adapter on a tiny model; return its folder."""

    def train(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: object) -> Path:
        model = {"name_or_path": str(tiny_model(family, dtype))}
        return run_training(make_config(output_dir=str(tmp_path / "run"), model=model, **changes))

    return train


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2"])
def test_in_float32_it_is_exactly_what_peft_merges(
    trained: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path, family: str, bias: str
) -> None:
    adapter = trained(family, adapter={"bias": bias})
    told = merge_adapter(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")

    both = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model(family)), adapter)
    answers = logits(both)
    torch.testing.assert_close(logits(merged), answers, rtol=1e-5, atol=1e-5)
    moved = (answers - logits(AutoModelForCausalLM.from_pretrained(tiny_model(family)))).abs().max()
    assert moved > 1e-2, "the adapter does something, so that agreeing says something"
    assert 0 <= told["merged"]["logits_moved"] < 1e-5

    by_peft = both.merge_and_unload().state_dict()
    ours = merged.state_dict()
    assert ours.keys() == by_peft.keys()
    for name, tensor in by_peft.items():
        assert torch.equal(ours[name], tensor), name


def test_a_bfloat16_base_stays_bfloat16_and_is_rounded_once(
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
def test_other_forms_of_lora_merge(trained: Callable[..., Path], tmp_path: Path, options: dict[str, object]) -> None:
    adapter = trained("qwen2", adapter=options)
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    answers = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    merge_adapter(adapter, tmp_path / "merged")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, answers, rtol=1e-5, atol=1e-5)


def test_an_adapter_trained_on_a_quantised_base_is_merged_into_the_whole_base(
    trained: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = trained(quantization={"bits": 4})
    merge_adapter(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    assert {tensor.dtype for tensor in merged.state_dict().values()} == {torch.float32}
    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    by_peft = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    assert all(torch.equal(merged.state_dict()[name], tensor) for name, tensor in by_peft.items())


def test_the_folder_is_complete_and_says_what_it_was_made_from(
    trained: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = trained()
    told = merge_adapter(adapter, tmp_path / "merged")
    out = tmp_path / "merged"
    assert why_invalid(out) is None
    assert {"model.safetensors", "config.json", "tokenizer.json", "provenance.json", "manifest.json"} <= contents(out)
    assert not any("adapter" in name for name in contents(out))
    assert AutoTokenizer.from_pretrained(out).chat_template == CHATML
    assert AutoConfig.from_pretrained(out).use_cache
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance == told
    assert provenance["merged"]["base"] == str(tiny_model())
    assert provenance["adapter"] == json.loads((adapter / "provenance.json").read_text())


def test_the_template_of_training_is_in_the_merged_model(
    trained: Callable[..., Path], make_config: Callable[..., RunConfig], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = {"name_or_path": str(tiny_model()), "chat_template": "alpaca"}
    adapter = run_training(make_config(model=model))
    merge_adapter(adapter, tmp_path / "merged")
    assert "### Response" in AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_a_bare_peft_adapter_is_merged_with_the_tokenizer_of_its_base(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model()),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    answers = logits(model)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), answers, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == CHATML


# What is refused, and that nothing is half-made


def nothing_made(folder: Path) -> bool:
    return not [path for path in folder.iterdir() if "merged" in path.name]


def test_a_folder_that_is_there_is_refused_and_replaced_on_request(
    trained: Callable[..., Path], tmp_path: Path
) -> None:
    adapter, out = trained(), tmp_path / "merged"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="is there already; choose another folder, or say --overwrite"):
        merge_adapter(adapter, out)
    assert contents(out) == {"mine.txt"}
    merge_adapter(adapter, out, overwrite=True)
    assert "mine.txt" not in contents(out)
    assert why_invalid(out) is None
    assert {path.name for path in tmp_path.iterdir() if "merged" in path.name} == {"merged"}


def test_an_empty_folder_is_taken(trained: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    merge_adapter(trained(), tmp_path / "merged")
    assert why_invalid(tmp_path / "merged") is None


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_place_of_the_folder_is_refused(
    trained: Callable[..., Path], tmp_path: Path, overwrite: bool
) -> None:
    (tmp_path / "merged").write_text("mine")
    with pytest.raises(ArtifactError, match="merged"):
        merge_adapter(trained(), tmp_path / "merged", overwrite=overwrite)
    assert (tmp_path / "merged").read_text() == "mine"


@pytest.mark.parametrize("inside", [".", "..", "out"])
def test_overwriting_what_is_merged_is_refused(trained: Callable[..., Path], inside: str) -> None:
    """OUT = the adapter's own folder, or one that holds it, would delete the adapter."""
    adapter = trained()
    before = contents(adapter)
    if inside == "out":
        merge_adapter(adapter, adapter / "out", overwrite=True)  # beside its files: harmless
        assert contents(adapter) == before | {"out"}
        return
    with pytest.raises(ArtifactError, match="holds the adapter"):
        merge_adapter(adapter, adapter / inside, overwrite=True)
    assert contents(adapter) == before


def test_overwriting_the_base_is_refused(
    trained: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = trained()
    copy = tmp_path / "base"
    shutil.copytree(tiny_model(), copy)
    with pytest.raises(ArtifactError, match="holds the base"):
        merge_adapter(adapter, copy, base=str(copy), overwrite=True)
    assert contents(copy) == contents(tiny_model())


def test_another_base_than_that_of_training_is_refused(
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
    assert nothing_made(tmp_path)


def test_the_same_base_in_another_place_is_taken(
    trained: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = trained()
    moved = tmp_path / "moved"
    shutil.copytree(tiny_model(), moved)
    told = merge_adapter(adapter, tmp_path / "merged", base=str(moved))
    assert told["merged"]["base"] == str(moved)


@pytest.mark.parametrize("gone", ["adapter_config.json", WEIGHTS])
def test_what_is_no_adapter_is_refused(trained: Callable[..., Path], tmp_path: Path, gone: str) -> None:
    adapter = trained()
    (adapter / gone).unlink()
    with pytest.raises(ArtifactError, match=f"no {gone} in it, so it is no adapter"):
        merge_adapter(adapter, tmp_path / "merged")
    assert nothing_made(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"base_model_name_or_path": null}', "{}"])
def test_an_adapter_config_that_names_no_base_is_refused(
    trained: Callable[..., Path], tmp_path: Path, text: str
) -> None:
    adapter = trained()
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match="adapter"):
        merge_adapter(adapter, tmp_path / "merged")
    assert nothing_made(tmp_path)


@pytest.mark.parametrize(
    "told", [[], 3, {"base": []}, {"base": {"revision": 3}}, {"base": {"sha256": 3, "name_or_path": "x"}}, {"base": {}}]
)
def test_a_provenance_that_tells_nothing_is_refused(trained: Callable[..., Path], tmp_path: Path, told: object) -> None:
    adapter = trained()
    (adapter / "provenance.json").write_text(json.dumps(told))
    with pytest.raises(ArtifactError, match=r"provenance\.json"):
        merge_adapter(adapter, tmp_path / "merged")
    assert nothing_made(tmp_path)


def test_a_base_that_is_gone_is_refused(trained: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        merge_adapter(trained(), tmp_path / "merged", base=str(tmp_path / "absent"))
    assert nothing_made(tmp_path)


def test_nan_is_refused(trained: Callable[..., Path], tmp_path: Path) -> None:
    adapter = trained()
    weights = load_file(adapter / WEIGHTS)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, adapter / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="not finite"):
        merge_adapter(adapter, tmp_path / "merged")
    assert nothing_made(tmp_path)


def test_a_merge_that_answers_otherwise_is_not_written(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT merges LoRA on one of two tied embeddings wrong, with a warning only."""
    tied = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model(), tie_word_embeddings=True))
    fill_by_formula(tied)
    tied.save_pretrained(tmp_path / "tied")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(LoraAccelError, match=r"differ from base \+ adapter by .* nothing was written") as refused:
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert refused.value.exit_code == 1
    assert nothing_made(tmp_path)


def test_nothing_is_half_made_when_saving_fails(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = trained()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "write_json", full)  # the last file: model and tokenizer are written by then
    with pytest.raises(OSError, match="No space left"):
        merge_adapter(adapter, tmp_path / "merged")
    assert nothing_made(tmp_path)
