"""Reads the lines of metrics.jsonl: of a run in progress, of a killed one, or of another version."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_accel.paths import open_to_read

METRICS_FILE = "metrics.jsonl"
MAX_STEP = 10**12
"""A step beyond this is not one of a run."""


def read_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the lines that are not empty: objects with a `kind` and a `step`; None for one that cannot be read.

    Raises:
        OSError: the file cannot be read.
    """
    with open_to_read(path) as file:
        for text in file:
            if text.strip():
                yield _parse(text)


def read_valid_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines that can be read; none if the file cannot."""
    with contextlib.suppress(OSError):
        for line in read_lines(path):
            if line is not None:
                yield line


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        return None
    step = line.get("step")
    is_step = isinstance(step, int) and not isinstance(step, bool) and 0 <= step <= MAX_STEP
    return line if is_step else None


def eval_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of an evaluation, or of one of its sources, by their names `eval_…`."""
    return {
        key: value
        for key, value in values.items()
        if key.startswith("eval_") and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
