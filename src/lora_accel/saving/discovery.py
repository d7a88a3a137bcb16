"""The checkpoints of a run: which there are, which one it goes on from, which stay. Reads no tensors."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

from lora_accel.errors import ArtifactError
from lora_accel.saving.atomic import MANIFEST, read_json, remove_folder, sha256_of, why_invalid

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
FILES = (WEIGHTS, CONFIG, OPTIMIZER, STATE)
"""What a checkpoint holds beside its manifest."""
ASIDE = ("corrupt", "superseded")
"""What the name of a checkpoint begins with that a run does not go on from."""


class Checkpoint(NamedTuple):
    """A checkpoint on disk whose manifest holds."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Return how many steps were done."""
        return int(self.state["step"])

    @property
    def skipped(self) -> int:
        """Return how many of them made no update, their loss or gradient norm not being finite."""
        return int(self.state["skipped"])

    @property
    def overflowed(self) -> int:
        """Return how many of them made no update, the loss scale being too large."""
        return int(self.state["overflowed"])


class RunPrecision(NamedTuple):
    """What a checkpoint was computed in."""

    mixed_precision: str
    base_dtype: str
    """By name; `auto` = as stored, which older checkpoints do not name otherwise."""


class CheckpointSelection(NamedTuple):
    """What a run goes on from, and what of its own folder has to step aside."""

    checkpoint: Checkpoint | None
    """None = it begins afresh."""
    parent_hash: str | None
    """Hash of the manifest of the checkpoint that `checkpoint.resume` named, now or when the run began."""
    parent_path: str | None
    """Where that checkpoint was."""
    damaged: dict[Path, str]
    """Newer ones that cannot be used, with the reason."""
    superseded: list[Path]
    """Newer ones that do not descend from the one that is named."""


def find_checkpoint(folder: Path, resume: str) -> CheckpointSelection:
    """Find what to go on from. Changes nothing.

    A named checkpoint says where the run begins. Once it has checkpoints that descend from it, it goes on from these:
    the same command resumes.

    Args:
        folder: the run's checkpoints.
        resume: auto = the newest valid one | never | a checkpoint folder.

    Raises:
        ArtifactError: the named one cannot be used, every one is damaged, or `never` meets a folder that has some.
    """
    own = step_folders(folder)
    named = None if resume in ("auto", "never") else Path(resume)
    if named is not None and not is_folder(named):
        found = find_checkpoint(folder, "auto")
        if found.checkpoint is not None and found.parent_path == resume:
            return found  # it has been rotated away where it was, and what descends from it is here
        raise ArtifactError(f"checkpoint.resume: {resume} is no folder; say auto, never, or a folder of checkpoints/")
    if resume == "never" and own:
        raise ArtifactError(
            f"checkpoint.resume=never, but {folder} holds {len(own)} checkpoints; "
            "choose another output_dir, or delete them"
        )
    begin = None if named is None else _named(named)
    parent_hash, parent_path = (None, None) if begin is None else (sha256_of(begin.folder / MANIFEST), resume)
    found = CheckpointSelection(begin, parent_hash, parent_path, {}, [])
    for candidate in reversed(own):
        if begin is not None and candidate.resolve() == begin.folder.resolve():
            break  # all before it stay: it descends from them
        reason = why_invalid(candidate, required=FILES)
        if reason is not None:
            found.damaged[candidate] = reason
            continue
        checkpoint = _open(candidate)
        if begin is None:
            state = checkpoint.state
            return found._replace(
                checkpoint=checkpoint, parent_hash=state.get("begun_from"), parent_path=state.get("begun_at")
            )
        if checkpoint.state.get("begun_from") == parent_hash:
            return found._replace(checkpoint=checkpoint)
        found.superseded.append(candidate)
    aside = sorted(path for prefix in ASIDE for path in folder.glob(f"{prefix}-step-*")) if folder.is_dir() else []
    if begin is None and resume == "auto" and (found.damaged or aside):
        lines = [f"{path.name}: {reason}" for path, reason in found.damaged.items()] + [path.name for path in aside]
        raise ArtifactError(
            f"{folder}: every checkpoint is damaged or set aside, and beginning afresh would write over them; "
            "choose another output_dir, or move them away\n" + "\n".join(f"  {line}" for line in lines)
        )
    return found


