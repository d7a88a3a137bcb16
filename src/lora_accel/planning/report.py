"""`lora-accel plan`: the estimate of a run, its time, what was measured, and advice."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_accel.config.plan import Plan
from lora_accel.config.schema import RunConfig
from lora_accel.console import Stage, format_seconds, format_table
from lora_accel.planning.advice import advise
from lora_accel.planning.estimate import Estimate, Option, as_dict, make_estimate
from lora_accel.planning.measure import Measurement, measure_in_child
from lora_accel.planning.remedies import Remedy, find_remedies
from lora_accel.planning.tables import estimate_tables, format_bytes
from lora_accel.saving.metrics_file import METRICS_FILE, read_valid_lines
from lora_accel.setup.data import PreparedData

LAST_LINES = 50
"""Lines of metrics.jsonl whose median is the throughput of a run."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What is known about a run before it starts."""

    plan: Plan
    estimate: Estimate
    measurement: Measurement | None
    """None = not measured, or memory ran out."""
    tokens_per_second: float | None
    """As measured, or of an earlier run in the run folder; None = unknown."""
    remedies: list[Remedy]
    """If the run does not fit, or did not."""
    advice: list[str]
    failure: str | None
    """Why the measurement failed."""

    @property
    def seconds(self) -> float | None:
        """Return how long the run takes, without evaluations and saves; None = unknown."""
        if self.tokens_per_second is None or (self.measurement is not None and self.plan.num_ranks > 1):
            return None  # one process was measured
        epochs = self.plan.total_steps / self.plan.steps_per_epoch
        return self.plan.num_tokens * epochs / self.tokens_per_second

    @property
    def option(self) -> Option:
        """Return the configured option on one device."""
        return self.estimate.options[0]

    @property
    def error(self) -> float | None:
        """Return the error of the estimate relative to what was measured."""
        if self.measurement is None or self.option.memory is None or self.estimate.untraced:
            return None
        return self.option.memory.total / self.measurement.peak_bytes - 1


def make_forecast(
    config: RunConfig, data: PreparedData, num_ranks: int, *, measured_with: tuple[Path, Sequence[str]] | None = None
) -> Forecast:
    """Estimate a run, and measure it if asked to.

    Args:
        num_ranks: number of training processes.
        measured_with: config file and overrides of the run to measure; None = do not measure.

    Raises:
        UserError: the base or the adapter is wrong.
    """
    from lora_accel.distributed.launch import resolve_launch
    from lora_accel.setup.memory import with_tokens
    from lora_accel.setup.sizes import resolve_rope_scaling

    config = resolve_rope_scaling(config)
    precision = resolve_launch(config, None)[1].mixed_precision
    with Stage("estimating memory"):
        estimate = make_estimate(config, data, precision, num_ranks)
        config = with_tokens(config, estimate.micro_batch_tokens)
        if config.training.activation_checkpointing == "auto" and estimate.fits(estimate.options[0]) is False:
            training = config.training.model_copy(update={"activation_checkpointing": True})
            config = config.model_copy(update={"training": training})
            estimate = make_estimate(config, data, precision, num_ranks)
    measurement = measure_in_child(*measured_with) if measured_with else None
    has_failed = measured_with is not None and measurement is None
    remedies = []
    if has_failed or not any(estimate.fits(option) is not False for option in estimate.options):
        with Stage("looking for options that fit"):
            remedies = find_remedies(config, data, precision, estimate)
    num_trained = sum(count.numel for count in estimate.parameters if count.is_trained)
    return Forecast(
        data.plan,
        estimate,
        measurement,
        measurement.tokens_per_second if measurement else _recorded_throughput(Path(config.output_dir)),
        remedies,
        advise(config, data.plan, data.dataset.ledgers, num_trained),
        "--measure: not enough memory" if has_failed else None,
    )


def forecast_as_dict(forecast: Forecast) -> dict[str, Any]:
    """Return a forecast as plain values: the plan's fields, and sections beside them."""
    measurement = forecast.measurement
    return {
        **forecast.plan.as_dict(),
        **as_dict(forecast.estimate),
        "measured": None if measurement is None else dataclasses.asdict(measurement) | {"error": forecast.error},
        "time": {"tokens_per_second": forecast.tokens_per_second, "seconds": forecast.seconds},
        "remedies": [remedy._asdict() | {"fits": remedy.fits} for remedy in forecast.remedies],
        "advice": forecast.advice,
    }


def forecast_text(forecast: Forecast) -> str:
    """Return a forecast as text for the terminal."""
    parts = estimate_tables(forecast.estimate)
    if forecast.measurement is not None:
        parts.append(_measured(forecast, forecast.measurement))
    elif forecast.seconds is not None:
        parts.append(
            f"time: {format_seconds(forecast.seconds)} at {forecast.tokens_per_second:,.0f} tokens/s, as in this run "
            "folder's metrics.jsonl"
        )
    parts += [_remedy(remedy) for remedy in forecast.remedies]
    parts += [f"advice: {text}" for text in forecast.advice]
    return "\n".join(parts)


def _measured(forecast: Forecast, measurement: Measurement) -> str:
    memory, seconds = forecast.option.memory, forecast.seconds
    assert memory is not None
    error = "without activations" if forecast.error is None else f"{forecast.error:+.1%}"
    tokens = " and ".join(f"{count:,}" for count in measurement.tokens)
    rows = [
        ("micro-batches", f"{tokens} tokens, in {' and '.join(map(format_seconds, measurement.seconds))}"),
        ("peak memory", f"{format_bytes(measurement.peak_bytes)} on {measurement.device}"),
        ("estimate", f"{format_bytes(memory.total)} ({error})"),
        ("process", f"{format_bytes(measurement.process_bytes)} of host memory"),
        ("throughput", f"{measurement.tokens_per_second:,.0f} tokens/s, without padding"),
    ]
    if seconds is not None:
        rows.append(("time of the run", f"{format_seconds(seconds)}, without evaluations and saves"))
    return format_table("measured", rows)


def _remedy(remedy: Remedy) -> str:
    verdict = f"fits, {format_bytes(remedy.spare)} to spare" if remedy.fits else f"lacks {format_bytes(-remedy.spare)}"
    return f"with {' '.join(remedy.overrides)}: {format_bytes(remedy.total)}, {verdict}"


def _recorded_throughput(folder: Path) -> float | None:
    """Return the median throughput of the last steps of the run in a folder; None if there is none."""
    lines = (line for line in read_valid_lines(folder / METRICS_FILE) if line["kind"] == "train")
    rates = [rate for line in lines if isinstance(rate := line.get("tokens_per_second"), (int, float))]
    return statistics.median(rates[-LAST_LINES:]) if rates else None
