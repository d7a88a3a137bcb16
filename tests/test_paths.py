"""Output paths are checked before any work, and reading never blocks on a FIFO."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from lora_accel.cli import main
from lora_accel.config.files import write_recipe
from lora_accel.config.launch import read_launch
from lora_accel.console import run_command
from lora_accel.data.template import template_source
from lora_accel.errors import ConfigError, UserError
from lora_accel.inference.prompts import read_prompts
from lora_accel.paths import (
    Purpose,
    open_regular,
    open_to_append,
    open_to_read,
    real_path,
    temporary_sibling,
    why_not_writable,
)
from lora_accel.saving.discovery import run_of
from lora_accel.saving.provenance import provenance_of
from tests.config.test_launch import TORCHRUN
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
    elif kind == "many folders":
        return path.joinpath(*["m"] * 1500)
    elif kind == "NUL":
        return path.with_name("a\0b")
    elif kind in NO_TEXT:
        return path.with_name(NO_TEXT[kind])
    return path


NO_TEXT = {"surrogate": "a\ud800b", "not UTF-8": "a\udcffb"}
"""Names that are not UTF-8. Only the second can be an argument of a process."""
REASONS = {
    "file": "is a file; choose a folder",
    "fifo": "is a file; choose a folder",
    "dangling link": "is a link to .*nowhere, which does not exist",
    "link to itself": "is a link to .*, which does not exist",
    "inside a file": r"out is a file; choose a folder",
    "inside a dangling link": "is a link to .*nowhere, which does not exist",
    "long name": "the name is too long",
    "long path": "the name is too long",
    "many folders": r"is 1,50\d folders below .*; choose a shorter path",
    "NUL": "cannot contain NUL",
    "surrogate": "characters that file names cannot have",
    "not UTF-8": "or is not UTF-8",
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


@pytest.mark.parametrize("kind", [kind for kind in REASONS if kind not in ("surrogate", "NUL", "not UTF-8")])
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


# Files that a user names


def read_deepspeed_json(file: Path) -> None:
    """Read a DeepSpeed JSON as a run does."""
    read_launch(TORCHRUN | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})


@pytest.mark.parametrize("kind", ["folder", "fifo", "dangling link", "link to itself", "device"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("prompts.txt", lambda file: read_prompts([], file)),
        ("prompts.jsonl", lambda file: read_prompts([], file)),
        ("chat.jinja", lambda file: template_source(str(file))),
        ("zero.json", read_deepspeed_json),
    ],
)
def test_input_file_of_another_kind_is_one_message(
    tmp_path: Path, name: str, read: Callable[[Path], object], kind: str
) -> None:
    file = tmp_path / name
    if kind == "device":
        file.symlink_to("/dev/zero")
    else:
        occupy(file, kind)
    with pytest.raises(UserError, match=name):
        read(file)


def test_looping_links_are_compared_as_paths(tmp_path: Path) -> None:
    link = occupy(tmp_path / "adapter", "link to itself")
    assert run_of(link) is None
    assert provenance_of(link) is None
    assert run_of(tmp_path / "run" / "checkpoints" / "step-00000001") == tmp_path / "run"


@pytest.mark.parametrize("name", ["m" * 300, "m/" * 2100, "a\udcffb", "loop/x"])
@pytest.mark.parametrize("args", [("checkpoints",), ("merge", "--all"), ("generate", "hello", "--adapter")])
def test_input_path_that_cannot_exist_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, args: tuple[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    occupy(tmp_path / "loop", "link to itself")
    monkeypatch.setattr("sys.argv", ["lora-accel", *args, name])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("error: ")) == (2, 1), error


def test_path_with_nul_is_compared_as_it_is(tmp_path: Path) -> None:
    assert real_path(tmp_path / "a\0b") == tmp_path / "a\0b"


def test_text_that_a_library_cannot_encode_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    def save() -> None:
        "model\udcff".encode()

    assert run_command(save) == 2
    assert capsys.readouterr().err == "error: 'model\\udcff': is not UTF-8; rename this file or folder\n"


def test_recipe_on_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(ConfigError, match=r"run\.yaml: cannot be written: File too large"):
            write_recipe(tmp_path / "run.yaml")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []
    write_recipe(tmp_path / "run.yaml")
