"""Packed rows are the same examples: their logits and gradients are those of each alone, and none sees another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packaging.version import Version
from torch.nn import functional as F
from transformers import PreTrainedModel

from lora_accel.batching.batch import MicroBatch
from lora_accel.batching.packing import pack
from lora_accel.data.chat import Example
from lora_accel.model import attention
from lora_accel.model.attention import can_pack, pack_attention, packed_attention
from lora_accel.model.families import PACKING
from tests.families import SIZES, model_of

MIXTURES = {"mixtral", "olmoe", "qwen2_moe", "qwen3_moe"}
"""Their experts multiply all tokens that chose them at once, so a token's last bits depend on how many these are."""
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
    """Segments of several blocks, some of them not whole."""
    monkeypatch.setattr(attention, "BLOCK", 8)


def test_the_flash_kernel_is_taken_from_the_first_torch_that_has_all_of_it() -> None:
    assert (attention.flash_kernel() is not None) == (Version(torch.__version__) >= Version("2.12"))


@pytest.mark.parametrize("family", sorted(PACKING))
def test_logits_and_gradients_are_those_of_each_alone(family: str) -> None:
    model = model_of(family)
    torch.manual_seed(1)
    weigh = torch.randn(max(LENGTHS), SIZES["vocab_size"])
    alone = [model(input_ids=torch.tensor([x.input_ids]), use_cache=False).logits[0] for x in examples()]
    sum((logits * weigh[: len(logits)]).sum() for logits in alone).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    assert can_pack(model)
    pack_attention(model)
    packed = logits_of(model, pack(examples()))
    for ours, theirs in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    sum((logits * weigh[: len(logits)]).sum() for logits in packed).backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(
                parameter.grad, expected[name], rtol=1e-4, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", sorted(PACKING))
def test_a_change_in_one_example_changes_no_other_by_a_bit(family: str, dtype: torch.dtype) -> None:
    model = model_of(family).to(dtype)
    pack_attention(model)
    rows = examples()
    before = logits_of(model, pack(rows))
    for changed in range(len(rows)):
        other = [1 + (token + 40) % 95 for token in rows[changed].input_ids]
        after = logits_of(model, pack([*rows[:changed], Example(other, other), *rows[changed + 1 :]]))
        for i, (now, was) in enumerate(zip(after, before, strict=True)):
            if i == changed:
                assert not torch.equal(now, was)
            elif family in MIXTURES:
                torch.testing.assert_close(now, was)
            else:
                assert torch.equal(now, was), f"example {i} saw example {changed}"


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_without_segments_it_attends_as_before(family: str) -> None:
    usual, packing = model_of(family), model_of(family)
    pack_attention(packing)
    prompts = {
        "input_ids": torch.tensor([[0, 0, 7, 8, 9], [11, 12, 13, 14, 15]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    }
    torch.testing.assert_close(packing(**prompts).logits[1], usual(**prompts).logits[1], rtol=0, atol=0)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    assert packing.generate(**prompts, **options).tolist() == usual.generate(**prompts, **options).tolist()
    ids = prompts["input_ids"][1:]
    torch.testing.assert_close(packing(ids).logits, usual(ids).logits, rtol=0, atol=0)


def test_a_layer_that_takes_no_segments_makes_all_nan() -> None:
    """Were an attention to go by the mask, as one of somebody's own does, nothing would be learned unseen."""
    model = model_of("llama")  # not told of packing
    assert torch.stack([logits.isnan().all() for logits in logits_of(model, pack(examples()))]).all()


def test_what_cannot_be_packed() -> None:
    assert can_pack(model_of("llama"))
    assert not can_pack(model_of("llama", attention_dropout=0.1)), "its weights would be dropped, or not, unasked"
    assert not can_pack(model_of("gpt2", attn_pdrop=0.1))
    assert not can_pack(model_of("bloom")), "it has no attention interface"


@pytest.mark.parametrize("window", [None, 1, 5, 300])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_it_is_attention(window: int | None, dtype: torch.dtype, close: float) -> None:
    torch.manual_seed(0)
    total, heads, groups, width = sum(LENGTHS), 6, 2, 4
    query, key, value = (torch.randn(1, h, total, width, dtype=dtype) for h in (heads, groups, groups))
    number = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(total)
    sees = (number[:, None] == number) & (place[:, None] >= place)
    if window is not None:
        sees &= place[:, None] - place < window
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=sees, enable_gqa=True, scale=0.3)
    ours = packed_attention(query, key, value, segments=LENGTHS, scaling=0.3, sliding_window=window)
    torch.testing.assert_close(ours, expected.transpose(1, 2), rtol=close, atol=close)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 4}, {"softcap": 2.0}], ids=str)
def test_its_gradient_is_right(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, h, 14, 3, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    torch.autograd.gradcheck(lambda q, k, v: packed_attention(q, k, v, segments=(9, 1, 4), **options), inputs)


def test_under_autocast_the_way_back_has_its_dtype() -> None:
    """Autograd's way back is outside of autocast: made again in another dtype, weights would not be those of before."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, 14, 8, requires_grad=True) for h in (4, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        attended = packed_attention(query, key, value, segments=(9, 5))
    assert attended.dtype == torch.bfloat16
    attended.float().square().sum().backward()
    exact = packed_attention(*(x.detach().requires_grad_() for x in (query, key, value)), segments=(9, 5))
    torch.testing.assert_close(attended.float(), exact, rtol=3e-2, atol=3e-2)
    assert query.grad is not None
    assert query.grad.dtype == torch.float32
    assert query.grad.isfinite().all()


def test_activation_checkpointing_attends_alike() -> None:
    gradients = []
    for again in (False, True):
        model = model_of("llama").train()
        pack_attention(model)
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = pack(examples())
        model(**batch.inputs, use_cache=False).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)
