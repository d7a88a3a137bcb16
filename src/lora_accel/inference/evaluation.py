"""Scores of base, base + adapters and a merged model on the evaluation rows of a run config."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_accel.config.schema import RunConfig
from lora_accel.console import Stage
from lora_accel.errors import ConfigError
from lora_accel.inference.generation import reply_in_batches
from lora_accel.inference.models import candidates, check_adapters, name_adapters


class Score(NamedTuple):
    """How a model did on evaluation rows."""

    name: str
    eval_loss: float
    """Mean per supervised token, in nats."""
    eval_perplexity: float
    eval_tokens: int
    """How many tokens were supervised."""
    exact_match: float | None
    """Share of rows whose greedy reply is the last answer to the letter; None where rows have no answer."""
    rows: int
    """How many rows have an answer."""
    sources: dict[str, dict[str, Any]]
    """Loss and tokens of each source of rows, where there are several."""


def evaluate(
    config: RunConfig,
    *,
    adapters: Sequence[Path] = (),
    merged: Path | None = None,
    batch_size: int = 25,
    max_new_tokens: int = 128,
) -> list[Score]:
    """Score the base, base + each adapter and a merged model on the evaluation rows of a run config.

    Args:
        batch_size: how many rows are answered at once.
        max_new_tokens: length of the longest reply.

    Raises:
        ConfigError: the config names no evaluation rows, or an adapter is given twice.
        ArtifactError: an adapter or a model cannot be used.
        DataError: rows cannot be used.
    """
    if not config.data.eval and not config.data.eval_fraction:
        raise ConfigError("data.eval: no rows to evaluate on; set data.eval, or data.eval_fraction as in training")
    named = name_adapters(adapters)
    check_adapters(adapters, merged)

    from accelerate import Accelerator

    from lora_accel.batching.batches import BatchOptions, step_batch
    from lora_accel.data.chat import question_of
    from lora_accel.data.splits import examples_by_name, load_evaluation
    from lora_accel.setup.recipe import make_recipe
    from lora_accel.training.evaluator import evaluate_sources

    accelerator = Accelerator(cpu=None)
    recipe = make_recipe(config)
    template, sources = recipe.template(), load_evaluation(config.data, config.seed, recipe)
    examples = examples_by_name(sources)
    records = [record for source in sources for record in source.records()]
    questions = [question for record in records if (question := question_of(record, template))]
    prompts, answers = [prompt for prompt, _ in questions], [answer for _, answer in questions]

    scores = []
    for name, model, packed in candidates(config.model, config.quantization, named, merged, with_base=True):
        options = BatchOptions.from_config(
            config.training, pad_id=template.tokenizer.pad_token_id, packed=packed and config.data.packing
        )
        batches = {path: step_batch(found, options) for path, found in examples.items()}
        with Stage(f"{name}: loss"):
            values = evaluate_sources(accelerator, model, batches)
        replies = reply_in_batches(name, model, template, prompts, batch_size, max_new_tokens)
        matches = sum(reply == answer for reply, answer in zip(replies, answers, strict=True))
        scores.append(
            Score(
                name,
                eval_loss=values["eval_loss"],
                eval_perplexity=math.exp(min(values["eval_loss"], 700.0)),
                eval_tokens=values["eval_tokens"],
                exact_match=matches / len(questions) if questions else None,
                rows=len(questions),
                sources=values.get("sources", {}),
            )
        )
        del model  # makes room for the merged one
    return scores


def scores_as_json(scores: list[Score]) -> str:
    """Return scores for a script to read."""
    values: list[dict[str, Any]] = [score._asdict() for score in scores]
    return json.dumps(values, indent=2)


def scores_as_table(scores: list[Score]) -> list[tuple[str, ...]]:
    """Return scores for a person to read, the heads first; exact match where rows have answers."""
    sources, answered = list(scores[0].sources), scores[0].exact_match is not None
    heads = ("model", "loss", "perplexity", *(["exact match"] if answered else []), *(f"loss on {s}" for s in sources))
    rows = [heads]
    for score in scores:
        matched = [] if score.exact_match is None else [f"{score.exact_match:.0%} of {score.rows}"]
        losses = [f"{score.sources[source]['eval_loss']:.4f}" for source in sources]
        rows.append((score.name, f"{score.eval_loss:.4f}", f"{score.eval_perplexity:,.3f}", *matched, *losses))
    return rows
