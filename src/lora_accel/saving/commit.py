"""A folder appears whole or not at all; a small file likewise."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


@contextlib.contextmanager
def committed_folder(final: Path) -> Iterator[Path]:
    """Give a temporary folder to write into, and put it in place of `final` if the block ends well.

    Files are synced, then the manifest with their sizes and SHA-256 is written, then one rename makes the folder
    appear. An older folder of that name is moved away first and deleted last. If the block raises, nothing stays.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that died here
    temporary.mkdir()
    try:
        yield temporary
        _fix_modes(temporary)
        write_manifest(temporary)
        older = final.with_name(f".{final.name}.older")
        if final.exists():
            shutil.rmtree(older, ignore_errors=True)
            final.rename(older)
        try:
            temporary.rename(final)
        except OSError:
            if older.exists():
                older.rename(final)
            raise
        _sync(final.parent)
        shutil.rmtree(older, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_manifest(folder: Path) -> None:
    """Sync every file of a folder, then write the manifest that makes them count."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            _sync(path)
            files[path.relative_to(folder).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": sha256_of(path),
            }
    write_json(folder / MANIFEST, {"files": files})
    _sync(folder)


def why_invalid(folder: Path) -> str | None:
    """Return what is wrong with a committed folder, or None if every file is as its manifest says."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        files = [(name, entry["bytes"], entry["sha256"]) for name, entry in listed.items()]
    except FileNotFoundError:
        return f"{MANIFEST} is missing, so it was never finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name, size, sha256 in files:
        path = folder / name
        if path.is_symlink() or not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or sha256_of(path) != sha256:
            return f"{name} is not what was written (size or SHA-256 differs)"
    return None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a small file whole: temporary file, sync, rename."""
    beside = path.with_name(f".{path.name}.writing")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
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
