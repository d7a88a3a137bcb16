"""Prepare the examples and the plan of a run, before the model is loaded."""

from __future__ import annotations

import dataclasses

from lora_accel.batching.order import source_count
from lora_accel.config.plan import Plan, make_plan
from lora_accel.config.schema import RunConfig
from lora_accel.console import format_table, short_names
from lora_accel.data.audit import SourceLedger, ledger_lines
from lora_accel.data.chat import ChatTemplate, Example
from lora_accel.data.dataset import Dataset, Recipe
from lora_accel.data.formats import Message
from lora_accel.data.splits import examples_by_name, load_splits
from lora_accel.logs import logger
from lora_accel.setup.recipe import make_recipe


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """The examples of a run and the plan that follows from them."""

    recipe: Recipe
    dataset: Dataset
    eval_sources: dict[str, list[Example]]
    """Evaluation examples by the name of their source."""
    eval_ledgers: list[SourceLedger]
    prompts: list[list[int]]
    """Token ids of `evaluation.prompts`."""
    plan: Plan

    @property
    def template(self) -> ChatTemplate:
        """The chat template of training, with its tokenizer."""
        return self.recipe.template()

    @property
    def pad_id(self) -> int:
        """The padding token."""
        pad_id: int = self.template.tokenizer.pad_token_id
        return pad_id


def prepare_data(config: RunConfig, num_ranks: int = 1) -> PreparedData:
    """Read and tokenize the rows, or take them from the cache, and derive the plan.

    Args:
        num_ranks: number of processes that will train.

    Raises:
        DataError: a file, a row or the template is wrong, or too many rows are unusable.
    """
    recipe = make_recipe(config)
    dataset, evaluation, eval_ledgers = load_splits(config.data, config.seed, recipe)
    eval_sources = examples_by_name(evaluation)
    plan = make_plan(
        config,
        num_ranks=num_ranks,
        num_examples=sum(source_count(len(source.examples), source.weight) for source in dataset.sources),
        num_tokens=sum(round(x.weight * int(x.examples.lengths.sum())) for x in dataset.sources),
        num_supervised_tokens=sum(round(x.weight * int(x.examples.num_supervised.sum())) for x in dataset.sources),
        num_eval_examples=sum(map(len, eval_sources.values())),
    )
    prompts = [recipe.template().encode_prompt((Message("user", prompt),)) for prompt in config.evaluation.prompts]
    return PreparedData(recipe, dataset, eval_sources, eval_ledgers, prompts, plan)


def log_data(data: PreparedData) -> None:
    """Log the ledger, how many examples of each source an epoch uses, and the plan."""
    ledgers, sources = [*data.dataset.ledgers, *data.eval_ledgers], data.dataset.sources
    logger.info(format_table("data", ledger_lines(ledgers)))
    if len(sources) > 1 or any(source.weight != 1 for source in sources):
        names = short_names([path for *_, path in sources])
        shares = [
            f"{source_count(len(x), weight):,} of {len(x):,} examples (weight {weight:g})" for x, weight, _ in sources
        ]
        logger.info(format_table("examples per epoch", zip(names, shares, strict=True)))
    logger.info(format_table("plan", data.plan.table()))
    if any(not ledger.num_ended and ledger.format not in ("text", "tokens") for ledger in data.dataset.ledgers):
        logger.info(
            "note: the chat template ends a turn without a special token, so the adapter will not learn to stop"
        )
