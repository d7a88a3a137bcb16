"""Paths that a user names: whether something can be written there, and file access that never blocks on a FIFO."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, Literal

Purpose = Literal["writing", "older", "deleting"]
"""Why a temporary sibling exists: it is written, was replaced, or is deleted."""
SUFFIX_LENGTH = len("..lora-accel-deleting")
"""Characters that the name of a temporary sibling adds (see `temporary_sibling`)."""
INNER_LENGTH = 100
"""Characters left for the names of the files in a folder, within the length limit of a path."""
MAX_NEW_FOLDERS = 100
"""How many nested folders are created. Python's `mkdir` and `rmtree` recurse into each."""


def temporary_sibling(path: Path, purpose: Purpose) -> Path:
    """Return the path at which a file or folder is while it is written, replaced or deleted.

    Everything with such a name was written by this package and is deleted by the next command that writes `path`. No
    other program uses these names.
    """
    return path.with_name(f".{path.name}.lora-accel-{purpose}")


def why_not_writable(path: Path, kind: Literal["file", "folder"]) -> str | None:
    """Return why a file or folder cannot be written at a path, created or replaced; None if it can. Writes nothing.

    Args:
        kind: what will be written. A folder may be a link to a folder, which is then replaced where it is; a file may
            not be a link.

    Returns:
        A sentence that begins with the path that prevents it and ends with a way out.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:  # safetensors and tokenizers cannot write to it either
        return f"{str(path)!a}: contains characters that file names cannot have, or is not UTF-8; choose another path"
    if "\0" in str(path):
        return f"{str(path)!r}: file names cannot contain NUL; choose another path"
    if path.name in ("", ".."):
        return f"{path} is a folder that cannot be replaced; choose another path"
    try:
        nearest = next(folder for folder in (path, *path.parents, *path.absolute().parents) if os.path.lexists(folder))
        return _why_no_name(path, nearest) or _why_occupied(path, nearest, kind) or _why_no_access(path, nearest)
    except OSError as error:
        return f"{path}: cannot be written: {error.strerror}; choose another path"


def _why_no_name(path: Path, nearest: Path) -> str | None:
    """Return which name of the path is too long for its file system."""
    if nearest.is_symlink() and not nearest.exists():
        return None  # `_why_occupied` reports it
    folder = nearest if nearest.is_dir() else nearest.parent
    missing = path.absolute().parts[len(folder.absolute().parts) :]
    longest = max([*(len(os.fsencode(name)) for name in missing), len(os.fsencode(path.name)) + SUFFIX_LENGTH])
    length = len(os.fsencode(path.absolute())) + SUFFIX_LENGTH + INNER_LENGTH
    if longest > os.pathconf(folder, "PC_NAME_MAX") or length > os.pathconf(folder, "PC_PATH_MAX"):
        return f"{path}: the name is too long for this file system; choose a shorter one"
    if len(missing) > MAX_NEW_FOLDERS:
        return f"{path}: is {len(missing):,} folders below {folder}; choose a shorter path"
    return None


def _why_occupied(path: Path, nearest: Path, kind: str) -> str | None:
    """Return what is at the path, or in place of one of its parents, that cannot be replaced."""
    if nearest.is_symlink() and not nearest.exists():
        if nearest == path and kind == "folder" and temporary_sibling(real_path(nearest), "older").is_dir():
            return None  # a killed command was replacing the folder; the next one restores it
        target = os.readlink(nearest)
        return f"{nearest} is a link to {target}, which does not exist; create that, or remove the link"
    if nearest != path:
        return None if nearest.is_dir() else f"{nearest} is a file; choose a folder"
    if kind == "folder":
        if not path.is_dir():
            return f"{path} is a file; choose a folder"
        if os.path.ismount(real_path(path)):
            return f"{path} is a mount point, which cannot be replaced; choose a folder in it"
    elif path.is_symlink():
        return f"{path} is a link to {os.readlink(path)}; name the file itself"
    elif not path.is_file():
        return f"{path} is {'a folder' if path.is_dir() else 'not an ordinary file'}; choose another name"
    return None


def _why_no_access(path: Path, nearest: Path) -> str | None:
    """Return which folder this user may not write to."""
    target = real_path(path)
    folders = [nearest] if nearest != path else [target.parent, *([target] if target.is_dir() else [])]
    for folder in folders:
        if folder.exists() and not has_access(folder, os.W_OK | os.X_OK):
            return f"{folder.absolute()} is not writable for this user; choose another path"
    if is_protected(target):
        return f"{path} belongs to another user, in a folder where only owners replace files; choose another path"
    return None


def real_path(path: Path) -> Path:
    """Return a path with its links followed. Unlike `Path.resolve`, it accepts a link to itself, and any name."""
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # NUL, or a character that file names cannot have
        return path.absolute()


def has_access(path: Path, mode: int) -> bool:
    """Whether this process may use an existing path: `os.access` for the effective user.

    Args:
        mode: as for `os.access`.
    """
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def is_protected(path: Path) -> bool:
    """Whether only another user may rename or replace this path: its folder has the sticky bit, as /tmp has."""
    if not path.exists():
        return False
    folder, user = path.parent.stat(), os.geteuid()
    return bool(folder.st_mode & stat.S_ISVTX) and user not in (0, folder.st_uid, path.stat().st_uid)


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open an ordinary file and return its descriptor. Opening a FIFO or a device could block, or never end.

    Args:
        flags: as for `os.open`. With O_CREAT the file's mode follows the umask.

    Raises:
        OSError: it cannot be opened, or is not an ordinary file.
    """
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "the name contains a NUL character", str(path))
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        if is_folder:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "not an ordinary file", str(path))
    return descriptor


def open_to_read(path: Path) -> BinaryIO:
    """Open an ordinary file to read its bytes. See `open_regular`."""
    return os.fdopen(open_regular(path), "rb")


def open_to_append(path: Path) -> BinaryIO:
    """Open or create an ordinary file to append bytes. Links are not followed. See `open_regular`."""
    return os.fdopen(open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW), "ab")
