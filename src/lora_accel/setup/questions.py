"""What evaluation asks a model: the last supervised answer of each evaluation row, and the prompt before it."""

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
from lora_accel.training.scoring import Question, Scorers, try_scorers

QUESTIONS = 0xA5C
"""Key of the permutation that selects questions."""


def find_questions(examples: Iterable[Example]) -> list[tuple[list[int], list[int]]]:
    """Return the last supervised answer of each row, as tokens: what inference feeds, and what it should get.

    A row without an answer (such as plain text), or whose answer is cut at data.max_length, has no question.

    Args:
        examples: the examples of a source; those of a row follow each other.
    """
    questions = []
    for _, group in itertools.groupby(examples, lambda example: example.row):
        *_, last = group
        if last.answer is not None:
            start, end = last.answer
            questions.append((last.input_ids[:start], last.input_ids[start:end]))
    return questions


def load_questions(
    sources: Sequence[EvalSource], template: ChatTemplate, *, limit: int | None = None, seed: int = 0
) -> list[Question]:
    """Return the questions of evaluation sources.

    Args:
        limit: maximum number of questions of each source, which the seed selects; None = all.
    """
    from lora_accel.model.generation import decode_reply  # imports torch, which `plan --no-estimate` does without

    by_name: dict[str, list[tuple[list[int], list[int]]]] = {}
    for source in sources:  # a path that is listed twice is one source, and its rows are asked twice
        by_name.setdefault(source.name, []).extend(find_questions(source.examples))
    questions = []
    for name, found in by_name.items():
        if limit is not None and len(found) > limit:
            found = [found[number] for number in sorted(permutation(len(found), seed, QUESTIONS)[:limit].tolist())]
        for ids, answer in found:
            reference = decode_reply(template.tokenizer, answer, template.end_ids)
            questions.append(Question(name, ids, template.tokenizer.decode(ids), reference))
    return questions


def check_scorers(scorers: Scorers, questions: Sequence[Question]) -> set[str]:
    """Check that metrics which need replies can be computed. Return the names of their values, as `eval_<name>`.

    Raises:
        ConfigError: no evaluation row has an answer, or a function of the user fails.
    """
    if scorers and not questions:
        raise ConfigError(
            f"evaluation.metrics: {next(iter(scorers))} compares replies with answers, but no evaluation row has a "
            "complete answer to a prompt; remove it, or use other rows"
        )
    if "tool_call_equal" in scorers and not any(find_calls(question.reference) for question in questions):
        raise ConfigError("evaluation.metrics: tool_call_equal: no answer has a tool call written as JSON; remove it")
    return try_scorers(scorers, questions) if scorers else set()


def count_bytes(examples: Iterable[Example], tokenizer: Any) -> int:
    """Return the UTF-8 bytes of the supervised text. Special tokens have none."""
    num_bytes = 0
    for example in examples:
        for is_supervised, run in itertools.groupby(example.labels, lambda label: label != IGNORE_INDEX):
            if is_supervised:
                text = tokenizer.decode([*run], skip_special_tokens=True, clean_up_tokenization_spaces=False)
                num_bytes += len(text.encode("utf-8", errors="replace"))
    return num_bytes
