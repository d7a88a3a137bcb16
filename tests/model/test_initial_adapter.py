"""PiSSA and OLoRA on an unchanged base: trained as PEFT's, saved as plain LoRA, and resumed with the same values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_accel import RunConfig, run_training
from lora_accel.config.schema import AdapterSection, ModelSection, QuantizationSection
from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.merging.merge import merge_adapter, merge_checkpoints
from lora_accel.model.adapter import add_adapter, trainable_parameters
from lora_accel.model.base import load_base_model
from lora_accel.model.initial_adapter import initial_names
from lora_accel.saving.attach import restore_adapter
from lora_accel.saving.discovery import CONFIG, WEIGHTS, step_folders
from lora_accel.saving.names import saved_shapes
from tests.conftest import read_metrics
from tests.families import model_of

INITS = ["pissa", "olora"]
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
IDS = torch.tensor([[5, 9, 31, 7, 60, 8, 41, 77, 12]])


def section(init: str, family: str = "llama", **options: object) -> AdapterSection:
    values = {"r": 4, "alpha": 6.0, "dropout": 0.0, "target_modules": TARGETS[family], "init_lora_weights": init}
    return AdapterSection.model_validate(values | options)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_initial_values_outputs_and_gradients_are_those_of_peft(init: str, use_rslora: bool) -> None:
    options = {"use_rslora": use_rslora, "rank_pattern": {"down_proj": 2}}
    ours = add_adapter(model_of("llama"), section(init, **options), seed=0, autocast=False)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=TARGETS["llama"], init_lora_weights=init, **options
    )
    reference = get_peft_model(model_of("llama"), config)
    trained, expected = trainable_parameters(ours), trainable_parameters(reference)
    assert trained.keys() == expected.keys()
    for model in (ours, reference):
        for parameter in trainable_parameters(model).values():
            parameter.data = parameter.data * 1.5  # no longer the initial values
        model(input_ids=IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(ours(input_ids=IDS).logits, reference(input_ids=IDS).logits, rtol=1e-5, atol=1e-6)
    for name, parameter in trained.items():
        assert torch.equal(parameter, expected[name]), name
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("init", [*INITS, "pissa_niter_2"])
def test_base_is_unchanged_and_the_run_begins_with_it(init: str, family: str) -> None:
    base = model_of(family)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = base(input_ids=IDS).logits
    model = add_adapter(base, section(init, family), seed=0, autocast=False)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-6)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.get_base_model().state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.abs().max() > 0 for p in trainable_parameters(model).values()), "the adapter is not zero"
    assert not set(initial_names(model)) & trainable_parameters(model).keys()


since_peft_021 = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.21"), reason="this PEFT rejects or ignores it"
)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"modules_to_save": ["lm_head"]}, marks=since_peft_021),
        {"trainable_token_indices": [3, 5]},
        {"bias": "all"},
    ],
)
def test_what_is_trained_besides_is_still_trained(options: dict[str, object]) -> None:
    model, plain = (
        add_adapter(
            model_of("qwen2"),
            AdapterSection.model_validate({"target_modules": ["q_proj"], "init_lora_weights": init} | options),
            seed=0,
            autocast=False,
        )
        for init in ("pissa", True)
    )
    assert trainable_parameters(model).keys() == trainable_parameters(plain).keys()
    assert saved_shapes(model).keys() == saved_shapes(plain).keys()


@pytest.mark.parametrize("init", INITS)
def test_quantized_base(tiny_model: Callable[..., Path], init: str) -> None:
    base = load_base_model(
        ModelSection(name_or_path=str(tiny_model())), QuantizationSection(bits=4), recorded_dtype="float32"
    ).eval()
    expected = base(input_ids=IDS).logits.detach()
    model = add_adapter(base, section(init), seed=0, autocast=False).eval()
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert all(p.abs().max() > 0 for p in trainable_parameters(model).values())


def test_rank_above_the_size_of_a_weight_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.r: init_lora_weights=pissa supports r up to 16 for .*k_proj"):
        add_adapter(model_of("llama"), section("pissa", r=20, target_modules=["k_proj"]), seed=0, autocast=False)


@since_peft_021
def test_layer_that_is_not_linear_is_an_error() -> None:
    adapter = section("pissa", target_modules=["q_proj", "w1", "w2", "w3"])
    with pytest.raises(ConfigError, match=r"init_lora_weights=pissa does not support .*experts"):
        add_adapter(model_of("mixtral"), adapter, seed=0, autocast=False)


@pytest.fixture
def init_config(make_config: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """Return a function that makes the config of a run whose initialization changes the base in PEFT."""

    def make(init: str = "pissa_niter_2", **changes: object) -> RunConfig:
        adapter = {"init_lora_weights": init, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}
        return make_config(adapter=adapter, training={"max_steps": 4}, **changes)

    return make


@pytest.mark.parametrize("init", [*INITS, "pissa_niter_2"])
def test_run_leaves_plain_lora_of_twice_the_rank(
    init_config: Callable[..., RunConfig], tiny_model: Callable[..., Path], tmp_path: Path, init: str
) -> None:
    adapter = run_training(init_config(init))
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16.0, True)
    card = (adapter / "README.md").read_text(encoding="utf-8")
    assert "Rank 8, alpha 16.0" in card
    assert f"Trained with {init} and rank 4, and saved as plain LoRA of twice the rank." in card

    merged = merge_adapter(adapter, tmp_path / "merged", verify=True)
    assert merged["merged"]["agreement"]["top1"] == 1
    expected = AutoModelForCausalLM.from_pretrained(tiny_model()).state_dict()
    for key, first in load_file(adapter / WEIGHTS).items():
        name = key.removeprefix("base_model.model.")
        if "lora_A" in name:
            second = load_file(adapter / WEIGHTS)[key.replace("lora_A", "lora_B")]
            expected[name.replace("lora_A.", "")] += 16 / 8 * second @ first
    actual = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name in ("model.layers.0.self_attn.q_proj.weight", "lm_head.weight"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6)


def test_resumed_run_has_the_same_initial_values(init_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Even if they are random and every process draws others."""
    full = run_training(init_config(output_dir=str(tmp_path / "full")))
    first = init_config(output_dir=str(tmp_path / "parts"), checkpoint={"keep_last": 9})
    run_training(first)
    checkpoints = step_folders(tmp_path / "parts" / "checkpoints")
    shutil.rmtree(tmp_path / "parts" / "adapter")
    shutil.rmtree(checkpoints[-1])
    svd_lowrank, calls = torch.svd_lowrank, []

    def other_values(*args: object, **options: object) -> object:
        calls.append(args)
        left, values, right = svd_lowrank(*args, **options)
        return left * 0.5, values, right * 0.9

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft.tuners.lora.layer.svd_lowrank", other_values)
        resumed = run_training(first)
    assert calls
    expected, actual = load_file(full / WEIGHTS), load_file(resumed / WEIGHTS)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())
    assert [line["loss"] for line in read_metrics(tmp_path / "parts")] == [
        line["loss"] for line in read_metrics(tmp_path / "full")
    ]
    assert len(merge_checkpoints(tmp_path / "parts", verify=True)) == 3


