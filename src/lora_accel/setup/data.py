"""Prepare the examples and the plan of a run, before the model is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lora_accel.batching.order import source_count
from lora_accel.config.metrics import load_metrics
from lora_accel.config.plan import Plan, make_plan
from lora_accel.config.schema import DataSection, RunConfig
from lora_accel.console import format_table, short_names
from lora_accel.data.audit import USED, SourceLedger, ledger_lines
from lora_accel.data.chat import Example
from lora_accel.data.dataset import Dataset, Recipe, Source
from lora_accel.data.records import Message
from lora_accel.data.splits import examples_by_name, load_splits
from lora_accel.data.template import ChatTemplate
from lora_accel.errors import ConfigError, did_you_mean
from lora_accel.logs import logger
from lora_accel.model.tokenizer import padding_id
from lora_accel.setup.neutral import neutral_examples
from lora_accel.setup.recipe import make_recipe
from lora_accel.setup.scored_prompts import check_scorers, load_scored_prompts
from lora_accel.setup.sizes import check_examples, check_prompts
from lora_accel.training.scoring import ScoredPrompt, Scorers


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """The examples of a run and the plan that follows from them."""

    recipe: Recipe
    dataset: Dataset
    eval_sources: dict[str, list[Example]]
    """Evaluation examples by the name of their source."""
    eval_ledgers: list[SourceLedger]
    sources: list[Source]
    """One for each of data.train. If all its rows are held out, it has no examples and is not in `dataset`."""
    prompts: list[list[int]]
    """Token ids of `evaluation.prompts`."""
    plan: Plan
    vocab_size: int
    """Tokens that the model has."""
    scorers: Scorers
    """Those of `evaluation.metrics` that need replies."""
    scored_prompts: list[ScoredPrompt]
    """What they ask; empty if there are none of them."""
    neutral: list[Example]
    """The neutral text; empty if there is none."""

    @property
    def template(self) -> ChatTemplate:
        """The chat template of training, with its tokenizer."""
        return self.recipe.template()

    @property
    def pad_id(self) -> int:
        """The padding token."""
        return padding_id(self.template.tokenizer, self.vocab_size)


def prepare_data(config: RunConfig, num_ranks: int = 1) -> PreparedData:
    """Read and tokenize the rows, or take them from the cache, and derive the plan.

    Args:
        num_ranks: number of processes that will train.

    Raises:
        DataError: a file, a row or the template is wrong, too many rows are unusable, or the model lacks a token.
        ConfigError: an example is longer than the model supports, or a metric cannot be computed.
    """
    scorers = load_metrics(config.evaluation.metrics)
    recipe = make_recipe(config)
    train, evaluation, eval_ledgers = load_splits(config.data, config.seed, recipe)
    dataset = train._replace(sources=[source for source in train.sources if len(source.examples)])
    eval_sources = examples_by_name(evaluation)
    plan = make_plan(
        config,
        num_ranks=num_ranks,
        num_examples=sum(source_count(len(source.examples), source.weight) for source in dataset.sources),
        num_tokens=sum(round(x.weight * int(x.examples.lengths.sum())) for x in dataset.sources),
        num_supervised_tokens=sum(round(x.weight * int(x.examples.num_supervised.sum())) for x in dataset.sources),
        num_eval_examples=sum(map(len, eval_sources.values())),
    )
    is_raw = all(ledger.num_raw == ledger.num_examples for ledger in dataset.ledgers)
    prompts = [_encode_prompt(prompt, recipe.template(), is_raw=is_raw) for prompt in config.evaluation.prompts]
    examples = [*(source.examples for source in dataset.sources), *(source.examples for source in evaluation)]
    sizes = check_examples(config, recipe.template, examples)
    named_prompts = {f"evaluation.prompts[{number}]": ids for number, ids in enumerate(prompts)}
    if prompts:
        check_prompts(config.model, recipe.template().tokenizer, named_prompts, sizes)
    scored_prompts: list[ScoredPrompt] = []
    if scorers:
        limit = config.evaluation.num_replies
        scored_prompts = load_scored_prompts(evaluation, recipe.template(), limit=limit, seed=config.seed)
    returned, selected = check_scorers(scorers, scored_prompts), config.checkpoint.keep_best
    if selected is not None and config.evaluation.metric_directions.get(selected) is None and selected not in returned:
        hint = did_you_mean(selected, returned)
        raise ConfigError(f"checkpoint.keep_best: no function of evaluation.metrics returns {selected}{hint}")
    return PreparedData(
        recipe,
        dataset,
        eval_sources,
        eval_ledgers,
        train.sources,
        prompts,
        plan,
        sizes.vocab_size,
        scorers=scorers,
        scored_prompts=scored_prompts,
        neutral=neutral_examples(config, recipe.template, sizes),
    )


def _encode_prompt(prompt: str, template: ChatTemplate, *, is_raw: bool) -> list[int]:
    return template.encode_text(prompt) if is_raw else template.encode_prompt((Message("user", prompt),))


def log_data(config: RunConfig, data: PreparedData) -> None:
    """Log the ledger, how many examples of each source an epoch uses, the plan, and what the data does not teach."""
    logger.info(format_table("data", ledger_lines([*data.dataset.ledgers, *data.eval_ledgers])))
    if len(data.sources) > 1 or any(source.weight != 1 for source in data.sources):
        names = short_names([source.path for source in data.sources])
        logger.info(format_table("examples per epoch", zip(names, map(describe_share, data.sources), strict=True)))
    logger.info(format_table("plan", data.plan.table()))
    if data.scored_prompts:
        logger.info(
            f"note: {', '.join(data.scorers)}: computed from replies to {len(data.scored_prompts):,} evaluation rows, "
            f"at most {config.evaluation.num_replies:,} of each source (evaluation.num_replies)"
        )
    for note in (*end_notes(data.dataset.ledgers, config.data), *raw_notes(data.dataset.ledgers)):
        logger.info(f"note: {note}")


def describe_share(source: Source) -> str:
    """Return how many examples of a source an epoch uses."""
    size = len(source.examples)
    if not size:
        return "0 (data.eval_fraction holds out all its rows)"
    return f"{source_count(size, source.weight):,} of {size:,} examples (weight {source.weight:g})"


def end_notes(ledgers: Sequence[SourceLedger], options: DataSection) -> list[str]:
    """Return a note for each source from which the model does not learn where an answer ends, with the reason."""
    notes = []
    for name, ledger in zip(short_names([ledger.path for ledger in ledgers]), ledgers, strict=True):
        if ledger.num_ended or ledger.format in ("text", "tokens"):
            continue
        if USED not in ledger.buckets and ledger.num_cut_tokens:
            limit = f"data.max_length={options.max_length}"
            reason = f"no example keeps the end of an answer: all are truncated at {limit}; raise it"
            if ledger.can_split and options.overlong != "split":
                reason += ", or set data.overlong=split"
        elif ledger.num_raw == ledger.num_examples:
            reason = "the tokenizer has no end token (eos_token), so the adapter will not learn to stop"
        else:
            reason = "the chat template ends a turn without a special token, so the adapter will not learn to stop"
        notes.append(f"{name}: {reason}")
    return notes


def raw_notes(ledgers: Sequence[SourceLedger]) -> list[str]:
    """Return a note if examples were tokenized without a chat template: `generate` and `chat` have to do the same."""
    num_raw, num_examples = (sum(getattr(x, name) for x in ledgers) for name in ("num_raw", "num_examples"))
    if not num_raw:
        return []
    if num_raw == num_examples:
        return [
            "rows are trained without a chat template: generate and chat pass prompts without it too (--template "
            "applies it)"
        ]
    return [
        f"{num_raw:,} of {num_examples:,} examples are trained without a chat template, but generate and chat apply it "
        "(--raw passes prompts without it)"
    ]
