"""What is trained: counts, dtypes, names; and what PEFT would let pass is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lora_accel.config.schema import AdapterSection, ModelSection, QuantizationSection
from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.model.adapter import add_adapter, count_parameters, trainable_parameters
from lora_accel.model.base import check_zero3_dtype, load_base_model
from lora_accel.model.tokenizer import load_tokenizer


def adapt(
    folder: Path, *, autocast: bool = False, seed: int = 0, bits: int | None = None, **adapter: object
) -> torch.nn.Module:
    model = ModelSection(name_or_path=str(folder))
    quantization = QuantizationSection.model_validate({"bits": bits})
    base = load_base_model(model, quantization, kept_dtype="auto")  # as stored
    section = AdapterSection.model_validate(adapter)
    return add_adapter(base, section, seed=seed, autocast=autocast)


def test_only_the_adapter_is_trained_and_it_is_float32_on_any_base(tiny_model: Callable[..., Path]) -> None:
    model = adapt(tiny_model(dtype=torch.bfloat16), r=4)
    trained = trainable_parameters(model)
    assert len(trained) == 8  # A and B of q_proj and v_proj in two layers
    assert all("lora_" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_first_weights_are_a_function_of_the_seed(tiny_model: Callable[..., Path]) -> None:
    def first(seed: int) -> torch.Tensor:
        torch.rand(7)  # however long the process has lived
        return next(iter(trainable_parameters(adapt(tiny_model(), seed=seed)).values())).detach()

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


def test_packed_weights_count_as_the_weights_they_stand_for(tiny_model: Callable[..., Path]) -> None:
    assert count_parameters(adapt(tiny_model(), bits=4)) == count_parameters(adapt(tiny_model()))


def test_a_16_bit_bias_is_not_trained_in_16_bits(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("qwen2", dtype=torch.bfloat16)
    with pytest.raises(
        ConfigError, match=r"q_proj\.base_layer\.bias would be trained in bfloat16.*mixed_precision=bf16"
    ):
        adapt(folder, bias="lora_only")
    model = adapt(folder, bias="lora_only", autocast=True)
    assert {parameter.dtype for parameter in trainable_parameters(model).values()} == {torch.float32}


def test_unknown_modules_are_refused_with_the_known_ones(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="down_proj, gate_proj"):
        adapt(tiny_model(), target_modules=["nothing"])


def test_fields_of_peft_pass_through(tiny_model: Callable[..., Path]) -> None:
    model = adapt(tiny_model(), use_rslora=True, use_dora=True, rank_pattern={"v_proj": 2}, r=4)
    assert any("lora_magnitude_vector" in name for name in trainable_parameters(model))
    assert sorted({p.shape[0] for name, p in trainable_parameters(model).items() if "lora_A" in name}) == [2, 4]


def test_lora_on_tied_embeddings_is_refused(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="one tensor"):
        adapt(tmp_path, target_modules=["lm_head"])


def test_the_end_token_pads_where_there_is_no_pad_token_and_unk_never_does(
    tokenizer_factory: Callable[..., PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    for name, pad in {"none": None, "unk": "<unk>"}.items():
        tokenizer = tokenizer_factory(pad_token=pad, eos_token="</s>")
        size = len(tokenizer)
        tokenizer.save_pretrained(tmp_path / name)
        loaded = load_tokenizer(ModelSection(name_or_path=str(tmp_path / name)))
        assert (loaded.pad_token, len(loaded)) == ("</s>", size)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no such folder"):
        load_tokenizer(ModelSection(name_or_path=str(tmp_path / "absent")))


def test_a_base_that_zero3_would_hold_in_more_bits_is_refused(tiny_model: Callable[..., Path]) -> None:
    stored_in_16, cpu = str(tiny_model("llama", dtype=torch.bfloat16)), torch.device("cpu")
    with pytest.raises(ConfigError, match=r"model\.dtype=auto: .* is stored in bfloat16, but ZeRO-3"):
        check_zero3_dtype(ModelSection(name_or_path=stored_in_16), cpu, "auto")
    with pytest.raises(ConfigError, match=r"model\.dtype=auto: .* is stored in bfloat16, but ZeRO-3"):
        check_zero3_dtype(ModelSection(name_or_path=stored_in_16), cpu, "bfloat16")
    check_zero3_dtype(ModelSection(name_or_path=stored_in_16), cpu, "float32")
    check_zero3_dtype(ModelSection(name_or_path=stored_in_16, dtype="float32"), cpu, None)
    check_zero3_dtype(ModelSection(name_or_path=str(tiny_model("llama"))), cpu, None)