@pytest.mark.parametrize(("init", "message"), [("pissa", ""), ("pissa_niter_2", "an earlier version saved it without")])
def test_checkpoint_of_an_earlier_version(init: str, message: str, tmp_path: Path) -> None:
    """It has only the trained A and B, and PEFT repeats the initialization unless it is random."""
    model = add_adapter(model_of("llama"), section(init), seed=0, autocast=False)
    initial = {name: model.get_parameter(name).clone() for name in initial_names(model)}
    saved = {name.replace(".default", ""): torch.randn(p.shape) for name, p in trainable_parameters(model).items()}
    save_file(saved, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps({"init_lora_weights": init, "peft_type": "LORA"}), encoding="utf-8")
    if message:
        with pytest.raises(ArtifactError, match=message):
            restore_adapter(model, tmp_path)
        return
    restore_adapter(model, tmp_path)
    trained = trainable_parameters(model)
    assert all(torch.equal(trained[name.replace(".weight", ".default.weight")], t) for name, t in saved.items())
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in initial.items())


def test_initial_values_of_a_run_in_16_bits_are_the_same_on_every_backend() -> None:
    """DeepSpeed has no float32 masters of the frozen adapter: what it subtracts must be exact in 16 bits."""

    def initial(**how: bool) -> dict[str, torch.Tensor]:
        model = add_adapter(model_of("llama").bfloat16(), section("pissa"), seed=0, **({"autocast": False} | how))
        return {name: model.get_parameter(name).float() for name in initial_names(model)}

    alone, with_masters = initial(autocast=True), initial(masters=True)
    assert alone.keys() == with_masters.keys()
    assert all(torch.equal(alone[name], with_masters[name]) for name in alone)
    in_fp32 = initial()
    assert not any(torch.equal(alone[name], in_fp32[name]) for name in alone)
