"""Metrics of replies: apply functions to them, over all sources and for each; check the results."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from lora_accel.config.metrics import METRICS, NEUTRAL_LOSS
from lora_accel.errors import ConfigError, first_line

RESERVED = {*METRICS, NEUTRAL_LOSS, "tokens"}
"""Names that a function of the user cannot return: evaluation logs other values under them."""
NUM_TRIED = 8
"""Prompts on which functions are tried before the model is loaded."""


class ScoredPrompt(NamedTuple):
    """A prompt whose reply is scored: the last one of an evaluation row with a supervised answer, its reference."""

    source: str
    """Name of the evaluation source."""
    ids: list[int]
    """Its token ids: what inference feeds."""
    text: str
    """Its text, special tokens included."""
    reference: str
    """The answer in the row, as text."""


Scorers: TypeAlias = Mapping[str, Callable[..., Any]]
"""Functions that score replies, by the name of the metric; see `config.metrics.load_metrics`."""


def score_replies(scorers: Scorers, prompts: Sequence[ScoredPrompt], replies: Sequence[str]) -> dict[str, float]:
    """Return the metrics of replies, as `eval_<name>`.

    Raises:
        ConfigError: a function of the user raises, or does not return finite numbers.
    """
    values: dict[str, float] = {}
    texts, references = [prompt.text for prompt in prompts], [prompt.reference for prompt in prompts]
    for name, function in scorers.items():
        try:
            result = function([*texts], [*replies], [*references])  # copies: a function may change its lists
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise ConfigError(f"evaluation.metrics: {name} raised {reason}; fix it, or remove it") from error
        for key, value in _named(name, result).items():
            if f"eval_{key}" in values:
                raise ConfigError(f"evaluation.metrics: {name} returned {key}, which another one returns; rename it")
            values[f"eval_{key}"] = _checked(name, key, value)
    return values


def _named(metric: str, result: Any) -> Mapping[str, Any]:
    """Return the result of a function by name: a single number gets the name of its function."""
    if metric in METRICS:
        return {metric: result}
    if not isinstance(result, Mapping):
        result = {metric.split(":")[1]: result}
    for key in result:
        if not isinstance(key, str) or key in RESERVED or not key.replace("_", "").replace("-", "").isalnum():
            raise ConfigError(
                f"evaluation.metrics: {metric} returned a value named {key!r}; use another name, of letters, digits, _ "
                "and -"
            )
    named: Mapping[str, Any] = result
    return named


def _checked(metric: str, key: str, value: Any) -> float:
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ConfigError(
            f"evaluation.metrics: {metric} returned {key} = {value!r:.100}; return a finite float, or {{name: float}}"
        )
    return float(value)


def score_by_source(
    scorers: Scorers, prompts: Sequence[ScoredPrompt], replies: Sequence[str]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return the metrics over all replies, and of each source.

    Raises:
        ConfigError: see `score_replies`.
    """
    by_source: dict[str, tuple[list[ScoredPrompt], list[str]]] = {}
    for prompt, reply in zip(prompts, replies, strict=True):
        pair = by_source.setdefault(prompt.source, ([], []))
        pair[0].append(prompt)
        pair[1].append(reply)
    overall = score_replies(scorers, prompts, replies)
    if len(by_source) == 1:
        return overall, dict.fromkeys(by_source, overall)
    return overall, {source: score_replies(scorers, *pair) for source, pair in by_source.items()}


def try_scorers(scorers: Scorers, prompts: Sequence[ScoredPrompt]) -> set[str]:
    """Score the references as if they were replies, so that a faulty function raises before the model is loaded.

    Returns:
        The names of the values, as `eval_<name>`.

    Raises:
        ConfigError: see `score_replies`.
    """
    tried = prompts[:NUM_TRIED]
    return set(score_replies(scorers, tried, [prompt.reference for prompt in tried]))
