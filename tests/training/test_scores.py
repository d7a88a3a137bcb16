"""Scores of replies have the values that their definitions give."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from lora_accel.config.metrics import METRICS, load_metrics
from lora_accel.errors import ConfigError
from lora_accel.training.scores import find_calls
from lora_accel.training.scoring import ScoredPrompt, score_by_source, score_replies

CALL = '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}'
CASES: list[tuple[str, str, str, float]] = [
    ("exact_match", "blue", "blue", 1.0),
    ("exact_match", "blue ", "blue", 0.0),
    ("token_f1", "The cat, sat!", "a cat sat", 1.0),
    ("token_f1", "the red cat", "a black cat", 0.5),
    ("token_f1", "cat cat", "cat", 2 / 3),
    ("token_f1", "the", "a", 1.0),
    ("token_f1", "", "cat", 0.0),
    ("rouge_l", "police killed the gunman", "police kill the gunman", 0.75),
    ("rouge_l", "the gunman kill police", "police kill the gunman", 0.5),
    ("bleu", "the cat sat on the mat", "the cat sat on the mat", 100.0),
    ("json_valid", ' {"a": [1, null]} ', "", 1.0),
    ("json_valid", "null", "", 1.0),
    ("json_valid", '```json\n{"a": 1}\n```', "", 0.0),
    ("json_valid", '{"a": NaN}', "", 0.0),
    ("json_valid", '{"a": 1, "a": 2}', "", 0.0),
    ("json_valid", "[" * 100_000, "", 0.0),
    ("json_equal", '{"b": 2.0, "a": [1]}', '{"a": [1], "b": 2}', 1.0),
    ("json_equal", "[1, 2]", "[2, 1]", 0.0),
    ("json_equal", '{"a": true}', '{"a": 1}', 0.0),
    ("json_equal", "null", "null", 1.0),
    ("json_equal", "not JSON", "not JSON", 0.0),
    ("tool_call_equal", f"<tool_call>\n{CALL}\n</tool_call>", CALL, 1.0),
    ("tool_call_equal", '[{"parameters": {"days": 2, "city": "Rome"}, "name": "weather"}]', CALL, 1.0),
    ("tool_call_equal", CALL.replace("2", "3"), CALL, 0.0),
    ("tool_call_equal", f"{CALL} {CALL}", CALL, 0.0),
    ("tool_call_equal", "no call", CALL, 0.0),
    ("tool_call_equal", "hello", "good evening", 1.0),
    ("tool_call_equal", CALL, "good evening", 0.0),
]


@pytest.mark.parametrize(("name", "reply", "reference", "expected"), CASES)
def test_score_of_a_reply(name: str, reply: str, reference: str, expected: float) -> None:
    (score,) = load_metrics([name]).values()
    assert score([""], [reply], [reference]) == pytest.approx(expected)
    if name != "bleu":  # a corpus score is no mean
        assert score(["", ""], [reply, "?"], [reference, '"?"']) == pytest.approx(
            (expected + score([""], ["?"], ['"?"'])) / 2
        )


def test_every_metric_of_replies_has_a_case() -> None:
    assert {name for name, spec in METRICS.items() if spec.needs_replies} == {name for name, *_ in CASES}


def test_arguments_as_text_are_parsed() -> None:
    text = 'I call {"type": "function", "function": {"name": "f", "arguments": "{\\"x\\": 1}"}} and [1, {"name": "f"}].'
    assert find_calls(text) == [("f", {"x": 1})]


def test_calls_within_other_objects_are_found() -> None:
    text = '{"content": null, "tool_calls": [{"id": 1, "function": {"name": "f", "arguments": {"x": 1}}}]}'
    assert find_calls(text) == [("f", {"x": 1})]


def scored_prompts(*sources: str) -> list[ScoredPrompt]:
    return [ScoredPrompt(source, [5], "prompt", f"answer {number}") for number, source in enumerate(sources)]


def test_metrics_of_all_sources_and_of_each() -> None:
    prompts = scored_prompts("a", "b", "a")
    overall, by_source = score_by_source(load_metrics(["exact_match"]), prompts, ["answer 0", "wrong", "answer 2"])
    assert overall == {"eval_exact_match": pytest.approx(2 / 3)}
    assert by_source == {"a": {"eval_exact_match": 1.0}, "b": {"eval_exact_match": 0.0}}


def change_lists(prompts: list[str], replies: list[str], references: list[str]) -> float:
    replies.clear()
    return 0.5


def test_functions_of_the_user() -> None:
    """Each gets lists of its own, and its numbers get the names that it returns."""
    scorers: dict[str, Callable[..., Any]] = {
        "my:first": change_lists,
        "my:lengths": lambda prompts, replies, references: {"mean-length": len(replies[0]), "n": len(prompts)},
    }
    expected = {"eval_first": 0.5, "eval_mean-length": 3.0, "eval_n": 1.0}
    assert score_replies(scorers, scored_prompts("a"), ["two"]) == expected


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (math.nan, "returned score = nan; return a finite float"),
        ("0.5", "returned score = '0.5'"),
        ({"f1": None}, "returned f1 = None"),
        ({"loss": 0.1}, "returned a value named 'loss'; use another name"),
        ({"a b": 0.1}, "returned a value named 'a b'"),
        (ZeroDivisionError("no words\nat all"), "raised ZeroDivisionError: no words; fix it"),
        (SystemExit(3), "raised SystemExit: 3"),
    ],
)
def test_invalid_results_are_named(result: Any, message: str) -> None:
    def score(*_: list[str]) -> Any:
        if isinstance(result, BaseException):
            raise result
        return result

    with pytest.raises(ConfigError) as caught:
        score_replies({"my:score": score}, scored_prompts("a"), [""])
    assert f"evaluation.metrics: my:score {message}" in str(caught.value)


def test_two_functions_cannot_return_the_same_name() -> None:
    functions: dict[str, Callable[..., Any]] = {"one:score": lambda *_: 1.0, "two:score": lambda *_: 2.0}
    with pytest.raises(ConfigError, match="two:score returned score, which another one returns"):
        score_replies(functions, scored_prompts("a"), [""])
