"""From rows to replies: a model trained on rows until its loss is near 0 answers them, in `evaluate` and `generate`.

The expected replies are rendered by transformers (tests/data/test_prefix_rule.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_accel import RunConfig, run_training
from lora_accel.data.formats import parse_row
from lora_accel.data.records import Conversation
from lora_accel.data.template import BUILT_IN_TEMPLATES
from lora_accel.inference.evaluation import evaluate
from lora_accel.inference.generation import generate
from tests.conftest import read_metrics, write_jsonl
from tests.data.test_prefix_rule import (
    CLOSES_THOUGHT,
    SPECIAL,
    WEATHER,
    WITH_CALLS,
    WITH_REASONING,
    Row,
    Turn,
    find_wanted,
    template_of,
)
from tests.data.test_prefix_rule import as_compared as text_as_compared

TURNS: dict[str, list[Turn]] = {
    "plain": [Turn("user", "why blue"), Turn("assistant", "the sky")],
    "system": [Turn("system", "be brief"), Turn("user", "why red"), Turn("assistant", "a rose")],
    "turns": [
        *(Turn("user", "what is it"), Turn("assistant", "it is sunny")),
        *(Turn("user", "and then"), Turn("assistant", "dark\n")),
    ],
    "call": [
        *(Turn("user", "weather in Paris"), Turn("assistant", "", argument="Paris")),
        *(Turn("tool", 'sunny "now"'), Turn("assistant", "sunny in Paris")),
    ],
    "reasoning": [Turn("user", "think of it"), Turn("assistant", "the light", reasoning="hmm light")],
    "reasoning as text": [
        *(Turn("user", "think and write it"), Turn("assistant", "<think>\nhmm dark\n</think>\n\nthe dark")),
    ],
    "line breaks": [Turn("user", "write it on line 3"), Turn("assistant", "\n\nhere it is")],
    "spaces": [Turn("user", "indent: "), Turn("assistant", "    return 1\n    20")],
}
"""Conversations by kind."""
COMPLETIONS = {"Answer: ": "yes", "Why? ": "  because", "def f(x):\n": "    return 1\n"}
"""Rows without a template. The prompts end with white space."""

TEMPLATES = {
    "tools": "bytes, GPT-2",
    "json_tool_results": "bytes, Llama 3",
    "arguments_as_text": "bytes, no split",
    "answer_continues_after_result": "bytes, Qwen",
    "opens_thought": "bytes, Llama 3",
    "opens_thought_of_reasoning": "bytes, Llama 3",
    "opens_thought_written_differently": "bytes, no split",
    "swaps_thought_tags": "bytes, digits",
    "thought_only_last": "bytes, Qwen",
    "closes_thought": "bytes, Llama 3",
    "no_closing_token": "bytes, GPT-2",
    "other_end_in_history": "bytes, Llama 3",
    "no_generation_prompt": "bytes, stripping",
    "space_before_answer": "sentencepiece, first",
    "vicuna_v1.1": "bytes, no split",
    "llama-2": "sentencepiece, llama-2",
}
"""Templates, each with a tokenizer of one family."""
EVERYDAY = ("json_tool_results", "thought_only_last", "swaps_thought_tags", "no_closing_token", "llama-2")
"""Structures that are least like each other. The others run with --faults only, since each takes about ten seconds."""


def rows_of(name: str) -> dict[str, Row]:
    """Return the rows that a template supports, by kind."""
    rows = {}
    for kind, turns in TURNS.items():
        is_supported = {
            "call": name in WITH_CALLS,
            "reasoning": name in WITH_REASONING,
            "reasoning as text": name not in WITH_REASONING | CLOSES_THOUGHT,
        }
        if not is_supported.get(kind, True):
            continue
        tools = [WEATHER] if kind == "call" else None
        row = {"messages": [turn.value() for turn in turns]} | ({"tools": tools} if tools else {})
        answers = tuple(i for i, turn in enumerate(turns) if turn.role == "assistant")
        rows[kind] = Row(row, tuple(turns), answers, tools)
    return rows


def train(folder: Path, name: str, sources: list[list[dict[str, Any]]]) -> tuple[RunConfig, Path]:
    """Train a tiny model on rows until the loss is near 0; return the config and the adapter's folder.

    Args:
        name: the chat template.
        sources: the rows of each file.
    """
    template = template_of(name, TEMPLATES[name], name == "llama-2")
    tokenizer = template.tokenizer
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            max_position_embeddings=512,
            **sizes,
        )
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    files = [{"path": str(write_jsonl(folder / f"rows{i}.jsonl", rows))} for i, rows in enumerate(sources)]
    chat_template = name if name in BUILT_IN_TEMPLATES else None
    config = RunConfig.model_validate(
        {
            "output_dir": str(folder / "run"),
            "model": {"name_or_path": str(folder / "model"), "chat_template": chat_template},
            "adapter": {"r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"}
            | {"modules_to_save": ["lm_head"]},
            "data": {"train": files, "eval": files, "max_length": 512},
            # At 0.01 without warm-up, loss spikes late in a run depended on the CPU's rounding.
            "training": {"batch_size": 32, "mixed_precision": "no", "max_steps": 200, "learning_rate": 0.006}
            | {"scheduler": "linear", "warmup_steps": 10},
            "checkpoint": {"every_steps": 1000},
            "logging": {"trackers": [], "report": False},
        }
    )
    adapter = run_training(config)
    assert read_metrics(folder / "run")[-1]["loss"] < 0.01
    return config, adapter


def as_compared(name: str, reply: str) -> str:
    """Return a reply without the white space that its tokenizer adds or leaves out."""
    reply = text_as_compared(TEMPLATES[name], reply)
    return reply.strip() if TEMPLATES[name] == "bytes, stripping" else reply


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in EVERYDAY else pytest.mark.slow) for n in TEMPLATES])
def test_a_model_answers_its_training_rows(name: str, tmp_path: Path) -> None:
    rows = rows_of(name)
    completions = [{"prompt": prompt, "completion": text} for prompt, text in COMPLETIONS.items()]
    config, adapter = train(tmp_path, name, [[row.row for row in rows.values()], completions])
    ledgers = json.loads((tmp_path / "run" / "data_ledger.json").read_text())["train"]
    assert [ledger["buckets"]["used"]["num_rows"] for ledger in ledgers] == [len(rows), len(completions)]
    assert not any("left out" in note for ledger in ledgers for note in ledger["notes"])

    _, score = evaluate(config, adapters=[adapter], max_new_tokens=80)
    assert (score.rows, score.exact_match) == (len(rows) + len(completions), 1.0)

    prompts, expected = [], {}
    template = template_of(name, TEMPLATES[name], name == "llama-2")
    for kind, row in rows.items():
        record = parse_row(row.row, "messages")
        assert isinstance(record, Conversation)
        for number in row.answers:
            prompts.append(record._replace(messages=record.messages[:number]))
            (generated, *_) = find_wanted(template, name, row, number).generated
            expected[kind, number] = SPECIAL.sub("", generated)
    answers = generate(prompts, adapters=[adapter], max_new_tokens=80)
    replies = [as_compared(name, reply) for answer in answers for reply in answer.values()]
    assert replies == [as_compared(name, text) for text in expected.values()]

    answers = generate(list(COMPLETIONS), adapters=[adapter], raw=True, max_new_tokens=80)
    replies = [as_compared(name, reply) for answer in answers for reply in answer.values()]
    assert replies == [as_compared(name, text) for text in COMPLETIONS.values()]


def test_an_adapter_of_completions_is_asked_without_the_template(tmp_path: Path) -> None:
    completions = [{"prompt": prompt, "completion": text} for prompt, text in COMPLETIONS.items()]
    config, adapter = train(tmp_path, "tools", [completions])
    _, score = evaluate(config, adapters=[adapter], max_new_tokens=20)
    assert (score.rows, score.exact_match) == (len(completions), 1.0)
    answers = generate(list(COMPLETIONS), adapters=[adapter], max_new_tokens=20)
    assert [reply for answer in answers for reply in answer.values()] == list(COMPLETIONS.values())
    with_template = generate(list(COMPLETIONS), adapters=[adapter], raw=False, max_new_tokens=20)
    for answer, text in zip(with_template, COMPLETIONS.values(), strict=True):
        assert text not in answer.values()
