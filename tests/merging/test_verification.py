"""What is taken for the same model, and what is not."""

from __future__ import annotations

import pytest
import torch

from lora_accel.merging.verification import LIMITS, compare, token_ids

LOGITS = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))


class Words:
    """A tokenizer that knows a text by the length of its words."""

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


@pytest.mark.parametrize("dtype", LIMITS)
def test_the_mean_decides_and_one_token_that_rounding_throws_far_does_not(dtype: torch.dtype) -> None:
    """Seen on a real model: 4.7 of the spread at one of 32 control tokens, 0.01 at most others."""
    noise = torch.randn(LOGITS.shape, generator=torch.Generator().manual_seed(1))
    near = LOGITS + noise * LIMITS[dtype] / 10
    agreement = compare([LOGITS], [near], dtype)
    assert agreement.holds
    assert agreement.top1 > 0.95
    assert agreement.kl < 1e-3
    if dtype == torch.bfloat16:
        near[7] += torch.linspace(-3, 3, 50)
        thrown = compare([LOGITS], [near], dtype)
        assert thrown.moved > 2
        assert thrown.holds
    assert not compare([LOGITS], [LOGITS + noise * LIMITS[dtype] * 2], dtype).holds


def test_what_is_not_a_number_does_not_agree() -> None:
    broken = LOGITS.clone()
    broken[3, 4] = float("nan")
    assert not compare([LOGITS], [broken], torch.bfloat16).holds


def test_what_is_asked_has_only_tokens_that_the_model_has() -> None:
    assert all(0 < token < 6 for row in token_ids(Words(), 6) for token in row)
    assert token_ids(Words(), 1) == [[0]], "of no text there is a token"
