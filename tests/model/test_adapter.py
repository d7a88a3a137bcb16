"""The adapter: trainable parameters, dtypes, initial weights, and configs that are rejected."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lora_accel.config.schema import AdapterSection, ModelSection, QuantizationSection
from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.model.adapter import add_adapter, count_parameters, trainable_parameters
from lora_accel.model.base import check_zero3_dtype, load_base_model
from lora_accel.model.tokenizer import load_tokenizer
from tests.families import model_of


def load_with_adapter(
    folder: Path, *, autocast: bool = False, seed: int = 0, bits: int | None = None, **adapter: object
) -> torch.nn.Module:
    model = ModelSection(name_or_path=str(folder))
    quantization = QuantizationSection.model_validate({"bits": bits})
    base = load_base_model(model, quantization, recorded_dtype="auto")  # as stored
    section = AdapterSection.model_validate(adapter)
    return add_adapter(base, section, seed=seed, autocast=autocast)


def test_only_the_adapter_is_trained_in_float32(tiny_model: Callable[..., Path]) -> None:
    model = load_with_adapter(tiny_model(dtype=torch.bfloat16), r=4)
    trained = trainable_parameters(model)
    assert len(trained) == 8  # A and B of q_proj and v_proj in two layers
    assert all("lora_" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_initial_weights_depend_only_on_the_seed(tiny_model: Callable[..., Path]) -> None:
    def first(seed: int) -> torch.Tensor:
        torch.rand(7)  # advance the global generator
        return next(iter(trainable_parameters(load_with_adapter(tiny_model(), seed=seed)).values())).detach()

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


def test_quantized_weights_count_with_their_original_shape(tiny_model: Callable[..., Path]) -> None:
    assert count_parameters(load_with_adapter(tiny_model(), bits=4)) == count_parameters(
        load_with_adapter(tiny_model())
    )


def test_bias_is_not_trained_in_16_bits(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("qwen2", dtype=torch.bfloat16)
    with pytest.raises(
        ConfigError, match=r"q_proj\.base_layer\.bias would be trained in bfloat16.*mixed_precision=bf16"
    ):
        load_with_adapter(folder, bias="lora_only")
    model = load_with_adapter(folder, bias="lora_only", autocast=True)
    assert {parameter.dtype for parameter in trainable_parameters(model).values()} == {torch.float32}


def check_trains_in_bf16(reference: PreTrainedModel, **adapter: object) -> None:
    """Train a bfloat16 copy of a model under autocast, and compare its loss with that of the model in float32."""
    section = AdapterSection.model_validate({"target_modules": "all-linear", "dropout": 0.0} | adapter)
    base = copy.deepcopy(reference).bfloat16().requires_grad_(False)
    model = add_adapter(base, section, seed=0, autocast=True)
    ids = torch.arange(5, 25).view(2, 10)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids).index_fill(1, torch.tensor([0, 1]), 0)}
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, labels=ids).loss
        assert model.generate(**batch, max_new_tokens=2, min_new_tokens=2).shape == (2, 12)
    assert loss.item() == pytest.approx(reference(**batch, labels=ids).loss.item(), rel=1e-2)
    loss.backward()
    trained = trainable_parameters(model)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert all(parameter.grad.abs().max() > 0 for name, parameter in trained.items() if "lora_A" not in name)


@pytest.mark.parametrize("option", ["bias", "modules_to_save"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "phi"])
def test_layer_norms_compute_under_autocast_on_a_cpu(family: str, option: str) -> None:
    """A trained bias and the activations of trained embeddings are float32. On a CPU, autocast does not cast them."""
    model = model_of(family, tie_word_embeddings=False)
    embeddings = next(name for name, x in model.named_modules() if x is model.get_input_embeddings())
    check_trains_in_bf16(model, **({"bias": "all"} if option == "bias" else {"modules_to_save": [embeddings]}))


def test_layer_norms_compute_after_a_bias_in_float32() -> None:
    """Falcon adds the biases of its linear layers after the matrix products, so autocast does not cast them."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    config = AutoConfig.for_model("falcon", bias=True, parallel_attn=False, **sizes)
    torch.manual_seed(0)
    check_trains_in_bf16(AutoModelForCausalLM.from_config(config).eval(), bias="lora_only")


