"""The cache: a damaged entry is built again with one note and the same bytes; several processes and users."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import filelock
import numpy as np
import pytest
from packaging.version import Version
from transformers import PreTrainedTokenizerFast

from lora_accel.config.schema import DataSection
from lora_accel.data import cache as cache_module
from lora_accel.data.cache import MANIFEST, CacheError, get_or_build
from lora_accel.data.dataset import Dataset, Recipe, load_dataset
from lora_accel.data.regular import hash_file, open_unbuffered
from lora_accel.data.store import INPUT_IDS, LEDGER, SUPERVISED, TABLE, Writer
from lora_accel.data.template import ChatTemplate
from lora_accel.errors import ConfigError
from tests.conftest import PATIENCE_SECONDS, chat_rows, write_jsonl

FILES = (INPUT_IDS, SUPERVISED, TABLE, LEDGER, MANIFEST)

Load = Callable[..., Dataset]


def flip_a_bit(file: Path, _: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def truncate(file: Path, _: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(1, file.stat().st_size))


def empty(file: Path, _: Path, __: random.Random) -> None:
    file.write_bytes(b"")


def append(file: Path, _: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(48))


def remove(file: Path, _: Path, __: random.Random) -> None:
    file.unlink()


def take_from_another_entry(file: Path, other: Path, _: random.Random) -> None:
    shutil.copy(other / file.name, file)


def fill_with_garbage(file: Path, _: Path, rng: random.Random) -> None:
    file.write_bytes(rng.randbytes(file.stat().st_size))


def mix_up(file: Path, _: Path, rng: random.Random) -> None:
    shutil.copy(file.parent / rng.choice([name for name in FILES if name != file.name]), file)


def replace_by_folder(file: Path, _: Path, __: random.Random) -> None:
    file.unlink()
    (file / "below").mkdir(parents=True)


def replace_by_pipe(file: Path, _: Path, __: random.Random) -> None:
    file.unlink()
    os.mkfifo(file)


def replace_by_dangling_link(file: Path, _: Path, __: random.Random) -> None:
    file.unlink()
    file.symlink_to("missing")


DAMAGES = (
    flip_a_bit,
    truncate,
    empty,
    append,
    remove,
    take_from_another_entry,
    fill_with_garbage,
    mix_up,
    replace_by_folder,
    replace_by_pipe,
    replace_by_dangling_link,
)


@pytest.fixture
def load(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Load:
    """Load rows through a cache in tmp_path."""
    template = ChatTemplate(tokenizer)

    def load(rows: list[Any], **options: Any) -> Dataset:
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        values = {"train": [{"path": str(path)}], "cache_dir": str(tmp_path / "cache"), "max_dropped": 1.0} | options
        section = DataSection.model_validate(values)
        return load_dataset(section.train, Recipe("tiny", lambda: template), section)

    return load


def entries(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.suffix != ".lock"]


def contents(entry: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in entry.iterdir()}


def count_notes(capsys: pytest.CaptureFixture[str]) -> int:
    return capsys.readouterr().err.count("building it again")


def never(_: Path) -> NoReturn:
    raise AssertionError("the entry was built")


# Damage.


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_built_again_with_one_note_and_the_same_bytes(
    tmp_path: Path,
    load: Load,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path, Path, random.Random], None],
    name: str,
) -> None:
    load(chat_rows(5))
    (other,) = entries(tmp_path / "cache")
    first = load([*chat_rows(12), {"messages": []}])
    examples = first.examples  # in memory: the files are changed in place
    (entry,) = set(entries(tmp_path / "cache")) - {other}
    before = contents(entry)
    for seed in range(3 if damage is flip_a_bit else 1):
        damage(entry / name, other, random.Random(f"{name} {seed}"))
        assert count_notes(capsys) == 0
        second = load([*chat_rows(12), {"messages": []}])
        assert count_notes(capsys) == 1
        assert contents(entry) == before
        assert (second.examples, second.ledgers) == (examples, first.ledgers)
        load([*chat_rows(12), {"messages": []}])
        assert count_notes(capsys) == 0
    assert set(entries(tmp_path / "cache")) == {entry, other}


@pytest.mark.parametrize("kind", ["file", "pipe", "dangling link", "empty folder", "another entry", "link to another"])
def test_something_else_in_place_of_an_entry_is_replaced(
    tmp_path: Path, load: Load, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    load(chat_rows(5))
    (other,) = entries(tmp_path / "cache")
    other_before = contents(other)
    load(chat_rows(12))
    (entry,) = set(entries(tmp_path / "cache")) - {other}
    before = contents(entry)
    shutil.rmtree(entry)
    if kind == "file":
        entry.write_text("x")
    elif kind == "pipe":
        os.mkfifo(entry)
    elif kind == "empty folder":
        entry.mkdir()
    elif kind == "another entry":
        shutil.copytree(other, entry)
    else:
        entry.symlink_to("missing" if kind == "dangling link" else other)
    load(chat_rows(12))
    assert count_notes(capsys) == 1
    assert contents(entry) == before
    assert contents(other) == other_before
    assert set(entries(tmp_path / "cache")) == {entry, other}


def sign(entry: Path) -> None:
    """Write the manifest that fits the files of an entry."""
    manifest = json.loads((entry / MANIFEST).read_text())
    for name in manifest["files"]:
        with open_unbuffered(entry / name) as file:
            manifest["files"][name] = [(entry / name).stat().st_size, hash_file(file)]
    (entry / MANIFEST).write_text(json.dumps(manifest))


def change_table(row: int, column: int, value: int) -> Callable[[Path], None]:
    def change(entry: Path) -> None:
        table = np.fromfile(entry / TABLE, np.int64).reshape(-1, 6)
        table[row, column] = value
        table.tofile(entry / TABLE)

    return change


def change_ledger(**values: Any) -> Callable[[Path], None]:
    def change(entry: Path) -> None:
        ledger = json.loads((entry / LEDGER).read_text())
        (entry / LEDGER).write_text(json.dumps(ledger | values))

    return change


@pytest.mark.parametrize(
    "forge",
    [
        *(
            change_table(row, column, value)
            for row in (0, 5, -1)
            for column in (0, 1, 2, 4, 5)
            for value in (-7, 10**9)
        ),
        *(change_ledger(**{name: 3}) for name in ("num_examples", "num_tokens", "num_supervised_tokens", "longest")),
        *(change_ledger(**{name: None}) for name in ("num_examples", "buckets", "sha256")),
        change_ledger(sha256={}),
        lambda entry: os.truncate(entry / TABLE, 48 * 3),
        lambda entry: os.truncate(entry / TABLE, 50),
        lambda entry: os.truncate(entry / INPUT_IDS, 8),
        lambda entry: os.truncate(entry / INPUT_IDS, 7),
        lambda entry: (entry / LEDGER).write_text("[" * 100_000),
        lambda entry: (entry / LEDGER).write_text("[]"),
    ],
)
def test_counts_that_contradict_the_arrays_are_damage(
    tmp_path: Path, load: Load, capsys: pytest.CaptureFixture[str], forge: Callable[[Path], None]
) -> None:
    load(chat_rows(12))
    (entry,) = entries(tmp_path / "cache")
    before = contents(entry)
    forge(entry)
    sign(entry)
    load(chat_rows(12))
    assert count_notes(capsys) == 1
    assert contents(entry) == before


@pytest.mark.parametrize(
    "manifest",
    [
        {"version": 2},
        {"version": "1"},
        {"key": "other"},
        {"files": None},
        {"files": {}},
        {"files": {LEDGER: 5}},
        {"files": {LEDGER: [1, 2, 3]}},
        {"files": {"../x": [0, ""]}},
        {"files": {"": [0, ""]}},
        {"files": {"a\0b": [0, ""]}},
        {"files": {"x" * 1000: [0, ""]}},
        [],
        7,
    ],
)
def test_metadata_of_another_version_or_entry_is_damage(
    tmp_path: Path, load: Load, capsys: pytest.CaptureFixture[str], manifest: Any
) -> None:
    load(chat_rows(3))
    (entry,) = entries(tmp_path / "cache")
    before = contents(entry)
    if isinstance(manifest, dict):
        manifest = json.loads(before[MANIFEST]) | manifest
    (entry / MANIFEST).write_text(json.dumps(manifest))
    load(chat_rows(3))
    assert count_notes(capsys) == 1
    assert contents(entry) == before


def test_a_damaged_download_is_downloaded_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = get_or_build(tmp_path, "key", lambda folder: (folder / "rows.jsonl").write_text("rows") and None)
    assert get_or_build(tmp_path, "key", never) == folder
    (folder / "rows.jsonl").write_text("sowr")
    get_or_build(tmp_path, "key", lambda folder: (folder / "rows.jsonl").write_text("rows") and None)
    assert (folder / "rows.jsonl").read_text() == "rows"
    assert count_notes(capsys) == 1


# Several processes.


def _load_in_child(cache: Path, log: Path, number: int) -> None:
    def build(folder: Path) -> None:
        with (log / "built").open("a") as file:
            file.write("x")
        time.sleep(0.2)
        (folder / "data").write_text("right")

    (log / str(number)).write_text((get_or_build(cache, "key", build) / "data").read_text())


def test_processes_that_find_a_damaged_entry_agree_and_one_builds_it(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = get_or_build(cache, "key", lambda folder: (folder / "data").write_text("right") and None)
    (folder / "data").write_text("wrong")
    processes = [
        multiprocessing.get_context("fork").Process(target=_load_in_child, args=(cache, tmp_path, number))
        for number in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_SECONDS)
        assert process.exitcode == 0
    assert [(tmp_path / str(number)).read_text() for number in range(4)] == ["right"] * 4
    assert (tmp_path / "built").read_text() == "x"


def test_examples_stay_readable_while_their_entry_is_built_again(tmp_path: Path, load: Load) -> None:
    first = load(chat_rows(12))
    expected = first.examples
    (entry,) = entries(tmp_path / "cache")
    (entry / SUPERVISED).unlink()
    load(chat_rows(12))
    assert first.examples == expected


def test_a_process_that_waits_for_long_reports_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from filelock import FileLock

    lock = FileLock(tmp_path / "key.lock", thread_local=False)
    lock.acquire()
    monkeypatch.setattr(cache_module, "NOTE_SECONDS", 0.05)
    monkeypatch.setattr(cache_module.logger, "info", lambda message: (print(message), lock.release()))
    get_or_build(tmp_path, "key", lambda folder: (folder / "data").touch())
    assert f"it holds {tmp_path / 'key.lock'}" in capsys.readouterr().out


def test_an_entry_that_another_machine_finished_first_is_used(tmp_path: Path) -> None:
    """Without locks that work, such as on some network file systems, two processes build one entry."""

    def build(folder: Path) -> None:
        if not (tmp_path / "key").exists():
            get_or_build(tmp_path / "elsewhere", "key", lambda folder: (folder / "data").write_text("first") and None)
            shutil.copytree(tmp_path / "elsewhere" / "key", tmp_path / "key")
        (folder / "data").write_text("second")

    assert (get_or_build(tmp_path, "key", build) / "data").read_text() == "first"
    assert not list(tmp_path.glob(".key.*"))


# A disk that is full or fails, and folders that cannot be a cache.


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("step", ["mkdir", "fsync", "rename"])
def test_a_full_or_broken_disk_is_one_message(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if step == "fsync" else (cache_module.Path, step)), fail)
        with pytest.raises(
            ConfigError, match=rf"data\.cache_dir: .*/cache cannot be written to: {os.strerror(number)}"
        ):
            load(chat_rows(9))
    assert not (tmp_path / "cache").exists() or not entries(tmp_path / "cache")
    assert load(chat_rows(9)).num_examples == 9


def test_a_disk_that_is_full_while_tokens_are_written_is_one_message(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full")

    def init(self: Writer, folder: Path) -> None:
        original(self, folder)
        self._input_ids.close()
        self._input_ids = full.open("wb")

    original = Writer.__init__
    monkeypatch.setattr(Writer, "__init__", init)
    with pytest.raises(ConfigError, match=r"data\.cache_dir: .*/cache cannot be written to: No space left"):
        load(chat_rows(9))
    assert not entries(tmp_path / "cache")


def test_a_disk_that_returns_other_bytes_is_one_message(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_and_write(folder: Path, key: str) -> None:
        write(folder, key)
        flip_a_bit(folder / INPUT_IDS, folder, random.Random(0))

    write = cache_module._write_manifest
    monkeypatch.setattr(cache_module, "_write_manifest", break_and_write)
    with pytest.raises(ConfigError, match="what was written there just now cannot be read"):
        load(chat_rows(9))


@pytest.mark.parametrize("kind", ["file", "below a file", "pipe", "long name", "dangling link", "loop"])
def test_a_cache_that_cannot_be_a_folder_is_one_message(tmp_path: Path, load: Load, kind: str) -> None:
    cache = tmp_path / "folder"
    if kind in ("file", "below a file"):
        cache.write_text("x")
    elif kind == "pipe":
        os.mkfifo(cache)
    elif kind in ("dangling link", "loop"):
        cache.symlink_to("/dev/null/missing" if kind == "dangling link" else cache)
    names = {"long name": "x" * 5000, "below a file": f"{cache}/cache"}
    with pytest.raises(ConfigError, match=r"^data\.cache_dir: .* cannot be written to: .*set another folder$"):
        load(chat_rows(3), cache_dir=names.get(kind, str(cache)))


def test_a_null_byte_in_the_path_of_a_cache_is_one_message() -> None:
    with pytest.raises(CacheError, match="cannot be written to"):
        get_or_build(Path("a\0b"), "key", never)


@pytest.mark.parametrize("kind", ["folder", "dangling link", "pipe"])
def test_something_else_in_place_of_a_lock_gives_an_entry_of_its_own(tmp_path: Path, kind: str) -> None:
    lock = tmp_path / "key.lock"
    if kind == "folder":
        lock.mkdir()
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to("missing")
    folder = get_or_build(tmp_path, "key", lambda folder: (folder / "data").touch())
    assert get_or_build(tmp_path, "key", never) == folder
    if kind == "dangling link" and Version(filelock.__version__) < Version("3.20.1"):
        kind = "pipe"  # earlier versions follow the link, and lock where it points
    assert folder.name == ("key" if kind == "pipe" else f"key-{os.geteuid()}")


# Two users, one cache.


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that two users share; the test must run as root to become both."""
    if os.geteuid() != 0:
        pytest.skip("needs two users")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    os.seteuid(0)
    shutil.rmtree(folder)


