"""Folders, patterns and URLs give the files that the `datasets` library reads, or an error with the way out."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import os
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerFast

from lora_accel.config.schema import DataSection, SourceSection
from lora_accel.data import files as files_module
from lora_accel.data.dataset import Recipe, find_rows, load_dataset
from lora_accel.data.files import DEFAULT_SPLIT, file_type, find_files
from lora_accel.data.rows import find_input
from lora_accel.data.template import ChatTemplate
from lora_accel.errors import DataError


def section(path: Path | str, **options: Any) -> SourceSection:
    return SourceSection.model_validate({"path": str(path), **options})


def make(root: Path, *names: str) -> Path:
    """Write a file for each name, with its name as its row."""
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"text": name}) + "\n")
    return root


def find(root: Path | str, **options: Any) -> list[str]:
    return [os.path.relpath(name, root) for name in find_files(section(root, **options))]


def texts(path: Path | str, **options: Any) -> list[str]:
    return [row["text"] for chunk in find_input(section(path, **options)).chunks(None) for _, row in chunk.parsed()]


# Splits


LAYOUTS = {
    "names of files": ["train.jsonl", "test.jsonl"],
    "words in names of files": ["my-training_0.jsonl", "my.dev.jsonl", "x eval 1.jsonl", "train1.jsonl"],
    "synonyms": ["training.jsonl", "valid.jsonl", "val.jsonl", "testing.jsonl", "evaluation.jsonl"],
    "folders": ["train/a.jsonl", "train/b.jsonl", "test/a.jsonl", "my-validation/a.jsonl"],
    "folders before files": ["train/test.jsonl", "dev/train.jsonl"],
    "deep folders": ["v1/train_x/y/a.jsonl", "v1/test/a.jsonl"],
    "subfolders with names of files": ["a/train.jsonl", "b/train.jsonl", "b/test.jsonl"],
    "shards": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/rest-00000-of-00001.jsonl"],
    "only parts of words": ["trained.jsonl", "contest.jsonl", "device.jsonl", "Train.jsonl"],
    "none": ["b.jsonl", "a.jsonl", "sub/a.jsonl"],
    "only train": ["train.jsonl"],
    "only test": ["test.jsonl"],
    "hidden": ["rows.jsonl", ".ipynb_checkpoints/rows-checkpoint.jsonl", "__pycache__/test.jsonl", ".test.jsonl"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_has_the_splits_of_the_datasets_library(tmp_path: Path, layout: str) -> None:
    make(tmp_path, *LAYOUTS[layout])
    patterns = datasets.data_files.get_data_patterns(str(tmp_path))
    expected = datasets.data_files.DataFilesDict.from_local_or_remote(patterns, base_path=str(tmp_path))
    for split in {*datasets.data_files.SPLIT_KEYWORDS, *expected, "rest"}:
        if split in expected:
            assert set(find_files(section(tmp_path, split=str(split)))) == set(expected[split])
        else:
            with pytest.raises(DataError, match=f"has no split '{split}'; it has .*Set split") as caught:
                find_files(section(tmp_path, split=str(split)))
            assert all(f"{name} (" in str(caught.value) for name in expected)


def test_train_is_the_split_that_a_folder_gives_by_default(tmp_path: Path) -> None:
    make(tmp_path, "train.jsonl", "test.jsonl")
    assert texts(tmp_path) == ["train.jsonl"]
    assert texts(tmp_path, split="test") == ["test.jsonl"]


@pytest.mark.parametrize(
    ("name", "which"),
    [("extra.jsonl", "no split, and other files to test or train"), ("train_test.csv", "splits train and test")],
)
def test_a_file_whose_split_is_not_clear_is_an_error(tmp_path: Path, name: str, which: str) -> None:
    """The library leaves out the first, and has the second in both splits."""
    make(tmp_path, "train.jsonl", "test.jsonl", name)
    with pytest.raises(DataError, match=f"by its name, {name} belongs to {which}.*set path to files"):
        find_files(section(tmp_path))


@pytest.mark.parametrize("path", ["train.jsonl", "*.jsonl", "t*.jsonl"])
def test_a_split_of_named_files_is_an_error(tmp_path: Path, path: str) -> None:
    make(tmp_path, "train.jsonl")
    with pytest.raises(DataError, match=r"split: 'test' selects files of a folder.*remove split"):
        find_files(section(tmp_path / path, split="test"))


def test_a_pattern_gives_all_of_its_files(tmp_path: Path) -> None:
    make(tmp_path, "train.jsonl", "test.jsonl", "LICENSE.txt", "README.md", ".hidden.jsonl", "sub.jsonl/x.jsonl")
    assert [Path(name).name for name in find_files(section(tmp_path / "*"))] == [
        "LICENSE.txt",
        "test.jsonl",
        "train.jsonl",
    ]
    with pytest.raises(DataError, match=r"no .*\.jsonl.* file matches this pattern"):
        find_files(section(tmp_path / "*.md"))


@pytest.mark.parametrize("option", ["name", "revision"])
def test_an_option_of_the_hub_is_an_error_for_files(tmp_path: Path, option: str) -> None:
    make(tmp_path, "rows.jsonl")
    for path in (tmp_path, tmp_path / "rows.jsonl", tmp_path / "*", f"file://{tmp_path}/rows.jsonl"):
        with pytest.raises(DataError, match=f"{option} is an option of datasets on the Hub.*remove {option}"):
            find_files(section(path, **{option: "x"}))


# Folders


def test_files_that_are_not_data_are_skipped_in_a_folder(tmp_path: Path) -> None:
    make(tmp_path, "rows.jsonl", ".ipynb_checkpoints/a/b.jsonl", ".a.jsonl", "__a/b.jsonl", "__a.jsonl", "script.py")
    make(tmp_path, "LICENSE.txt", "LICENSE-MIT.txt", "README.txt", "sub/NOTICE.TXT", "readme.txt", "LICENSE", "x.md")
    make(tmp_path, "dataset_infos.json", "config.json")
    assert find(tmp_path) == ["rows.jsonl"]


def test_documents_are_not_taken_for_a_license(tmp_path: Path) -> None:
    names = ["Amended License Agreement.txt", "license_agreement_1.txt", "notice of default.txt", "readme_rows.jsonl"]
    assert find(make(tmp_path, *names)) == names


def test_a_folder_may_have_a_hidden_parent(tmp_path: Path) -> None:
    assert find(make(tmp_path / ".cache" / "__x" / "test", "rows.jsonl")) == ["rows.jsonl"]


@pytest.mark.parametrize("names", [[], [".a.jsonl", ".git/b.jsonl"], ["LICENSE.txt", "README.md"]])
def test_a_folder_without_data_is_an_error(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(DataError, match=r"no .*\.jsonl.* file in this folder"):
        find_files(section(make(tmp_path, *names)))


def test_files_of_one_name_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    make(tmp_path, "b/rows.jsonl", "a/rows.jsonl", "a-b/rows.jsonl", "c.jsonl", "B.jsonl")
    names = ["B.jsonl", "a/rows.jsonl", "a-b/rows.jsonl", "b/rows.jsonl", "c.jsonl"]
    assert find(tmp_path) == texts(tmp_path) == texts(f"{tmp_path}/") == names


def test_suffixes_may_be_in_upper_case(tmp_path: Path) -> None:
    assert texts(make(tmp_path, "A.JSONL")) == texts(tmp_path / "A.JSONL") == ["A.JSONL"]
    assert file_type("a/B.Jsonl.GZ") == ".jsonl"


def test_symbolic_links_are_followed_once(tmp_path: Path) -> None:
    make(tmp_path / "store", "a.jsonl", "sub/b.jsonl")
    root = make(tmp_path / "root", "c.jsonl")
    (root / "d.jsonl").symlink_to(tmp_path / "store" / "a.jsonl")
    (root / "linked").symlink_to(tmp_path / "store" / "sub")
    (root / "loop").symlink_to(root)
    assert find(root) == ["c.jsonl", "d.jsonl", "linked/b.jsonl"]


@pytest.mark.parametrize("path", ["gone.jsonl", "gone", "."])
def test_a_broken_link_is_an_error(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make(tmp_path, "rows.jsonl"))
    Path("gone.jsonl").symlink_to("nowhere.jsonl")
    Path("gone").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"gone.* is a symbolic link to a file that is missing"):
        find_files(section(path))


def test_a_pipe_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    for path in (tmp_path, tmp_path / "rows.jsonl"):
        with pytest.raises(DataError, match=r"rows\.jsonl: is not an ordinary file"):
            find_files(section(path))


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "rows.jsonl", "closed/rows.jsonl")
    scandir = os.scandir

    def fail(path: str) -> Any:  # root may read every folder
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(DataError, match="closed: cannot be read: Permission denied"):
        find_files(section(tmp_path))


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(make(tmp_path, "data/rows.jsonl")))
    for path in ("~/data", "~/data/rows.jsonl", "~/data/*.jsonl"):
        assert texts(path) == ["data/rows.jsonl"]
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        find_files(section("~/none.jsonl"))


@pytest.mark.parametrize("path", ["none/", "./none", "a/b/c", "none.jsonl", "a/none.json.gz"])
def test_a_missing_path_that_is_no_hub_id_is_an_error(path: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        find_files(section(path))


@pytest.mark.parametrize("path", ["squad", "org/name", "org/OpenData-2.5"])
def test_a_missing_path_may_be_a_hub_id(path: str) -> None:
    assert find_files(section(path)) == {}


def test_the_file_that_is_not_like_the_others_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The notes are read first, and their format would be that of all files."""
    make(tmp_path / "rows", "notes.txt")
    chat = {"chat": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "rows" / "rows.jsonl").write_text(json.dumps(chat) + "\n")
    recipe = Recipe("tiny", lambda: ChatTemplate(tokenizer))
    for options, odd in (({"columns": {"messages": "chat"}}, "notes.txt"), ({"format": "text"}, "rows.jsonl")):
        data = DataSection(train=[section(tmp_path / "rows", **options)], cache_dir=str(tmp_path / "cache"))
        with pytest.raises(DataError, match=f"^{tmp_path}/rows/{odd}[:,] "):
            load_dataset(data.train, recipe, data)


