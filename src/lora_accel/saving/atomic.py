"""Atomic writes of folders and small files, manifests that detect later corruption, and cleanup after a crash."""

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
"""Name of the sibling that exists while a folder or file is written, replaced or deleted."""


@contextlib.contextmanager
def atomic_folder(final: Path, hashes: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Yield a temporary folder to write into, and rename it to `final` if the block succeeds.

    Files are synced, then the manifest with their sizes and SHA-256 is written, then one atomic rename publishes the
    folder. An existing folder is renamed first and deleted last. If the block raises, the temporary folder is deleted.

    Args:
        hashes: SHA-256 by name, of files that the block has already synced and hashed.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    recover(final)
    temporary, older = _sibling(final, "writing"), _sibling(final, "older")
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
    """Delete a committed folder. It is renamed first: a crash never leaves a partial folder under the original name."""
    renamed = _sibling(folder, "deleting")
    shutil.rmtree(renamed, ignore_errors=True)
    folder.rename(renamed)
    fault_point("rotate.mid")
    shutil.rmtree(renamed)


def recover(final: Path) -> None:
    """Clean up after a process that crashed while it wrote, replaced or deleted this folder or file."""
    older = _sibling(final, "older")
    if older.exists() and not final.exists():
        older.rename(final)
    for suffix in ("writing", "older", "deleting"):
        leftover = _sibling(final, suffix)
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def recover_all(folder: Path) -> None:
    """Clean up after crashed processes everywhere in a folder that only this process uses."""
    if folder.is_dir():
        for match in [LEFTOVER.fullmatch(path.name) for path in folder.iterdir()]:
            if match:
                recover(folder / match["name"])


def write_manifest(folder: Path, hashes: Mapping[str, str] | None = None) -> None:
    """Sync every file of a folder, then write the manifest that commits them.

    Args:
        hashes: see `atomic_folder`.
    """
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
    """Return why a committed folder is invalid, or None if every file matches the manifest.

    Args:
        required: files that the manifest must list.
        hashes: whether to read the files and compare their SHA-256; otherwise only names and sizes are compared.
    """
    if folder.is_symlink():
        return "it is a symbolic link"
    if not (folder / MANIFEST).exists():
        return f"{MANIFEST} is missing: the folder was never completed"
    try:
        listed = read_json(folder / MANIFEST)["files"]
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except (ArtifactError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name in required:
        if name not in files:
            return f"{MANIFEST} does not list {name}"
    for name, (size, sha256) in files.items():
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not name.isprintable():
            return f"{MANIFEST} lists {name!a}, which is not a file in this folder"
        try:
            if path.resolve() != folder.resolve() / name or not path.is_file():  # links are not followed
                return f"{name} is missing"
            if path.stat().st_size != size or (hashes and sha256_of(path) != sha256):
                return f"{name} is corrupt (size or SHA-256 differs)"
        except OSError as error:
            return f"{name[:100]} cannot be read: {error.strerror}"
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ArtifactError: the file is missing, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: cannot be read: {str(error) or type(error).__name__}") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: should be an object, not a {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file atomically: write a temporary file, sync, rename, sync the folder."""
    temporary = _sibling(path, "writing")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sibling(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fix_modes(folder: Path) -> None:
    """Set file modes according to the umask: safetensors creates private files."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