def test_unknown_target_modules_error_lists_the_known_ones(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="down_proj, gate_proj"):
        load_with_adapter(tiny_model(), target_modules=["nothing"])


def test_peft_fields_are_applied(tiny_model: Callable[..., Path]) -> None:
    model = load_with_adapter(tiny_model(), use_rslora=True, use_dora=True, rank_pattern={"v_proj": 2}, r=4)
    assert any("lora_magnitude_vector" in name for name in trainable_parameters(model))
    assert sorted({p.shape[0] for name, p in trainable_parameters(model).items() if "lora_A" in name}) == [2, 4]


def test_lora_on_tied_embeddings_is_an_error(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="one tensor"):
        load_with_adapter(tmp_path, target_modules=["lm_head"])


def test_end_token_is_the_pad_token_if_there_is_none(
    tokenizer_factory: Callable[..., PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    for name, pad in {"none": None, "unk": "<unk>"}.items():
        tokenizer = tokenizer_factory(pad_token=pad, eos_token="</s>")
        size = len(tokenizer)
        tokenizer.save_pretrained(tmp_path / name)
        loaded = load_tokenizer(ModelSection(name_or_path=str(tmp_path / name)))
        assert (loaded.pad_token, len(loaded)) == ("</s>", size)


def test_an_unknown_token_that_the_vocabulary_lacks_is_reported(
    tokenizer_factory: Callable[..., PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    """transformers looks up an unknown token as the unknown token, without end."""
    tokenizer_factory().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unk_token": ""}))
    with pytest.raises(ArtifactError, match="unk_token '' is not in its vocabulary; correct it in tokenizer_config"):
        load_tokenizer(ModelSection(name_or_path=str(tmp_path)))


def test_missing_model_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no such folder"):
        load_tokenizer(ModelSection(name_or_path=str(tmp_path / "absent")))


def test_base_that_zero3_would_cast_to_float32_is_an_error(tiny_model: Callable[..., Path]) -> None:
    bf16_model, cpu = str(tiny_model("llama", dtype=torch.bfloat16)), torch.device("cpu")
    with pytest.raises(ConfigError, match=r"model\.dtype=auto: .* is stored in bfloat16, but ZeRO-3"):
        check_zero3_dtype(ModelSection(name_or_path=bf16_model), cpu, "auto")
    with pytest.raises(ConfigError, match=r"model\.dtype=auto: .* is stored in bfloat16, but ZeRO-3"):
        check_zero3_dtype(ModelSection(name_or_path=bf16_model), cpu, "bfloat16")
    check_zero3_dtype(ModelSection(name_or_path=bf16_model), cpu, "float32")
    check_zero3_dtype(ModelSection(name_or_path=bf16_model, dtype="float32"), cpu, None)
    check_zero3_dtype(ModelSection(name_or_path=str(tiny_model("llama"))), cpu, None)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_keeps_its_dtype_where_it_is_not_quantized(
    tiny_model: Callable[..., Path], bits: Literal[4, 8]
) -> None:
    """PEFT's preparation would cast norms, embeddings and head to float32, and so all hidden states."""
    section = ModelSection(name_or_path=str(tiny_model()))
    base = load_base_model(section, QuantizationSection(bits=bits), mixed_precision="bf16")
    model = add_adapter(base, AdapterSection(), seed=0, autocast=True)
    frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    assert frozen == {torch.bfloat16, torch.uint8 if bits == 4 else torch.int8}


def test_an_evaluation_does_not_change_the_gradients_of_a_4_bit_base(tmp_path: Path) -> None:
    """On CPUs with bfloat16 instructions, bitsandbytes would repack its weights for products without a gradient."""
    model_of("llama", hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(tmp_path)
    section = ModelSection(name_or_path=str(tmp_path))
    model = load_base_model(section, QuantizationSection(bits=4), mixed_precision="bf16").train()

    def gradient() -> torch.Tensor:
        x = torch.linspace(-1, 1, 5 * 64, dtype=torch.bfloat16).view(1, 5, 64).requires_grad_()
        (result,) = torch.autograd.grad(model(inputs_embeds=x).logits.float().square().sum(), x)
        return result

    before = gradient()
    with torch.no_grad():
        model.eval()(input_ids=torch.ones(1, 5, dtype=torch.long))
    model.train()
    assert torch.equal(gradient(), before)
