"""LoRA on the head with dropout: the head gets only supervised tokens, in chunks, and their keys with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from lora_accel import RunConfig, run_training
from lora_accel.config.schema import AdapterSection
from lora_accel.errors import ConfigError
from lora_accel.model import fused_loss as loss_module
from lora_accel.model.adapter import add_adapter, key_dropout, trainable_parameters
from lora_accel.model.fused_loss import patch_fused_loss
from lora_accel.randomness import token_keys
from lora_accel.saving.discovery import WEIGHTS
from tests.conftest import read_metrics
from tests.families import model_of

IDS = torch.tensor([[5, 9, 31, 7, 60, 8, 41, 77], [12, 9, 3, 44, 6, 8, 1, 2]])
POSITIONS = torch.tensor([1, 2, 5, 6])
SECTION = AdapterSection(target_modules=["q_proj", "lm_head"], dropout=0.4, init_lora_weights=False)


@pytest.mark.parametrize("chunk", [10**9, 3 * 96])
def test_gradients_are_those_of_dropout_on_all_tokens(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask is the same when activation checkpointing recomputes a chunk."""
    monkeypatch.setattr(loss_module, "CHUNK_NUMEL", chunk)
    model = add_adapter(model_of("llama"), SECTION, seed=0, autocast=False).train()
    base = model.get_base_model()
    original = base.forward
    assert patch_fused_loss(base)
    keys = key_dropout(model)
    keys.keys = torch.from_numpy(token_keys(7, range(IDS.numel()))).reshape(IDS.shape)
    targets = IDS[:, POSITIONS + 1]

    logits = original(input_ids=IDS).logits[:, POSITIONS]  # the head gets all tokens
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    gradients = torch.autograd.grad(expected, list(trainable_parameters(model).values()))
    loss = model(input_ids=IDS, logit_positions=POSITIONS, targets=targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert keys.keys.shape == IDS.shape, "the keys of the batch are restored"
    for (name, parameter), gradient in zip(trainable_parameters(model).items(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert model.eval()(input_ids=IDS, logit_positions=POSITIONS, targets=targets).item() != pytest.approx(loss.item())


def test_result_does_not_depend_on_micro_batches(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    results = []
    for tokens in (1, 10_000):
        config = make_config(
            output_dir=str(tmp_path / str(tokens)),
            adapter={"target_modules": ["q_proj", "lm_head"], "dropout": 0.3},
            training={"max_steps": 3, "micro_batch_tokens": tokens},
        )
        results.append((load_file(run_training(config) / WEIGHTS), read_metrics(tmp_path / str(tokens))))
    (one, one_lines), (all_, all_lines) = results
    assert [line["loss"] for line in one_lines] == pytest.approx([line["loss"] for line in all_lines], rel=1e-5)
    for name, tensor in one.items():
        assert (tensor - all_[name]).norm() < 1e-3 * tensor.norm(), name


def test_family_without_a_fused_loss_is_an_error() -> None:
    model = add_adapter(model_of("llama"), SECTION, seed=0, autocast=False)
    with pytest.raises(ConfigError, match=r"LoRA on lm_head with dropout is not supported.*set it to 0\.0"):
        key_dropout(model, fused_loss=False)
