"""A folder appears whole or not at all; a small file likewise. What a process that died here left is put right."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lora_accel.errors import ArtifactError
from lora_accel.faults import fault_point

MANIFEST = "manifest.json"
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(writing|older|deleting)")
"""What stands beside a folder or file while it is written, replaced or deleted."""


@contextlib.contextmanager
def atomic_folder(final: Path, hashes: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Give a temporary folder to write into, and put it in place of `final` if the block ends well.

    Files are synced, then the manifest with their sizes and SHA-256 is written, then one rename makes the folder
    appear. An older folder of that name is moved away first and deleted last. If the block raises, nothing stays.

    Args:
        hashes: SHA-256 of files that are synced and hashed already when the block ends, by name.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    recover(final)
    temporary, older = _beside(final, "writing"), _beside(final, "older")
    temporary.mkdir()
    try:
        yield temporary
        _fix_modes(temporary)
        fault_point("save.before_manifest")
        write_manifest(temporary, hashes or {})
        fault_point("save.after_manifest")
        if final.exists():
            final.rename(older)
        try:
            fault_point("save.before_rename")
            temporary.rename(final)
        except OSError:
            if older.exists():
                older.rename(final)
            raise
        fault_point("save.after_rename")
        fault_point("save.before_fsync_dir")
        sync(final.parent)
        shutil.rmtree(older, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a committed folder: moved away first, so that it is never there in part."""
    away = _beside(folder, "deleting")
    shutil.rmtree(away, ignore_errors=True)
    folder.rename(away)
    fault_point("rotate.mid")
    shutil.rmtree(away)


def recover(final: Path) -> None:
    """Put right what a process left that died while it wrote, replaced or deleted this folder or file."""
    older = _beside(final, "older")
    if older.exists() and not final.exists():
        older.rename(final)
    for what in ("writing", "older", "deleting"):
        leftover = _beside(final, what)
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def recover_all(folder: Path) -> None:
    """Put right what processes that died left in a folder that is this process's alone."""
    if folder.is_dir():
        for match in [LEFTOVER.fullmatch(path.name) for path in folder.iterdir()]:
            if match:
                recover(folder / match["name"])


def write_manifest(folder: Path, hashes: Mapping[str, str] | None = None) -> None:
    """Sync every file of a folder, then write the manifest that makes them count. `hashes`: see `atomic_folder`."""
    files, known = {}, hashes or {}
    for path in sorted(folder.rglob("*")):
        if path.name == MANIFEST and path.parent == folder:
            continue
        name = path.relative_to(folder).as_posix()
        if name not in known:
            sync(path)
        if path.is_file():
            files[name] = {"bytes": path.stat().st_size, "sha256": known.get(name) or sha256_of(path)}
    write_json(folder / MANIFEST, {"files": files})


def why_invalid(folder: Path, *, required: tuple[str, ...] = (), hashes: bool = True) -> str | None:
    """Return what is wrong with a committed folder, or None if every file is as its manifest says.

    Args:
        required: files that the manifest must name.
        hashes: whether bytes are read; without it only names and sizes are compared.
    """
    if folder.is_symlink():
        return "it is a link"
    if not (folder / MANIFEST).exists():
        return f"{MANIFEST} is missing, so it was never finished"
    try:
        listed = read_json(folder / MANIFEST)["files"]
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except (ArtifactError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name in required:
        if name not in files:
            return f"{MANIFEST} does not name {name}"
    for name, (size, sha256) in files.items():
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not name.isprintable():
            return f"{MANIFEST} names {name!a}, which is no file of the folder"
        try:
            if path.resolve() != folder.resolve() / name or not path.is_file():  # a link leads elsewhere
                return f"{name} is missing"
            if path.stat().st_size != size or (hashes and sha256_of(path) != sha256):
                return f"{name} is not what was written (size or SHA-256 differs)"
        except OSError as error:
            return f"{name[:100]} cannot be read: {error.strerror}"
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ArtifactError: the file is missing, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: cannot be read: {str(error) or type(error).__name__}") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: should be an object, not a {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, as UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file whole: temporary file, sync, rename, sync of the folder."""
    beside = _beside(path, "writing")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


def sync(path: Path) -> None:
    """Wait until a file or the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fix_modes(folder: Path) -> None:
    """Give files the mode that the umask asks for: safetensors makes them private."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
