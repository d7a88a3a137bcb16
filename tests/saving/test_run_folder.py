"""What is in a run folder, and happens to it: other files, links, FIFOs, other users, full disks, moves."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import TensorBoardTracker
from tensorboard.summary.writer.record_writer import RecordWriter

from lora_accel import RunConfig, run_training
from lora_accel.errors import ArtifactError, ConfigError, TrainingError
from lora_accel.saving.atomic import MANIFEST, atomic_folder, read_json, recover_all, sha256_of, why_invalid
from lora_accel.saving.discovery import FILES, find_checkpoint, prune, step_folders
from lora_accel.saving.listing import list_checkpoints
from lora_accel.saving.lock import LOCK, locked
from lora_accel.saving.output_dir import RUN_FILES, RUN_FOLDERS, check_output_folder
from lora_accel.training import loop, metrics
from tests.conftest import CommandResult, read_metrics
from tests.saving.test_lock import attempt

NOBODY = 65534


def make_checkpoint(folder: Path, step: int) -> Path:
    """Write a checkpoint that is complete by its manifest."""
    path = folder / f"step-{step:08d}"
    with atomic_folder(path) as temporary:
        for name in FILES:
            (temporary / name).write_text(json.dumps({"step": step}))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a run folder with three checkpoints and an adapter."""
    run = tmp_path / "run"
    for step in (1, 2, 3):
        make_checkpoint(run / "checkpoints", step)
    with atomic_folder(run / "adapter") as temporary:
        (temporary / "adapter_config.json").write_text("{}")
    for name in RUN_FILES:
        (run / name).write_text("{}")
    check_output_folder(run)
    return run


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256_of(path) if path.is_file() else "" for path in sorted(folder.rglob("*"))
    }


def replace(path: Path, kind: str) -> None:
    """Replace a file or folder by something of another kind."""
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name("was"))
    else:
        path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("mine")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        (path.parent.parent / "elsewhere").write_text("mine")
        path.symlink_to(path.parent.parent / "elsewhere")
    elif kind == "full device":
        path.symlink_to("/dev/full")
    else:
        path.symlink_to(path.parent / "nowhere")


# Names that are no ordinary files


@pytest.mark.parametrize("kind", ["folder", "fifo", "link", "full device", "dangling"])
@pytest.mark.parametrize("name", RUN_FILES)
def test_run_file_of_another_kind_is_reported_at_once(folder: Path, name: str, kind: str) -> None:
    replace(folder / name, kind)
    with pytest.raises(ConfigError, match=rf"^output_dir: .*{name} is "):
        check_output_folder(folder)


@pytest.mark.parametrize("kind", ["file", "fifo", "link", "dangling"])
@pytest.mark.parametrize("name", [*RUN_FOLDERS, "checkpoints/step-00000009"])
def test_run_folder_of_another_kind_is_reported_at_once(folder: Path, name: str, kind: str) -> None:
    replace(folder / name, kind)
    with pytest.raises(ConfigError, match=rf"^output_dir: .*{name} is .*(;|move it)"):
        check_output_folder(folder)


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
@pytest.mark.parametrize("kind", ["folder", "fifo", "dangling"])
def test_checkpoint_file_of_another_kind_is_corrupt(folder: Path, name: str, kind: str) -> None:
    newest = folder / "checkpoints" / "step-00000003"
    replace(newest / name, kind)
    selection = find_checkpoint(folder / "checkpoints", "auto")
    assert selection.checkpoint is not None
    assert (selection.checkpoint.step, list(selection.corrupt)) == (2, [newest])
    assert [info.reason is None for info in list_checkpoints(folder, hashes=True)] == [True, True, False]


# Files of the user


def test_rotation_keeps_a_checkpoint_with_other_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = folder / "checkpoints"
    notes = checkpoints / "step-00000001" / "notes" / "ideas.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    for _ in range(2):
        prune(checkpoints, keep_last=1)
    assert [path.name for path in step_folders(checkpoints)] == ["step-00000001", "step-00000003"]
    assert notes.read_text() == "mine"
    stderr = capsys.readouterr().err
    assert stderr.count("note: kept an old checkpoint: ") == 1
    assert "notes/ideas.txt" in stderr


