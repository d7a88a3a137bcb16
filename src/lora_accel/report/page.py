"""The content of the page: tables of one run or of several, for the template."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_accel.config.schema import RunConfig
from lora_accel.console import format_seconds, short_names
from lora_accel.pages import make_readable
from lora_accel.report.charts import NOT_CHARTED, SKIP_EVENTS, charts_of
from lora_accel.report.figures import draw_svg
from lora_accel.report.metrics_log import TOTAL, Series, as_number
from lora_accel.report.read import RunRecord, options_as_text
from lora_accel.saving.listing import selection_of
from lora_accel.summary import next_lines

TEMPLATE = "page.html.jinja"
MAX_ROWS = 1000
"""Rows of a table; the page reports how many more there are."""
MAX_REPLY_STEPS = 25
"""Columns of replies: the first and the last evaluation, and others evenly between."""
MAX_TEXT = 2000
"""Characters of a reply or prompt."""
MAX_DROPPED = 200
"""Characters of the rows that were dropped for one reason."""
MAX_LABEL = 48
"""Characters of the name of a run among several, with the options in which it differs."""
NAMES = ("output_dir", "logging.project", "logging.run_name")
"""Options that name a run, and do not change it."""
NUMBER = re.compile(r"-?[\d,]+(\.\d+)?(e[-+]?\d+)?%?")
"""A cell that is a number, and aligned as one."""
STATES = {
    "done": "finished",
    "running": "in progress",
    "preempted": "stopped; the same command resumes it",
    "failed": "failed; the newest checkpoint is kept",
    "killed": "killed; the same command resumes it",
    "unknown": "state unknown",
}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text cells."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_more: int = 0
    """Rows that are left out."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A reply to a prompt."""

    text: str
    is_same: bool = False
    """Whether it is the reply of the column before."""
    is_error: bool = False


@dataclasses.dataclass(frozen=True)
class Replies:
    """Replies side by side: a row per prompt, a column per step or run."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell | None]]]
    note: str


def render_page(runs: Sequence[RunRecord]) -> str:
    """Return the page of one run, or of several compared. All text of the runs is escaped."""
    import jinja2
    from markupsafe import Markup

    def readable(value: object) -> object:
        return make_readable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=readable,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.tests["number"] = lambda text: NUMBER.fullmatch(text) is not None
    names = run_names(runs)
    values = run_page(runs[0]) if len(runs) == 1 else comparison_page(runs, names)
    charts = [Markup(draw_svg(chart)) for chart in charts_of(runs, names)]  # which escapes its labels
    return environment.get_template(TEMPLATE).render(charts=charts, **values)


def run_names(runs: Sequence[RunRecord]) -> list[str]:
    """Return a short name for each run, unique if its folder is, with the options in which it differs from most."""
    names = [run.folder.name or str(run.folder) for run in runs]
    if len(set(names)) < len(names):
        names = short_names([str(run.folder) for run in runs])
    options = differing_options([options_as_text(run.config) for run in runs])
    labels = []
    for number, name in enumerate(names):
        values = {
            option: found[number] for option, found in options.items() if Counter(found)[found[number]] * 2 <= len(runs)
        }
        texts = [f"{option.rpartition('.')[2]} {value}" for option, value in values.items()]
        labels.append(f"{name}: {', '.join(texts)}" if texts else name)
    return [label if len(label) <= MAX_LABEL else name for label, name in zip(labels, names, strict=True)]


def differing_options(configs: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Return the options in which configs differ, each with its values, except those that name a run."""
    options = dict.fromkeys(option for config in configs for option in config if option not in NAMES)
    values = {option: [config.get(option, "(none)") for config in configs] for option in options}
    return {option: found for option, found in values.items() if len(set(found)) > 1}


