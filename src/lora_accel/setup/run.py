"""Build the `Run` for the training loop from the prepared parts: batches, metrics, checkpointer and evaluator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from lora_accel.batching.batches import Batches, BatchOptions, step_batch
from lora_accel.config.plan import Plan
from lora_accel.config.schedules import learning_rate
from lora_accel.config.schema import RunConfig, chosen_options
from lora_accel.saving.provenance import Provenance
from lora_accel.saving.status import Note
from lora_accel.setup.data import PreparedData
from lora_accel.setup.fingerprint import evaluation_fingerprint
from lora_accel.setup.model import PreparedModel
from lora_accel.setup.resume import ResumePoint
from lora_accel.setup.scored_prompts import count_bytes
from lora_accel.training.checkpointer import Checkpointer
from lora_accel.training.evaluator import Evaluator
from lora_accel.training.metrics import Metrics
from lora_accel.training.replies import ReplyGenerator
from lora_accel.training.step import Run
from lora_accel.training.stopping import Stop

REPLY_FACTOR = 4
"""Tokens of a batch of replies relative to a micro-batch: keys and values take less than what training saves."""


def make_run(
    config: RunConfig,
    data: PreparedData,
    accelerator: Accelerator,
    prepared: PreparedModel,
    provenance: Provenance,
    start: ResumePoint,
    stop: Stop,
    note_status: Note,
) -> Run:
    """Build the `Run`. Opens metrics.jsonl."""
    options = BatchOptions.from_config(
        config.training,
        pad_id=data.pad_id,
        packed=prepared.packed,
        min_saving=prepared.min_saving,
        row_multiple=prepared.row_multiple,
        rank=accelerator.process_index,
        num_ranks=data.plan.num_ranks,
    )
    metrics = Metrics(accelerator, Path(config.output_dir), data.plan, start.progress.step)
    return Run(
        accelerator=accelerator,
        backend=prepared.backend,
        model=prepared.model,
        trainable=prepared.trainable,
        optimizer=prepared.optimizer,
        dropout_keys=prepared.dropout_keys,
        training=config.training,
        plan=data.plan,
        seed=config.seed,
        learning_rate=_learning_rate(config, data.plan),
        batches=Batches(
            data.dataset, data.plan, options, seed=config.seed, group_by_prefix=config.data.group_by_prefix
        ),
        evaluator=_evaluator(config, data, accelerator, prepared, options),
        checkpointer=Checkpointer(
            accelerator=accelerator,
            model=prepared.model,
            optimizer=prepared.optimizer,
            loss_scale=start.loss_scale,
            config=config,
            plan=data.plan,
            provenance=provenance,
            parent_hash=start.parent_hash,
            parent_path=start.parent_path,
            sync_log=metrics.sync,
            note=note_status,
        ),
        metrics=metrics,
        stop=stop,
        loss_scale=start.loss_scale,
    )


def _learning_rate(config: RunConfig, plan: Plan) -> Callable[[int], float]:
    """Return the learning rate as a function of the step."""
    return functools.partial(
        learning_rate,
        peak=config.training.learning_rate,
        scheduler=config.training.scheduler,
        warmup_steps=plan.warmup_steps,
        total_steps=plan.total_steps,
        from_zero=config.training.warmup_from_zero,
        options=chosen_options(config.training.scheduler_options),
    )


def _evaluator(
    config: RunConfig, data: PreparedData, accelerator: Accelerator, prepared: PreparedModel, options: BatchOptions
) -> Evaluator:
    tokenizer, evaluation = data.template.tokenizer, config.evaluation
    num_bytes = None
    if "bits_per_byte" in evaluation.metrics:
        num_bytes = {name: count_bytes(examples, tokenizer) for name, examples in data.eval_sources.items()}
    return Evaluator(
        accelerator=accelerator,
        model=prepared.model,
        sources={name: step_batch(examples, options) for name, examples in data.eval_sources.items()},
        num_bytes=num_bytes,
        neutral=step_batch(data.neutral, options) if data.neutral else None,
        scorers=data.scorers,
        scored_prompts=data.scored_prompts,
        reply_generator=ReplyGenerator(
            accelerator=accelerator,
            model=prepared.model,
            tokenizer=tokenizer,
            ends=data.template.end_ids,
            max_new_tokens=evaluation.max_new_tokens,
            sampling=evaluation.generation,
            max_tokens=REPLY_FACTOR * options.max_tokens,
            is_sharded=prepared.backend.shards_parameters,
        ),
        prompts=evaluation.prompts,
        prompt_ids=data.prompts,
        fingerprint=evaluation_fingerprint(config, data),
    )
