"""FlashAttention packages by name: packed rows reach them as offsets. A replacement computes what they would."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, PreTrainedModel, modeling_flash_attention_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_accel.batching.packing import pack
from lora_accel.config.schema import ModelSection, QuantizationSection, RunConfig
from lora_accel.data.chat import Example
from lora_accel.errors import ConfigError
from lora_accel.model.attention import can_pack, check_flash_dtype, pack_attention
from lora_accel.model.base import load_base_model
from lora_accel.planning.skeleton import build_skeleton
from tests.families import model_of

NAME = "flash_attention_2"
LENGTHS = (5, 19, 1, 12)
Calls = list[dict[str, Any]]


def flash_attn_func(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> torch.Tensor:
    """Causal attention by plain torch, [B, T, H, D], with the parameters of the package's function."""
    assert causal
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    products = query @ key.mT * (query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        products = torch.tanh(products / softcap) * softcap
    distance = torch.arange(query.shape[2])[:, None] - torch.arange(query.shape[2])
    is_visible = (distance >= 0) & ((distance <= window_size[0]) if window_size[0] >= 0 else True)
    return (products.masked_fill(~is_visible, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Install the replacement as the package flash_attn; return the arguments of its calls with offsets."""
    recorded: Calls = []

    def flash_attn_varlen_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> torch.Tensor:
        recorded.append(dict(locals()))
        options = (dropout_p, softmax_scale, causal, window_size, softcap, deterministic)
        rows = [
            flash_attn_func(*(x[None, begin:end] for x in (q, k, v)), *options)[0]
            for begin, end in itertools.pairwise(cu_seqlens_q.tolist())
        ]
        return torch.cat(rows)

    package, padding = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.bert_padding")
    functions = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}
    vars(package).update(functions | {"flash_attn_with_kvcache": flash_attn_func, "bert_padding": padding})
    vars(padding).update({"pad_input": None, "unpad_input": None})
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None, raising=False)
    original = ALL_ATTENTION_FUNCTIONS[NAME]
    yield recorded
    AttentionInterface.register(NAME, original)


def examples() -> list[Example]:
    torch.manual_seed(0)
    ids = [torch.randint(1, 96, (length,)).tolist() for length in LENGTHS]
    return [Example(x, x) for x in ids]


def with_package(family: str) -> PreTrainedModel:
    """Return a model as transformers loads it where the package is installed."""
    model = model_of(family)
    model.config._attn_implementation_internal = NAME
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "opt"])
def test_packed_rows_give_the_logits_and_gradients_of_single_examples(calls: Calls, family: str) -> None:
    single, packed = model_of(family), with_package(family)
    assert can_pack(packed)
    pack_attention(packed)
    expected = [single(input_ids=torch.tensor([x.input_ids]), use_cache=False).logits[0] for x in examples()]
    batch = pack(examples())
    actual = packed(**batch.inputs, use_cache=False).logits[0]
    torch.testing.assert_close(actual, torch.cat(expected), rtol=1e-5, atol=1e-5)
    torch.cat(expected).square().sum().backward()
    actual.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in single.named_parameters()}
    for name, parameter in packed.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=5e-5)

    assert len(calls) == packed.config.num_hidden_layers
    for call in calls:
        assert call["cu_seqlens_q"] is batch.cu_seqlens, "copied to the device once per micro-batch"
        assert call["cu_seqlens_k"] is batch.cu_seqlens
        assert (call["max_seqlen_q"], call["max_seqlen_k"]) == (19, 19)
        assert type(call["max_seqlen_q"]) is int, "a tensor would wait for the device"
        assert call["deterministic"] is False


def test_without_segments_the_package_gets_rows(calls: Calls) -> None:
    model, ids = with_package("llama"), torch.tensor([[11, 12, 13, 14, 15]])
    expected = model_of("llama")(ids).logits
    for other in (model, with_package("llama")):  # the second model finds the first one's
        pack_attention(other)
        torch.testing.assert_close(other(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert calls == []


def test_deterministic_runs_ask_the_package_for_it(calls: Calls) -> None:
    model = with_package("llama")
    pack_attention(model)
    torch.use_deterministic_algorithms(True)
    try:
        model(**pack(examples()).inputs, use_cache=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(call["deterministic"] for call in calls)


@pytest.mark.parametrize("name", [NAME, "flash_attention_3", "kernels-community/flash-attn2"])
def test_a_package_that_is_not_installed_names_the_option(tiny_model: Callable[..., Any], name: str) -> None:
    section = ModelSection(name_or_path=str(tiny_model()), attention=name)
    with pytest.raises(ConfigError, match=rf"^model\.attention: '{name}' is not available: .*install"):
        load_base_model(section, QuantizationSection())


def test_float32_is_an_error() -> None:
    model = with_package("llama")
    with pytest.raises(ConfigError, match=r"model\.attention: 'flash_attention_2' needs bfloat16 or float16"):
        check_flash_dtype(model, "no")
    check_flash_dtype(model, "bf16")
    check_flash_dtype(model.to(torch.bfloat16), "no")
    check_flash_dtype(model_of("llama"), "no")


def test_a_plan_does_not_need_the_package(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    config = config.model_copy(update={"model": config.model.model_copy(update={"attention": NAME})})
    assert build_skeleton(config, "bf16", torch.device("cpu")).packed