def run_page(run: RunRecord) -> dict[str, Any]:
    """Return the values of the template for one run."""
    model = str(run.option("model", "name_or_path") or "")
    return {
        "title": str(run.folder),
        "state": run.state,
        "subtitle": f"{STATES.get(run.state, run.state)}, step {run.step:,}"
        + (f" of {run.total_steps:,}" if run.total_steps else "")
        + (f"; model {model}" if model else ""),
        "facts": facts(run),
        "notes": [*evaluation_notes(run), *notes(run)],
        "next": next_commands(run),
        "replies": replies_by_step(run),
        "first_sections": [],
        "sections": [
            ("evaluation", "Evaluation", True, [("", evaluation_table(run))]),
            ("checkpoints", "Checkpoints", True, [("", checkpoint_table(run))]),
            ("merged", "Merged models", True, [("", merge_table(run))]),
            ("data", "Data", True, [("", ledger_table(run)), ("Dropped rows", dropped_table(run))]),
            ("events", "Events", False, [("", event_table(run))]),
            ("settings", "Launch settings and where they come from", False, [("", settings_table(run))]),
            ("config", "Config", False, [("", config_table(run))]),
            ("provenance", "Provenance", False, [("", provenance_table(run))]),
        ],
    }


def comparison_page(runs: Sequence[RunRecord], names: Sequence[str]) -> dict[str, Any]:
    """Return the values of the template for several runs."""
    lowest = [(value, name) for run, name in zip(runs, names, strict=True) if (value := lowest_loss(run)) is not None]
    loss, best = min(lowest, default=(None, ""))
    return {
        "title": f"{len(runs)} runs compared",
        "state": "",
        "subtitle": f"Lowest evaluation loss: {format_number(loss)}, {best}" if loss is not None else "",
        "facts": [],
        "notes": [f"{name}: {note}" for run, name in zip(runs, names, strict=True) for note in notes(run)],
        "next": [],
        "replies": replies_by_run(runs, names),
        "first_sections": [
            ("metrics", "Final metrics", True, [("", final_metrics_table(runs, names))]),
            ("config", "Config differences", True, [("", differences_table(runs, names))]),
        ],
        "sections": [],
    }


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """Return the values at the top of the page, as (name, value)."""
    log, best = run.log, run.best_checkpoint()
    rates = np.array(log.train.get("tokens_per_second", Series()).values)
    memory = log.train.get("peak_memory_bytes", Series()).values
    metrics = {name: sources.get(TOTAL, Series()) for name, sources in log.evaluations.items()}
    return [
        (name, value)
        for name, value in (
            ("eval loss", format_change(log.eval_loss())),
            *(
                (_metric_name(name), format_change(series))
                for name, series in metrics.items()
                if name not in NOT_CHARTED
            ),
            ("training loss", _training_change(log.train.get("loss", Series()))),
            (
                "best checkpoint",
                f"step {best[0].step:,}: {_metric_name(best[1])} {format_number(best[2])}" if best else "",
            ),
            ("training time", format_seconds(run.training_seconds) if run.training_seconds else ""),
            ("tokens/s, median", f"{np.median(rates):,.0f}" if len(rates) else ""),
            ("peak memory", f"{max(memory) / 1e9:.2f} GB" if len(memory) else ""),
        )
        if value
    ]


def evaluation_notes(run: RunRecord) -> list[str]:
    """Return in which evaluation the loss was lowest."""
    series = run.log.eval_loss()
    values = {step: loss for step, loss in zip(series.steps, series.values, strict=True) if math.isfinite(loss)}
    if len(values) < 2:
        return []
    lowest, last = min(values, key=lambda step: values[step]), max(values)
    if lowest == last:
        return [f"evaluation loss: the last of {len(values):,} evaluations is the lowest"]
    when = f"after step {lowest:,}" if lowest else "before training"
    change = f"{format_number(values[lowest])} {when}, {format_number(values[last])} after step {last:,}"
    return [f"evaluation loss: lowest {when}, and higher since: {change}"]


