"""Which differences of logits are accepted as rounding."""

from __future__ import annotations

import pytest
import torch

from lora_accel.merging.verification import LIMITS, compare, token_ids

LOGITS = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))


class LengthTokenizer:
    """A tokenizer whose token ids are the lengths of the words."""

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


@pytest.mark.parametrize("dtype", LIMITS)
def test_limit_applies_to_the_mean_and_not_to_the_maximum(dtype: torch.dtype) -> None:
    """Rounding moved one of 32 control tokens of a real model by 4.7 standard deviations, most others by 0.01."""
    noise = torch.randn(LOGITS.shape, generator=torch.Generator().manual_seed(1))
    near = LOGITS + noise * LIMITS[dtype] / 10
    agreement = compare([LOGITS], [near], dtype)
    assert agreement.is_within_limit
    assert agreement.top1 > 0.95
    assert agreement.kl < 1e-3
    if dtype == torch.bfloat16:
        near[7] += torch.linspace(-3, 3, 50)
        with_outlier = compare([LOGITS], [near], dtype)
        assert with_outlier.moved > 2
        assert with_outlier.is_within_limit
    assert not compare([LOGITS], [LOGITS + noise * LIMITS[dtype] * 2], dtype).is_within_limit


def test_nan_is_not_within_the_limit() -> None:
    broken = LOGITS.clone()
    broken[3, 4] = float("nan")
    assert not compare([LOGITS], [broken], torch.bfloat16).is_within_limit


def test_inputs_are_within_the_vocabulary() -> None:
    assert all(0 < token < 6 for row in token_ids(LengthTokenizer(), 6) for token in row)
    assert token_ids(LengthTokenizer(), 1) == [[0]], "no text has tokens of this vocabulary"
