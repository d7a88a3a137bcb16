"""NEFTune's noise is uniform, a function of the token alone, sized by its example, and absent in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lora_accel.batching.batch import MicroBatch
from lora_accel.batching.packing import pack, pad
from lora_accel.data.chat import Example
from lora_accel.model.dropout import DropoutKeys, feature_keys
from lora_accel.model.noise import FEATURE_SEED, add_embedding_noise, uniform_noise
from lora_accel.randomness import derive_seed, token_keys

ALPHA = 5.0
EXAMPLES = [
    Example(list(range(5, 5 + length)), [-100, *range(6, 5 + length)], key=derive_seed(0, length))
    for length in (3, 11, 7)
]


def noise_of(*key: int, length: int = 500, size: int = 200) -> torch.Tensor:
    keys = torch.from_numpy(token_keys(derive_seed(*key), range(length)))
    return uniform_noise(keys, feature_keys(size, FEATURE_SEED))


def test_noise_is_uniform_and_independent() -> None:
    noise = noise_of(0, 0)
    assert noise.abs().max() <= 1
    counts = torch.histc(noise, bins=20, min=-1, max=1) / noise.numel()
    assert (counts - 0.05).abs().max() < 5 * (0.05 / noise.numel()) ** 0.5
    scale = 3 / noise.numel() ** 0.5  # three deviations of a mean of products, whose variance is at most 1
    assert noise.mean().abs() < scale
    for other in (noise_of(0, 1), noise_of(1, 0), noise.roll(1, 0), noise.roll(1, 1)):
        assert (noise * other).mean().abs() < scale
    assert (noise.square().mean() - 1 / 3).abs() < scale


@pytest.fixture
def model_and_keys(tiny_model: Callable[..., Path]) -> tuple[PeftModel, DropoutKeys]:
    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    tokens = DropoutKeys()
    add_embedding_noise(model, ALPHA, tokens)
    return model.train(), tokens


def added(model: PeftModel, tokens: DropoutKeys, batch: MicroBatch) -> torch.Tensor:
    """Return the noise that training adds to the embeddings of a batch, [B, T, H]."""
    tokens.keys, tokens.lengths = batch.token_keys, batch.example_lengths
    embeddings = model.get_base_model().get_input_embeddings()
    with torch.no_grad():
        clean = embeddings.eval()(batch.input_ids)
        return torch.as_tensor(embeddings.train()(batch.input_ids) - clean)


def test_noise_does_not_depend_on_packing(model_and_keys: tuple[PeftModel, DropoutKeys]) -> None:
    packed, padded = (added(*model_and_keys, batch) for batch in (pack(EXAMPLES), pad(EXAMPLES, 0)))
    start = 0
    for row, example in enumerate(EXAMPLES):
        length = len(example.input_ids)
        own = packed[0, start : start + length]
        torch.testing.assert_close(own, padded[row, :length], rtol=1e-4, atol=1e-6)
        limit = ALPHA / (length * own.shape[1]) ** 0.5
        assert 0.9 * limit < own.abs().max() <= limit * (1 + 1e-3)
        start += length


def test_lengths_of_examples() -> None:
    assert pack(EXAMPLES).example_lengths.tolist() == [[3] * 3 + [11] * 11 + [7] * 7]
    assert pad(EXAMPLES, 0).example_lengths.tolist() == [[3] * 11, [11] * 11, [7] * 11]


def test_evaluation_has_no_noise(model_and_keys: tuple[PeftModel, DropoutKeys]) -> None:
    model, tokens = model_and_keys
    batch = pad(EXAMPLES, 0)
    tokens.keys, tokens.lengths = batch.token_keys, batch.example_lengths
    clean = AutoModelForCausalLM.from_pretrained(model.get_base_model().name_or_path)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        expected = clean(**inputs).logits
        assert not torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model.eval()(**inputs).logits, expected)