# Folders that the datasets library saved


def rows_of(path: Path, **options: Any) -> list[Any]:
    return [row for chunk in find_input(section(path, **options)).chunks(None) for _, row in chunk.parsed()]


@pytest.mark.parametrize("change", ["none", "select", "shuffle", "filter", "shards"])
def test_a_saved_dataset_gives_the_rows_of_load_from_disk(tmp_path: Path, change: str) -> None:
    rows = datasets.Dataset.from_list([{"text": str(i), "n": {"i": i}} for i in range(25)])
    if change == "select":
        rows = rows.select([7, 3, 3, 20])
    elif change == "shuffle":
        rows = rows.shuffle(seed=1)
    elif change == "filter":
        rows = rows.filter(lambda row: row["n"]["i"] % 2)
    rows.save_to_disk(tmp_path / "saved", num_shards=12 if change == "shards" else 1)
    make(tmp_path / "saved", "cache-123.arrow", "extra.jsonl")  # what `map` leaves behind
    assert rows_of(tmp_path / "saved") == list(datasets.load_from_disk(tmp_path / "saved"))
    assert rows_of(tmp_path) == rows_of(tmp_path / "saved")


def test_a_saved_dataset_of_any_split_is_read_by_default(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": "a"}], split="test")
    rows.save_to_disk(tmp_path)
    assert rows_of(tmp_path) == rows_of(tmp_path, split="test") == [{"text": "a"}]
    with pytest.raises(DataError, match=r"has no split 'dev'; it has test \(data-00000-of-00001.arrow\)"):
        find_files(section(tmp_path, split="dev"))


def test_a_saved_dict_gives_the_rows_of_its_split(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "held_out")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path)
    assert rows_of(tmp_path) == [{"text": "train"}]
    assert rows_of(tmp_path, split="held_out") == [{"text": "held_out"}]
    with pytest.raises(DataError, match=r"has no split 'test'; it has train .*, held_out"):
        find_files(section(tmp_path, split="test"))


