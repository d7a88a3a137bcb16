"""Output paths are checked before any work, and reading never blocks on a FIFO."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from lora_accel.paths import Purpose, open_regular, open_to_append, open_to_read, temporary_sibling, why_not_writable
from tests.conftest import CommandResult


def occupy(path: Path, kind: str) -> Path:
    """Put something in the way of an output path; return the path to pass."""
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dangling link":
        path.symlink_to(path.parent / "nowhere")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "inside a file":
        path.write_text("mine")
        return path / "deep" / "out"
    elif kind == "inside a dangling link":
        path.symlink_to(path.parent / "nowhere")
        return path / "out"
    elif kind == "long name":
        return path.with_name("m" * 250)
    elif kind == "long path":
        return path.joinpath(*["m" * 200] * 21)
    elif kind == "NUL":
        return path.with_name("a\0b")
    elif kind == "surrogate":
        return path.with_name("a\ud800b")
    return path


REASONS = {
    "file": "is a file; choose a folder",
    "fifo": "is a file; choose a folder",
    "dangling link": "is a link to .*nowhere, which does not exist",
    "link to itself": "is a link to .*, which does not exist",
    "inside a file": r"out is a file; choose a folder",
    "inside a dangling link": "is a link to .*nowhere, which does not exist",
    "long name": "the name is too long",
    "long path": "the name is too long",
    "NUL": "cannot contain NUL",
    "surrogate": "characters that file names cannot have",
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", REASONS)
def test_folder_that_cannot_be_written(tmp_path: Path, kind: str) -> None:
    path = occupy(tmp_path / "out", kind)
    before = names(tmp_path)
    reason = why_not_writable(path, "folder")
    assert reason is not None
    assert re.search(REASONS[kind], reason), reason
    assert names(tmp_path) == before


@pytest.mark.parametrize("kind", ["folder", *(kind for kind in REASONS if kind != "file")])
def test_file_that_cannot_be_written(tmp_path: Path, kind: str) -> None:
    path = occupy(tmp_path / "out", kind)
    reason = why_not_writable(path, "file")
    assert reason is not None
    assert "; " in reason, "with a way out"


def test_new_and_existing_paths_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("new", "new/deep/er", "folder", "link", "link/new", "m" * 230):
        assert why_not_writable(tmp_path / name, "folder") is None
    for name in ("new", "new/deep", "file", "link/new"):
        assert why_not_writable(tmp_path / name, "file") is None


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert why_not_writable(Path("new"), "folder") is None
    assert why_not_writable(Path("file/out"), "folder") == "file is a file; choose a folder"
    for name in (".", "..", "a/.."):
        assert "cannot be replaced" in (why_not_writable(Path(name), "folder") or "")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_only_ordinary_files_are_opened(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "metrics.jsonl")
    for open_file in (open_regular, open_to_read, open_to_append):
        with pytest.raises(OSError, match=r"ordinary file|folder|No such device|Is a directory"):
            open_file(tmp_path / "metrics.jsonl")


def test_device_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="not an ordinary file"):
        open_to_read(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="symbolic links"):
        open_to_append(tmp_path / "metrics.jsonl")


def test_temporary_names_are_unlike_those_of_other_programs(tmp_path: Path) -> None:
    names = {temporary_sibling(tmp_path / "a", purpose).name for purpose in get_args(Purpose)}
    assert names == {".a.lora-accel-writing", ".a.lora-accel-older", ".a.lora-accel-deleting"}


# Commands


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Return a folder that is named as an adapter; the output path is checked before it is read."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    return tmp_path / "adapter"


COMMANDS = ("merge", "merge --adapter", "merge --overwrite", "export", "init", "inspect --html", "verify-resume")


@pytest.mark.parametrize("kind", [kind for kind in REASONS if kind not in ("surrogate", "NUL")])
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_check_their_output_first(
    command: Callable[..., CommandResult], adapter: Path, tmp_path: Path, name: str, kind: str
) -> None:
    if kind == "file" and name in ("init", "inspect --html"):
        kind = "folder"
    if name == "verify-resume" and kind.startswith("inside"):
        pytest.skip("its folder has another name than output_dir")
    out = occupy(tmp_path / ("out-verify-resume" if name == "verify-resume" else "out"), kind)
    before = names(tmp_path)
    config = tmp_path / "adapter" / "run.yaml"
    config.write_text("output_dir: run\nmodel: {name_or_path: m}\ndata: {train: [{path: rows.jsonl}]}\n")
    args: dict[str, tuple[str | Path, ...]] = {
        "merge": ("merge", adapter, out),
        "merge --adapter": ("merge", "--adapter", f"{adapter}=0.5", out),
        "merge --overwrite": ("merge", adapter, out, "--overwrite"),
        "export": ("export", adapter, out, "--format", "peft"),
        "init": ("init", out),
        "inspect --html": ("inspect", "--config", config, "--html", out),
        "verify-resume": ("verify-resume", "--config", config, f"output_dir={str(out).replace('-verify-resume', '')}"),
    }
    result = command(*args[name])
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert "out" in result.stderr or kind == "long name"
    assert names(tmp_path) == before
