"""A merged model is what PEFT would merge, answers as base + adapter do, and is an ordinary model folder."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

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
from lora_accel.saving.atomic import why_invalid
from lora_accel.saving.discovery import WEIGHTS
from tests.conftest import CHATML

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
        changes = {"model": {"name_or_path": str(tiny_model(family, dtype))}} | changes
        return run_training(make_config(output_dir=str(tmp_path / "run"), **changes))

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
    assert 0 <= told["merged"]["agreement"]["moved"] < 1e-5

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


def test_dequantized_weights_are_those_that_a_qlora_run_computes_with(
    trained: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = trained(quantization={"bits": 4})
    told = merge_adapter(adapter, tmp_path / "merged", base_weights="dequantized")
    assert told["merged"]["base_weights"] == "dequantized"
    assert told["merged"]["agreement"]["moved"] < 1e-4
    packed = load_base_model(ModelSection(name_or_path=str(tiny_model())), QuantizationSection(bits=4))
    layer = packed.model.layers[0].mlp.down_proj
    unpacked = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    delta = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model()), adapter)
    delta = delta.base_model.model.model.layers[0].mlp.down_proj.get_delta_weight("default")
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    torch.testing.assert_close(ours["model.layers.0.mlp.down_proj.weight"], unpacked + delta, rtol=0, atol=1e-6)
    base = load_file(tiny_model() / "model.safetensors")
    assert (ours["model.layers.0.mlp.down_proj.weight"] - base["model.layers.0.mlp.down_proj.weight"]).std() > 1e-3
    assert torch.equal(ours["lm_head.weight"], base["lm_head.weight"]), "the head is not packed"


def test_dequantized_is_refused_where_nothing_was_quantised(trained: Callable[..., Path], tmp_path: Path) -> None:
    adapter = trained()
    with pytest.raises(ArtifactError, match="was not held in 4 bits; say --base-weights original"):
        merge_adapter(adapter, tmp_path / "merged", base_weights="dequantized")
    (adapter / "provenance.json").unlink()
    with pytest.raises(ArtifactError, match="does not say how its base was quantised"):
        merge_adapter(adapter, tmp_path / "merged", base_weights="dequantized")
    with pytest.raises(UserError, match="say original or dequantized"):
        merge_adapter(adapter, tmp_path / "merged", base_weights="rounded")
    assert nothing_made(tmp_path)


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
    licence = tiny_model() / "LICENSE.txt"
    licence.write_text("free")
    adapter = trained()
    told = merge_adapter(adapter, tmp_path / "merged")
    licence.unlink()
    out = tmp_path / "merged"
    assert why_invalid(out) is None
    files = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "provenance.json"}
    assert files | {"manifest.json", "README.md", "LICENSE.txt"} <= contents(out)
    assert str(tiny_model()) in (out / "README.md").read_text()
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

    told = merge_adapter(adapter, tmp_path / "merged", base=str(other), force=True)
    assert told["merged"]["same_base"] is False
    assert told["merged"]["agreement"]["moved"] < 1e-4, "it is base + adapter all the same"


@pytest.mark.parametrize("change", [{"num_hidden_layers": 1}, {"hidden_size": 48}, {"intermediate_size": 32}])
def test_a_base_of_another_shape_is_refused(
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
    assert nothing_made(tmp_path)


def test_another_kind_of_model_is_refused(
    trained: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="does not fit this base"):
        merge_adapter(trained(), tmp_path / "merged", base=str(tiny_model("gpt2")))
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


def test_a_merge_that_answers_otherwise_is_not_written(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One value of one tensor, and a sum that is not a number."""
    adapter = trained()
    real = MergedTensors.read

    def wrong(by: float) -> Callable[..., torch.Tensor]:
        def read(self: MergedTensors, name: str) -> torch.Tensor:
            tensor = real(self, name).clone()
            if name == "model.layers.1.mlp.down_proj.weight":
                tensor[3, 5] += by
            return tensor

        return read

    for by in (0.1, float("nan")):
        monkeypatch.setattr(MergedTensors, "read", wrong(by))
        with pytest.raises(LoraAccelError, match=r"differ from base \+ adapter by .* nothing was written") as refused:
            merge_adapter(adapter, tmp_path / "merged", verify=True)
        assert refused.value.exit_code == 1
        assert nothing_made(tmp_path)
    monkeypatch.setattr(MergedTensors, "read", wrong(0.1))
    told = merge_adapter(adapter, tmp_path / "merged", verify=False)
    assert told["merged"]["agreement"] is None


