"""Replies are greedy, whatever a base's generation_config.json asks for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from lora_accel.config.schema import GenerationSection, ModelSection, QuantizationSection
from lora_accel.model.base import load_base_model
from lora_accel.model.generation import generate_replies, generation_config
from lora_accel.model.tokenizer import load_tokenizer

UNTRUSTED: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 1_000_000},
    "sequences": {"num_return_sequences": 1_000_000, "num_beams": 1_000_000},
    "sampling": {"do_sample": True, "temperature": 5.0, "top_k": 3, "num_return_sequences": 1000},
    "lengths": {"max_length": 10**9, "min_length": 10**9, "min_new_tokens": 10**9},
    "static cache": {"cache_implementation": "static"},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1, "length_penalty": -3.0},
    "invalid penalties": {"repetition_penalty": -1.0, "no_repeat_ngram_size": -2},
    "lookup": {"prompt_lookup_num_tokens": 10**6},
}


def replies(section: ModelSection) -> list[str]:
    model = load_base_model(section, QuantizationSection())
    return generate_replies(model, load_tokenizer(section), [[3, 50, 60], [7]], max_new_tokens=4)


@pytest.mark.parametrize("options", UNTRUSTED.values(), ids=UNTRUSTED)
def test_replies_are_greedy(tiny_model: Callable[..., Path], tmp_path: Path, options: dict[str, Any]) -> None:
    expected = replies(ModelSection(name_or_path=str(tiny_model())))
    base = Path(shutil.copytree(tiny_model(), tmp_path / "base"))
    config = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(config | options))
    assert replies(ModelSection(name_or_path=str(base))) == expected


def test_only_end_tokens_are_kept() -> None:
    given = GenerationConfig(eos_token_id=[2, 4], repetition_penalty=1.05, no_repeat_ngram_size=3, num_beams=5)
    kept = generation_config(given, GenerationSection())
    assert kept.to_diff_dict() == GenerationConfig(eos_token_id=[2, 4]).to_diff_dict()


@pytest.mark.parametrize("lengths", [(250, 3), (3, 250, 255), (256, 3)])
def test_prompts_near_the_last_position_get_the_replies_that_they_get_alone(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]
) -> None:
    """GPT-2 has a table of 256 positions: a long prompt leaves room for few tokens, a short one beside it for all."""
    section = ModelSection(name_or_path=str(tiny_model("gpt2")))
    model, tokenizer = load_base_model(section, QuantizationSection()), load_tokenizer(section)
    prompts = [[(7 * length + i) % 90 + 5 for i in range(length)] for length in lengths]
    sampling, generate = GenerationSection(temperature=1.0), model.generate
    sizes: list[int] = []

    def generate_and_note(**options: Any) -> Any:
        sizes.append(options["max_new_tokens"])
        return generate(**options)

    monkeypatch.setattr(model, "generate", generate_and_note)
    together = generate_replies(model, tokenizer, prompts, sampling=sampling, max_new_tokens=12)
    assert sizes == [max(1, min(12, 256 - length)) for length in lengths]
    alone = [
        generate_replies(model, tokenizer, [prompt], sampling=sampling, numbers=[number], max_new_tokens=12)
        for number, prompt in enumerate(prompts)
    ]
    assert [[reply] for reply in together] == alone
