"""Check that a path can be used as a run folder; and during the run, that the folder is still there."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from pathlib import Path

from lora_accel.errors import ArtifactError, ConfigError, TrainingError
from lora_accel.paths import has_access, is_protected, real_path, temporary_sibling, why_not_writable
from lora_accel.saving.atomic import check_no_unlisted_files
from lora_accel.saving.discovery import step_folders
from lora_accel.saving.lock import LOCK

RUN_FILES = (
    "plan.json",
    "config.yaml",
    "provenance.json",
    "data_ledger.json",
    "status.json",
    "metrics.jsonl",
    "trackers.json",
    LOCK,
)
"""The files that a run writes."""
RUN_FOLDERS = ("checkpoints", "adapter", "tensorboard")
"""The folders that a run writes to. They may be links to folders on another disk."""
PLAN_LEFTOVERS = (temporary_sibling(Path("plan.json"), "writing").name, ".plan.json.writing")
"""Left behind by a run that was killed while it created its folder; the second by an earlier version."""


def check_output_folder(folder: Path) -> None:
    """Check that a path can be used as a run folder. Writes nothing.

    Raises:
        ConfigError: it is a file, is not writable, contains other files or an adapter that would be lost, has a name
            that other programs misread, or something in it that is not what a run writes there.
    """
    if "[" in str(folder) or ".." in folder.parts:
        raise ConfigError(
            f"output_dir: {folder}: many programs read `[` as a pattern, and `..` depends on symbolic links; "
            "write the path without them"
        )
    if reason := why_not_writable(folder / "plan.json", "file"):
        raise ConfigError(f"output_dir: {reason}")
    if not folder.is_dir():
        return
    try:
        names = {path.name for path in folder.iterdir()} - {LOCK, *PLAN_LEFTOVERS}
        check_run_files(folder)
        has_checkpoints = bool(step_folders(folder / "checkpoints"))
    except OSError as error:
        raise ConfigError(f"output_dir: {error.filename}: {error.strerror}; choose another folder") from None
    if names and "plan.json" not in names and not has_checkpoints:
        raise ConfigError(f"output_dir: {folder} contains other files but no run; choose a new or empty folder")
    if "adapter" in names and not has_checkpoints:
        raise ConfigError(
            f"output_dir: {folder} contains an adapter but no checkpoints; a new run would replace it. "
            "Choose another folder, or move the adapter"
        )


def check_run_files(folder: Path) -> None:
    """Check what exists in a run folder: ordinary files and folders, which this user may read and write.

    Raises:
        ConfigError: a path is of another kind (a folder, a FIFO, a link to nothing), or belongs to another user.
        OSError: a folder cannot be read.
    """
    for path in (folder / name for name in RUN_FILES):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            kind = "a link" if path.is_symlink() else "a folder" if path.is_dir() else "not an ordinary file"
            raise ConfigError(f"output_dir: {path} is {kind}, but a run writes a file there; move it")
        _check_access(path, os.R_OK | os.W_OK if path.name in ("metrics.jsonl", LOCK) else os.R_OK)
    for path in (folder / name for name in RUN_FOLDERS):
        if path.is_symlink() and not path.exists() and not temporary_sibling(real_path(path), "older").is_dir():
            raise ConfigError(
                f"output_dir: {path} is a link to {os.readlink(path)}, which does not exist; create that, or remove "
                "the link"
            )
        if path.exists() and not path.is_dir():
            raise ConfigError(f"output_dir: {path} is a file; choose another folder, or move the file")
        _check_access(path, os.R_OK | os.W_OK | os.X_OK)
    checkpoints = folder / "checkpoints"
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if re.fullmatch(r"step-\d{8,}", path.name) and (path.is_symlink() or not path.is_dir()):
            raise ConfigError(f"output_dir: {path} is not a folder, but a run writes a checkpoint there; move it")
        for file in (path, *path.iterdir()) if path.is_dir() else ():
            _check_access(file, os.R_OK | (os.W_OK | os.X_OK if file == path else 0))


def check_final_adapter(folder: Path) -> None:
    """Check, before training, that the final adapter can be written: that it replaces no files of the user.

    Args:
        folder: the adapter's folder in the run folder.

    Raises:
        ConfigError: it contains other files, or cannot be replaced.
    """
    if reason := why_not_writable(folder, "folder"):
        raise ConfigError(f"output_dir: {reason}")
    try:
        check_no_unlisted_files(folder, "move them: the run replaces this folder at its end")
    except ArtifactError as error:
        raise ConfigError(f"output_dir: {error}") from None


def _check_access(path: Path, mode: int) -> None:
    """Check that this user may use a path, if it exists.

    Raises:
        ConfigError: the user may not.
    """
    if path.exists() and (not has_access(path, mode) or is_protected(path)):
        raise ConfigError(
            f"output_dir: {path} belongs to another user, or its permissions do not allow this user to continue the "
            "run; choose another folder, or change its permissions"
        )


@dataclasses.dataclass(frozen=True)
class FolderIdentity:
    """A run folder, by its identity on disk: another folder may have its path later."""

    folder: Path
    device: int
    inode: int

    @classmethod
    def of(cls, folder: Path) -> FolderIdentity:
        """Return the identity of an existing folder."""
        status = folder.stat()
        return cls(folder, status.st_dev, status.st_ino)

    def check(self) -> None:
        """Check that the folder is still at its path.

        Raises:
            TrainingError: it was moved or deleted. Nothing may be written at the path.
        """
        with contextlib.suppress(OSError):
            status = self.folder.stat()
            if (status.st_dev, status.st_ino) == (self.device, self.inode):
                return
        raise _moved(self.folder)


def check_exists(folder: Path) -> None:
    """Check that a run folder still exists, before a checkpoint or the adapter is written into it.

    Raises:
        TrainingError: it was moved or deleted.
    """
    if not folder.is_dir():
        raise _moved(folder)


def _moved(folder: Path) -> TrainingError:
    return TrainingError(
        f"{folder}: the run folder was moved or deleted while the run was in progress; nothing else is written. Move "
        "it back, and run the same command to resume from its newest checkpoint"
    )
