"""The prompts whose replies evaluation scores: the last supervised answer of each row, and the prompt before it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from lora_accel.data.chat import Example
from lora_accel.data.splits import EvalSource
from lora_accel.data.template import ChatTemplate
from lora_accel.errors import ConfigError
from lora_accel.labels import IGNORE_INDEX
from lora_accel.randomness import permutation
from lora_accel.training.scores import find_calls
from lora_accel.training.scoring import ScoredPrompt, Scorers, try_scorers

SCORED_PROMPTS = 0xA5C
"""Key of the permutation that selects prompts."""


def find_answers(examples: Iterable[Example]) -> list[tuple[list[int], list[int]]]:
    """Return the last supervised answer of each row, as tokens: what inference feeds, and what it should get.

    A row without an answer (such as plain text), or whose answer is cut at data.max_length, is left out.

    Args:
        examples: the examples of a source; those of a row follow each other.
    """
    answers = []
    for _, group in itertools.groupby(examples, lambda example: example.row):
        *_, last = group
        if last.answer is not None:
            start, end = last.answer
            answers.append((last.input_ids[:start], last.input_ids[start:end]))
    return answers


def load_scored_prompts(
    sources: Sequence[EvalSource], template: ChatTemplate, *, limit: int | None = None, seed: int = 0
) -> list[ScoredPrompt]:
    """Return the prompts of evaluation sources.

    Args:
        limit: maximum number of prompts of each source, which the seed selects; None = all.
    """
    from lora_accel.model.generation import decode_reply  # imports torch, which `plan --no-estimate` does without

    by_name: dict[str, list[tuple[list[int], list[int]]]] = {}
    for source in sources:  # a path that is listed twice is one source, and its rows are asked twice
        by_name.setdefault(source.name, []).extend(find_answers(source.examples))
    prompts = []
    for name, found in by_name.items():
        if limit is not None and len(found) > limit:
            found = [found[number] for number in sorted(permutation(len(found), seed, SCORED_PROMPTS)[:limit].tolist())]
        for ids, answer in found:
            reference = decode_reply(template.tokenizer, answer, template.end_ids)
            prompts.append(ScoredPrompt(name, ids, template.tokenizer.decode(ids), reference))
    return prompts


def check_scorers(scorers: Scorers, prompts: Sequence[ScoredPrompt]) -> set[str]:
    """Check that metrics which need replies can be computed. Return the names of their values, as `eval_<name>`.

    Raises:
        ConfigError: no evaluation row has an answer, or a function of the user fails.
    """
    if scorers and not prompts:
        raise ConfigError(
            f"evaluation.metrics: {next(iter(scorers))} compares replies with answers, but no evaluation row has a "
            "complete answer to a prompt; remove it, or use other rows"
        )
    if "tool_call_equal" in scorers and not any(find_calls(prompt.reference) for prompt in prompts):
        raise ConfigError("evaluation.metrics: tool_call_equal: no answer has a tool call written as JSON; remove it")
    return try_scorers(scorers, prompts) if scorers else set()


def count_bytes(examples: Iterable[Example], tokenizer: Any) -> int:
    """Return the UTF-8 bytes of the supervised text. Special tokens have none."""
    num_bytes = 0
    for example in examples:
        for is_supervised, run in itertools.groupby(example.labels, lambda label: label != IGNORE_INDEX):
            if is_supervised:
                text = tokenizer.decode([*run], skip_special_tokens=True, clean_up_tokenization_spaces=False)
                num_bytes += len(text.encode("utf-8", errors="replace"))
    return num_bytes
