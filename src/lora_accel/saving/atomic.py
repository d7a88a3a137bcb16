"""Atomic writes of folders and small files, manifests that detect later corruption, and cleanup after a crash.

A folder that is replaced or deleted may contain files of the user. Only files that its manifest lists are deleted: with
any other file in it, nothing is.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from lora_accel.data.regular import hash_file, open_unbuffered
from lora_accel.errors import ArtifactError
from lora_accel.faults import fault_point
from lora_accel.paths import Purpose, has_access, open_to_read, real_path, temporary_sibling
from lora_accel.saving.lock import lock_folder

MANIFEST = "manifest.json"
CARD = "README.md"
"""The model card, which users edit before they publish a folder. An edited one is theirs, and no damage."""
LEFTOVER = re.compile(rf"\.(?P<name>.+)\.lora-accel-(?:{'|'.join(get_args(Purpose))})")
"""Name of the sibling that exists while a folder or file is written, replaced or deleted (`temporary_sibling`)."""
MAX_NAMED = 3
"""How many files of the user a message names."""


@contextlib.contextmanager
def atomic_folder(final: Path, hashes: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Yield a temporary folder to write into, and rename it to `final` if the block succeeds.

    Files are synced, then the manifest with their sizes and SHA-256 is written, then one atomic rename publishes the
    folder. An existing folder is renamed first and deleted last. If the block raises, the temporary folder is deleted.
    If `final` is a link to a folder, that folder is replaced, on its own disk.

    Args:
        hashes: SHA-256 by name, of files that the block has already synced and hashed.

    Raises:
        ArtifactError: `final` contains files that its manifest does not list, is a file, or a link to nothing, or
            another process is writing it.
    """
    final = _target(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary, older = temporary_sibling(final, "writing"), temporary_sibling(final, "older")
    lock, is_published = _claim(final), False
    try:
        check_no_unlisted_files(final)
        yield temporary
        _fix_modes(temporary)
        fault_point("save.before_manifest")
        write_manifest(temporary, hashes or {})
        fault_point("save.after_manifest")
        check_no_unlisted_files(final)  # again: writing may have taken an hour
        try:
            if final.exists():
                final.rename(older)
            fault_point("save.before_rename")
            temporary.rename(final)
            is_published = True
        except BaseException:  # Ctrl-C, too
            if older.exists() and not os.path.lexists(final):
                older.rename(final)
            raise
        fault_point("save.after_rename")
        fault_point("save.before_fsync_dir")
        sync(final.parent)
    finally:
        if not is_published:  # afterwards, another process may use this name
            shutil.rmtree(temporary, ignore_errors=True)
        if os.path.lexists(final):
            shutil.rmtree(older, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def unlisted_files(folder: Path) -> list[str]:
    """Return the files in a folder that its manifest does not list, as relative paths. Links are not followed.

    A model card that was edited is one of them.
    """
    if not folder.is_dir():
        return []
    try:
        files = read_json(folder / MANIFEST)["files"]
        listed = {MANIFEST: "", **{name: entry["sha256"] for name, entry in files.items() if "sha256" in entry}}
    except (ArtifactError, KeyError, TypeError, AttributeError):
        listed = {}
    unlisted = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        for path in (Path(parent, name) for name in (*folders, *names)):
            mode, name = path.lstat().st_mode, path.relative_to(folder).as_posix()
            if not stat.S_ISDIR(mode) and not (stat.S_ISREG(mode) and name in listed):
                unlisted.append(name)
            elif name == CARD and stat.S_ISREG(mode) and sha256_of(path) != listed[name]:
                unlisted.append(f"{name} (edited)")
    return sorted(unlisted)


def check_no_unlisted_files(folder: Path, way_out: str = "move them, or choose another folder") -> None:
    """Check that a folder can be replaced or deleted: that a manifest lists all of its files.

    Raises:
        ArtifactError: it contains other files, or is a file.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise ArtifactError(f"{folder}: is not a folder; {way_out}")
    try:
        unlisted = unlisted_files(folder)
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be read: {error}") from None
    if unlisted:
        more = len(unlisted) - MAX_NAMED
        named = ", ".join(unlisted[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
        raise ArtifactError(
            f"{folder}: contains files that were not written here, and would be lost: {named}; {way_out}"
        )


def remove_folder(folder: Path) -> None:
    """Delete a committed folder. It is renamed first: a crash never leaves a partial folder under the original name.

    Raises:
        ArtifactError: it contains files that its manifest does not list.
    """
    check_no_unlisted_files(folder)
    renamed = temporary_sibling(folder, "deleting")
    _delete(renamed)
    folder.rename(renamed)
    fault_point("rotate.mid")
    shutil.rmtree(renamed)


def recover(final: Path) -> None:
    """Clean up after a process that crashed while it wrote, replaced or deleted this folder or file.

    Raises:
        ArtifactError: the process is still writing it.
    """
    final = real_path(final) if final.is_symlink() else final  # what it links to may be renamed at the moment
    if _is_locked(final) or any(os.path.lexists(temporary_sibling(final, purpose)) for purpose in get_args(Purpose)):
        lock = _claim(final)
        temporary_sibling(final, "writing").rmdir()
        if lock is not None:
            os.close(lock)


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
    if folder.exists() and not has_access(folder, os.R_OK | os.X_OK):
        return "it cannot be read by this user"
    if not os.path.lexists(folder / MANIFEST):
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
            if name != CARD and (path.stat().st_size != size or (hashes and sha256_of(path) != sha256)):
                return f"{name} is corrupt (size or SHA-256 differs)"
        except OSError as error:
            return f"{name[:100]} cannot be read: {error.strerror}"
        except RuntimeError:  # before Python 3.13, for a link to itself
            return f"{name[:100]} is a link to itself"
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ArtifactError: the file is missing, or is not a JSON object.
    """
    try:
        with open_to_read(path) as file:
            value = json.loads(file.read().decode("utf-8"))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
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
    temporary = temporary_sibling(path, "writing")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = error.filename or str(path)  # for the message: on a full disk Python names no file
        raise
    sync(path.parent)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with open_unbuffered(path) as file:
        return hash_file(file)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _in_use(final: Path) -> ArtifactError:
    return ArtifactError(f"{final}: another process is writing it; wait for it, or choose another path")


def _claim(final: Path) -> int | None:
    """Create the temporary folder of `final`, lock it, and clean up after crashed processes.

    Whoever has locked that folder may rename and delete `final` and what is beside it. The lock moves with the folder
    when it is published, until older versions are deleted.

    Returns:
        The lock; None on file systems without locks for folders.

    Raises:
        ArtifactError: another process is writing, or what a crashed one left behind belongs to another user.
    """
    temporary, older = temporary_sibling(final, "writing"), temporary_sibling(final, "older")
    try:
        if os.path.lexists(temporary):
            _delete_unused(temporary)
        temporary.mkdir()
        lock = _lock_at(temporary)
    except (FileExistsError, FileNotFoundError, BlockingIOError):  # each step may be lost to another process
        raise _in_use(final) from None
    try:
        if _is_locked(final):
            raise _in_use(final)
        if older.exists() and not os.path.lexists(final):
            older.rename(final)
        _delete(older)
        _delete(temporary_sibling(final, "deleting"))
    except BaseException:
        temporary.rmdir()
        if lock is not None:
            os.close(lock)
        raise
    return lock


def _delete_unused(temporary: Path) -> None:
    """Delete the temporary folder or file of a crashed process, which holds no lock.

    Raises:
        BlockingIOError, FileNotFoundError: it is that of another process.
    """
    lock = None
    try:
        if temporary.is_dir() and not temporary.is_symlink():
            with contextlib.suppress(PermissionError):  # `_delete` reports it
                lock = _lock_at(temporary)
            _delete(temporary)
        else:
            with _deleting(temporary):
                temporary.unlink(missing_ok=True)
    except (IsADirectoryError, NotADirectoryError):  # replaced since it was looked at
        raise BlockingIOError from None
    finally:
        if lock is not None:
            os.close(lock)


def _lock_at(folder: Path) -> int | None:
    """Lock a folder that other processes may delete or replace.

    Raises:
        BlockingIOError: it is locked, or was replaced.
        FileNotFoundError: it was deleted.
    """
    lock = lock_folder(folder)
    if lock is not None and not os.path.samestat(os.fstat(lock), folder.stat()):
        os.close(lock)
        raise BlockingIOError
    return lock


def _is_locked(folder: Path) -> bool:
    """Whether another process, or another open descriptor of this one, has locked a folder."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    try:
        descriptor = lock_folder(folder)
    except BlockingIOError:
        return True
    except OSError:  # of another user, or deleted in the meantime
        return False
    if descriptor is not None:
        os.close(descriptor)
    return False


def _delete(leftover: Path) -> None:
    """Delete a temporary folder or file of this package, if it exists.

    Raises:
        ArtifactError: it belongs to another user.
    """
    with _deleting(leftover):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def _deleting(leftover: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:  # its path may be relative to a folder within
        raise ArtifactError(
            f"{leftover}: was left behind by a process that was killed, and this user may not delete it "
            f"({error.strerror}); delete it as its owner, or choose another path"
        ) from None


def _target(final: Path) -> Path:
    """Return the folder that a link points to, or the path itself if it is no link."""
    if not final.is_symlink():
        return final
    target = real_path(final)
    if not target.exists() and not temporary_sibling(target, "older").is_dir():
        raise ArtifactError(f"{final}: is a link to {target}, which does not exist; create that, or remove the link")
    return target


def _raise(error: OSError) -> None:
    raise error


def _fix_modes(folder: Path) -> None:
    """Set file modes according to the umask: safetensors creates private files."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