def test_a_saved_dataset_with_a_missing_or_damaged_file_is_an_error(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": str(i)} for i in range(4)]).save_to_disk(tmp_path, num_shards=2)
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow is missing; state\.json lists it"):
        find_files(section(tmp_path))
    for state in ("{", "[1]", '{"_data_files": [1]}', "{}"):
        (tmp_path / "state.json").write_text(state)
        with pytest.raises(DataError, match=r"state\.json .*save the dataset again"):
            find_files(section(tmp_path))


# URLs


class Server(ThreadingHTTPServer):
    """Counts requests; may leave out the version of a file, or the end of its content."""

    def __init__(self, folder: Path, *, has_versions: bool, missing_bytes: int) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.has_versions, self.missing_bytes = has_versions, missing_bytes
        self.paths: list[str] = []


class Handler(SimpleHTTPRequestHandler):
    """Answers the requests of a `Server`."""

    server: Server

    def log_message(self, *args: Any) -> None:
        self.server.paths.append(self.path)

    def send_header(self, keyword: str, value: str) -> None:
        if keyword != "Last-Modified" or self.server.has_versions:
            added = self.server.missing_bytes if keyword == "Content-Length" else 0
            super().send_header(keyword, str(int(value) + added) if added else value)


@contextlib.contextmanager
def serve(folder: Path, *, has_versions: bool = True, missing_bytes: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder on a free port of this machine; yields its address and the requests."""
    server = Server(folder, has_versions=has_versions, missing_bytes=missing_bytes)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.paths
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def downloads(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test an empty cache of downloads."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(home))
    return home / "lora_accel" / "downloads"


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "JSONL.zst", "csv"])
def test_an_address_gives_the_rows_and_hashes_of_the_file(tmp_path: Path, suffix: str) -> None:
    data = b"text\none\ntwo\n" if suffix == "csv" else b'{"text": "one"}\n\n{"text": "two"}\n'
    compress = {"gz": gzip.compress, "zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
    file = tmp_path / f"rows.{suffix}"
    file.write_bytes(compress.get(suffix.split(".")[-1], bytes)(data))
    with serve(tmp_path) as (address, _):
        url = f"{address}/rows.{suffix}?download=true"
        remote, local = find_input(section(url)), find_input(section(file))
    assert list(remote.hashes) == [url]
    assert list(remote.hashes.values()) == list(local.hashes.values())
    rows = [(chunk.file, number, row) for chunk in remote.chunks(None) for number, row in chunk.parsed()]
    assert rows == [(url, n, r) for chunk in local.chunks(None) for n, r in chunk.parsed()]


def test_rows_of_an_address_are_tokenized_and_found_again(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    lines = "".join(f'{{"text": "row {i}"}}\n' for i in range(5))
    (tmp_path / "rows.jsonl").write_text(lines)
    recipe = Recipe("tiny", lambda: ChatTemplate(tokenizer))
    with serve(tmp_path) as (address, _):
        url = f"{address}/rows.jsonl"
        for path in (url, str(tmp_path / "rows.jsonl"), url):
            data = DataSection(train=[section(path, limit=4)], cache_dir=str(tmp_path / "cache"))
            dataset = load_dataset(data.train, recipe, data)
            assert [example.row for example in dataset.examples] == [(path, number) for number in range(1, 5)]
            found = [dict(chunk.parsed()) for chunk in find_rows(data.train[0], {(path, 2), (path, 4)})]
            assert found == [{2: {"text": "row 1"}}, {4: {"text": "row 3"}}]
    assert len(list((tmp_path / "cache").glob("*/ledger.json"))) == 1  # the same bytes, wherever they come from


@pytest.mark.parametrize("has_versions", [True, False])
def test_a_download_is_cached_until_the_file_changes(tmp_path: Path, downloads: Path, has_versions: bool) -> None:
    make(tmp_path, "rows.jsonl")
    with serve(tmp_path, has_versions=has_versions) as (address, _):
        (first,) = find_files(section(f"{address}/rows.jsonl")).values()
        stamp = first.stat().st_mtime_ns
        (second,) = find_files(section(f"{address}/rows.jsonl")).values()
        assert (second, second.stat().st_mtime_ns) == (first, stamp)
        (tmp_path / "rows.jsonl").write_text('{"text": "rows,jsonl"}\n')  # of the same size
        os.utime(tmp_path / "rows.jsonl", (1, 1))
        (third,) = find_files(section(f"{address}/rows.jsonl")).values()
    assert (first.parent.parent, third.parent.parent) == (downloads, downloads)
    assert [json.loads(file.read_text())["text"] for file in (first, third)] == ["rows.jsonl", "rows,jsonl"]


def test_a_download_that_is_cut_off_is_an_error(tmp_path: Path, downloads: Path) -> None:
    make(tmp_path, "rows.jsonl")
    with (
        serve(tmp_path, missing_bytes=5) as (address, _),
        pytest.raises(DataError, match=r"rows\.jsonl: the download ended after 23 of 28 bytes; run again"),
    ):
        find_files(section(f"{address}/rows.jsonl"))
    assert not [path for path in downloads.iterdir() if path.suffix != ".lock"]


def test_an_address_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with serve(make(tmp_path, "rows.jsonl")) as (address, _):
        for path, reason in (("none.jsonl", "404"), ("", "unknown file type"), ("rows", "unknown file type")):
            with pytest.raises(DataError, match=f"{address}/{path}: .*{reason}"):
                find_files(section(f"{address}/{path}"))
        with pytest.raises(DataError, match="split: 'test' selects"):
            find_files(section(f"{address}/rows.jsonl", split="test"))
    with pytest.raises(DataError, match=r"cannot be read: .*Errno.*; check the address and your access"):
        find_files(section(f"{address}/rows.jsonl"))  # the server has ended


@pytest.fixture
def memory() -> Iterator[Any]:
    """Return fsspec's file system in memory, as a store such as S3, and empty it afterwards."""
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def test_urls_of_file_systems_give_files_folders_and_patterns(memory: Any) -> None:
    for name in ("b/train.jsonl", "b/test.jsonl", "b/.x/train.jsonl", "b/LICENSE.txt", "c/sub/one.jsonl"):
        memory.pipe_file(f"/{name}", json.dumps({"text": name}).encode())
    assert texts("memory://b/test.jsonl") == ["b/test.jsonl"]
    assert texts("memory://b") == texts("memory://b/") == ["b/train.jsonl"]
    assert texts("memory://b", split="test") == ["b/test.jsonl"]
    assert texts("memory://b/*.jsonl") == ["b/test.jsonl", "b/train.jsonl"]
    assert texts("memory://c/**/*.jsonl") == ["c/sub/one.jsonl"]
    for path, options, message in (
        ("memory://b", {"split": "dev"}, "has no split 'dev'; it has test .*, train|has no split 'dev'; it has train"),
        ("memory://b/test.jsonl", {"split": "dev"}, "split: 'dev' selects files"),
        ("memory://b/none.jsonl", {}, "cannot be read: no such file"),
        ("memory://none", {}, "no .* file in this folder|no such file"),
        ("memory://b/*.csv", {}, "no .* file matches this pattern"),
    ):
        with pytest.raises(DataError, match=f"{path.replace('*', '.')}: .*({message})"):
            find_files(section(path, **options))


def test_a_saved_dataset_is_read_from_a_url(memory: Any) -> None:
    datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}]).save_to_disk("memory://saved", num_shards=2)
    assert texts("memory://saved") == ["a", "b"]


