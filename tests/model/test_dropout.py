"""Keyed dropout: the mask is distributed as independent draws, depends only on the keys, and is fast."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_accel.config.schema import AdapterSection
from lora_accel.errors import ConfigError
from lora_accel.model.adapter import add_adapter, key_dropout
from lora_accel.model.dropout import DropoutKeys, KeyedDropout, keep_mask, make_selection, select
from lora_accel.randomness import derive_seed, token_keys

TOKENS, FEATURES = 4096, 576


def dropped(p: float, *, seed: int = 0, step: int = 0, example: int = 0, layer: int = 0) -> torch.Tensor:
    """Return [T, F]: 1 where a value is zeroed."""
    keys = torch.from_numpy(token_keys(derive_seed(seed, step, example), range(TOKENS)))
    features = KeyedDropout(p, layer, FEATURES, DropoutKeys()).feature_keys
    return 1.0 - keep_mask(keys, features, p).float()


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_rates_per_token_and_feature_are_those_of_independent_draws(p: float) -> None:
    zeros = dropped(p)
    spread = (p * (1 - p)) ** 0.5
    assert zeros.mean().item() == pytest.approx(p, abs=5 * spread / zeros.numel() ** 0.5)
    assert zeros.mean(1).std().item() == pytest.approx(spread / FEATURES**0.5, rel=0.1)
    assert zeros.mean(0).std().item() == pytest.approx(spread / TOKENS**0.5, rel=0.15)


def test_tokens_and_features_are_uncorrelated() -> None:
    zeros = dropped(0.1)
    normalized = (zeros - zeros.mean()) / zeros.std()
    between_features = (normalized.T @ normalized / TOKENS).fill_diagonal_(0)
    between_tokens = (normalized @ normalized.T / FEATURES).fill_diagonal_(0)
    assert between_features.pow(2).mean().sqrt().item() == pytest.approx(TOKENS**-0.5, rel=0.05)
    assert between_tokens.pow(2).mean().sqrt().item() == pytest.approx(FEATURES**-0.5, rel=0.05)
    assert between_features.abs().max().item() < 7 * TOKENS**-0.5
    assert between_tokens.abs().max().item() < 10 * FEATURES**-0.5  # of 8 million pairs, skewed


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 1}, {"example": 1}, {"layer": 1}])
def test_seed_step_example_and_layer_give_independent_masks(other: dict[str, int]) -> None:
    p = 0.1
    first, second = dropped(p) - p, dropped(p, **other) - p
    correlation = (first * second).mean() / (p * (1 - p))
    assert abs(correlation.item()) < 5 / first.numel() ** 0.5


def test_values_are_scaled_and_gradients_follow_the_mask() -> None:
    tokens = DropoutKeys()
    tokens.keys = torch.from_numpy(token_keys(7, range(32))).reshape(2, 16)
    dropout = KeyedDropout(0.25, 0, 8, tokens)
    x = torch.full((2, 16, 8), 3.0, requires_grad=True)
    y = dropout(x)
    assert set(y.detach().unique().tolist()) == {0.0, 4.0}
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach() / 3)
    assert dropout.eval()(x) is x


@pytest.mark.parametrize("p", [1e-12, 0.05, 0.5, 0.97])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_selected_values_are_those_of_the_mask(dtype: torch.dtype, p: float) -> None:
    keys = torch.from_numpy(token_keys(7, range(200)))
    features = KeyedDropout(p, 0, FEATURES, DropoutKeys()).feature_keys
    x = torch.randn(FEATURES, 200).t().to(dtype)  # with other strides
    expected = torch.where(keep_mask(keys, features, p).bool(), x, 0)
    assert torch.equal(select(x, make_selection(keys, features, p, dtype), p), expected)
    assert (expected == 0).any() == (p > 1e-3)


def test_mask_of_a_token_does_not_depend_on_the_batch() -> None:
    tokens, x = DropoutKeys(), torch.randn(3, 20, 8)
    dropout = KeyedDropout(0.3, 2, 8, tokens)
    keys = torch.from_numpy(token_keys(7, range(60))).reshape(3, 20)
    tokens.keys = keys
    full = dropout(x)
    for row in range(3):
        tokens.keys = keys[row : row + 1, 5:]
        assert torch.equal(dropout(x[row : row + 1, 5:])[0], full[row, 5:])


def test_layer_with_other_tokens_than_the_batch_is_an_error() -> None:
    tokens = DropoutKeys()
    tokens.keys = torch.from_numpy(token_keys(7, range(32))).reshape(2, 16)
    dropout = KeyedDropout(0.3, 2, 8, tokens)
    assert torch.equal(dropout(torch.ones(32, 8)), dropout(torch.ones(2, 16, 8)).reshape(32, 8))
    with pytest.raises(ConfigError, match=r"adapter\.dropout.*10 tokens of a batch of 32"):
        dropout(torch.ones(10, 8))


def test_every_lora_layer_gets_its_own_keyed_dropout(tiny_model: Callable[..., Path]) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    section = AdapterSection(dropout=0.1, target_modules="all-linear")
    model = add_adapter(base, section, seed=0, autocast=False)
    key_dropout(model)
    keyed = [module for module in model.modules() if isinstance(module, KeyedDropout)]
    assert len(keyed) == 14
    assert len({tuple(module.feature_keys.tolist()) for module in keyed}) == 14
    assert not [name for name, module in model.named_modules() if "lora" in name and type(module) is torch.nn.Dropout]


def test_keyed_dropout_is_at_least_as_fast_as_torchs_dropout() -> None:
    x = torch.randn(1, 2048, FEATURES).bfloat16()
    tokens = DropoutKeys()
    tokens.keys = torch.from_numpy(token_keys(7, range(2048)))[None]
    keyed, reference = KeyedDropout(0.05, 0, FEATURES, tokens), torch.nn.Dropout(0.05)

    def seconds(dropout: torch.nn.Module) -> float:
        """Return the CPU time of this process, which does not depend on other processes."""
        start = time.process_time()
        dropout(x)
        return time.process_time() - start

    times = [(seconds(keyed), seconds(reference)) for _ in range(41)]  # alternating
    assert min(ours for ours, _ in times) < min(torchs for _, torchs in times)
