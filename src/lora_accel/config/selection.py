"""Which evaluated step of a run is the best, and when a run stops early: functions of its evaluations alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from typing_extensions import Self

from lora_accel.config.schema import RunConfig

Evaluation = Mapping[str, float]
"""The metrics of an evaluation by name (eval_loss, eval_tokens, …), `step`, after which it was made, and `fingerprint`,
a number that identifies the data and the settings behind its metric (setup/fingerprint.py)."""
MAX_RECORDED = 500
"""Evaluations that a run records, so that the state of its checkpoints stays small."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """The metric that selects a checkpoint.

    The evaluation before the first step does not take part: it was not saved. Neither does one of other evaluation
    data or settings, which a run may get when it resumes: its metrics cannot be compared.
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
        _, num_without = self._last_improvement(self._counted(evaluations))
        return self.patience is not None and num_without >= self.patience

    def shorten(self, evaluations: list[dict[str, float]]) -> list[dict[str, float]]:
        """Return the evaluations on which the choice of the best and the early stop still depend.

        Of a list that is too long these are the last improvement and what followed it: the best, which is not before
        it, and the newest, at least as many as `patience`. So both choices are the same as with all evaluations.
        """
        limit = max(MAX_RECORDED, self.patience or 0)
        if len(evaluations) <= limit:
            return evaluations
        counted = self._counted(evaluations)
        improvement, num_without = self._last_improvement(counted)
        newest = counted[len(counted) - min(num_without, limit) :]
        decisive: list[Evaluation | None] = [improvement, self.best(evaluations), *newest, evaluations[-1]]
        steps = {entry["step"] for entry in decisive if entry is not None}
        return [entry for entry in evaluations if entry["step"] in steps]

    def _counted(self, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        """Return the evaluations that count for `patience`: comparable ones, unless their replies failed."""
        return [x for x in _comparable(evaluations) if self.metric in x or "eval_loss" not in x]

    def _last_improvement(self, evaluations: Sequence[Evaluation]) -> tuple[Evaluation | None, int]:
        """Return the last evaluation that improved by more than `min_delta`, and how many followed it."""
        reference, num_without = None, 0
        for evaluation in evaluations:
            num_without += 1
            if self._is_better(evaluation, reference, self.min_delta):
                reference, num_without = evaluation, 0
        return reference, num_without

    def _is_better(self, evaluation: Evaluation, than: Evaluation | None, by: float = 0.0) -> bool:
        value = evaluation.get(self.metric, math.nan)
        if than is None or not math.isfinite(value):
            return math.isfinite(value)
        change = value - than[self.metric]
        return (change if self.is_larger_better else -change) > by


def _comparable(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Return the evaluations of the same data and settings as the last one.

    Earlier versions recorded no fingerprint. Of these, the number of evaluated tokens is compared.
    """
    return [entry for entry in evaluations if _is_comparable(entry, evaluations[-1])]


def _is_comparable(one: Evaluation, other: Evaluation) -> bool:
    key = "fingerprint" if "fingerprint" in one and "fingerprint" in other else "eval_tokens"
    return one.get(key) == other.get(key)
