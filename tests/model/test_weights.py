"""Bases whose weight files are not the model of their config.json are errors before any weight is read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lora_accel.config.schema import ModelSection, QuantizationSection, RunConfig
from lora_accel.errors import ArtifactError, DataError
from lora_accel.merging.merge import merge_adapter
from lora_accel.model import base as base_module
from lora_accel.model.base import build_on_meta_device, choose_dtype, load_base_model, stored_dtype
from lora_accel.model.headers import StoredTensor, main_dtype, read_headers
from lora_accel.model.sizes import load_config, model_sizes
from lora_accel.model.weights import check_weights
from lora_accel.train import check_base_early, run_training
from tests.conftest import CommandResult
from tests.families import SIZES, model_of

State = dict[str, torch.Tensor]
Models = Callable[..., Path]


def load(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = load_base_model(ModelSection(name_or_path=str(folder)), QuantizationSection())
    return model


@pytest.fixture
def base(tiny_model: Models, tmp_path: Path) -> Path:
    """Return a copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model(), tmp_path / "base"))


def change_weights(base: Path, change: Callable[[State], Any]) -> Path:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base


def change_config(base: Path, **changes: Any) -> Path:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    return base


def plain_adapter(base: Path, folder: Path, target: str = "q_proj") -> Path:
    """Save an adapter with random weights as PEFT does."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=[target], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


QUERY = "model.layers.1.self_attn.q_proj.weight"
DAMAGES: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing": (lambda t: t.pop(QUERY), rf"1 tensor of the model is not .*: {QUERY}; it would be random"),
    "none": (lambda t: t.clear(), r"21 tensors of the model are not in its weight files: lm_head.* and 18 more"),
    "head": (lambda t: t.pop("lm_head.weight"), "lm_head.weight; it would be random"),
    "integers": (lambda t: t.update({QUERY: t[QUERY].mul(100).to(torch.int8)}), f"int8 instead .*: {QUERY};"),
    "shape": (lambda t: t.update({QUERY: t[QUERY][:16].clone()}), rf"{QUERY} has shape \[16, 32\] .* \[32, 32\]"),
    "more layers": (
        lambda t: t.update({QUERY.replace("1", "2"): t[QUERY].clone()}),
        r"does not use 1 tensor .*: model.layers.2.self_attn.q_proj.weight",
    ),
    "bias": (lambda t: t.update({QUERY.replace("weight", "bias"): torch.ones(32)}), "does not use .*q_proj.bias"),
    "LoRA": (
        lambda t: t.update({QUERY.replace("weight", "lora_A.weight"): torch.ones(4, 32)}),
        "does not use .*lora_A",
    ),
    "scales": (lambda t: t.update({QUERY + "_scale": torch.ones(32)}), "does not use .*q_proj.weight_scale"),
    "positions": (lambda t: t.update({"model.embed_positions.weight": torch.ones(9, 32)}), "does not use .*embed_pos"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=DAMAGES)
def test_weights_of_another_model_are_an_error(base: Path, change: Callable[[State], Any], message: str) -> None:
    change_weights(base, change)
    with pytest.raises(ArtifactError, match=message) as error:
        load(base)
    assert str(error.value).startswith(f"{base}: ")


def test_every_command_rejects_a_base_with_a_missing_tensor(
    base: Path,
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    config_file: Callable[[RunConfig], Path],
    command: Callable[..., CommandResult],
) -> None:
    adapter = plain_adapter(base, tmp_path / "adapter", "v_proj")
    change_weights(base, lambda tensors: tensors.pop(QUERY))
    config = make_config(model={"name_or_path": str(base)}, data={"eval_fraction": 0.2})
    with pytest.raises(ArtifactError, match=QUERY):
        run_training(config)
    assert not Path(config.output_dir).exists()
    commands = (
        ("evaluate", "--config", config_file(config), "--adapter", adapter),
        ("generate", "hello", "--adapter", adapter),
        ("chat", "--adapter", adapter),
        ("merge", adapter, tmp_path / "out"),
        ("merge", adapter, tmp_path / "out", "--no-verify"),
    )
    for args in commands:
        result = command(*args)
        assert result.returncode == 2, args
        assert f"{base}: 1 tensor of the model is not in its weight files: {QUERY}" in result.stderr
    assert not (tmp_path / "out").exists()


def test_training_checks_a_local_base_before_it_reads_rows(base: Path, make_config: Callable[..., RunConfig]) -> None:
    rows = {"train": [{"path": "no-such-rows.jsonl"}]}
    with pytest.raises(DataError, match="no-such-rows"):
        run_training(make_config(model={"name_or_path": str(base)}, data=rows))
    change_weights(base, lambda tensors: tensors.pop(QUERY))
    config = make_config(model={"name_or_path": str(base)}, data=rows)
    with pytest.raises(ArtifactError, match=QUERY):
        run_training(config)
    (Path(config.output_dir) / "adapter").mkdir(parents=True)
    check_base_early(config, Accelerator())  # the run may be finished: it needs no weights


def test_a_base_is_checked_once_in_a_process(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []

    def check(name: str, *args: Any) -> None:
        checked.append(name)
        check_weights(name, *args)

    monkeypatch.setattr(base_module, "check_weights", check)
    for _ in range(2):
        load(base)
    assert checked == [str(base)]
    change_weights(base, lambda tensors: tensors.pop(QUERY))
    for _ in range(2):
        with pytest.raises(ArtifactError, match=QUERY):
            load(base)
    assert len(checked) == 3, "another header is another base, and an error is not remembered"


def test_attention_in_config_json_may_be_replaced(base: Path) -> None:
    change_config(base, attn_implementation="flash_attention_2")
    section = ModelSection(name_or_path=str(base), attention="sdpa")
    assert load_base_model(section, QuantizationSection()).config._attn_implementation == "sdpa"


def test_names_with_a_prefix_are_reported(base: Path) -> None:
    def add_prefix(tensors: State) -> None:  # as torch.compile names them
        for name in list(tensors):
            tensors[f"_orig_mod.{name}"] = tensors.pop(name)

    change_weights(base, add_prefix)
    with pytest.raises(
        ArtifactError, match=r"would be random\. The files have _orig_mod\.lm_head\.weight, .* instead\. Use"
    ):
        load(base)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    model_of("mixtral").save_pretrained(tmp_path)
    expert = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    load(tmp_path)
    change_weights(tmp_path, lambda tensors: tensors.pop(expert))
    with pytest.raises(ArtifactError, match=f"not in its weight files: {expert};"):
        load(tmp_path)


def test_other_parts_of_a_model_are_a_note(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {
        "v_head.summary.weight": torch.ones(1, 32),
        "vision_tower.blocks.0.attn.weight": torch.ones(4, 4),
        "model.mtp.layers.0.norm.weight": torch.ones(32),
    }
    change_weights(base, lambda tensors: tensors.update(extra))
    load(base)
    notes = [record.getMessage() for record in caplog.records if "note: " in record.getMessage()]
    names = "model.mtp.layers.0.norm.weight, v_head.summary.weight, vision_tower.blocks.0.attn.weight"
    assert notes == [f"note: {base}: 3 tensors of the weight files are not used: {names}"]


def test_layers_that_predict_several_tokens_are_a_note(base: Path) -> None:
    change_weights(base, lambda tensors: tensors.update({QUERY.replace("1", "2"): torch.ones(32, 32)}))
    change_config(base, num_nextn_predict_layers=1)
    load(base)


def test_masks_and_frequencies_of_old_files_are_ignored(tiny_model: Models, base: Path, tmp_path: Path) -> None:
    rotary = "model.layers.0.self_attn.rotary_emb"
    tables = {f"{rotary}.inv_freq": torch.ones(4), f"{rotary}.cos_cached": torch.ones(64, 8)}
    tables["model.layers.0.self_attn.bias"] = torch.ones(1, 1, 64, 64)  # a family without a buffer of that name
    load(change_weights(base, lambda tensors: tensors.update(tables)))
    old = Path(shutil.copytree(tiny_model("gpt2"), tmp_path / "old"))
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 256, 256),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    load(change_weights(old, lambda tensors: tensors.update(masks)))

    def without_prefix(tensors: State) -> None:  # as the first models on the Hub were saved
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    load(change_weights(old, without_prefix))


def test_tied_weights_are_not_missing(tiny_model: Models, tmp_path: Path) -> None:
    assert "lm_head.weight" not in read_headers([tiny_model("gpt2") / "model.safetensors"])
    load(tiny_model("gpt2"))


def test_pickled_weights_are_checked_without_reading_them(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    load(base)
    assert read_headers([base / "pytorch_model.bin"])[QUERY] == StoredTensor(torch.float32, (32, 32))
    del tensors[QUERY]
    torch.save(tensors, base / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=QUERY):
        load(base)
    torch.save({QUERY: torch.ones(2).to_sparse()}, base / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="should contain a dict of tensors"):
        load(base)
    (base / "pytorch_model.bin").write_bytes(b"\x80\x02nonsense")
    with pytest.raises(ArtifactError, match=r"pytorch_model\.bin: cannot be read"):
        load(base)


def test_more_tensors_than_any_model_has(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_weights(base, lambda tensors: tensors.update({"." * 1001: torch.ones(1)}))
    with pytest.raises(ArtifactError, match=r"model\.safetensors: has more tensors, or longer names, than any model"):
        load(base)


def test_weights_that_are_quantized_at_load_are_checked(base: Path) -> None:
    change_weights(base, lambda tensors: tensors.pop(QUERY))
    with pytest.raises(ArtifactError, match=QUERY):
        load_base_model(ModelSection(name_or_path=str(base)), QuantizationSection(bits=4))


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_base_with_its_own_code_is_checked(base: Path) -> None:
    (base / "modeling_own.py").write_text(CODE)
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change_config(base, model_type="own", auto_map=names, architectures=["OwnForCausalLM"])
    section = ModelSection(name_or_path=str(base), trust_remote_code=True)
    load_base_model(section, QuantizationSection())
    change_weights(base, lambda tensors: tensors.pop(QUERY))
    with pytest.raises(ArtifactError, match=QUERY):
        load_base_model(section, QuantizationSection())


def test_shards_without_their_index(base: Path) -> None:
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    with pytest.raises(ArtifactError, match=r"model-00001-of-00001.safetensors without model.safetensors.index.json"):
        load(base)


def test_a_truncated_file_is_named(base: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"model\.safetensors: cannot be read"):
        load(base)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe", "gemma2", "phi3"])
def test_the_check_accepts_what_transformers_saves(family: str, tmp_path: Path) -> None:
    model_of(family).save_pretrained(tmp_path)
    section = ModelSection(name_or_path=str(tmp_path))
    check_weights("base", load_config(section), read_headers([tmp_path / "model.safetensors"]))


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"hidden_size": -32}, "hidden_size=-32 should be an integer of at least 1"),
    "zero": ({"num_attention_heads": 0}, "num_attention_heads=0 should be"),
    "no tokens": ({"vocab_size": 0}, "vocab_size=0 should be"),
    "no positions": ({"max_position_embeddings": -1}, "max_position_embeddings=-1 should be"),
    "fraction": ({"intermediate_size": 64.5}, "intermediate_size=64.5 should be an integer"),
    "groups": ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
    "heads": ({"num_attention_heads": 6, "num_key_value_heads": 2}, "hidden size .32. is not a multiple"),
    "activation": ({"hidden_act": "silo"}, r"hidden_act='silo' is not an activation .*did you mean silu"),
    "RoPE": ({"rope_parameters": {"rope_type": "yarm", "factor": 2.0, "rope_theta": 1e4}}, "rope_type='yarm' is not"),
    "theta": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}},
        "rope_theta=-1.0 should be a positive",
    ),
    "eps": ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0 should be a positive number"),
    "dropout": ({"attention_dropout": 2.0}, "attention_dropout=2.0 should be from 0 to 1"),
    "layers": ({"num_hidden_layers": 1_000_000}, "num_hidden_layers=1000000 is more than any model has"),
    "more layers": ({"num_hidden_layers": 10**400}, "num_hidden_layers=1000.* is more than any model has"),
    "more heads": ({"num_attention_heads": 10**12}, "num_attention_heads=1000000000000 is more than"),
    "huge": ({"intermediate_size": 2**31 - 1}, r"shape \[32, 64\] in the weight files and \[32, 2147483647\]"),
    "few layers": ({"num_hidden_layers": 1}, "does not use 9 tensors"),
    "many layers": ({"num_hidden_layers": 3}, "9 tensors of the model are not"),
    "text": ({"hidden_size": "32"}, "hidden_size"),
    "no family": ({"model_type": "nomodel"}, "nomodel"),
}


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_impossible_config_is_one_message(base: Path, changes: dict[str, Any], message: str) -> None:
    change_config(base, **changes)
    with pytest.raises(ArtifactError, match=message) as error:
        load(base)
    assert str(base) in str(error.value)


def test_tables_that_a_config_makes_huge(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gptj", vocab_size=96, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    load(tmp_path)
    change_config(tmp_path, n_positions=2**31 - 1)
    with pytest.raises(ArtifactError, match=r"tables of 34 GB, such as .*embed_positions of shape \[2147483647, 4\]"):
        load(tmp_path)


def test_more_layers_than_tensors(base: Path) -> None:
    change_config(base, num_hidden_layers=1000)
    with pytest.raises(ArtifactError, match="num_hidden_layers=1000, but the weight files hold 21 tensors"):
        load(base)


def test_sizes_are_checked_before_the_model_is_needed(base: Path) -> None:
    section = ModelSection(name_or_path=str(change_config(base, vocab_size=-5)))
    for function in (model_sizes, load_config):
        with pytest.raises(ArtifactError, match="vocab_size=-5"):
            function(section)
    config = AutoConfig.for_model("llama", **SIZES | {"num_key_value_heads": 3})
    with pytest.raises(ArtifactError, match="num_key_value_heads=3"):
        build_on_meta_device(config)
    config = AutoConfig.for_model("qwen3_moe", **SIZES | {"num_experts": 4, "num_experts_per_tok": 5})
    with pytest.raises(ArtifactError, match="num_experts_per_tok=5 is not 1 to 4"):
        build_on_meta_device(config)


def test_config_json_that_is_no_object(base: Path) -> None:
    for text in ("[1]", "[" * 100_000, "null", ""):
        (base / "config.json").write_text(text)
        with pytest.raises(ArtifactError, match="config"):
            model_sizes(ModelSection(name_or_path=str(base)))


def test_the_check_is_the_same_under_zero3(base: Path) -> None:
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    active = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert is_deepspeed_zero3_enabled()
    section = ModelSection(name_or_path=str(base))
    check_weights("base", load_config(section), read_headers([base / "model.safetensors"]))
    assert build_on_meta_device(load_config(section)).get_parameter(QUERY).shape == (32, 32)
    change_weights(base, lambda tensors: tensors.pop(QUERY))
    with pytest.raises(ArtifactError, match=QUERY):
        load(base)
    assert is_deepspeed_zero3_enabled()
    del active


def test_the_stored_dtype_decides(base: Path) -> None:
    section = ModelSection(name_or_path=str(change_config(base, dtype="bfloat16")))
    assert load_config(section).dtype == torch.bfloat16
    assert stored_dtype(section) == torch.float32
    assert load(base).dtype == torch.float32
    assert choose_dtype(section, "no", torch.device("cpu"), "auto") == torch.bfloat16  # as versions before took it
    assert choose_dtype(section, "no", torch.device("cpu"), "bfloat16") == torch.bfloat16


def test_most_elements_decide_among_dtypes() -> None:
    tensors = {
        "norm": StoredTensor(torch.float32, (10,)),
        "linear": StoredTensor(torch.bfloat16, (10, 10)),
        "ids": StoredTensor(torch.int64, (1000, 10)),
    }
    assert main_dtype(tensors) == torch.bfloat16
    assert main_dtype({}) == torch.float32


def test_merge_is_verified_with_the_weights_as_stored(base: Path, tmp_path: Path) -> None:
    change_config(base, dtype="bfloat16")
    adapter = plain_adapter(base, tmp_path / "adapter")
    provenance = merge_adapter(adapter, tmp_path / "out")
    assert provenance["merged"]["agreement"]["mean_moved"] < 1e-5
    assert provenance["merged"]["dtype"] == "float32"
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"


def test_merge_keeps_the_dtype_of_each_tensor(base: Path, tmp_path: Path) -> None:
    def mix(tensors: State) -> None:
        for name in tensors:
            if "norm" not in name:
                tensors[name] = tensors[name].to(torch.bfloat16)

    change_weights(base, mix)
    adapter = plain_adapter(base, tmp_path / "adapter")
    provenance = merge_adapter(adapter, tmp_path / "out", verify=True)
    assert provenance["merged"]["dtype"] == "bfloat16"
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert {name: tensor.dtype for name, tensor in before.items()} == {n: t.dtype for n, t in after.items()}
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(before[name], after[name])


def test_a_weight_file_that_this_user_may_not_read_is_named() -> None:
    user = os.geteuid()
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    try:
        folder.chmod(0o755)
        save_file({"x": torch.ones(1)}, folder / "model.safetensors")
        (folder / "model.safetensors").chmod(0)
        if user == 0:  # may read everything
            os.seteuid(65534)
        with pytest.raises(ArtifactError, match=r"model\.safetensors: this user may not read it"):
            read_headers([folder / "model.safetensors"])
    finally:
        os.seteuid(user)
        shutil.rmtree(folder)