def test_a_file_url_is_a_local_path(tmp_path: Path, downloads: Path) -> None:
    make(tmp_path, "train.jsonl", "test.jsonl")
    (name,) = find_files(section(f"file://{tmp_path}"))
    assert name == str(tmp_path / "train.jsonl")
    assert not downloads.exists()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_files_of_archives_are_read(tmp_path: Path, kind: str) -> None:
    """The file of each archive has the same name, size and time, also after the archive has changed."""
    row = tmp_path / "rows.jsonl"
    for path, text in (("a", "one"), ("b", "two"), ("a", "six")):
        row.write_text(json.dumps({"text": text}))
        os.utime(row, (1e9, 1e9))
        if kind == "zip":
            with zipfile.ZipFile(tmp_path / path, "w") as archive:
                archive.write(row, "x/rows.jsonl")
        else:
            with tarfile.TarFile(tmp_path / path, "w") as archive:
                archive.add(row, "x/rows.jsonl")
        assert texts(f"{kind}://x/rows.jsonl::file://{tmp_path}/{path}") == [text]


def test_files_of_one_content_keep_their_names(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / name).write_text('{"text": "a"}')
    with serve(tmp_path, has_versions=False) as (address, _):
        assert texts(f"{address}/a.jsonl") == ["a"]
        assert texts(f"{address}/b.txt") == ['{"text": "a"}']


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/rows.jsonl", "pip install s3fs"),
        ("gs://bucket/folder", "pip install gcsfs"),
        ("abfs://bucket/*.jsonl", "pip install adlfs"),
        ("s4://bucket/rows.jsonl", "Protocol not known: s4"),
    ],
)
def test_a_missing_package_of_a_protocol_is_an_error(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("s3fs", "gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError) as caught:
        find_files(section(url))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{url}: ")
    assert message in line


def test_a_folder_for_downloads_that_is_not_writable_is_an_error(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe_file("/rows.jsonl", b"{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", "/dev/null/home")
    with pytest.raises(
        DataError, match=r"the folder for downloads, cannot be written to: Not a directory; .*set HF_HOME"
    ):
        find_files(section("memory://rows.jsonl"))


def test_the_default_split_is_that_of_the_config() -> None:
    assert SourceSection.model_fields["split"].default == DEFAULT_SPLIT
    assert set(files_module.SPLIT_WORDS) == set(map(str, datasets.data_files.SPLIT_KEYWORDS))


@pytest.mark.parametrize(
    "content", ["", "[]", "7", "{", "[" * 100_000, '{"_data_files": 5}', '{"_data_files": [{"filename": 5}]}', None]
)
def test_damaged_metadata_of_a_saved_dataset_is_an_error(tmp_path: Path, content: str | None) -> None:
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "saved")
    state = tmp_path / "saved" / "state.json"
    state.unlink()
    if content is None:
        os.mkfifo(state)
    else:
        state.write_text(content)
    with pytest.raises(DataError, match=r"saved: .*(save the dataset again|Copy the folder again)$"):
        find_files(section(str(tmp_path / "saved")))


@pytest.mark.parametrize("splits", [5, [5], [["train"]], {"train": 1}, None])
def test_damaged_names_of_splits_are_an_error(tmp_path: Path, splits: Any) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["one"]})}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(DataError, match="does not list its splits; save the dataset again"):
        find_files(section(str(tmp_path / "saved")))


@pytest.mark.parametrize("own", [5, ["train"], {}, None])
def test_a_damaged_name_of_a_split_is_only_a_remark(tmp_path: Path, own: Any) -> None:
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "saved")
    state = tmp_path / "saved" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_split": own}))
    assert len(find_files(section(str(tmp_path / "saved")))) == 1
