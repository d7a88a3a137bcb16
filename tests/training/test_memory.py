"""Activation memory: measured bytes match known sizes, and the estimate grows with the number of tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_accel.batching.batch import MicroBatch
from lora_accel.batching.packing import pack
from lora_accel.data.chat import Example
from lora_accel.errors import ConfigError
from lora_accel.model.attention import pack_attention
from lora_accel.model.fused_loss import patch_fused_loss
from lora_accel.model.kernels import patch_base
from lora_accel.model.recompute import recompute_layers
from lora_accel.training.memory import (
    HEADROOM,
    LOGITS,
    MAX_TOKENS,
    MIN_TOKENS,
    USED_SHARE,
    ActivationCost,
    free_bytes,
    num_layers_to_recompute,
    saved_activation_bytes,
    update_bytes,
)
from lora_accel.training.metrics import peak_memory_bytes
from tests.families import SIZES, model_of


def batch_of(tokens: int) -> MicroBatch:
    ids = [1 + i % 90 for i in range(tokens)]
    return pack([Example(ids, ids)])


@pytest.fixture
def model() -> nn.Module:
    model = model_of("llama", max_position_embeddings=512).requires_grad_(False)
    pack_attention(model)
    patch_base(model)
    patch_fused_loss(model)
    return model


def test_saved_activations_match_the_layer_sizes(model: nn.Module) -> None:
    model.model.embed_tokens.requires_grad_(True)  # so that every layer saves activations for backward
    h, i, kv = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["num_key_value_heads"] * SIZES["head_dim"]
    layer = 2 * h + 2 * i + h + 2 * kv + 2  # inputs of norms, gate and attention, and a scale per norm
    rest = h + 1 + h  # last norm, and the gradient of the loss
    few, many = (saved_activation_bytes(model, batch_of(tokens)) for tokens in (64, 128))
    floats_per_token = (many - few) / 64 / 4
    expected = SIZES["num_hidden_layers"] * layer + rest
    assert expected <= floats_per_token <= 1.1 * expected + 16  # token keys, positions and rotary embeddings


def test_frozen_model_saves_no_activations(model: nn.Module) -> None:
    assert saved_activation_bytes(model, batch_of(64)) == 0


def test_cost_extrapolates_from_two_small_batches(model: nn.Module) -> None:
    model.model.embed_tokens.requires_grad_(True)
    small, large, expected = (saved_activation_bytes(model, batch_of(tokens)) for tokens in (32, 64, 256))
    cost = ActivationCost.through(small, large, 32)
    assert cost.fixed + 256 * cost.per_token == pytest.approx(expected, rel=0.02)
    assert cost.num_bytes(256) == int(HEADROOM * (cost.fixed + 256 * cost.per_token)) + LOGITS


def test_token_limit_is_what_fits() -> None:
    cost = ActivationCost(fixed=1e8, per_token=1e6)
    limits = {free: cost.token_limit(free) for free in (0, 1e9, 5e9, 1e10, 1e11)}
    assert (limits[0], limits[1e9], limits[1e11]) == (MIN_TOKENS, MIN_TOKENS, MAX_TOKENS)
    for free in (5e9, 1e10):
        assert cost.num_bytes(limits[free]) <= USED_SHARE * free < cost.num_bytes(limits[free] + 2)
    assert ActivationCost(0, 0).token_limit(0) == MAX_TOKENS, "a frozen model saves nothing"


def test_layers_recompute_until_the_rest_fits() -> None:
    kept, recomputed, layers = 1200, 200, 10  # a layer saves 100 more if it does not recompute
    counts = [num_layers_to_recompute(kept, recomputed, free, layers) for free in (1199, 1100, 1050, 201, 200, 0)]
    assert counts == [1, 1, 2, 10, 10, 10]
    assert num_layers_to_recompute(kept, recomputed, 1000, 0) == 0, "layers are not known"


def test_the_last_layers_keep_their_activations(model: nn.Module) -> None:
    model.model.embed_tokens.requires_grad_(True)
    model.train()
    none = saved_activation_bytes(model, batch_of(64))
    assert recompute_layers(model) == SIZES["num_hidden_layers"] == 2
    every = saved_activation_bytes(model, batch_of(64))
    assert recompute_layers(model, 1) == 1
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False]
    assert saved_activation_bytes(model, batch_of(64)) == pytest.approx((none + every) / 2, rel=0.05)


def test_a_model_that_cannot_recompute_names_the_option(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match=r"training\.activation_checkpointing: this model does not support it"):
        recompute_layers(model)


def test_gradients_and_moments_are_allocated_in_the_first_step() -> None:
    parameters = [nn.Parameter(torch.empty(8, 4)), nn.Parameter(torch.empty(4, dtype=torch.bfloat16))]
    assert update_bytes(parameters, "adamw") == (32 * 4 + 4 * 2) + 2 * 4 * (32 + 4)


class _Module(SimpleNamespace):
    """What torch.xpu, torch.npu and torch.hpu have, with 100 bytes free of 500, 30 reserved and 20 allocated."""

    def __init__(self) -> None:
        values = {"memory_reserved": 30, "memory_allocated": 20, "max_memory_allocated": 25}
        super().__init__(**{name: lambda device, value=value: value for name, value in values.items()})
        self.mem_get_info = lambda device: (100, 500)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "hpu"])
def test_memory_of_other_accelerators(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No device that a launch accepts may lack it: the default of activation_checkpointing reads it."""
    monkeypatch.setattr(torch, "get_device_module", lambda device: _Module())
    assert free_bytes(torch.device(kind), 4) == 100 + 30 - 20
    assert peak_memory_bytes(torch.device(kind)) == 25


def test_memory_of_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 500)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 20)
    assert free_bytes(torch.device("mps"), 1) == 480
    assert peak_memory_bytes(torch.device("mps")) == peak_memory_bytes(torch.device("cpu"))


def test_free_memory_is_divided_among_local_ranks() -> None:
    cpu = torch.device("cpu")
    assert free_bytes(cpu, 4) == pytest.approx(free_bytes(cpu, 1) / 4, rel=0.2)
