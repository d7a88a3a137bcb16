"""Which charts a report has, and the lines in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lora_accel.console import short_names
from lora_accel.pages import make_readable
from lora_accel.report.curves import curve_of, smooth, smoothing_distance, thin_out
from lora_accel.report.figures import Chart, Line, Marks
from lora_accel.report.metrics_log import TOTAL, Series
from lora_accel.report.read import RunRecord

MIN_SMOOTHED = 20
"""Points from which a loss curve is smoothed too."""
SKIP_EVENTS = ("skipped", "overflow")
NOT_CHARTED = ("eval_loss", "eval_perplexity", "eval_tokens")
"""Eval values without a chart of their own: the first has one per source, the others follow from it or are constant."""


class Quantity(NamedTuple):
    """A value of train lines that has a chart."""

    name: str
    title: str
    y_label: str
    scale: float = 1.0
    may_be_log: bool = False
    begins_at_zero: bool = False


QUANTITIES = (
    Quantity("learning_rate", "Learning rate", "learning rate"),
    Quantity("grad_norm", "Gradient norm, before clipping", "norm", may_be_log=True),
    Quantity("tokens_per_second", "Throughput", "tokens/s", begins_at_zero=True),
    Quantity("peak_memory_bytes", "Peak memory of the main process", "GB", scale=1e-9, begins_at_zero=True),
)


def charts_of(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Chart]:
    """Return the charts of one run, or of several with a line for each. All show the same range of steps.

    Args:
        names: one per run, for the legend of several.
    """
    names = [make_readable(name) for name in names]
    charts = [loss_chart(runs, names), *_eval_charts(runs, names)]
    charts += [_quantity_chart(quantity, runs, names) for quantity in QUANTITIES]
    charts = [chart for chart in charts if any(len(line.curve[0]) for line in chart.lines)]
    last_step = max((line.curve[0][-1] for chart in charts for line in chart.lines if len(line.curve[0])), default=0.0)
    return [dataclasses.replace(chart, last_step=float(last_step)) for chart in charts]


def loss_chart(runs: Sequence[RunRecord], names: Sequence[str]) -> Chart:
    """Return the chart of the training loss: as logged, and smoothed."""
    lines: list[Line] = []
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        curve = curve_of(run.log.train.get("loss", Series()))
        raw, label = thin_out(curve), name if len(runs) > 1 else "as logged"
        if len(curve[0]) < MIN_SMOOTHED:
            lines.append(Line(raw, label if len(runs) > 1 else "", number))
            continue
        distance = smoothing_distance(len(curve[0]))
        smoothed = thin_out((curve[0], smooth(curve[1], distance)))
        lines.append(Line(raw, "" if len(runs) > 1 else label, number, is_faint=True))
        lines.append(Line(smoothed, name if len(runs) > 1 else f"smoothed, ± {distance} points", number))
    return Chart("Training loss", "loss per supervised token", lines, marks_of(runs))


def marks_of(runs: Sequence[RunRecord]) -> list[Marks]:
    """Return what happened at single steps of one run; nothing for several, whose marks would be mistaken."""
    if len(runs) > 1:
        return []
    log = runs[0].log
    marks = [
        Marks(log.steps_of("resume"), "resumed", "resume"),
        Marks(log.steps_of(*SKIP_EVENTS), "step skipped", "skipped"),
        Marks(log.steps_of("early_stop"), "stopped early", "stop"),
    ]
    return [each for each in marks if each.steps]


def _eval_charts(runs: Sequence[RunRecord], names: Sequence[str]) -> Iterator[Chart]:
    metrics = list(dict.fromkeys(metric for run in runs for metric in run.log.evaluations))
    best = runs[0].best_checkpoint() if len(runs) == 1 else None
    for metric in ["eval_loss", *(metric for metric in metrics if metric not in NOT_CHARTED)]:
        title = metric.removeprefix("eval_").replace("_", " ")
        star = (best[0].step, best[2]) if best is not None and best[1] == metric else None
        yield Chart(
            make_readable(f"Evaluation: {title}"),
            "loss per supervised token" if metric == "eval_loss" else make_readable(title),
            list(_eval_lines(metric, runs, names)),
            [marks for marks in marks_of(runs) if marks.style != "skipped"],
            star=star,
        )


def _eval_lines(metric: str, runs: Sequence[RunRecord], names: Sequence[str]) -> Iterator[Line]:
    """Yield a line per source for one run, per run for several."""
    if len(runs) > 1:
        for number, (run, name) in enumerate(zip(runs, names, strict=True)):
            series = run.log.evaluations.get(metric, {}).get(TOTAL)
            if series is not None:
                yield Line(thin_out(curve_of(series)), name, number, has_markers=True)
        return
    sources = runs[0].log.evaluations.get(metric, {})
    labels = short_names(["all sources" if source == TOTAL else source for source in sources])
    for number, (label, series) in enumerate(zip(labels, sources.values(), strict=True)):
        yield Line(
            thin_out(curve_of(series)), make_readable(label) if len(sources) > 1 else "", number, has_markers=True
        )


def _quantity_chart(quantity: Quantity, runs: Sequence[RunRecord], names: Sequence[str]) -> Chart:
    lines = []
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        steps, values = curve_of(run.log.train.get(quantity.name, Series()))
        label = name if len(runs) > 1 else ""
        if len(steps):
            lines.append(Line(thin_out((steps, values * quantity.scale)), label, number))
    marks = [mark for mark in marks_of(runs) if quantity.name != "peak_memory_bytes" or mark.style == "resume"]
    if quantity.name == "grad_norm" and len(runs) == 1:
        lines += _clipping_line(runs[0], lines)
    return Chart(
        quantity.title,
        quantity.y_label,
        lines,
        marks,
        may_be_log=quantity.may_be_log,
        begins_at_zero=quantity.begins_at_zero,
    )


def _clipping_line(run: RunRecord, lines: Sequence[Line]) -> list[Line]:
    """Return `training.max_grad_norm` as a line, if some gradient was clipped."""
    limit = run.option("training", "max_grad_norm")
    if not lines or not isinstance(limit, (int, float)):
        return []
    steps, norms = lines[0].curve
    if not np.nanmax(norms, initial=0.0) > limit:
        return []
    return [Line((steps[[0, -1]], np.full(2, float(limit))), f"max_grad_norm {limit:g}", 1)]
