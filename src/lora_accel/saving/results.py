"""The last evaluation of a run and its losses, from its metrics.jsonl, for the model card."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_accel.saving.metrics_file import METRICS_FILE, eval_metrics, read_valid_lines

BARS = "▁▂▃▄▅▆▇█"
MAX_BARS = 40


class RunResults(NamedTuple):
    """The result of a run."""

    evaluation: dict[str, Any] | None = None
    """The `eval` line of metrics.jsonl; None = the run did not evaluate."""
    losses: tuple[tuple[int, float], ...] = ()
    """(step, loss), by step."""


def read_results(run: Path, step: int | None = None) -> RunResults:
    """Return the results of a run. Lines that cannot be read are ignored, since they are only shown.

    Args:
        run: its folder.
        step: the last step to consider; None = all.
    """
    evaluation, losses = None, {}
    for line in read_valid_lines(run / METRICS_FILE):
        at = line["step"]
        if step is not None and at > step:
            continue
        if line["kind"] == "eval":
            evaluation = line
        loss = line.get("loss")
        if line["kind"] == "train" and isinstance(loss, float) and math.isfinite(loss):
            losses[at] = loss  # after a resume, the later line of a step replaces the earlier
    return RunResults(evaluation, tuple(sorted(losses.items())))


def loss_curve(results: RunResults) -> str:
    """Return the losses as a line of at most `MAX_BARS` bars, each the mean of some steps; empty if there are none."""
    losses = [loss for _, loss in results.losses]
    count = min(MAX_BARS, len(losses))
    edges = [round(number * len(losses) / count) for number in range(count + 1)] if count else [0]
    means = [sum(losses[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    if not means:
        return ""
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def evaluation_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Return the metrics of an evaluation by source, that of all sources first: (name, {metric: value})."""
    sources = evaluation.get("sources")
    parts = {"all": evaluation} | (sources if isinstance(sources, dict) and len(sources) > 1 else {})
    return [
        (str(name), {key.removeprefix("eval_"): value for key, value in eval_metrics(values).items()})
        for name, values in parts.items()
        if isinstance(values, Mapping)
    ]
