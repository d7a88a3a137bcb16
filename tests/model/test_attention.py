"""Packed attention: logits and gradients equal those of each example alone, and examples do not affect each other."""

from __future__ import annotations

import re
import sys
from math import nan
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch.nn import functional as F
from transformers import PreTrainedModel

from lora_accel.batching.batch import MicroBatch
from lora_accel.batching.packing import pack
from lora_accel.data.chat import Example
from lora_accel.model import attention, gpu_attention, recurrence
from lora_accel.model.attention import can_pack, pack_attention, packed_attention, why_padded
from tests.families import PACKING, RECURRENT, ROUTING, SIZES, model_of

LENGTHS = (5, 19, 1, 12)


def examples(seed: int = 0) -> list[Example]:
    torch.manual_seed(seed)
    ids = [torch.randint(1, 96, (length,)).tolist() for length in LENGTHS]
    return [Example(x, x) for x in ids]


def logits_of(model: PreTrainedModel, batch: MicroBatch) -> list[torch.Tensor]:
    logits: torch.Tensor = model(**batch.inputs, use_cache=False).logits[0]
    return list(logits.split(LENGTHS))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small blocks, so that segments have several, some of them partial."""
    monkeypatch.setattr(attention, "BLOCK", 8)
    monkeypatch.setattr(recurrence, "CHUNK", 8)


def test_flash_kernel_needs_torch_2_12() -> None:
    assert (gpu_attention.flash_kernel() is not None) == (Version(torch.__version__) >= Version("2.12"))


@pytest.mark.parametrize("family", PACKING)
def test_packed_logits_and_gradients_equal_those_of_single_examples(family: str) -> None:
    model = model_of(family).train(family in RECURRENT)  # Mamba has a kernel for training; none of these has dropout
    torch.manual_seed(1)
    weights = torch.randn(max(LENGTHS), SIZES["vocab_size"])
    single = [model(input_ids=torch.tensor([x.input_ids]), use_cache=False).logits[0] for x in examples()]
    sum((logits * weights[: len(logits)]).sum() for logits in single).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    assert can_pack(model)
    pack_attention(model)
    packed = logits_of(model, pack(examples()))
    for actual, reference in zip(packed, single, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5)
    sum((logits * weights[: len(logits)]).sum() for logits in packed).backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            atol = max(5e-5, 1e-5 * expected[name].abs().max().item())  # sums of large gradients round
            torch.testing.assert_close(
                parameter.grad, expected[name], rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", PACKING)
def test_examples_do_not_affect_each_other(family: str, dtype: torch.dtype) -> None:
    model = model_of(family).to(dtype)
    pack_attention(model)
    rows = examples()
    before = logits_of(model, pack(rows))
    for changed in range(len(rows)):
        other = [1 + (token + 40) % 95 for token in rows[changed].input_ids]
        after = logits_of(model, pack([*rows[:changed], Example(other, other), *rows[changed + 1 :]]))
        for i, (new, old) in enumerate(zip(after, before, strict=True)):
            if i == changed:
                assert not torch.equal(new, old)
            elif family in ROUTING:
                torch.testing.assert_close(new, old)
            else:
                assert torch.equal(new, old), f"example {i} attends to example {changed}"


@pytest.mark.parametrize(
    "family", [name for name in ("llama", "mistral", "gemma2", "gemma4", "gpt_oss", "qwen3_next") if name in PACKING]
)
def test_without_segments_the_original_attention_is_used(family: str) -> None:
    original, packing = model_of(family), model_of(family)
    pack_attention(packing)
    prompts = {
        "input_ids": torch.tensor([[0, 0, 7, 8, 9], [11, 12, 13, 14, 15]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    }
    torch.testing.assert_close(packing(**prompts).logits[1], original(**prompts).logits[1], rtol=0, atol=0)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    assert packing.generate(**prompts, **options).tolist() == original.generate(**prompts, **options).tolist()
    ids = prompts["input_ids"][1:]
    torch.testing.assert_close(packing(ids).logits, original(ids).logits, rtol=0, atol=0)


@pytest.mark.skipif("bamba" not in PACKING, reason="transformers does not pass segments to recurrent layers")
def test_packed_rows_do_not_use_the_fused_kernel_of_mamba(monkeypatch: pytest.MonkeyPatch) -> None:
    """It multiplies by the weight of the output projection and would leave out its adapter."""
    model = model_of("bamba").train()
    module = sys.modules[type(model).__module__]
    monkeypatch.setattr(
        module, recurrence.FUSED, lambda states, *_, **__: states.new_full((1, len(states[0]), 32), nan)
    )
    pack_attention(model)
    assert model(torch.tensor([[1, 2, 3]]), use_cache=False).logits.isnan().all()
    assert all(logits.isfinite().all() for logits in logits_of(model, pack(examples())))


def test_layer_that_ignores_segments_gives_nan() -> None:
    """An attention that uses the mask instead must not train on wrong values silently."""
    model = model_of("llama")  # not patched
    assert torch.stack([logits.isnan().all() for logits in logits_of(model, pack(examples()))]).all()


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("llama", {"attention_dropout": 0.1}, "it drops attention weights at random"),
        ("gpt2", {"attn_pdrop": 0.1}, r"it drops attention weights at random|packing it needs transformers 5\.3"),
        ("llama", {"layer_types": ["full_attention", "chunked_attention"]}, "no test proves .* type chunked_attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "its attention is not causal"),
        ("bloom", {}, "its attention is not transformers' attention interface"),
    ],
)
def test_unsupported_models_are_padded_and_named_why(family: str, options: dict[str, Any], reason: str) -> None:
    assert re.fullmatch(reason, why_padded(model_of(family, **options)) or "")
    assert not can_pack(model_of(family, **options))


@pytest.mark.parametrize("window", [None, 1, 5, 300])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_packed_attention_equals_masked_sdpa(window: int | None, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    total, heads, groups, width = sum(LENGTHS), 6, 2, 4
    query, key, value = (torch.randn(1, h, total, width, dtype=dtype) for h in (heads, groups, groups))
    segment = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    position = torch.arange(total)
    mask = (segment[:, None] == segment) & (position[:, None] >= position)
    if window is not None:
        mask &= position[:, None] - position < window
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True, scale=0.3)
    actual = packed_attention(query, key, value, segments=LENGTHS, scaling=0.3, sliding_window=window)
    torch.testing.assert_close(actual, expected.transpose(1, 2), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 4}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("has_sinks", [False, True])
def test_gradient_passes_gradcheck(options: dict[str, Any], has_sinks: bool) -> None:
    """Values may have another size than queries and keys."""
    torch.manual_seed(0)
    shapes = [(1, 4, 14, 3), (1, 2, 14, 3), (1, 2, 14, 5), *([(4,)] if has_sinks else [])]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def attend(query: Any, key: Any, value: Any, sinks: Any = None) -> torch.Tensor:
        return packed_attention(query, key, value, segments=(9, 1, 4), s_aux=sinks, **options)

    torch.autograd.gradcheck(attend, inputs)


def test_backward_under_autocast_uses_the_autocast_dtype() -> None:
    """Autograd runs backward outside of autocast; the recomputed weights must have the dtype of forward."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, 14, 8, requires_grad=True) for h in (4, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        output = packed_attention(query, key, value, segments=(9, 5))
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    exact = packed_attention(*(x.detach().requires_grad_() for x in (query, key, value)), segments=(9, 5))
    torch.testing.assert_close(output.float(), exact, rtol=3e-2, atol=3e-2)
    assert query.grad is not None
    assert query.grad.dtype == torch.float32
    assert query.grad.isfinite().all()


@pytest.mark.parametrize(
    "family", [name for name in ("llama", "gpt_oss", "gemma3n_text", "qwen3_next") if name in PACKING]
)
def test_activation_checkpointing_gives_equal_gradients(family: str) -> None:
    """Also of sinks, and of layers that attend to the keys of another."""
    gradients = []
    for recompute in (False, True):
        model = model_of(family).train()
        pack_attention(model)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = pack(examples())
        model(**batch.inputs, use_cache=False).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for saved, recomputed in zip(*gradients, strict=True):
        assert saved is recomputed is None or torch.equal(saved, recomputed)
