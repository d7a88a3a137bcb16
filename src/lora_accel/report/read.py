"""Reads a run folder: of a run that has finished, is in progress, was stopped, or was written by another version."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from lora_accel.config.flat import flatten
from lora_accel.errors import ArtifactError
from lora_accel.report.metrics_log import MetricsLog, Series, as_number, read_metrics_log
from lora_accel.saving.atomic import read_json
from lora_accel.saving.listing import CheckpointInfo, list_checkpoints, selection_of
from lora_accel.saving.metrics_file import METRICS_FILE

MERGED, MERGED_ALL = "merged", "merged-all"
"""Folders of a run in which its summary, and `merge --all`, put merged models."""


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The content of a run folder. What is missing or unreadable is empty."""

    folder: Path
    """As it was given."""
    log: MetricsLog
    status: dict[str, Any]
    plan: dict[str, Any]
    provenance: dict[str, Any]
    ledger: dict[str, Any]
    checkpoints: list[CheckpointInfo]
    merges: dict[str, dict[str, Any]]
    """`merged` of the provenance of merged models, by their folder in the run."""

    @property
    def config(self) -> dict[str, Any]:
        """Return the run config, resolved."""
        config = self.provenance.get("config")
        return config if isinstance(config, dict) else {}

    def option(self, section: str, name: str) -> Any:
        """Return an option of the config; None = it has none."""
        values = self.config.get(section)
        return values.get(name) if isinstance(values, dict) else None

    @property
    def state(self) -> str:
        """Return the state of the run: running, done, preempted, failed, killed or unknown."""
        state = str(self.status.get("state", "unknown"))
        return "killed" if state == "running" and self._has_no_process() else state

    def _has_no_process(self) -> bool:
        """Whether a run was killed: it ran on this machine, and none of its processes exists."""
        pids = self.status.get("pids")
        if not isinstance(pids, list) or not pids or self.status.get("host") != socket.gethostname():
            return False
        return not any(isinstance(pid, int) and psutil.pid_exists(pid) for pid in pids)

    @property
    def step(self) -> int:
        """Return the last step that is known."""
        loss = self.log.train.get("loss", Series())
        number = as_number(self.status.get("step"))
        return max([0, *loss.steps[-1:], *([int(number)] if number is not None and math.isfinite(number) else [])])

    @property
    def total_steps(self) -> int | None:
        """Return the steps of the plan."""
        number = as_number(self.plan.get("total_steps"))
        return int(number) if number is not None and math.isfinite(number) else None

    @property
    def training_seconds(self) -> float:
        """Return the time of all processes that trained, in which a resumed run logged its lines."""
        total, previous = 0.0, 0.0
        for seconds in self.log.train.get("elapsed_seconds", Series()).values:
            if math.isfinite(seconds):
                total += previous if seconds < previous else 0.0
                previous = seconds
        return total + previous

    @property
    def launch_settings(self) -> list[tuple[str, str, str]]:
        """Return (setting, value, decided by) of the newest launch; empty for a run of an older version."""
        for event in reversed(self.log.events):
            rows = event.get("settings")
            if event["event"] in ("start", "resume") and isinstance(rows, list):
                return [(str(row[0]), str(row[1]), str(row[2])) for row in rows if isinstance(row, list) and row[2:]]
        return []

    def best_checkpoint(self) -> tuple[CheckpointInfo, str, float] | None:
        """Return the best checkpoint that exists, the metric that selects it, and its value."""
        best = next((info for info in self.checkpoints if "best" in info.marks), None)
        selection = selection_of(self.folder)
        if best is None or selection is None or selection.metric not in best.metrics:
            return None
        return best, selection.metric, best.metrics[selection.metric]


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        ArtifactError: it is not one, or has no metrics.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: is not a folder; pass the output_dir of a run")
    if not (folder / METRICS_FILE).exists():
        raise ArtifactError(
            f"{folder}: has no metrics.jsonl, so there is nothing to report; pass the output_dir of a run that has "
            "begun to train"
        )
    log = read_metrics_log(folder / METRICS_FILE)
    checkpoints: list[CheckpointInfo] = []
    with contextlib.suppress(ArtifactError, OSError):
        checkpoints = list_checkpoints(folder, hashes=False)
    names = ("status", "plan", "provenance", "data_ledger")
    status, plan, provenance, ledger = (_read_object(folder / f"{name}.json") for name in names)
    return RunRecord(folder, log, status, plan, provenance, ledger, checkpoints, _read_merges(folder))


def _read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty if there is none."""
    try:
        return read_json(path)
    except ArtifactError:
        return {}


def _read_merges(folder: Path) -> dict[str, dict[str, Any]]:
    merges = {}
    paths = [folder / MERGED]
    with contextlib.suppress(OSError):
        paths += sorted(path for path in (folder / MERGED_ALL).iterdir() if path.is_dir())
    for path in paths:
        merged = _read_object(path / "provenance.json").get("merged")
        if isinstance(merged, dict):
            merges[str(path.relative_to(folder))] = merged
    return merges


def options_as_text(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the options of a config by dotted name, values as JSON text."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in flatten(config).items()
    }
