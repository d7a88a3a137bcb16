"""Sampling draws from the model's distribution, reproducibly, and whatever else is in the batch."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_accel.config.schema import GenerationSection
from lora_accel.model.generation import generate_replies
from lora_accel.model.sampling import logits_processors

PROMPTS = ["one", "hello world the answer is", "two three one two three", "assistant", "user"]


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model())


def draw(logits: torch.Tensor, count: int, **options: Any) -> list[float]:
    """Return how often each token is drawn for some logits, [V]."""
    processors = logits_processors(GenerationSection(**options), [[1]] * count, range(count))
    tokens = processors(torch.ones(count, 1, dtype=torch.long), logits.repeat(count, 1)).argmax(-1)
    counts = collections.Counter(tokens.tolist())
    return [counts[token] / count for token in range(len(logits))]


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 2.0, -torch.inf, 1.0, -1.0])
    for temperature in (0.5, 1.0, 3.0):
        expected = (logits / temperature).softmax(-1).tolist()
        assert draw(logits, 20_000, temperature=temperature) == pytest.approx(expected, abs=0.015)
    assert draw(logits, 1000, temperature=1.0, top_k=2)[0::4] == [0, 0]
    assert draw(logits, 1000, temperature=1.0, top_p=0.6)[1] == 1.0
    assert draw(logits, 20_000, temperature=1.0, seed=1) != draw(logits, 20_000, temperature=1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.5, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3, "length_penalty": 0.5, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=["sampling", "penalty", "n-grams", "beams"],
)
def test_replies_do_not_depend_on_the_batch(
    model: Any, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]
) -> None:
    """Padding is hidden from the penalties: the pad token is the end token, which they would make less likely."""
    sampling, prompts = GenerationSection(**options), tokenizer(PROMPTS).input_ids
    state = torch.get_rng_state()
    batch = generate_replies(model, tokenizer, prompts, sampling=sampling, max_new_tokens=10)
    assert torch.equal(torch.get_rng_state(), state), "training draws from the same generator"
    alone = [
        generate_replies(model, tokenizer, [ids], sampling=sampling, numbers=[number], max_new_tokens=10)[0]
        for number, ids in enumerate(prompts)
    ]
    assert batch == alone
    greedy = generate_replies(model, tokenizer, prompts, max_new_tokens=10)
    assert batch != greedy


def test_seed_and_number_determine_the_reply(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [tokenizer("one").input_ids] * 2

    def replies(seed: int) -> list[str]:
        sampling = GenerationSection(temperature=2.0, seed=seed)
        return generate_replies(model, tokenizer, prompts, sampling=sampling, max_new_tokens=10)

    first = replies(0)
    assert first == replies(0)
    assert first[0] != first[1], "the same prompt twice gets two replies"
    assert first != replies(1)


def test_penalties_equal_those_of_transformers(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(PROMPTS[2]).input_ids
    for options in ({"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 1}, {"num_beams": 3, "length_penalty": 2.0}):
        expected = model.generate(
            torch.tensor([ids]), max_new_tokens=10, do_sample=False, pad_token_id=4, eos_token_id=4, **options
        )[0, len(ids) :]
        text = tokenizer.decode(expected, skip_special_tokens=True)
        sampling = GenerationSection(**options)
        assert generate_replies(model, tokenizer, [ids], sampling=sampling, max_new_tokens=10) == [text]
