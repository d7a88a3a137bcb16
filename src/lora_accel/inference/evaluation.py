"""Evaluation of the base, base + adapters and a merged model on the evaluation data of a run config."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_accel.config.metrics import NEUTRAL_LOSS, check_metric_name, load_metrics
from lora_accel.config.schema import RunConfig
from lora_accel.console import Stage
from lora_accel.errors import ConfigError
from lora_accel.inference.generation import reply_in_batches
from lora_accel.inference.models import find_adapters, load_candidates, name_adapters

if TYPE_CHECKING:
    from lora_accel.data.chat import Example
    from lora_accel.data.template import ChatTemplate
    from lora_accel.training.scoring import ScoredPrompt, Scorers

DEFAULT_METRICS = ("loss", "perplexity", "exact_match")
"""What `evaluate` computes unless metrics are requested; in addition to those of the run config."""


class Score(NamedTuple):
    """Scores of a model on the evaluation data."""

    name: str
    eval_loss: float
    """Mean loss per supervised token, in nats."""
    eval_perplexity: float
    eval_tokens: int
    """Number of supervised tokens."""
    exact_match: float | None
    """Fraction of rows whose reply is the text of their last supervised answer; None if no row has an answer, or it is
    not requested."""
    rows: int
    """Number of rows with a complete supervised answer; 0 if no metric needs replies."""
    sources: dict[str, dict[str, Any]]
    """`eval_loss`, `eval_tokens` and the metrics by source; empty if there is only one."""
    metrics: dict[str, float]
    """Further values, as `eval_<name>`: metrics, and `eval_neutral_loss`."""


class _EvaluationData(NamedTuple):
    """The evaluation data of a run config, tokenized."""

    template: ChatTemplate
    pad_id: int
    sources: dict[str, list[Example]]
    """Examples by source."""
    num_bytes: dict[str, int] | None
    """Bytes of the supervised text of each source; None = bits per byte are not requested."""
    scorers: Scorers
    """The metrics that need replies."""
    scored_prompts: list[ScoredPrompt]
    neutral: list[Example]


def evaluate(
    config: RunConfig,
    *,
    adapters: Sequence[Path] = (),
    merged: Path | None = None,
    metrics: Sequence[str] | None = None,
    batch_size: int = 25,
    max_new_tokens: int = 128,
    force: bool = False,
) -> list[Score]:
    """Score the base, base + each adapter and a merged model on the evaluation data of a run config.

    Args:
        adapters: adapter folders.
        merged: folder of a merged model.
        metrics: what to compute; None = `DEFAULT_METRICS` and `evaluation.metrics` of the config. The loss is always
            computed. Replies use the options of `evaluation.generation`.
        batch_size: number of prompts per batch.
        max_new_tokens: maximum length of a reply.
        force: whether to accept a base that an adapter was not trained on, and to ignore options of an adapter that the
            installed PEFT does not know.

    Returns:
        The scores of the base, of each adapter in order, and of the merged model.

    Raises:
        ConfigError: the config has no evaluation data, an adapter is given twice, or a metric cannot be computed.
        ArtifactError: an adapter or a model cannot be used.
        DataError: the evaluation data cannot be used, or a row holds a token that the model lacks.
    """
    if not config.data.eval and not config.data.eval_fraction:
        raise ConfigError("data.eval: no evaluation data; set data.eval, or data.eval_fraction as in training")
    names, scorers = _load_metrics(config, metrics)
    folders = dict(zip(name_adapters(adapters), find_adapters(adapters, merged, force=force), strict=True))

    from accelerate import Accelerator

    from lora_accel.batching.batches import BatchOptions, step_batch
    from lora_accel.model.attention import tile_size
    from lora_accel.model.sharing import min_saving_of
    from lora_accel.setup.recipe import complete_config
    from lora_accel.setup.sizes import resolve_rope_scaling
    from lora_accel.training.evaluator import evaluate as evaluate_batch
    from lora_accel.training.evaluator import evaluate_sources

    accelerator, config = Accelerator(cpu=None), resolve_rope_scaling(complete_config(config))
    data = _load_data(config, names, scorers, is_default=metrics is None and not config.evaluation.metrics)
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
        packed = packed and config.data.packing
        min_saving = min_saving_of(config.training, model, accelerator.device, packed=packed)
        options = BatchOptions.from_config(
            config.training,
            pad_id=data.pad_id,
            packed=packed,
            min_saving=min_saving,
            row_multiple=tile_size(next(model.parameters()).dtype, accelerator.device),
        )
        batches = {path: step_batch(source, options) for path, source in data.sources.items()}
        with Stage(f"{name}: loss"):
            losses = evaluate_sources(accelerator, model, batches, data.num_bytes)
            if data.neutral:
                losses[f"eval_{NEUTRAL_LOSS}"] = evaluate_batch(accelerator, model, step_batch(data.neutral, options))
        replies = []
        if data.scored_prompts:
            prompts, sampling = [prompt.ids for prompt in data.scored_prompts], config.evaluation.generation
            replies = reply_in_batches(name, model, data.template, prompts, batch_size, max_new_tokens, sampling)
        scores.append(_score(name, losses, replies, data))
        del model  # frees memory for the merged model
    return scores


def _load_metrics(config: RunConfig, metrics: Sequence[str] | None) -> tuple[list[str], Scorers]:
    """Return the names of the metrics to compute, and the functions of those that need replies."""
    names = [*dict.fromkeys([*DEFAULT_METRICS, *config.evaluation.metrics] if metrics is None else metrics)]
    try:
        names = [check_metric_name(name) for name in names]
    except ValueError as error:
        raise ConfigError(f"--metric: {error}") from None
    return names, load_metrics(names)


def _load_data(config: RunConfig, metrics: Sequence[str], scorers: Scorers, *, is_default: bool) -> _EvaluationData:
    """Load the evaluation data of a run config, and check that the base has its tokens and positions.

    Args:
        is_default: whether nobody asked for a metric. Then rows need not have answers.
    """
    from lora_accel.data.splits import examples_by_name, load_evaluation
    from lora_accel.model.tokenizer import padding_id
    from lora_accel.setup.neutral import neutral_examples
    from lora_accel.setup.recipe import make_recipe
    from lora_accel.setup.scored_prompts import check_scorers, count_bytes, load_scored_prompts
    from lora_accel.setup.sizes import check_examples

    recipe = make_recipe(config)
    template, sources = recipe.template(), load_evaluation(config.data, config.seed, recipe)
    sizes = check_examples(config, recipe.template, [source.examples for source in sources])
    by_name, num_bytes = examples_by_name(sources), None
    scored_prompts = load_scored_prompts(sources, template) if scorers else []
    if scored_prompts or not is_default:
        check_scorers(scorers, scored_prompts)
    if "bits_per_byte" in metrics:
        num_bytes = {name: count_bytes(examples, template.tokenizer) for name, examples in by_name.items()}
    return _EvaluationData(
        template,
        padding_id(template.tokenizer, sizes.vocab_size),
        sources=by_name,
        num_bytes=num_bytes,
        scorers=scorers,
        scored_prompts=scored_prompts,
        neutral=neutral_examples(config, recipe.template, sizes),
    )


def _score(name: str, losses: dict[str, Any], replies: Sequence[str], data: _EvaluationData) -> Score:
    """Return the scores of a model from its losses and its replies."""
    from lora_accel.training.loss import perplexity
    from lora_accel.training.scoring import score_by_source

    sources = losses.pop("sources", {})
    if data.scored_prompts:
        overall, by_source = score_by_source(data.scorers, data.scored_prompts, replies)
        losses |= overall
        sources = {source: values | by_source.get(source, {}) for source, values in sources.items()}
    return Score(
        name,
        eval_loss=losses["eval_loss"],
        eval_perplexity=perplexity(losses["eval_loss"]),
        eval_tokens=losses["eval_tokens"],
        exact_match=losses.pop("eval_exact_match", None),
        rows=len(data.scored_prompts),
        sources=sources,
        metrics={key: value for key, value in losses.items() if key not in ("eval_loss", "eval_tokens")},
    )


def scores_as_json(scores: list[Score]) -> str:
    """Return scores as JSON."""
    values: list[dict[str, Any]] = [score._asdict() for score in scores]
    return json.dumps(values, indent=2)


def scores_as_table(scores: list[Score]) -> list[tuple[str, ...]]:
    """Return scores as rows of a table, the column headers first. Exact match is left out if it is not computed."""
    sources, has_match = [*scores[0].sources], scores[0].exact_match is not None
    metrics = [*dict.fromkeys(metric for score in scores for metric in score.metrics)]  # replies may decide the names
    headers = (
        "model",
        "loss",
        "perplexity",
        *(["exact match"] if has_match else []),
        *(metric.removeprefix("eval_").replace("_", " ") for metric in metrics),
        *(f"loss on {source}" for source in sources),
    )
    rows = [headers]
    for score in scores:
        matches = [] if score.exact_match is None else [f"{score.exact_match:.0%} of {score.rows}"]
        values = [f"{score.metrics[metric]:.4f}" if metric in score.metrics else "" for metric in metrics]
        losses = [f"{score.sources[source]['eval_loss']:.4f}" for source in sources]
        rows.append((score.name, f"{score.eval_loss:.4f}", f"{score.eval_perplexity:,.3f}", *matches, *values, *losses))
    return rows
