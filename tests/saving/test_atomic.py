"""Writes are atomic, crashes are cleaned up, and manifests detect later damage."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_accel import faults
from lora_accel.errors import ArtifactError
from lora_accel.saving.atomic import (
    MANIFEST,
    atomic_folder,
    recover,
    recover_all,
    remove_folder,
    sha256_of,
    why_invalid,
    write_json,
    write_text,
)
from tests.conftest import ROOT


def fill(folder: Path, text: str = "one") -> None:
    (folder / "a.txt").write_text(text)
    (folder / "inner").mkdir()
    (folder / "inner" / "b.bin").write_bytes(b"\x00\x01\x02" * 100)


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    with atomic_folder(tmp_path / "result") as temporary:
        fill(temporary)
    return tmp_path / "result"


def fail_while_writing(folder: Path, error: BaseException) -> None:
    with atomic_folder(folder) as temporary:
        fill(temporary, "two")
        raise error


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_that_is_being_written_is_left_to_its_writer(tmp_path: Path) -> None:
    """Two merges into one folder: the second used to delete what the first had written so far."""
    final = tmp_path / "result"
    with atomic_folder(final) as temporary:
        fill(temporary)
        with pytest.raises(ArtifactError, match="result: another process is writing it"):
            fail_while_writing(final, AssertionError("the block must not run"))
        with pytest.raises(ArtifactError, match="another process is writing it"):
            recover_all(tmp_path)
    assert why_invalid(final) is None
    assert names(tmp_path) == {"result"}


def test_a_folder_is_left_to_its_writer_until_the_old_version_is_deleted(
    committed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next process used to start after the rename, and the first one then deleted what it had written."""
    from lora_accel.saving import atomic

    attempts = []

    def write_too(folder: Path) -> None:
        sync(folder)
        if folder == committed.parent:
            attempts.append(folder)
            with pytest.raises(ArtifactError, match="another process is writing it"):
                fail_while_writing(committed, AssertionError("the block must not run"))

    sync = atomic.sync
    monkeypatch.setattr(atomic, "sync", write_too)
    with atomic_folder(committed) as temporary:
        (temporary / "a.txt").write_text("two")
    assert attempts
    assert (committed / "a.txt").read_text() == "two"
    assert names(committed.parent) == {"result"}


