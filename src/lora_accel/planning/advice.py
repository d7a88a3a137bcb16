"""Advice about a plan, only where it is sure. Each rule is a pure function; docs/planning.md gives its reason."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_accel.config.plan import Plan
from lora_accel.config.schema import RunConfig
from lora_accel.data.audit import TRUNCATED, SourceLedger

MIN_RATE, MAX_RATE = 1e-5, 5e-3
"""Rates outside are a factor of ten from those of LoRA's and QLoRA's authors; see docs/planning.md."""
MAX_WEIGHTS_PER_TOKEN = 100
"""Trained parameters per supervised token of an epoch beyond which an adapter can store its data many times over."""
LONG_RUN_STEPS = 1000
"""A run of so many steps takes hours on most machines."""


def advise(config: RunConfig, plan: Plan, ledgers: Sequence[SourceLedger], num_trained: int | None = None) -> list[str]:
    """Return advice about a plan, most important first; empty if there is none.

    Args:
        num_trained: trained parameters; None = unknown.
    """
    advice = [
        warmup_advice(plan),
        rate_advice(config, plan),
        truncation_advice(config, ledgers),
        batch_advice(plan),
        checkpoint_advice(plan),
        evaluation_advice(config, plan),
        capacity_advice(plan, num_trained),
    ]
    return [text for text in advice if text is not None]


def warmup_advice(plan: Plan) -> str | None:
    """Advise on a warm-up that takes the full run: the rate never reaches its peak."""
    if plan.warmup_steps < plan.total_steps or plan.total_steps == 1:
        return None
    return (
        f"the warm-up ({plan.warmup_steps:,} steps) is as long as the run ({plan.total_steps:,} steps), so the "
        "learning rate only rises; lower training.warmup_steps or training.warmup_ratio"
    )


def rate_advice(config: RunConfig, plan: Plan) -> str | None:
    """Advise on a learning rate far from those with which LoRA is trained."""
    rate = config.training.learning_rate
    if "adamw" not in config.training.optimizer or MIN_RATE <= rate <= MAX_RATE:
        return None  # the bounds are those of AdamW
    effect = "the loss may diverge" if rate > MAX_RATE else f"{plan.total_steps:,} steps may hardly change the adapter"
    return f"training.learning_rate={rate:g}: LoRA's and QLoRA's authors train with 1e-4 to 5e-4; {effect}"


def truncation_advice(config: RunConfig, ledgers: Sequence[SourceLedger]) -> str | None:
    """Advise on data of which most rows are truncated."""
    num_rows = sum(ledger.num_rows for ledger in ledgers)
    num_truncated = sum(len(ledger.buckets.get(TRUNCATED, ())) for ledger in ledgers)
    if 2 * num_truncated <= num_rows:
        return None
    return (
        f"{num_truncated:,} of {num_rows:,} rows are truncated at data.max_length={config.data.max_length:,}, so what "
        "follows is not trained; raise it, or set data.overlong=split"
    )


def batch_advice(plan: Plan) -> str | None:
    """Advise on a step of more examples than the dataset has: every step takes all of them."""
    if plan.batch_size <= plan.num_examples:
        return None
    return (
        f"a step takes {plan.batch_size:,} examples, but the dataset has {plan.num_examples:,}: each epoch is one step "
        f"of {plan.num_examples:,}; lower training.batch_size for more steps"
    )


def checkpoint_advice(plan: Plan) -> str | None:
    """Advise on a long run whose only checkpoint is the last: an interruption would lose all of it."""
    has_evaluated = plan.saves_evaluated and plan.evaluates and (plan.evaluate_every or math.inf) < plan.total_steps
    if plan.total_steps < LONG_RUN_STEPS or plan.save_every < plan.total_steps or has_evaluated:
        return None
    return (
        f"the only checkpoint is saved at the end, after {plan.total_steps:,} steps; lower checkpoint.every_steps, so "
        "that a crash costs less"
    )


def evaluation_advice(config: RunConfig, plan: Plan) -> str | None:
    """Advise on an interval of evaluations that is longer than the run."""
    if plan.evaluate_every is None or plan.evaluate_every <= plan.total_steps:
        return None
    section = config.evaluation
    option = f"every_steps={section.every_steps:,}" if section.every_steps else f"every_epochs={section.every_epochs}"
    when = "before its first step and at the end" if plan.evaluates_at_start else "at the end"
    return (
        f"evaluation.{option} is never reached: the run has {plan.total_steps:,} steps, so it is evaluated only {when}"
    )


def capacity_advice(plan: Plan, num_trained: int | None) -> str | None:
    """Advise on an adapter that has far more parameters than there are supervised tokens to learn from."""
    if num_trained is None or num_trained <= MAX_WEIGHTS_PER_TOKEN * plan.num_supervised_tokens:
        return None
    ratio = num_trained / max(1, plan.num_supervised_tokens)
    how = "Hold out rows (data.eval_fraction) to see it, or"
    if plan.num_eval_examples:
        how = "If the loss on the evaluation rows rises, keep the best checkpoint (checkpoint.keep_best), or"
    return (
        f"{num_trained:,} parameters are trained on {plan.num_supervised_tokens:,} supervised tokens, {ratio:,.0f} for "
        f"each: the adapter can memorize them. {how} lower adapter.r"
    )