ALICE, BOB = 65533, 65534


def build_as(user: int, cache: Path, umask: int = 0o022) -> tuple[Path, bool]:
    """Return the folder of an entry as a user gets it, and whether it was built."""
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "data").write_text("right")

    before = os.umask(umask)
    os.seteuid(user)
    try:
        folder = get_or_build(cache, "key", build)
        assert (folder / "data").read_text() == "right"
    finally:
        os.seteuid(0)
        os.umask(before)
    return folder, bool(built)


def test_an_entry_of_another_user_is_used(shared: Path) -> None:
    assert build_as(ALICE, shared) == (shared / "key", True)
    assert build_as(BOB, shared) == (shared / "key", False)
    assert stat.S_IMODE((shared / "key").stat().st_mode) == 0o755


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_a_private_entry_of_another_user_is_left_alone(shared: Path, mode: int) -> None:
    shared.chmod(mode)
    build_as(ALICE, shared, umask=0o077)
    own = shared / f"key-{BOB}"
    assert build_as(BOB, shared, umask=0o077) == (own, True)
    assert build_as(BOB, shared) == (own, False)
    assert build_as(ALICE, shared) == (shared / "key", False)


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_a_damaged_entry_of_another_user_is_replaced_or_left_alone(shared: Path, mode: int) -> None:
    shared.chmod(mode)
    build_as(ALICE, shared)
    (shared / "key" / "data").write_text("wrong")
    folder, built = build_as(BOB, shared)
    assert built
    assert folder.name in ("key", f"key-{BOB}")
    assert build_as(BOB, shared) == (folder, False)


def test_a_cache_of_another_user_is_read_and_otherwise_one_message(shared: Path) -> None:
    cache = shared / "cache"
    build_as(ALICE, cache)
    assert build_as(BOB, cache) == (cache / "key", False)
    (cache / "key" / "data").write_text("wrong")
    with pytest.raises(CacheError, match=r"cache cannot be written to: .*Permission denied"):
        build_as(BOB, cache)
    shutil.rmtree(cache / "key")
    with pytest.raises(CacheError, match=r"cache cannot be written to: .*Permission denied"):
        build_as(BOB, cache)