def test_a_name_that_another_process_uses_after_the_rename_is_left_to_it(
    committed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On file systems without locks for folders nothing else keeps the next process from starting."""
    from lora_accel.saving import atomic

    of_next = committed.parent / ".result.lora-accel-writing"
    monkeypatch.setattr(atomic, "lock_folder", lambda folder: None)
    monkeypatch.setattr(atomic, "sync", lambda path: of_next.mkdir() if path == committed.parent else None)
    with atomic_folder(committed) as temporary:
        (temporary / "a.txt").write_text("two")
    assert of_next.is_dir()


@pytest.mark.parametrize("other", ["locks it", "deletes it", "replaces it"])
def test_a_folder_that_another_process_takes_before_it_is_locked_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    from lora_accel.saving import atomic

    def take(folder: Path) -> int | None:
        if other == "locks it":
            raise BlockingIOError
        if other == "replaces it":
            descriptor = lock_folder(folder)
            folder.rename(tmp_path / "elsewhere")
            folder.mkdir()
            return descriptor
        folder.rmdir()
        return lock_folder(folder)

    lock_folder = atomic.lock_folder
    monkeypatch.setattr(atomic, "lock_folder", take)
    with pytest.raises(ArtifactError, match="result: another process is writing it"):
        fail_while_writing(tmp_path / "result", AssertionError("must not run"))


def test_folder_appears_only_after_the_block(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "er" / "result"
    with atomic_folder(final) as temporary:
        fill(temporary)
        assert not final.exists()
        assert temporary.parent == final.parent, "one file system, so that the rename is atomic"
    assert names(final) == {"a.txt", "inner", MANIFEST}
    assert names(final.parent) == {"result"}
    assert why_invalid(final) is None


def test_nothing_is_left_if_the_block_raises(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="disk full"):
        fail_while_writing(tmp_path / "result", RuntimeError("disk full"))
    assert names(tmp_path) == set()


def test_existing_folder_is_unchanged_if_the_block_raises(committed: Path) -> None:
    before = (committed / MANIFEST).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        fail_while_writing(committed, KeyboardInterrupt())
    assert (committed / "a.txt").read_text() == "one"
    assert (committed / MANIFEST).read_bytes() == before
    assert why_invalid(committed) is None
    assert names(committed.parent) == {"result"}


def test_existing_folder_is_replaced(committed: Path) -> None:
    with atomic_folder(committed) as temporary:
        (temporary / "a.txt").write_text("two")
    assert names(committed) == {"a.txt", MANIFEST}
    assert (committed / "a.txt").read_text() == "two"
    assert names(committed.parent) == {"result"}


def test_cleanup_after_a_crash_holds_the_lock(committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to run before the lock: of two commands and a kill, one could delete the only version of the other."""
    from lora_accel.saving import atomic

    writing, older = (committed.parent / f".result.lora-accel-{purpose}" for purpose in ("writing", "older"))
    are_locked = []

    def note(leftover: Path) -> None:
        if leftover == older:
            are_locked.append(atomic._is_locked(writing))
        delete(leftover)

    delete = atomic._delete
    monkeypatch.setattr(atomic, "_delete", note)
    for clean_up in (recover, lambda folder: fail_while_writing(folder, KeyError())):
        older.mkdir()
        with contextlib.suppress(KeyError):
            clean_up(committed)
    assert are_locked == [True, True]
    assert names(committed.parent) == {"result"}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_leftover_of_another_user_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """It named a file within the folder only: `a: Permission denied`."""
    leftover = tmp_path / ".result.lora-accel-writing"
    leftover.mkdir() if kind == "folder" else leftover.touch()

    def fail(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "a")

    monkeypatch.setattr(shutil, "rmtree", fail)
    monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(ArtifactError, match=rf"{leftover}: was left behind .* \(Permission denied\); delete it as its"):
        fail_while_writing(tmp_path / "result", AssertionError("must not run"))


def test_leftovers_of_a_crash_are_deleted(tmp_path: Path) -> None:
    for leftover in (".result.lora-accel-writing", ".result.lora-accel-deleting"):
        (tmp_path / leftover / "inner").mkdir(parents=True)
        (tmp_path / leftover / "partial").write_text("partial")
    with atomic_folder(tmp_path / "result") as temporary:
        fill(temporary)
    assert names(tmp_path) == {"result"}
    assert names(tmp_path / "result") == {"a.txt", "inner", MANIFEST}


@pytest.mark.parametrize("stage", ["manifest", "rename"])
def test_failure_while_committing_keeps_the_existing_folder(
    committed: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    from lora_accel.saving import atomic

    if stage == "manifest":

        def raise_no_space(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(atomic, "write_manifest", raise_no_space)
    else:
        rename = Path.rename

        def failing_rename(self: Path, target: Path) -> Path:
            if self.name.endswith(".lora-accel-writing"):
                raise OSError(5, "Input/output error")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(OSError, match="Errno"), atomic_folder(committed) as temporary:
        fill(temporary, "two")
    monkeypatch.undo()
    assert why_invalid(committed) is None
    assert (committed / "a.txt").read_text() == "one"


@pytest.mark.parametrize(("point", "text"), [("save.before_rename", "one"), ("save.after_rename", "two")])
def test_interrupt_while_committing_leaves_one_version(
    committed: Path, monkeypatch: pytest.MonkeyPatch, point: str, text: str
) -> None:
    """Ctrl-C between the two renames used to leave the old version under its hidden name only."""
    from lora_accel.saving import atomic

    def interrupt(name: str) -> None:
        if name == point:
            raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "fault_point", interrupt)
    with pytest.raises(KeyboardInterrupt), atomic_folder(committed) as temporary:
        fill(temporary, "two")
    assert why_invalid(committed) is None
    assert (committed / "a.txt").read_text() == text
    assert names(committed.parent) == {"result"}


def test_kill_at_any_file_operation_leaves_a_valid_folder(tmp_path: Path) -> None:
    """A child process exits at its n-th sync or rename, for every n."""
    program = """
import os, sys
from pathlib import Path
from lora_accel.saving.atomic import atomic_folder
count = iter(range(int(sys.argv[2])))
def dying(original):
    def call(*args, **kwargs):
        if next(count, None) is None:
            os._exit(9)
        return original(*args, **kwargs)
    return call
os.fsync, os.rename, os.replace = dying(os.fsync), dying(os.rename), dying(os.replace)
Path.rename, Path.replace = dying(Path.rename), dying(Path.replace)
with atomic_folder(Path(sys.argv[1])) as temporary:
    for name in "ab":
        (temporary / name).write_text("new" * 1000)
"""
    results = []
    for operations in range(40):
        final = tmp_path / str(operations) / "result"
        with atomic_folder(final) as temporary:
            (temporary / "a").write_text("old")
        code = subprocess.run([sys.executable, "-c", program, final, str(operations)], cwd=ROOT, check=False).returncode
        if code == 0:
            break
        assert code == 9
        older = final.with_name(".result.lora-accel-older")
        survivor = final if final.exists() else older
        assert why_invalid(survivor) is None, f"after {operations} operations"
        results.append((survivor / "a").read_text()[:3])
        with atomic_folder(final) as temporary:  # the next save cleans up
            (temporary / "a").write_text("next")
        assert names(final.parent) == {"result"}
        assert (final / "a").read_text() == "next"
    else:
        pytest.fail("the child process never finished")
    assert set(results) == {"old", "new"}, "exited both before and after the commit"
    assert len(results) >= 8


@pytest.mark.parametrize(
    ("point", "text"),
    [
        ("save.before_manifest", "one"),
        ("save.after_manifest", "one"),
        ("save.before_rename", "one"),
        ("save.after_rename", "two"),
        ("save.before_fsync_dir", "two"),
    ],
)
def test_full_disk_at_any_point_leaves_the_old_or_the_new_folder(
    committed: Path, monkeypatch: pytest.MonkeyPatch, point: str, text: str
) -> None:
    fault = faults.Fault(point, 1, "enospc", None)
    monkeypatch.setattr(faults, "active_fault", lambda: fault)
    with pytest.raises(OSError, match="No space left"), atomic_folder(committed) as temporary:
        fill(temporary, text="two")
    assert why_invalid(committed) is None
    assert (committed / "a.txt").read_text() == text
    with atomic_folder(committed) as temporary:  # the fault occurs once
        fill(temporary, text="three")
    assert (committed / "a.txt").read_text() == "three"
    assert names(committed.parent) == {"result"}


# Cleanup after a crash


def create(path: Path, kind: str, text: str) -> None:
    """Write a folder with a file, or a file."""
    if kind == "folder":
        (path / "inner").mkdir(parents=True)
        path = path / "inner" / "a"
    path.write_text(text)


def text_of(path: Path) -> str:
    return (path / "inner" / "a" if path.is_dir() else path).read_text()


KINDS = pytest.mark.parametrize("kind", ["folder", "file"])


@KINDS
def test_renamed_original_is_restored_if_it_was_not_replaced(tmp_path: Path, kind: str) -> None:
    create(tmp_path / ".result.lora-accel-older", kind, "old")
    create(tmp_path / ".result.lora-accel-writing", kind, "partial")
    recover(tmp_path / "result")
    assert text_of(tmp_path / "result") == "old"
    assert names(tmp_path) == {"result"}


def test_failed_save_restores_what_a_crash_had_renamed(committed: Path) -> None:
    committed.rename(committed.with_name(".result.lora-accel-older"))
    with pytest.raises(RuntimeError, match="disk full"):
        fail_while_writing(committed, RuntimeError("disk full"))
    assert why_invalid(committed) is None
    assert names(committed.parent) == {"result"}


@KINDS
@pytest.mark.parametrize("suffix", ["writing", "older", "deleting"])
def test_leftovers_are_deleted_and_the_current_version_kept(tmp_path: Path, kind: str, suffix: str) -> None:
    create(tmp_path / "result", kind, "current")
    create(tmp_path / f".result.lora-accel-{suffix}", kind, "leftover")
    recover(tmp_path / "result")
    assert text_of(tmp_path / "result") == "current"
    assert names(tmp_path) == {"result"}


@KINDS
@pytest.mark.parametrize("suffix", ["writing", "deleting"])
def test_unfinished_and_deleted_versions_are_not_restored(tmp_path: Path, kind: str, suffix: str) -> None:
    create(tmp_path / f".result.lora-accel-{suffix}", kind, "leftover")
    recover(tmp_path / "result")
    assert names(tmp_path) == set()


def test_recover_all_cleans_up_every_leftover_in_a_folder(tmp_path: Path) -> None:
    create(tmp_path / ".step-00000001.lora-accel-deleting", "folder", "old")
    create(tmp_path / ".step-00000002.lora-accel-older", "folder", "moved")
    create(tmp_path / ".step-00000003.lora-accel-writing", "folder", "partial")
    create(tmp_path / ".status.json.lora-accel-writing", "file", "partial")
    others = {"step-00000000", "notes.lora-accel-writing", ".lora-accel-writing", ".hidden", ".result.writing.txt"}
    others |= {".draft.writing", ".adapter.older", ".status.json.deleting"}  # of the user
    for other in others:
        create(tmp_path / other, "folder", "unrelated")
    recover_all(tmp_path)
    assert names(tmp_path) == {"step-00000002"} | others
    assert text_of(tmp_path / "step-00000002") == "moved"
    recover_all(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_deleting_a_folder_deletes_leftovers_of_an_earlier_deletion(committed: Path) -> None:
    create(committed.with_name(".result.lora-accel-deleting"), "folder", "earlier")
    remove_folder(committed)
    assert names(committed.parent) == set()


def test_kill_during_deletion_leaves_no_partial_folder(committed: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from lora_accel.saving.atomic import remove_folder\n"
        "remove_folder(Path(sys.argv[1]))\n"
    )
    environment = os.environ | {"LORA_ACCEL_FAULT": "rotate.mid@1=kill"}
    process = subprocess.run([sys.executable, "-c", code, committed], env=environment, cwd=ROOT, check=False)
    assert process.returncode == -9
    assert names(committed.parent) == {".result.lora-accel-deleting"}
    recover(committed)
    assert names(committed.parent) == set()


# The manifest


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def extended(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def missing(path: Path) -> None:
    path.unlink()


def linked(path: Path) -> None:
    other = path.parent.parent.parent / "elsewhere"
    path.rename(other)
    path.symlink_to(other)


def replaced_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [truncated, extended, flipped, emptied, missing, linked, replaced_by_a_folder])
def test_damage_is_detected(committed: Path, damage: Callable[[Path], None]) -> None:
    damage(committed / "inner" / "b.bin")
    reason = why_invalid(committed)
    assert reason is not None
    assert reason.startswith("inner/b.bin is ")


@pytest.mark.parametrize("damage", [truncated, extended, emptied, missing, linked, replaced_by_a_folder])
def test_damage_is_detected_without_hashes_except_flipped_bytes(
    committed: Path, damage: Callable[[Path], None]
) -> None:
    flipped(committed / "a.txt")
    assert why_invalid(committed, hashes=False) is None
    damage(committed / "inner" / "b.bin")
    reason = why_invalid(committed, hashes=False)
    assert reason is not None
    assert reason.startswith("inner/b.bin is ")


def test_symbolic_link_to_a_valid_folder_is_invalid(committed: Path) -> None:
    link = committed.with_name("link")
    link.symlink_to(committed, target_is_directory=True)
    assert why_invalid(link) == "it is a symbolic link"


@pytest.mark.parametrize("name", ["../outside", "inner/../../outside", "ABSOLUTE"])
def test_manifest_entry_outside_the_folder_is_invalid(committed: Path, name: str) -> None:
    outside = committed.with_name("outside")
    outside.write_text("outside")
    name = str(outside) if name == "ABSOLUTE" else name
    manifest = json.loads((committed / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 7, "sha256": sha256_of(outside)}
    write_json(committed / MANIFEST, manifest)
    assert why_invalid(committed) == f"{MANIFEST} lists {name!a}, which is not a file in this folder"


def test_required_files_must_be_listed_in_the_manifest(committed: Path) -> None:
    (committed / "late.txt").write_text("written after the manifest")
    assert why_invalid(committed, required=("a.txt", "inner/b.bin")) is None
    for name in ("late.txt", "absent.txt"):
        assert why_invalid(committed, required=("a.txt", name)) == f"{MANIFEST} does not list {name}"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", '{"files": 3}', '{"files": {"a.txt": {}}}', "\x00", "[" * 10**5]
)
def test_folder_with_a_malformed_manifest_is_invalid(committed: Path, text: str) -> None:
    (committed / MANIFEST).write_text(text)
    assert why_invalid(committed) == f"{MANIFEST} cannot be read"


def test_folder_without_a_manifest_is_invalid(committed: Path) -> None:
    (committed / MANIFEST).unlink()
    assert why_invalid(committed) == f"{MANIFEST} is missing: the folder was never completed"
    assert why_invalid(committed.parent / "absent") == f"{MANIFEST} is missing: the folder was never completed"


def test_manifest_lists_size_and_hash_of_every_file(committed: Path) -> None:
    files = json.loads((committed / MANIFEST).read_text())["files"]
    assert files == {
        "a.txt": {"bytes": 3, "sha256": "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"},
        "inner/b.bin": {"bytes": 300, "sha256": sha256_of(committed / "inner" / "b.bin")},
    }


# Modes and small files


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_file_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    with atomic_folder(tmp_path / "result") as temporary:
        save_file({"a": torch.ones(2)}, temporary / "private.safetensors")
        fill(temporary)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "result").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}
    assert stat.S_IMODE((tmp_path / "result").stat().st_mode) == 0o777 & ~umask


def test_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'a'}'"):
        write_text(tmp_path / "a", "new")
    assert names(tmp_path) == set()


def test_failed_write_leaves_the_existing_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "new \ud800")  # a lone surrogate cannot be encoded
    assert (tmp_path / "a").read_text() == "old"
    write_json(tmp_path / "a", {"é": 1})
    assert (tmp_path / "a").read_text(encoding="utf-8") == '{\n  "é": 1\n}\n'
    assert names(tmp_path) == {"a"}
