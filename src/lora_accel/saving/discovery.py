"""Find, select, quarantine and prune the checkpoints of a run. Reads no tensors."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lora_accel.config.recorded import with_defaults
from lora_accel.errors import ArtifactError
from lora_accel.logs import logger
from lora_accel.paths import real_path
from lora_accel.saving.atomic import MANIFEST, read_json, remove_folder, sha256_of, why_invalid
from lora_accel.saving.state import read_state

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
FILES = (WEIGHTS, CONFIG, OPTIMIZER, STATE)
"""The files of a checkpoint besides its manifest."""
QUARANTINED = ("corrupt", "superseded")
"""Name prefixes of checkpoints that a run does not resume from."""


class Checkpoint(NamedTuple):
    """A checkpoint on disk that matches its manifest."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Return the number of completed steps."""
        return int(self.state["step"])

    @property
    def skipped(self) -> int:
        """Return how many of them made no update because the loss or gradient norm was not finite."""
        return int(self.state["skipped"])

    @property
    def overflowed(self) -> int:
        """Return how many of them made no update because the loss scale was too large."""
        return int(self.state["overflowed"])

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """Return the step and the metrics of each evaluation before the checkpoint."""
        return list(self.state["evaluations"])


class KeptSettings(NamedTuple):
    """The settings of a checkpoint that a resumed run keeps unless its config sets them."""

    mixed_precision: str
    base_dtype: str
    """Name of the dtype; `auto` = as stored, for older checkpoints that do not record it."""
    warmup_from_zero: bool
    micro_batch_tokens: int | None = None
    """None = not known."""
    begun_with_adapter: dict[str, Any] | None = None
    """Provenance of a run that began with an adapter (adapter.init_from); None = it began with a new one."""


class CheckpointSelection(NamedTuple):
    """The checkpoint to resume from, and the run's own checkpoints to quarantine."""

    checkpoint: Checkpoint | None
    """None = a new run."""
    parent_hash: str | None
    """Manifest hash of the checkpoint that `checkpoint.resume` named, now or when the run began."""
    parent_path: str | None
    """Where that checkpoint was."""
    corrupt: dict[Path, str]
    """Newer checkpoints that cannot be used, with the reason."""
    superseded: list[Path]
    """Newer checkpoints that do not descend from the named one."""


def find_checkpoint(folder: Path, resume: str) -> CheckpointSelection:
    """Select the checkpoint to resume from. Changes nothing on disk.

    A run begins from a named checkpoint. Once the run has checkpoints that descend from it, the newest of these is
    selected, so the same command resumes.

    Args:
        folder: the run's checkpoints.
        resume: auto = the newest valid checkpoint | never | a checkpoint folder.

    Raises:
        ArtifactError: the named checkpoint cannot be used, all checkpoints are corrupt, or `never` is set and there are
            checkpoints.
    """
    if resume == "auto":
        return _select_newest(folder)
    if resume != "never":
        return _select_named(folder, resume)
    if own := step_folders(folder):
        raise ArtifactError(
            f"checkpoint.resume=never, but {folder} contains {len(own)} checkpoints; "
            "choose another output_dir, or delete them"
        )
    return CheckpointSelection(None, None, None, {}, [])


def _select_newest(folder: Path) -> CheckpointSelection:
    """Select the newest valid checkpoint, or none if the run has no checkpoints."""
    corrupt: dict[Path, str] = {}
    for candidate in reversed(step_folders(folder)):
        reason = why_invalid(candidate, required=FILES)
        if reason is None:
            checkpoint = _read_checkpoint(candidate)
            parent_hash, parent_path = checkpoint.state.get("begun_from"), checkpoint.state.get("begun_at")
            return CheckpointSelection(checkpoint, parent_hash, parent_path, corrupt, [])
        corrupt[candidate] = reason
    unusable = [f"{path.name}: {reason}" for path, reason in corrupt.items()]
    if folder.is_dir():
        unusable += sorted(path.name for prefix in QUARANTINED for path in folder.glob(f"{prefix}-step-*"))
    if unusable:
        raise ArtifactError(
            f"{folder}: every checkpoint is corrupt or quarantined, and a new run would overwrite them; "
            "choose another output_dir, or move them to another folder\n" + "\n".join(f"  {line}" for line in unusable)
        )
    return CheckpointSelection(None, None, None, {}, [])


def _select_named(folder: Path, resume: str) -> CheckpointSelection:
    """Select the newest checkpoint that descends from the named one, or else the named one."""
    named = Path(resume)
    if not is_folder(named):
        selection = _select_newest(folder)
        if selection.checkpoint is not None and selection.parent_path == resume:
            return selection  # the named checkpoint was deleted, but its descendants are here
        raise ArtifactError(
            f"checkpoint.resume: {resume} is not a folder; use auto, never, or a folder of checkpoints/"
        )
    _check_is_checkpoint(named)
    if reason := why_invalid(named, required=FILES):
        raise ArtifactError(f"checkpoint.resume: {named} cannot be used: {reason}")
    selection = CheckpointSelection(_read_checkpoint(named), sha256_of(named / MANIFEST), resume, {}, [])
    for candidate in reversed(step_folders(folder)):
        if real_path(candidate) == real_path(named):
            break  # the named checkpoint descends from all older ones
        if reason := why_invalid(candidate, required=FILES):
            selection.corrupt[candidate] = reason
            continue
        checkpoint = _read_checkpoint(candidate)
        if checkpoint.state.get("begun_from") == selection.parent_hash:
            return selection._replace(checkpoint=checkpoint)
        selection.superseded.append(candidate)
    return selection