def lowest_loss(run: RunRecord) -> float | None:
    """Return the lowest evaluation loss of a run; None without evaluation."""
    return min((value for value in run.log.eval_loss().values if math.isfinite(value)), default=None)


def recent_mean(series: Series) -> float | None:
    """Return the mean of the last tenth of a series, whose single values are noisy; None = it is empty."""
    values = [value for value in series.values if math.isfinite(value)]
    recent = values[-max(1, len(values) // 10) :]
    return sum(recent) / len(recent) if recent else None


def notes(run: RunRecord) -> list[str]:
    """Return what happened to the run, and what of it could not be read."""
    log = run.log
    lines = []
    if resumed := log.steps_of("resume"):
        lines.append(f"resumed after step {_join_steps(resumed)}")
    if skipped := log.steps_of(*SKIP_EVENTS):
        lines.append(f"steps without an update ({len(skipped):,}): {_join_steps(skipped)}")
    if stopped := log.steps_of("early_stop"):
        lines.append(f"stopped early after step {_join_steps(stopped)}")
    if log.num_unreadable:
        lines.append(f"unreadable lines of metrics.jsonl, which are left out: {log.num_unreadable:,}")
    return lines


def next_commands(run: RunRecord) -> list[str]:
    """Return the commands to run next."""
    if run.state == "done":
        can_evaluate = bool(run.option("data", "eval") or run.option("data", "eval_fraction"))
        trust = run.option("model", "trust_remote_code") is True
        return [line.strip() for line in next_lines(run.folder, can_evaluate=can_evaluate, trust_remote_code=trust)[1:]]
    resume = [] if run.state == "running" else [f"lora-accel train --config {_quote(run.folder / 'config.yaml')}"]
    return [*resume, f"lora-accel report {_quote(run.folder)}"]


def replies_by_step(run: RunRecord) -> Replies | None:
    """Return the replies of one run, a column per evaluation."""
    log = run.log
    steps = sorted({step for replies in log.replies.values() for step in replies})
    if not steps:
        return None
    shown = _spread(steps, MAX_REPLY_STEPS)
    rows = []
    for prompt, replies in list(log.replies.items())[:MAX_ROWS]:
        cells: list[Cell | None] = []
        for number, step in enumerate(shown):
            before = replies.get(shown[number - 1]) if number else None
            is_error = (prompt, step) in log.failed_replies
            reply = replies.get(step)
            cells.append(None if reply is None else Cell(_shorten(reply), reply == before, is_error))
        rows.append((_shorten(prompt), cells))
    columns = [f"step {step:,}" + (" (before training)" if step == 0 else "") for step in shown]
    left_out = [
        f"{len(steps) - len(shown):,} of {len(steps):,} evaluations" if len(shown) < len(steps) else "",
        f"{len(log.replies) - MAX_ROWS:,} of {len(log.replies):,} prompts" if len(log.replies) > MAX_ROWS else "",
    ]
    return Replies(columns, rows, _left_out_note(left_out))


def replies_by_run(runs: Sequence[RunRecord], names: Sequence[str]) -> Replies | None:
    """Return the last reply to each prompt, a column per run."""
    prompts = list(dict.fromkeys(prompt for run in runs for prompt in run.log.replies))
    rows = []
    for prompt in prompts[:MAX_ROWS]:
        cells: list[Cell | None] = []
        for run in runs:
            replies = run.log.replies.get(prompt)
            step = max(replies) if replies else 0
            is_error = (prompt, step) in run.log.failed_replies
            cells.append(Cell(f"{_shorten(replies[step])}", is_error=is_error) if replies else None)
        rows.append((_shorten(prompt), cells))
    left_out = f"{len(prompts) - MAX_ROWS:,} of {len(prompts):,} prompts" if len(prompts) > MAX_ROWS else ""
    return Replies(names, rows, _left_out_note([left_out])) if rows else None


def evaluation_table(run: RunRecord) -> Table:
    """Return every evaluation: a row per step, a column per metric and source."""
    columns = [
        (source, metric, series)
        for metric, sources in run.log.evaluations.items()
        for source, series in sources.items()
        if metric != "eval_tokens" or source == TOTAL
    ]
    names = short_names([source for source, *_ in columns])
    headers = [
        _metric_name(metric).removeprefix("eval ") + ("" if source == TOTAL else f" ({name})")
        for name, (source, metric, _) in zip(names, columns, strict=True)
    ]
    by_step = [dict(zip(series.steps, series.values, strict=True)) for *_, series in columns]
    steps = sorted({step for values in by_step for step in values})
    rows = [[f"{step:,}", *(format_number(values.get(step)) for values in by_step)] for step in steps]
    return _table(["step", *headers], rows)


def checkpoint_table(run: RunRecord) -> Table:
    """Return the checkpoints, and which of them is the newest, the best and the exported one.

    Of the metrics it has the loss, and the one that selects the best.
    """
    selection = selection_of(run.folder)
    names = [*dict.fromkeys(["eval_loss", *([selection.metric] if selection else [])])]
    rows = [
        [
            info.name,
            f"{info.step:,}",
            f"{info.bytes / 1e6:,.1f} MB",
            *(format_number(info.metrics.get(name)) for name in names),
            "valid" if info.reason is None else info.reason,
            ", ".join(info.marks),
        ]
        for info in run.checkpoints
    ]
    titles = [name.replace("_", " ") for name in names]
    return _table(["checkpoint", "step", "size", *titles, "state", ""], rows)


def merge_table(run: RunRecord) -> Table:
    """Return the merged models in the run folder, and how much they agree with base + adapter."""
    rows = []
    for folder, merged in run.merges.items():
        agreement = merged.get("agreement")
        values = agreement if isinstance(agreement, dict) else {}
        top1, kl, moved = (as_number(values.get(name)) for name in ("top1", "kl", "mean_moved"))
        rows.append(
            [
                folder,
                str(merged.get("dtype", "")),
                str(merged.get("base_weights", "")),
                "not verified" if not values else f"{top1:.2%}" if top1 is not None else "",
                "" if kl is None else f"{kl:.2e}",
                "" if moved is None else f"{moved:.2e}",
                str(values.get("num_tokens", "")),
            ]
        )
    headers = ["folder", "dtype", "base weights", "same top token", "KL, nats", "mean logit change, std", "tokens"]
    return _table(headers, rows)


def ledger_table(run: RunRecord) -> Table:
    """Return the ledger of each source: every row is in exactly one bucket."""
    rows = []
    for split, source in _sources(run):
        buckets = source.get("buckets") if isinstance(source.get("buckets"), dict) else {}
        counts = {name: _rows_of(bucket) for name, bucket in (buckets or {}).items()}
        num_dropped = sum(count for name, count in counts.items() if name.startswith("dropped:"))
        tokens, supervised = (as_number(source.get(f"num_{name}")) or 0 for name in ("tokens", "supervised_tokens"))
        ended, examples = (as_number(source.get(f"num_{name}")) or 0 for name in ("ended", "examples"))
        source_notes = source.get("notes")
        rows.append(
            [
                split,
                str(source.get("path", "")),
                str(source.get("format", "")),
                f"{sum(counts.values()):,}",
                *(f"{counts.get(name, 0):,}" for name in ("used", "truncated", "split")),
                f"{num_dropped:,}",
                f"{examples:,.0f}",
                f"{tokens:,.0f}",
                f"{supervised / tokens:.1%}" if tokens else "",
                f"{ended / examples:.1%}" if examples else "",
                "; ".join(f"{count} rows: {note}" for note, count in source_notes.items())
                if isinstance(source_notes, dict)
                else "",
            ]
        )
    headers = ["split", "source", "format", "rows", "used", "truncated", "split up", "dropped", "examples", "tokens"]
    return _table([*headers, "supervised", "end of turn supervised", "notes"], rows)


def dropped_table(run: RunRecord) -> Table:
    """Return the reasons for which rows were dropped, with the rows."""
    rows = []
    for _, source in _sources(run):
        buckets = source.get("buckets")
        for name, bucket in buckets.items() if isinstance(buckets, dict) else ():
            if name.startswith("dropped:"):
                ranges = bucket.get("rows") if isinstance(bucket, dict) else None
                files = ranges.items() if isinstance(ranges, dict) else ()
                where = "; ".join(f"{Path(file).name}: {numbers}" for file, numbers in files)
                where = where if len(where) <= MAX_DROPPED else f"{where[:MAX_DROPPED]}… (data_ledger.json has all)"
                reason = name.removeprefix("dropped:")
                rows.append([str(source.get("path", "")), reason, f"{_rows_of(bucket):,}", where])
    return _table(["source", "reason", "rows", "which"], rows)


def event_table(run: RunRecord) -> Table:
    """Return the events of the log, except replies."""
    rows = []
    for event in run.log.events:
        hidden = ("kind", "event", "step", "settings")
        details = ", ".join(f"{key} {value}" for key, value in event.items() if key not in hidden)
        rows.append([f"{event['step']:,}", event["event"], _shorten(details)])
    return _table(["step", "event", ""], rows)


def settings_table(run: RunRecord) -> Table:
    """Return the settings that launcher, run config or machine decided."""
    return _table(["setting", "value", "decided by"], run.launch_settings)


def config_table(run: RunRecord) -> Table:
    """Return the options of the config, those that differ from their defaults first."""
    defaults = _defaults()
    rows = [
        [name, value, "" if defaults.get(name) == value else "set", defaults.get(name, "required")]
        for name, value in options_as_text(run.config).items()
    ]
    rows.sort(key=lambda row: not row[2])
    headers = ["option", "value", "", "default"]
    return _table(headers, [[name, _shorten(value), is_set, default] for name, value, is_set, default in rows])


def provenance_table(run: RunRecord) -> Table:
    """Return versions and hashes: what the result depends on."""
    provenance = run.provenance
    base = provenance.get("base") if isinstance(provenance.get("base"), dict) else {}
    packages = provenance.get("packages") if isinstance(provenance.get("packages"), dict) else {}
    hashes = (base or {}).get("sha256")
    data = provenance.get("data") if isinstance(provenance.get("data"), list) else []
    rows = [[name, str(version)] for name, version in (packages or {}).items()]
    keys = ("mixed_precision", "base_dtype", "prompt_format", "seed", "num_threads")
    rows += [[key, str(provenance[key])] for key in keys if key in provenance]
    rows += [[f"SHA-256 of {name}", str(value)] for name, value in (hashes.items() if isinstance(hashes, dict) else ())]
    rows += [
        [f"SHA-256 of the {name}", str(value)]
        for name, value in (
            ("base's tensors", (base or {}).get("tensors_sha256")),
            ("base's config", (base or {}).get("config_sha256")),
            ("tokenizer", provenance.get("tokenizer_sha256")),
            ("chat template", provenance.get("chat_template_sha256")),
            ("run config", provenance.get("config_sha256")),
        )
        if value
    ]
    for source in data or []:
        if isinstance(source, dict):
            rows.append([f"SHA-256 of {source.get('path')}", str(source.get("sha256"))])
    return _table(["", ""], rows)


def final_metrics_table(runs: Sequence[RunRecord], names: Sequence[str]) -> Table:
    """Return the last metrics of each run."""
    rows = []
    lowest = min((loss for run in runs if (loss := lowest_loss(run)) is not None), default=None)
    for run, name in zip(runs, names, strict=True):
        best, rates = run.best_checkpoint(), run.log.train.get("tokens_per_second", Series()).values
        loss = lowest_loss(run)
        rows.append(
            [
                name,
                STATES.get(run.state, run.state).split(";")[0],
                f"{run.step:,}" + (f" of {run.total_steps:,}" if run.total_steps else ""),
                format_number(recent_mean(run.log.train.get("loss", Series()))),
                format_number(run.log.eval_loss().last),
                format_number(loss) + (" (best)" if loss is not None and loss == lowest else ""),
                f"step {best[0].step:,}" if best else "",
                format_seconds(run.training_seconds) if run.training_seconds else "",
                f"{np.median(np.array(rates)):,.0f}" if len(rates) else "",
            ]
        )
    headers = [
        "run",
        "state",
        "steps",
        "training loss",
        "eval loss",
        "lowest eval loss",
        "best checkpoint",
        "training time",
    ]
    return _table([*headers, "tokens/s, median"], rows)


def differences_table(runs: Sequence[RunRecord], names: Sequence[str]) -> Table:
    """Return the options in which the runs differ."""
    options = differing_options([options_as_text(run.config) for run in runs])
    return _table(
        ["option", *names], [[option, *(_shorten(value) for value in values)] for option, values in options.items()]
    )


def format_number(value: float | None) -> str:
    """Return a number with four digits after the point, or four significant ones if it is small; "" for None."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.4f}" if abs(value) >= 0.01 else f"{value:.4g}"


def format_change(series: Series) -> str:
    """Return the first and the last finite value of a series, or its only one."""
    values = [value for value in series.values if math.isfinite(value)]
    return _arrow(values[:1] if len(values) < 2 else [values[0], values[-1]])


def _training_change(loss: Series) -> str:
    """Return the first training loss, and the mean of the last tenth of the steps."""
    first = next((value for value in loss.values if math.isfinite(value)), None)
    return _arrow([first] if len(loss.values) < 2 else [first, recent_mean(loss)])


def _arrow(values: Sequence[float | None]) -> str:
    """Return values with three significant digits, from the first to the last."""
    return " → ".join(f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}" for value in values if value is not None)


def _metric_name(metric: str) -> str:
    return metric.replace("_", " ")


def _defaults() -> dict[str, str]:
    """Return the default of each option that has one."""
    required = {"output_dir": "-", "model": {"name_or_path": "-"}, "data": {"train": [{"path": "-"}]}}
    flat = options_as_text(RunConfig.model_validate(required).model_dump())
    return {key: value for key, value in flat.items() if key not in ("output_dir", "model.name_or_path", "data.train")}


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return Table(headers, rows[:MAX_ROWS], max(0, len(rows) - MAX_ROWS))


def _sources(run: RunRecord) -> list[tuple[str, Mapping[str, Any]]]:
    """Return (split, ledger) of each source."""
    return [
        (split, source)
        for split, sources in run.ledger.items()
        for source in (sources if isinstance(sources, list) else [])
        if isinstance(source, dict)
    ]


def _rows_of(bucket: object) -> int:
    count = as_number(bucket.get("num_rows")) if isinstance(bucket, dict) else None
    return int(count) if count is not None and math.isfinite(count) else 0


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """Return at most `most` steps, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(number * (len(steps) - 1) / (most - 1))] for number in range(most)]


def _left_out_note(parts: Sequence[str]) -> str:
    shown = [part for part in parts if part]
    return f"{' and '.join(shown)} are left out; metrics.jsonl has all." if shown else ""


def _join_steps(steps: Sequence[int], most: int = 10) -> str:
    names = [f"{step:,}" for step in steps[:most]]
    return ", ".join(names) + (f" and {len(steps) - most:,} more" if len(steps) > most else "")


def _shorten(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:MAX_TEXT]}… ({len(text) - MAX_TEXT:,} more characters)"


def _quote(path: Path) -> str:
    return shlex.quote(str(path))
