"""Scores of replies. Each function takes prompts, replies and reference answers, three lists of equal length.

docs/evaluation.md defines them. Add a function to `METRICS` (config/metrics.py) to make it a metric.
"""

from __future__ import annotations

import collections
import json
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

from lora_accel.json_text import parse_strictly

Texts = Sequence[str]
ARTICLES = re.compile(r"\b(a|an|the)\b")


def exact_match(prompts: Texts, replies: Texts, references: Texts) -> float:
    """Return the share of replies that are the reference, character by character."""
    return _mean(lambda reply, reference: reply == reference, replies, references)


def token_f1(prompts: Texts, replies: Texts, references: Texts) -> float:
    """Return the mean F1 of the words that reply and reference share, with SQuAD's normalization.

    Source: Rajpurkar et al., SQuAD, arXiv 1606.05250. If either has no word, F1 is 1 if both have none, else 0.
    """
    return _mean(_token_f1, replies, references)


def rouge_l(prompts: Texts, replies: Texts, references: Texts) -> float:
    """Return the mean ROUGE-L F1 without stemming, by rouge-score.

    Source: Lin, ROUGE: A package for automatic evaluation of summaries, ACL 2004.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return _mean(lambda reply, reference: scorer.score(reference, reply)["rougeL"].fmeasure, replies, references)


def bleu(prompts: Texts, replies: Texts, references: Texts) -> float:
    """Return the corpus BLEU by sacrebleu with its defaults (13a tokens, exponential smoothing), 0 to 100.

    Source: Post, A call for clarity in reporting BLEU scores, arXiv 1804.08771.
    """
    from sacrebleu import corpus_bleu

    return float(corpus_bleu(list(replies), [list(references)]).score)


def json_valid(prompts: Texts, replies: Texts, references: Texts) -> float:
    """Return the share of replies that are one JSON value, with nothing before and after it."""
    return _mean(lambda reply, _: _parse(reply) is not None, replies, references)


def json_equal(prompts: Texts, replies: Texts, references: Texts) -> float:
    """Return the share of replies that are the JSON value of the reference, whatever order its objects' keys have."""
    return _mean(_json_equal, replies, references)


def tool_call_equal(prompts: Texts, replies: Texts, references: Texts) -> float:
    """Return the share of replies that call the tools of the reference, in its order and with its arguments.

    If the reference calls none, the reply has to call none.
    """
    return _mean(lambda reply, reference: _is_same(find_calls(reply), find_calls(reference)), replies, references)


def _mean(score: Callable[[str, str], float], replies: Texts, references: Texts) -> float:
    return sum(float(score(*pair)) for pair in zip(replies, references, strict=True)) / len(references)


def _token_f1(reply: str, reference: str) -> float:
    words, expected = _words(reply), _words(reference)
    if not words or not expected:
        return float(words == expected)
    shared = (collections.Counter(words) & collections.Counter(expected)).total()
    return 2 * shared / (len(words) + len(expected))


def _words(text: str) -> list[str]:
    """Return the words of a text, normalized as SQuAD does: lower case, without punctuation and articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return ARTICLES.sub(" ", text).split()


def _json_equal(reply: str, reference: str) -> bool:
    values = _parse(reply), _parse(reference)
    return None not in values and _is_same(*values)


def _parse(text: str) -> tuple[Any] | None:
    """Return the JSON value of a text, in a tuple since it may be null; None if it is not JSON."""
    try:
        return (parse_strictly(text, allow_nan=False),)
    except ValueError:
        return None


def _is_same(first: Any, second: Any) -> bool:
    """Whether two JSON values are equal: 1 equals 1.0, but not true."""
    try:
        if isinstance(first, dict) and isinstance(second, dict):
            return first.keys() == second.keys() and all(_is_same(first[key], second[key]) for key in first)
        if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
            return len(first) == len(second) and all(map(_is_same, first, second))
        return isinstance(first, bool) == isinstance(second, bool) and bool(first == second)
    except RecursionError:  # nested almost as deeply as the parser allows
        return False


def find_calls(text: str) -> list[tuple[str, Any]]:
    """Return the tool calls in a text: the name and the arguments of each.

    A call is a JSON object with a `name`, and `arguments` or `parameters`, wherever it is in the text: alone, in a
    list, in an OpenAI `function`, or between the markers of a chat template.
    """
    calls: list[tuple[str, Any]] = []
    decoder, position = json.JSONDecoder(), 0
    while (start := _next_bracket(text, position)) is not None:
        try:
            value, position = decoder.raw_decode(text, start)
            calls += _calls_of(value)
        except (ValueError, RecursionError):
            position = start + 1
    return calls


def _next_bracket(text: str, position: int) -> int | None:
    found = re.compile(r"[{\[]").search(text, position)
    return None if found is None else found.start()


def _calls_of(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, list):
        return [call for item in value for call in _calls_of(item)]
    if not isinstance(value, dict):
        return []
    function = value["function"] if isinstance(value.get("function"), dict) else value
    arguments = function.get("arguments", function.get("parameters"))
    if not isinstance(function.get("name"), str) or arguments is None:
        return [call for item in value.values() for call in _calls_of(item)]
    parsed = _parse(arguments) if isinstance(arguments, str) else None
    return [(function["name"], arguments if parsed is None else parsed[0])]