def _check_is_checkpoint(folder: Path) -> None:
    """Check that a folder is not an adapter or a run, which are easily taken for a checkpoint.

    Raises:
        ArtifactError: it is one.
    """
    if (folder / STATE).exists():
        return
    if (folder / "checkpoints").is_dir() or folder.name == "checkpoints":
        raise ArtifactError(
            f"checkpoint.resume: {folder} is not a checkpoint; name one of the step-… folders in its checkpoints/, or "
            "set checkpoint.resume=auto to resume the run in output_dir"
        )
    if (folder / CONFIG).exists():
        raise ArtifactError(
            f"checkpoint.resume: {folder} is an adapter, not a checkpoint: it has no optimizer state to resume from. "
            "Name a step-… folder in the checkpoints/ of the run that trained it. To begin a new run with its weights, "
            f"set adapter.init_from={folder} instead, with another output_dir"
        )


def kept_settings(folder: Path, resume: str) -> KeptSettings | None:
    """Return the settings of the checkpoint that a run will resume from, None for a new run.

    Compares only names and sizes: the checkpoint is selected, and read in full, after the data is loaded.

    Args:
        folder, resume: as in `find_checkpoint`.
    """
    named = None if resume in ("auto", "never") else Path(resume)
    if named is not None and is_folder(named):
        _check_is_checkpoint(named)
    candidates = [*reversed(step_folders(folder)), *([] if named is None else [named])]
    for candidate in candidates:
        if why_invalid(candidate, required=FILES, hashes=False) is not None:
            continue
        with contextlib.suppress(ArtifactError, KeyError, TypeError, AttributeError):
            state = read_json(candidate / STATE)
            provenance = state["provenance"]
            precision = provenance["mixed_precision"]
            descends = named in (None, candidate) or state.get("begun_at") == resume
            if descends and precision in ("no", "bf16", "fp16"):
                training = with_defaults(provenance["config"])["training"]
                tokens = training["micro_batch_tokens"]
                return KeptSettings(
                    precision,
                    str(provenance.get("base_dtype", "auto")),
                    training["warmup_from_zero"] is True,
                    tokens if isinstance(tokens, int) else None,
                    provenance if provenance.get("init_from") else None,
                )
    return None


def quarantine(selection: CheckpointSelection, log: Path | None = None) -> list[str]:
    """Rename the checkpoints that a run does not resume from, so that it does not overwrite them.

    Args:
        log: the run's metrics.jsonl. It is renamed too if the run begins from another run's checkpoint, since it
            describes other steps.

    Returns:
        One line per renamed checkpoint.
    """
    if log is not None and log.exists() and selection.checkpoint is not None:
        own = real_path(log.parent / "checkpoints")  # which may be a link to another disk
        if real_path(selection.checkpoint.folder.parent) != own:
            _rename(log, "superseded")
    corrupt = [
        f"skipped a corrupt checkpoint: {path.name}: {reason}; renamed to {_rename(path, 'corrupt')}"
        for path, reason in selection.corrupt.items()
    ]
    superseded = [
        f"{path.name} does not descend from the named checkpoint; renamed to {_rename(path, 'superseded')}"
        for path in selection.superseded
    ]
    return corrupt + superseded


def prune(folder: Path, keep_last: int, protected: Iterable[str | Path] = ()) -> None:
    """Delete all but the newest `keep_last` checkpoints. Incomplete checkpoints are neither counted nor deleted.

    A checkpoint into which somebody has put other files is kept, and one that cannot be deleted is left, each with a
    warning.

    Args:
        protected: checkpoint folders that are not deleted.
    """
    valid = [path for path in step_folders(folder) if why_invalid(path, required=FILES, hashes=False) is None]
    kept = {real_path(Path(path)) for path in protected}
    for path in valid[:-keep_last]:
        if real_path(path) not in kept:
            try:
                remove_folder(path)
            except ArtifactError as error:
                _warn_once(f"note: kept an old checkpoint: {error}")
            except OSError as error:  # on NFS, for example, while another process reads it; training can continue
                _warn_once(f"note: an old checkpoint cannot be deleted: {error}")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def named_base(adapter: Path) -> str:
    """Return the base model that an adapter names, a Hub id or a path.

    Raises:
        ArtifactError: it names none.
    """
    name = read_json(adapter / CONFIG).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise ArtifactError(f"{adapter}: does not name its base model; pass --base")
    return name


def run_of(checkpoint: Path) -> Path | None:
    """Return the run folder of a checkpoint; None if the folder is not in one."""
    folders = (checkpoint.absolute(), real_path(checkpoint))  # a link may point into a run
    return next((folder.parent.parent for folder in folders if folder.parent.name == "checkpoints"), None)


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after a step.

    Args:
        folder: of the checkpoints.
    """
    return folder / f"step-{step:08d}"


def step_folders(folder: Path) -> list[Path]:
    """Return the folders that are named like checkpoints, oldest first.

    Raises:
        ArtifactError: the folder cannot be read.
    """
    try:
        paths = list(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be read: {error.strerror}") from None
    folders = [path for path in paths if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))


def is_folder(path: Path) -> bool:
    """Whether a path is a folder. False if the path is not valid on this file system."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _rename(path: Path, prefix: str) -> str:
    """Add a prefix to a name, and a number if that name exists; return the new name."""
    target, number = path.with_name(f"{prefix}-{path.name}"), 1
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{prefix}-{path.name}-{number}")
    path.rename(target)
    return target.name


def _read_checkpoint(folder: Path) -> Checkpoint:
    listed = read_json(folder / MANIFEST)["files"]
    return Checkpoint(folder, read_state(folder / STATE, {name: entry["sha256"] for name, entry in listed.items()}))
