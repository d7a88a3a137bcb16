"""The plan of a run: number of steps, examples per step, and when to log, save and evaluate."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lora_accel.config.counts import scale
from lora_accel.config.schema import RunConfig
from lora_accel.errors import join_and


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps of a run, for a dataset and a number of ranks."""

    num_ranks: int
    num_examples: int
    """Examples per epoch, after source weights."""
    num_eval_examples: int
    num_tokens: int
    """Tokens per epoch, without padding."""
    num_supervised_tokens: int
    batch_size: int
    """Examples per step, over all ranks."""
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    log_every: int
    save_every: float
    """In steps. A part of an epoch need not be a number of steps; see `is_due`."""
    evaluate_every: float | None
    """In steps; None = after the last step only."""
    evaluates: bool
    """Whether there are evaluation examples, prompts or neutral text."""
    evaluates_at_start: bool
    """Whether the first evaluation is before the first step."""
    saves_evaluated: bool
    """Whether every evaluated step is saved, because one of them is selected by its metrics."""

    def position(self, step: int) -> tuple[int, int]:
        """Return (epoch, step within the epoch) of the 0-based step."""
        return divmod(step, self.steps_per_epoch)

    def examples_after(self, step: int) -> int:
        """Return how many examples the first `step` steps consume. The last step of an epoch may be short."""
        epochs, steps = self.position(step)
        return epochs * self.num_examples + steps * self.batch_size

    def logs_after(self, step: int) -> bool:
        """Whether a line is logged after `step` steps."""
        return step % self.log_every == 0 or step == self.total_steps

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is saved after `step` steps."""
        if self.saves_evaluated and step > 0 and self.evaluates_after(step):
            return True
        return is_due(step, self.save_every) or step == self.total_steps

    def evaluates_after(self, step: int) -> bool:
        """Whether the model is evaluated after `step` steps; 0 = before the first one."""
        if step == 0:
            return self.evaluates and self.evaluates_at_start
        return self.evaluates and (is_due(step, self.evaluate_every) or step == self.total_steps)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return dataclasses.asdict(self)

    def _describe_warmup(self) -> str:
        if self.warmup_steps <= self.total_steps:
            return f"{self.warmup_steps} warm-up step(s)"
        return f"{self.warmup_steps} warm-up steps, so the learning rate does not reach its peak"

    def table(self) -> list[tuple[str, str]]:
        """Return (name, value) rows to print."""
        share = self.num_supervised_tokens / max(1, self.num_tokens)
        times = ["before the first step"] if self.evaluates_at_start else []
        times += [f"every {self.evaluate_every:,.10g} steps"] if self.evaluate_every else []
        saves = [f"every {self.save_every:,.10g} steps", *(["after each evaluation"] if self.saves_evaluated else [])]
        return [
            ("examples", f"{self.num_examples:,} per epoch, {self.num_eval_examples:,} for evaluation"),
            ("tokens", f"{self.num_tokens:,} per epoch, {share:.1%} supervised"),
            ("step", f"{self.batch_size} examples over {self.num_ranks} rank(s)"),
            (
                "steps",
                f"{self.total_steps:,} = {self.total_steps / self.steps_per_epoch:.4g} epoch(s) of "
                f"{self.steps_per_epoch:,} steps; {self._describe_warmup()}",
            ),
            ("checkpoints", join_and([*saves, "after the last step"])),
            ("evaluation", join_and([*times, "after the last step"]) if self.evaluates else "none"),
        ]


def is_due(step: int, every: float | None) -> bool:
    """Whether something that happens every `every` steps happens after `step` steps.

    Its k-th time is after the first step that is not before k * every: every 3.5 steps is after steps 4, 7, 11, 14.

    Args:
        every: None = never.
    """
    if every is None or step <= 0:
        return False
    # The small number makes up for the rounding of the division, so that a multiple of 2.1 is one.
    return math.floor(step / every + 1e-9) > math.floor((step - 1) / every + 1e-9)


def make_plan(
    config: RunConfig,
    *,
    num_ranks: int,
    num_examples: int,
    num_tokens: int,
    num_supervised_tokens: int,
    num_eval_examples: int = 0,
) -> Plan:
    """Return the plan of a run.

    Warm-up steps are rounded up, as in transformers, so a ratio above 0 gives at least one.

    Args:
        num_examples, num_tokens, num_supervised_tokens: per epoch.
    """
    training = config.training
    batch_size = training.examples_per_step(num_ranks)
    steps_per_epoch = math.ceil(num_examples / batch_size)
    total_steps = training.max_steps or math.ceil(scale(training.epochs, steps_per_epoch))
    warmup_steps = training.warmup_steps
    if warmup_steps is None:
        warmup_steps = math.ceil(scale(training.warmup_ratio, total_steps))
    checkpoint, evaluation = config.checkpoint, config.evaluation
    return Plan(
        num_ranks=num_ranks,
        num_examples=num_examples,
        num_eval_examples=num_eval_examples,
        num_tokens=num_tokens,
        num_supervised_tokens=num_supervised_tokens,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        log_every=config.logging.every_steps,
        save_every=checkpoint.every_steps or scale(checkpoint.every_epochs or 0, steps_per_epoch),
        evaluate_every=evaluation.every_steps or scale(evaluation.every_epochs or 0, steps_per_epoch) or None,
        evaluates=num_eval_examples > 0 or bool(evaluation.prompts or evaluation.neutral),
        evaluates_at_start=evaluation.at_start,
        saves_evaluated=checkpoint.keeps_best or evaluation.patience is not None,
    )