def test_a_model_that_does_not_fit_into_memory_is_not_compared(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    told = merge_adapter(trained(), tmp_path / "merged")
    assert told["merged"]["agreement"] is None
    assert "It was not compared" in (tmp_path / "merged" / "README.md").read_text()


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


# All of a run


@pytest.fixture
def run(trained: Callable[..., Path]) -> Path:
    """A run with two checkpoints, and its adapter."""
    return trained(adapter={"bias": "all", "use_dora": True}, checkpoint={"every_steps": 3}).parent


def test_every_checkpoint_is_merged_and_the_base_is_read_once(
    run: Path, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()
    real = Weights._read

    def counted(self: Weights, file: Path, name: str) -> torch.Tensor:
        read[name] += file.parent == tiny_model()
        return real(self, file, name)

    monkeypatch.setattr(Weights, "_read", counted)
    made = merge_checkpoints(run)
    assert set(read.values()) == {1}
    assert contents(run / "merged") == {"step-00000003", "step-00000006", "adapter"}
    assert [Path(told["merged"]["adapter"]).name for told in made] == ["step-00000003", "step-00000006", "adapter"]
    for folder, name in [(run / "checkpoints" / "step-00000003", "step-00000003"), (run / "adapter", "adapter")]:
        merge_adapter(folder, tmp_path / "one", overwrite=True)
        one = load_file(tmp_path / "one" / "model.safetensors")
        ours = load_file(run / "merged" / name / "model.safetensors")
        assert all(torch.equal(ours[key], tensor) for key, tensor in one.items())
        assert why_invalid(run / "merged" / name) is None
        assert AutoTokenizer.from_pretrained(run / "merged" / name).chat_template == CHATML
    first, last = (load_file(run / "merged" / name / "model.safetensors") for name in ("step-00000003", "adapter"))
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], last["model.layers.0.mlp.up_proj.weight"])


def test_what_is_merged_already_is_left_and_what_is_damaged_is_made_again(run: Path) -> None:
    merge_checkpoints(run)
    stamps = {path: path.stat().st_mtime_ns for path in (run / "merged").glob("*/model.safetensors")}
    damaged = run / "merged" / "adapter" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    stamps[damaged] = damaged.stat().st_mtime_ns
    made = merge_checkpoints(run)
    assert [told.get("already", False) for told in made] == [True, True, False]
    changed = [path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp]
    assert changed == [damaged]
    assert why_invalid(run / "merged" / "adapter") is None


def test_a_checkpoint_has_the_template_of_its_run_when_there_is_no_adapter_yet(
    trained: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = trained(model={"name_or_path": str(tiny_model()), "chat_template": "alpaca"})
    run = adapter.parent
    shutil.rmtree(adapter)
    merge_checkpoints(run)
    for merged in (run / "merged").iterdir():
        assert "### Response" in AutoTokenizer.from_pretrained(merged).chat_template
    provenance = json.loads((run / "provenance.json").read_text())
    provenance["config"]["model"]["chat_template"] = "chatml"
    (run / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(ArtifactError, match="the chat template of its training is not to be found"):
        merge_adapter(run / "checkpoints" / "step-00000006", tmp_path / "merged")


def test_a_folder_without_anything_to_merge_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="has no checkpoints/ in it"):
        merge_checkpoints(tmp_path / "absent")
    shutil.rmtree(run / "adapter")
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="neither a whole checkpoint nor an adapter"):
        merge_checkpoints(run)
