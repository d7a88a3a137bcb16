"""The list of a run's checkpoints, with the metrics of their evaluations. Reads no tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from lora_accel.config.schema import RunConfig
from lora_accel.config.selection import Selection
from lora_accel.errors import ArtifactError
from lora_accel.paths import has_access
from lora_accel.saving.atomic import read_json, why_invalid
from lora_accel.saving.discovery import FILES, QUARANTINED, step_folders
from lora_accel.saving.metrics_file import METRICS_FILE, eval_metrics, read_valid_lines


@dataclasses.dataclass
class CheckpointInfo:
    """One row of the list of checkpoints."""

    name: str
    step: int
    age_seconds: float
    bytes: int
    reason: str | None
    """Why it cannot be used; None = it can."""
    metrics: dict[str, float]
    """Of the evaluation after its step; empty = not evaluated."""
    marks: list[str] = dataclasses.field(default_factory=list)
    """newest: the run resumes from it | best: of the metric that the config selects by | exported: adapter/ has its
    weights."""


def list_checkpoints(run: Path, *, hashes: bool) -> list[CheckpointInfo]:
    """List a run's checkpoints, oldest first, quarantined ones last.

    Args:
        hashes: whether to read all files and compare their SHA-256.

    Raises:
        ArtifactError: there is no such run, or it cannot be read.
    """
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise ArtifactError(f"{run}: no checkpoints/ folder; pass the output_dir of a run")
    steps, evaluations = step_folders(folder), read_evaluations(run)
    quarantined = sorted(
        path for path in folder.iterdir() if re.fullmatch(rf"({'|'.join(QUARANTINED)})-step-\d{{8,}}.*", path.name)
    )
    infos = []
    for path in [*steps, *quarantined]:
        reason = why_invalid(path, required=FILES, hashes=hashes)
        if path in quarantined:
            reason = f"quarantined{'' if reason is None else f': {reason}'}"
        step = int(re.sub(r".*step-(\d+).*", r"\1", path.name))
        with contextlib.suppress(FileNotFoundError):  # deleted in the meantime, by a run in progress
            readable = path.is_dir() and has_access(path, os.R_OK | os.X_OK)
            size = sum(file.lstat().st_size for file in path.iterdir()) if readable else 0
            age = time.time() - path.lstat().st_mtime
            own_metrics = {} if path in quarantined else eval_metrics(evaluations.get(step, {}))
            infos.append(CheckpointInfo(path.name, step, age, size, reason, own_metrics))
    _mark(run, infos, evaluations)
    return infos


def as_table(run: Path, infos: Sequence[CheckpointInfo], *, hashes: bool) -> list[tuple[str, ...]]:
    """Return a list of checkpoints as rows of a table, the column headers first.

    Of the metrics it has the loss, and the one by which the run selects a checkpoint.

    Args:
        hashes: whether the SHA-256 of the files were compared.
    """
    selection = selection_of(run)
    names = dict.fromkeys(["eval_loss", *([selection.metric] if selection else [])])
    names = {name: None for name in names if any(name in info.metrics for info in infos)}
    rows = [("checkpoint", "step", "age", "size", *names, "bytes and hashes" if hashes else "state", "")]
    for info in infos:
        metrics = [f"{info.metrics[name]:.4f}" if name in info.metrics else "" for name in names]
        age, size = f"{info.age_seconds / 3600:,.1f} h", f"{info.bytes / 1e6:,.1f} MB"
        rows.append((info.name, str(info.step), age, size, *metrics, info.reason or "valid", ", ".join(info.marks)))
    return rows


def read_evaluations(run: Path) -> dict[int, dict[str, float]]:
    """Return the metrics and the fingerprint of a run's evaluations by their step, from its metrics.jsonl."""
    evaluations = {}
    for line in read_valid_lines(run / METRICS_FILE):
        if line["kind"] == "eval":
            identity = {key: line[key] for key in ("fingerprint",) if isinstance(line.get(key), int)}
            evaluations[line["step"]] = identity | eval_metrics(line)
    return evaluations


def selection_of(run: Path) -> Selection | None:
    """Return the metric by which a run selects a checkpoint; None = its config is missing or of another version."""
    try:
        recorded = read_json(run / "provenance.json")["config"]
        return Selection.from_config(RunConfig.model_validate(recorded))
    except (ArtifactError, KeyError, TypeError, ValidationError):
        return None


def _mark(run: Path, infos: list[CheckpointInfo], evaluations: Mapping[int, Mapping[str, float]]) -> None:
    """Mark the newest valid, the best and the exported checkpoint."""
    usable = [info for info in infos if info.reason is None]
    if usable:
        usable[-1].marks.append("newest")
    selection = selection_of(run)
    saved = [{"step": step, **metrics} for step, metrics in sorted(evaluations.items()) if step > 0]
    best = selection.best(saved) if selection and saved else None
    exported = _exported_step(run / "adapter")
    for info in usable:
        info.marks += ["best"] if best is not None and info.step == best["step"] else []
        info.marks += ["exported"] if info.step == exported else []


def _exported_step(adapter: Path) -> int | None:
    """Return the step of the weights in a final adapter; None = it does not record one."""
    try:
        step = read_json(adapter / "provenance.json")["exported"]["step"]
    except (ArtifactError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