def precision_of_run(folder: Path, resume: str) -> RunPrecision | None:
    """Return the precision of the checkpoint that a run will resume from, None if it begins afresh.

    Only names and sizes are checked here: the checkpoint itself is found, and read in full, once the data are.

    Args:
        folder, resume: as in `find_checkpoint`.
    """
    named = [] if resume in ("auto", "never") else [Path(resume)]
    for candidate in [*reversed(step_folders(folder)), *named]:
        if why_invalid(candidate, required=FILES, hashes=False) is None:
            with contextlib.suppress(ArtifactError, KeyError, TypeError, AttributeError):
                state = read_json(candidate / STATE)
                made_from = state["provenance"]
                precision = made_from["mixed_precision"]
                descends = not named or candidate in named or state.get("begun_at") == resume
                if descends and precision in ("no", "bf16", "fp16"):
                    return RunPrecision(precision, str(made_from.get("base_dtype", "auto")))
    return None


def quarantine(found: CheckpointSelection, log: Path | None = None) -> list[str]:
    """Rename what a run cannot go on from, so that nothing is written over it; return what was done.

    Args:
        log: the run's metrics.jsonl, which tells of other steps than those before a checkpoint of another run.
    """
    begins = found.checkpoint.folder.resolve().parent.parent if found.checkpoint else None
    if log is not None and log.exists() and begins not in (None, log.parent.resolve()):
        _renamed(log, "superseded")
    damaged = [
        f"passed over a damaged checkpoint: {path.name}: {reason}; it is kept as {_renamed(path, 'corrupt')}"
        for path, reason in found.damaged.items()
    ]
    superseded = [
        f"{path.name} does not descend from the named checkpoint; it is kept as {_renamed(path, 'superseded')}"
        for path in found.superseded
    ]
    return damaged + superseded


def prune(folder: Path, keep_last: int, spare: str = "") -> None:
    """Delete all but the newest so many checkpoints. What looks like no whole one is neither counted nor touched."""
    whole = [path for path in step_folders(folder) if why_invalid(path, required=FILES, hashes=False) is None]
    for old in whole[:-keep_last]:
        if not spare or old.resolve() != Path(spare).resolve():
            remove_folder(old)


class CheckpointInfo(NamedTuple):
    """What is told of a checkpoint folder."""

    name: str
    step: int
    age_seconds: float
    bytes: int
    reason: str | None
    """Why it cannot be used; None = it can."""


def list_checkpoints(run: Path, *, hashes: bool) -> list[CheckpointInfo]:
    """List a run's checkpoints, oldest first, those set aside last.

    Args:
        hashes: whether every byte is read and compared.

    Raises:
        ArtifactError: there is no such run.
    """
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise ArtifactError(f"{run}: has no checkpoints/ in it; give the output_dir of a run")
    aside = sorted(
        path for path in folder.iterdir() if re.fullmatch(rf"({'|'.join(ASIDE)})-step-\d{{8,}}.*", path.name)
    )
    listed = []
    for path in [*step_folders(folder), *aside]:
        reason = why_invalid(path, required=FILES, hashes=hashes)
        if path in aside:
            reason = f"set aside{'' if reason is None else f': {reason}'}"
        step = int(re.sub(r".*step-(\d+).*", r"\1", path.name))
        with contextlib.suppress(FileNotFoundError):  # a run that lives may have deleted it meanwhile
            size = sum(file.lstat().st_size for file in path.iterdir()) if path.is_dir() else 0
            listed.append(CheckpointInfo(path.name, step, time.time() - path.lstat().st_mtime, size, reason))
    return listed


def step_folders(folder: Path) -> list[Path]:
    """Return the folders that may be checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]
    return sorted(found, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _renamed(path: Path, prefix: str) -> str:
    free = (path.with_name(f"{prefix}-{path.name}{again}") for again in ("", *(f"-{n}" for n in range(2, 10**6))))
    target = next(target for target in free if not target.exists())
    path.rename(target)
    return target.name


def is_folder(path: Path) -> bool:
    """Whether a path is a folder; one that no file system takes is none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _named(folder: Path) -> Checkpoint:
    if reason := why_invalid(folder, required=FILES):
        raise ArtifactError(f"checkpoint.resume: {folder} cannot be used: {reason}")
    return _open(folder)


def _open(folder: Path) -> Checkpoint:
    state = read_json(folder / STATE)
    counts = {key: state.get(key, 0) for key in ("step", "skipped", "overflowed")}
    step, skipped, overflowed = counts.values()
    if any(type(count) is not int or count < 0 for count in counts.values()) or not 0 < step >= skipped + overflowed:
        raise ArtifactError(f"{folder / STATE}: {counts} are not counts of steps")
    return Checkpoint(folder, state | counts)
