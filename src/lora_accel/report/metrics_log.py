"""The content of metrics.jsonl by name: series of values, events and replies."""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_accel.errors import ArtifactError
from lora_accel.saving.metrics_file import read_lines

TRAIN_VALUES = (
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "supervised_tokens",
    "tokens_per_second",
    "elapsed_seconds",
    "peak_memory_bytes",
)
"""The values of a train line that the report uses."""
TOTAL = ""
"""Name of the evaluation over all sources: no source has an empty path."""


@dataclasses.dataclass
class Series:
    """Values by step, in the order of the log."""

    steps: array[int] = dataclasses.field(default_factory=lambda: array("q"))
    values: array[float] = dataclasses.field(default_factory=lambda: array("d"))

    def add(self, step: int, value: float) -> None:
        """Add a value."""
        self.steps.append(step)
        self.values.append(value)

    @property
    def last(self) -> float | None:
        """Return the last finite value."""
        return next((value for value in reversed(self.values) if math.isfinite(value)), None)

    def at(self, step: int) -> float | None:
        """Return the last value of a step; None = there is none."""
        found = [value for at, value in zip(self.steps, self.values, strict=True) if at == step]
        return found[-1] if found else None


@dataclasses.dataclass
class MetricsLog:
    """The content of metrics.jsonl."""

    train: dict[str, Series] = dataclasses.field(default_factory=dict)
    """Values of train lines, by name."""
    evaluations: dict[str, dict[str, Series]] = dataclasses.field(default_factory=dict)
    """Values of eval lines, by metric (`eval_loss`, …) and source; `TOTAL` = over all sources."""
    events: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """All events but replies, in order."""
    replies: dict[str, dict[int, str]] = dataclasses.field(default_factory=dict)
    """Replies by prompt and step, prompts in the order of their first reply."""
    failed_replies: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    """(prompt, step) of the replies that are errors."""
    num_unreadable: int = 0
    """Lines that are not JSON objects with a step, such as an incomplete last one."""

    def eval_loss(self, source: str = TOTAL) -> Series:
        """Return the evaluation loss of a source, empty without evaluation."""
        return self.evaluations.get("eval_loss", {}).get(source, Series())

    def steps_of(self, *events: str) -> list[int]:
        """Return the steps of some kinds of events."""
        return [event["step"] for event in self.events if event["event"] in events]


def read_metrics_log(path: Path) -> MetricsLog:
    """Read a log. Lines that cannot be read are counted.

    Raises:
        ArtifactError: there is no log, or it has no readable line.
    """
    log, num_lines = MetricsLog(), 0
    try:
        for line in read_lines(path):
            num_lines += 1
            if line is None:
                log.num_unreadable += 1
            else:
                _add(log, line)
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot be read: {error.strerror}; pass the output_dir of a run that has begun to train"
        ) from None
    if not log.train and not log.events and not log.evaluations and not log.replies:
        raise ArtifactError(f"{path}: has no metrics ({num_lines:,} lines, {log.num_unreadable:,} unreadable)")
    return log


def _add(log: MetricsLog, line: dict[str, Any]) -> None:
    step, kind = line["step"], line["kind"]
    if kind == "train":
        for name in TRAIN_VALUES:
            if (value := as_number(line.get(name))) is not None:
                log.train.setdefault(name, Series()).add(step, value)
    elif kind == "eval":
        for source, name, value in _eval_values(line):
            log.evaluations.setdefault(name, {}).setdefault(source, Series()).add(step, value)
    elif kind == "event" and isinstance(line.get("event"), str):
        if line["event"] not in ("reply", "reply_failed"):
            log.events.append(line)
        elif isinstance(prompt := line.get("prompt"), str):
            failed = line["event"] == "reply_failed"
            log.replies.setdefault(prompt, {})[step] = str(line.get("error" if failed else "reply", ""))
            (log.failed_replies.add if failed else log.failed_replies.discard)((prompt, step))


def _eval_values(line: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield (source, metric, value) of an eval line."""
    sources = line.get("sources")
    parts = {TOTAL: line} | (sources if isinstance(sources, dict) else {})
    for source, values in parts.items():
        for name, value in values.items() if isinstance(values, Mapping) else ():
            if name.startswith("eval_") and (number := as_number(value)) is not None:
                yield source, name, number


def as_number(value: object) -> float | None:
    """Return a number, also from text such as `NaN`; None = it is not one."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):  # an integer too large for a float
        return None