def test_rotation_that_cannot_delete_does_not_end_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """NFS keeps `.nfs…` files in a folder while another process reads the deleted ones, such as merge --all."""
    checkpoints = folder / "checkpoints"

    def fail(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        prune(checkpoints, keep_last=1)
    assert [path.name for path in step_folders(checkpoints)] == ["step-00000003"]
    assert "note: an old checkpoint cannot be deleted: " in capsys.readouterr().err
    recover_all(checkpoints)  # as the next run does
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize(("name", "named"), [("notes.txt", "notes.txt"), ("README.md", r"README.md \(edited\)")])
def test_notes_in_the_adapter_are_kept(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, name: str, named: str
) -> None:
    adapter = run_training(make_config())
    (adapter / name).write_text("mine")
    before = tree(adapter.parent)
    assert run_training(make_config()) == adapter, "finished: nothing to do"
    longer = make_config(training={"epochs": 2}, checkpoint={"allow_changes": ["training.epochs"]})
    monkeypatch.setattr(loop, "train_step", None)
    with pytest.raises(ConfigError, match=rf"^output_dir: .*adapter: contains files .* lost: {named}; move them: the"):
        run_training(longer)
    assert tree(adapter.parent) == before


def test_hidden_names_of_the_user_are_kept(make_config: Callable[..., RunConfig]) -> None:
    first = make_config(training={"max_steps": 2})
    adapter = run_training(first)
    folders = (adapter.parent, adapter.parent / "checkpoints")
    mine = [
        folder / f".{name}.{suffix}"
        for folder in folders
        for name in ("x", "adapter", "step-00000004", "status.json", "metrics.jsonl")
        for suffix in ("writing", "older", "deleting")
    ]
    for path in mine:
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    longer = make_config(training={"max_steps": 4}, checkpoint={"allow_changes": ["training.max_steps"]})
    run_training(longer)
    assert [path for path in mine if (path / "notes.txt").read_text() != "mine"] == []
    assert why_invalid(adapter) is None


# Links to another disk


def test_folders_on_another_disk(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    disk, run = tmp_path / "disk", tmp_path / "run"
    run_training(make_config(training={"max_steps": 2}))
    for name in ("adapter", "checkpoints"):
        shutil.move(run / name, disk / name)
        (run / name).symlink_to(disk / name)
    before = tree(disk)
    run_training(make_config(training={"max_steps": 2}))
    assert tree(disk) == before, "finished: nothing to do"
    options = {"allow_changes": ["training.max_steps"]}
    adapter = run_training(make_config(training={"max_steps": 4}, checkpoint=options))
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4], "the log of the first run is kept"
    assert [path.name for path in step_folders(disk / "checkpoints")][-1] == "step-00000004"
    assert {path.name for path in disk.iterdir()} == {"adapter", "checkpoints"}
    assert (adapter.is_symlink(), why_invalid(disk / "adapter")) == (True, None)
    assert not list(run.glob(".*"))


def test_linked_adapter_that_was_being_replaced_is_restored(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    shutil.move(folder / "adapter", tmp_path / "disk" / ".adapter.lora-accel-older")
    (folder / "adapter").symlink_to(tmp_path / "disk" / "adapter")
    check_output_folder(folder)
    with contextlib.suppress(ZeroDivisionError), atomic_folder(folder / "adapter"):
        raise ZeroDivisionError
    assert why_invalid(tmp_path / "disk" / "adapter") is None
    shutil.rmtree(tmp_path / "disk" / "adapter")
    with (
        pytest.raises(ArtifactError, match=r"is a link to .*, which does not exist"),
        atomic_folder(folder / "adapter"),
    ):
        pytest.fail("nothing is created behind a dangling link")


# The lock, and a run folder that is moved


def test_deleted_lock_file_does_not_admit_a_second_run(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        (tmp_path / "run" / LOCK).unlink()
        assert "is in use by another run (just started)" in attempt(tmp_path / "run")
        assert [path.name for path in (tmp_path / "run").iterdir()] == []
    assert not (tmp_path / "run").exists()


def test_lock_of_another_run_is_not_deleted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with locked(run):
        run.rename(tmp_path / "moved")
        run.mkdir()
        (run / LOCK).write_text("process 1 on elsewhere")
    assert (run / LOCK).read_text() == "process 1 on elsewhere"


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Call a function after a step, before anything of it is saved."""
    original = loop.train_step

    def train_step(run: Any, number: int) -> Any:
        result = original(run, number)
        if number + 1 == step:
            action()
        return result

    monkeypatch.setattr(loop, "train_step", train_step)


@pytest.mark.parametrize("event", ["moved", "deleted", "replaced"])
def test_run_folder_that_is_moved_during_a_run(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    config, run, moved = make_config(logging={"every_steps": 100}), tmp_path / "run", tmp_path / "moved"

    def move() -> None:
        shutil.rmtree(run) if event == "deleted" else run.rename(moved)
        if event == "replaced":
            run.mkdir()

    with monkeypatch.context() as patch:
        after_step(patch, 4, move)
        with pytest.raises(TrainingError, match="the run folder was moved or deleted while the run was in progress"):
            run_training(config)
    assert not run.exists() or list(run.iterdir()) == []
    if event == "moved":
        moved.rename(run)
        run_training(config)
        assert [line["step"] for line in read_metrics(run, "event") if line["event"] == "resume"] == [2]


# Full disks


def full(*args: Any, **keywords: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_log_that_cannot_be_written_ends_the_run_and_it_resumes(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        after_step(patch, 3, lambda: patch.setattr(metrics, "open_to_append", full))
        with pytest.raises(TrainingError, match=r"metrics\.jsonl: cannot be written: No space left on device\. Checkp"):
            run_training(make_config())
    status = read_json(tmp_path / "run" / "status.json")
    assert (status["state"], status["step"]) == ("failed", 2)
    run_training(make_config())
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("method", ["log", "finish"])
def test_tracker_that_fails_is_left_out(
    make_config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
) -> None:
    monkeypatch.setattr(TensorBoardTracker, method, full)
    adapter = run_training(make_config(training={"max_steps": 2}, logging={"trackers": ["tensorboard"]}))
    note = "note: a tracker of logging.trackers failed: [Errno 28] No space left on device; training continues without"
    assert capsys.readouterr().err.count(note) == 1
    assert read_json(adapter.parent / "status.json")["state"] == "done"
    assert len(read_metrics(adapter.parent)) == 2


def test_full_disk_of_tensorboard_is_a_note(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard writes in a thread, whose errors Python prints as tracebacks."""
    after_step(monkeypatch, 1, lambda: monkeypatch.setattr(RecordWriter, "write", full))
    run_training(make_config(training={"max_steps": 3}, logging={"trackers": ["tensorboard"]}))
    stderr = capsys.readouterr().err
    assert "note: a tracker of logging.trackers failed" in stderr
    assert "Traceback" not in stderr
    assert threading.excepthook is threading.__excepthook__


def test_tracker_that_cannot_start_ends_the_run(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(TensorBoardTracker, "start", full)
    with pytest.raises(TrainingError, match=r"logging\.trackers: tensorboard cannot be started: .*No space left"):
        run_training(make_config(logging={"trackers": ["tensorboard"]}))
    assert read_json(tmp_path / "run" / "status.json")["state"] == "failed"


# Other users


@contextlib.contextmanager
def other_user() -> Iterator[None]:
    """Run the block as a user without privileges."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to act as two users")
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared() -> Iterator[Path]:
    """Return a folder that every user may list; pytest's own folders are private."""
    with tempfile.TemporaryDirectory(prefix="lora-accel-tests-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize("what", [".", "metrics.jsonl", "adapter", "checkpoints", "checkpoints/step-00000002", LOCK])
def test_run_of_another_user_is_reported_at_once(folder: Path, shared: Path, what: str) -> None:
    run = shared / "run"
    shutil.copytree(folder, run)
    for path in (run, *run.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    with other_user():
        check_output_folder(run)
    (run / what).chmod(0o644 if what == "metrics.jsonl" else 0o700)
    with other_user(), pytest.raises(ConfigError, match=r"^output_dir: .*(this user|another user|Permission denied)"):
        check_output_folder(run)


def test_output_folder_of_another_user_is_reported(shared: Path) -> None:
    from lora_accel.merging.job import check_out_folder

    with atomic_folder(shared / "out") as temporary:
        (temporary / "model.safetensors").write_text("")
    shared.chmod(0o777)
    with other_user():
        check_out_folder(shared / "new", {}, overwrite=False)
        with pytest.raises(ArtifactError, match="/out is not writable for this user"):
            check_out_folder(shared / "out", {}, overwrite=True)
    (shared / "out").chmod(0o777)
    shared.chmod(0o1777)
    with other_user(), pytest.raises(ArtifactError, match="belongs to another user, in a folder where only owners"):
        check_out_folder(shared / "out", {}, overwrite=True)


def test_command_reports_a_run_that_this_user_may_not_read(
    command: Callable[..., CommandResult], folder: Path, shared: Path
) -> None:
    shutil.copytree(folder, shared / "run")
    (shared / "run").chmod(0o700)
    with other_user():
        result = command("checkpoints", shared / "run")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "Permission denied" in result.stderr
