"""Which evaluated step of a run is the best, and when a run stops early: functions of its evaluations alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from typing_extensions import Self

from lora_accel.config.schema import RunConfig

Evaluation = Mapping[str, float]
"""The metrics of an evaluation by name (eval_loss, eval_tokens, …), and `step`, after which it was made."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """The metric that selects a checkpoint.

    The evaluation before the first step does not take part: it was not saved. Neither does one of other evaluation
    data, which a run may get when it resumes: its metrics cannot be compared.
    """

    metric: str
    is_larger_better: bool
    keeps_best: bool
    """Whether the best checkpoint is kept."""
    patience: int | None
    min_delta: float

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        """Return the selection of a run config."""
        checkpoint, evaluation = config.checkpoint, config.evaluation
        metric = checkpoint.keep_best or "eval_loss"
        is_larger_better = (
            evaluation.metric_directions.get(metric) if checkpoint.best_is == "auto" else checkpoint.best_is == "max"
        )
        return cls(metric, is_larger_better is True, checkpoint.keeps_best, evaluation.patience, evaluation.min_delta)

    def best(self, evaluations: Sequence[Evaluation]) -> Evaluation | None:
        """Return the evaluation with the best metric, the earliest of equal ones; None if none has a finite one.

        Args:
            evaluations: in the order of their steps.
        """
        best = None
        for evaluation in _comparable(evaluations):
            if self._is_better(evaluation, best):
                best = evaluation
        return best

    def step_to_keep(self, evaluations: Sequence[Evaluation]) -> int | None:
        """Return the step whose checkpoint must not be deleted; None = there is none."""
        best = self.best(evaluations) if self.keeps_best else None
        return None if best is None else int(best["step"])

    def has_stalled(self, evaluations: Sequence[Evaluation]) -> bool:
        """Whether the last `patience` evaluations did not improve the metric by more than `min_delta`."""
        reference, num_without = None, 0
        for evaluation in _comparable(evaluations):
            if self.metric not in evaluation and "eval_loss" in evaluation:
                continue  # its replies failed
            num_without += 1
            if self._is_better(evaluation, reference, self.min_delta):
                reference, num_without = evaluation, 0
        return self.patience is not None and num_without >= self.patience

    def _is_better(self, evaluation: Evaluation, than: Evaluation | None, by: float = 0.0) -> bool:
        value = evaluation.get(self.metric, math.nan)
        if than is None or not math.isfinite(value):
            return math.isfinite(value)
        change = value - than[self.metric]
        return (change if self.is_larger_better else -change) > by


def _comparable(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Return the evaluations of the same data as the last one."""
    return [entry for entry in evaluations if entry.get("eval_tokens") == evaluations[-1].get("eval_tokens")]
