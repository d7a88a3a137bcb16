"""Evaluation of the base, base + adapters and a merged model on the evaluation data of a run config."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_accel.config.schema import RunConfig
from lora_accel.console import Stage
from lora_accel.errors import ConfigError
from lora_accel.inference.generation import reply_in_batches
from lora_accel.inference.models import find_adapters, load_candidates, name_adapters

if TYPE_CHECKING:
    from lora_accel.data.chat import Example
    from lora_accel.data.template import ChatTemplate


class Score(NamedTuple):
    """Scores of a model on the evaluation data."""

    name: str
    eval_loss: float
    """Mean loss per supervised token, in nats."""
    eval_perplexity: float
    eval_tokens: int
    """Number of supervised tokens."""
    exact_match: float | None
    """Fraction of rows whose greedy reply is the text of their last supervised answer; None if no row has an answer."""
    rows: int
    """Number of rows with a complete supervised answer."""
    sources: dict[str, dict[str, Any]]
    """`eval_loss` and `eval_tokens` by source; empty if there is only one."""


class _EvaluationData(NamedTuple):
    """The evaluation data of a run config, tokenized."""

    template: ChatTemplate
    pad_id: int
    sources: dict[str, list[Example]]
    """Examples by source."""
    prompts: list[list[int]]
    """Of the rows with an answer, as token ids."""
    answers: list[str]


def evaluate(
    config: RunConfig,
    *,
    adapters: Sequence[Path] = (),
    merged: Path | None = None,
    batch_size: int = 25,
    max_new_tokens: int = 128,
    force: bool = False,
) -> list[Score]:
    """Score the base, base + each adapter and a merged model on the evaluation data of a run config.

    Args:
        adapters: adapter folders.
        merged: folder of a merged model.
        batch_size: number of prompts per batch.
        max_new_tokens: maximum length of a reply.
        force: whether to accept a base that an adapter was not trained on, and to ignore options of an adapter that the
            installed PEFT does not know.

    Returns:
        The scores of the base, of each adapter in order, and of the merged model.

    Raises:
        ConfigError: the config has no evaluation data, or an adapter is given twice.
        ArtifactError: an adapter or a model cannot be used.
        DataError: the evaluation data cannot be used, or a row holds a token that the model lacks.
    """
    if not config.data.eval and not config.data.eval_fraction:
        raise ConfigError("data.eval: no evaluation data; set data.eval, or data.eval_fraction as in training")
    folders = dict(zip(name_adapters(adapters), find_adapters(adapters, merged, force=force), strict=True))

    from accelerate import Accelerator

    from lora_accel.batching.batches import BatchOptions, step_batch
    from lora_accel.setup.recipe import complete_config
    from lora_accel.setup.sizes import resolve_rope_scaling
    from lora_accel.training.evaluator import evaluate_sources

    accelerator, config = Accelerator(cpu=None), resolve_rope_scaling(complete_config(config))
    data = _load_data(config)
    scores = []
    candidates = load_candidates(
        config.model,
        config.quantization,
        folders,
        merged,
        with_base=True,
        force=force,
        way_out="set model.name_or_path to that base",
    )
    for name, model, packed in candidates:
        options = BatchOptions.from_config(config.training, pad_id=data.pad_id, packed=packed and config.data.packing)
        batches = {path: step_batch(source, options) for path, source in data.sources.items()}
        with Stage(f"{name}: loss"):
            losses = evaluate_sources(accelerator, model, batches)
        replies = reply_in_batches(name, model, data.template, data.prompts, batch_size, max_new_tokens)
        scores.append(_score(name, losses, replies, data.answers))
        del model  # frees memory for the merged model
    return scores


def _load_data(config: RunConfig) -> _EvaluationData:
    """Load the evaluation data of a run config, and check that the base has its tokens and positions."""
    from lora_accel.data.splits import examples_by_name, load_evaluation
    from lora_accel.model.generation import decode_reply
    from lora_accel.model.tokenizer import padding_id
    from lora_accel.setup.recipe import make_recipe
    from lora_accel.setup.sizes import check_examples

    recipe = make_recipe(config)
    template, sources = recipe.template(), load_evaluation(config.data, config.seed, recipe)
    sizes = check_examples(config, recipe.template, [source.examples for source in sources])
    questions = [question for source in sources for question in find_questions(source.examples)]
    return _EvaluationData(
        template,
        padding_id(template.tokenizer, sizes.vocab_size),
        sources=examples_by_name(sources),
        prompts=[prompt for prompt, _ in questions],
        answers=[decode_reply(template.tokenizer, answer, template.end_ids) for _, answer in questions],
    )


def _score(name: str, losses: dict[str, Any], replies: Sequence[str], answers: Sequence[str]) -> Score:
    """Return the scores of a model from its losses and its replies."""
    from lora_accel.training.loss import perplexity

    matches = sum(reply == answer for reply, answer in zip(replies, answers, strict=True))
    return Score(
        name,
        eval_loss=losses["eval_loss"],
        eval_perplexity=perplexity(losses["eval_loss"]),
        eval_tokens=losses["eval_tokens"],
        exact_match=matches / len(answers) if answers else None,
        rows=len(answers),
        sources=losses.get("sources", {}),
    )


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


def scores_as_json(scores: list[Score]) -> str:
    """Return scores as JSON."""
    values: list[dict[str, Any]] = [score._asdict() for score in scores]
    return json.dumps(values, indent=2)


def scores_as_table(scores: list[Score]) -> list[tuple[str, ...]]:
    """Return scores as rows of a table, the column headers first. Exact match is left out if no row has an answer."""
    sources, has_answers = list(scores[0].sources), scores[0].exact_match is not None
    headers = (
        "model",
        "loss",
        "perplexity",
        *(["exact match"] if has_answers else []),
        *(f"loss on {s}" for s in sources),
    )
    rows = [headers]
    for score in scores:
        matches = [] if score.exact_match is None else [f"{score.exact_match:.0%} of {score.rows}"]
        losses = [f"{score.sources[source]['eval_loss']:.4f}" for source in sources]
        rows.append((score.name, f"{score.eval_loss:.4f}", f"{score.eval_perplexity:,.3f}", *matches, *losses))
    return rows
