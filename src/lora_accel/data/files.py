"""Find the data files of a source: a file, a folder, a glob pattern, or a URL that fsspec can read.

Folders follow the rules of the `datasets` library: names of splits, folders written by `save_to_disk`, hidden names.
Its own functions are not used, since they also count files that are not data: with them, `test.py` beside `rows.jsonl`
is the only file of the folder. Tests compare the results.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from lora_accel.config.schema import SourceSection
from lora_accel.console import Stage, shorten
from lora_accel.data.cache import CacheError, get_or_build
from lora_accel.data.regular import read_regular, stamp_and_hash
from lora_accel.errors import DataError, first_line, join_or

FILE_TYPES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
"""Ending -> the name of its compression."""

DEFAULT_SPLIT = "train"
SPLIT_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}
"""Split -> the words that name it in a file or folder name."""
SPLIT_PATTERNS = {
    split: re.compile(rf"(?:^|[-._ 0-9])(?:{words})(?:[-._ 0-9]|$)") for split, words in SPLIT_WORDS.items()
}
SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
"""A shard of a split of any name, as `push_to_hub` names it."""
STATE, INFO, DATASET_DICT = "state.json", "dataset_info.json", "dataset_dict.json"
"""Files that `save_to_disk` writes beside its data."""
METADATA = {INFO, DATASET_DICT, "dataset_infos.json", "config.json"}
ABOUT = re.compile(
    r"(?:LICEN[CS]E|README|NOTICE|COPYING)(?:[-._ ].*)?\.(?i:txt)|(?i:licen[cs]e|readme|notice|copying)\.(?i:txt)"
)
"""Text files about the data. A longer name in lower case is data: a document may be `notice of default.txt`."""
HTTP_TIMEOUT_SECONDS = 60
"""Without an answer or a byte. A download may take as long as it needs."""
VERSIONS = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "mtime", "created", "blob_id")
"""Keys of fsspec's file information that change with the file, in the names of several protocols."""


def find_files(source: SourceSection) -> dict[str, Path]:
    """Return the data files of a source in a fixed order, by name; empty if its path can only be a Hub id.

    Returns:
        Name in messages and in the ledger (path or URL) -> local file. The content of a URL is downloaded once.

    Raises:
        DataError: there is no such file, or an option does not apply to the path.
    """
    if "://" in source.path:
        return _find_remote(source)
    return _find_local(source, os.path.expanduser(source.path))


def file_type(name: str) -> str:
    """Return the ending of a path or URL in lower case without compression: `.jsonl` for `rows.JSONL.gz`."""
    if "://" in name:
        name = _url_path(name)
    path = PurePosixPath(name.lower())
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix


def _url_path(url: str) -> str:
    """Return the path of a URL, without the query of an HTTP address and the URL of an archive."""
    first = url.split("::")[0]
    return urlsplit(first).path if first.startswith(("http://", "https://")) else first


def _find_local(source: SourceSection, pattern: str) -> dict[str, Path]:
    path = Path(pattern)
    try:
        is_there = path.exists()
    except OSError as error:
        raise DataError(f"{pattern}: cannot be read: {error.strerror}") from None
    if path.is_dir():
        names = select_files(pattern, _walk(path), source.split, lambda name: read_regular(path / name))
        files = [path / name for name in names]
    elif path.is_file():
        _check_type(pattern, path.name)
        _check_no_split(source)
        files = [path]
    elif glob.has_magic(pattern) and not is_there:
        _check_no_split(source)
        matches = map(Path, glob.glob(pattern, recursive=True))
        files = sorted(file for file in matches if file_type(file.name) in FILE_TYPES and not file.is_dir())
        if not files:
            raise DataError(f"{pattern}: no {', '.join(FILE_TYPES)} file matches this pattern")
    elif is_there or path.is_symlink():
        files = [path]
    else:
        is_possible_id = pattern.count("/") <= 1 and not pattern.startswith((".", "/", "~")) and pattern[-1] != "/"
        if is_possible_id and file_type(pattern) not in FILE_TYPES:  # `OpenHermes-2.5` has a suffix too
            return {}
        raise DataError(f"{pattern}: no such file; paths are relative to the working directory")
    _check_hub_options(source)
    for file in files:
        if not file.is_file():
            what = "a symbolic link to a file that is missing" if file.is_symlink() else "not an ordinary file"
            raise DataError(f"{file}: is {what}")
    return {str(file): file for file in files}


def _check_type(path: str, name: str) -> None:
    if file_type(name) not in FILE_TYPES:
        suffix = PurePosixPath(name).suffix
        known = f"{', '.join(FILE_TYPES)}, each with {' or '.join(COMPRESSED)}"
        raise DataError(f"{path}: unknown file type {suffix!r}; known are {known}")


def _check_no_split(source: SourceSection) -> None:
    if source.split != DEFAULT_SPLIT:
        raise DataError(
            f"{source.path}: split: {source.split!r} selects files of a folder, and this path names its files; "
            "remove split, or set path to the folder"
        )


def _check_hub_options(source: SourceSection) -> None:
    for option in ("name", "revision"):
        if getattr(source, option) is not None:
            raise DataError(
                f"{source.path}: {option} is an option of datasets on the Hub, and this path has files; remove {option}"
            )


def _walk(root: Path) -> list[str]:
    """Return the files of a folder, relative to it, without hidden ones. Symbolic links to folders are followed."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None

    names, seen = [], {os.path.realpath(root)}
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        # A link to a folder that is already listed, such as a parent, would repeat its rows.
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(folders) if not _is_hidden(name)}
        folders[:] = [name for name, target in real.items() if target not in seen]
        seen.update(real.values())
        names += [os.path.relpath(os.path.join(folder, name), root) for name in files if not _is_hidden(name)]
    return names


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


# Files of a folder, local or remote


def select_files(where: str, names: Sequence[str], split: str, read: Callable[[str], bytes]) -> list[str]:
    """Return the data files of one split of a folder, sorted by path.

    Args:
        where: the folder, for messages.
        names: all files of the folder, relative to it, with "/".
        split: name of the split. Without any names of splits, all files are `train`.
        read: returns the content of a file.

    Raises:
        DataError: there is no data file, the folder has no such split, or the split of a file is not clear.
    """
    names = [name for name in names if not any(map(_is_hidden, name.split("/")))]
    files = _data_files(where, names, read)
    if not files:
        raise DataError(f"{where}: no {', '.join(FILE_TYPES)} file in this folder")
    if STATE in names and INFO in names:  # one dataset, whose split is a remark
        own = _read_json(where, STATE, read).get("_split")
        splits = {own if own and isinstance(own, str) else DEFAULT_SPLIT: files, DEFAULT_SPLIT: files}
    elif DATASET_DICT in names:
        known = _read_json(where, DATASET_DICT, read).get("splits", [])
        if not isinstance(known, list) or not all(isinstance(name, str) for name in known):
            raise DataError(f"{where}: {DATASET_DICT} does not list its splits; save the dataset again")
        splits = {name: [file for file in files if file.startswith(f"{name}/")] for name in known}
    else:
        splits = _group_by_split(where, files)
    if split not in splits:
        found = ", ".join(f"{name} ({shorten(', '.join(group), 60)})" for name, group in splits.items())
        raise DataError(
            f"{where}: has no split {split!r}; it has {found}. Set split to one of them, or path to the files"
        )
    if not splits[split]:
        raise DataError(f"{where}: no file of split {split!r} in this folder")
    return splits[split]


def _data_files(where: str, names: Sequence[str], read: Callable[[str], bytes]) -> list[str]:
    """Return the files that hold rows, sorted; of folders that `save_to_disk` wrote, those that state.json lists."""
    present, files = set(names), []
    prefixes = [name.removesuffix(STATE) for name in names if PurePosixPath(name).name == STATE]
    saved = tuple(prefix for prefix in prefixes if f"{prefix}{INFO}" in present)
    for name in sorted(names, key=lambda name: PurePosixPath(name).parts):
        base = PurePosixPath(name).name
        prefix = name.removesuffix(base)
        if prefix not in saved:
            is_about = base in METADATA or ABOUT.fullmatch(base)
            if file_type(name) in FILE_TYPES and not is_about:
                files.append(name)
        elif base == STATE:
            files += [prefix + file for file in _listed_files(where, name, read)]
    for name in files:
        if name not in present:
            raise DataError(f"{where}: {name} is missing; {STATE} lists it. Copy the folder again")
    return files


def _listed_files(where: str, name: str, read: Callable[[str], bytes]) -> list[str]:
    try:
        return [str(entry["filename"]) for entry in _read_json(where, name, read)["_data_files"]]
    except (KeyError, TypeError):
        raise DataError(f"{where}: {name} does not list its data files; save the dataset again") from None


def _read_json(where: str, name: str, read: Callable[[str], bytes]) -> dict[str, Any]:
    try:
        return dict(json.loads(read(name)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{where}: {name} cannot be read: {first_line(error)}; save the dataset again") from None


def _group_by_split(where: str, files: list[str]) -> dict[str, list[str]]:
    """Return split -> files: by the names of shards, else of folders, else of files; without names, all are `train`."""
    for splits_of in (_splits_of_shard, _splits_of_folders, _splits_of_file):
        found = {file: splits_of(file) for file in files}
        if any(found.values()):
            break
    else:
        return {DEFAULT_SPLIT: files}
    for file, splits in found.items():
        if len(splits) != 1:
            others = join_or(dict.fromkeys(name for names in found.values() for name in names))
            which = f"splits {' and '.join(splits)}" if splits else f"no split, and other files to {others}"
            raise DataError(f"{where}: by its name, {file} belongs to {which}; rename or move it, or set path to files")
    groups: dict[str, list[str]] = {}
    for file, (split,) in found.items():
        groups.setdefault(split, []).append(file)
    return groups


def _splits_of_shard(file: str) -> list[str]:
    match = SHARD.fullmatch(file)
    return [match[1]] if match else []


def _splits_of_folders(file: str) -> list[str]:
    folders = PurePosixPath(file).parent.parts
    return [split for split, pattern in SPLIT_PATTERNS.items() if any(map(pattern.search, folders))]


def _splits_of_file(file: str) -> list[str]:
    return [split for split, pattern in SPLIT_PATTERNS.items() if pattern.search(PurePosixPath(file).name)]


# URLs


def _find_remote(source: SourceSection) -> dict[str, Path]:
    """Find the files of a URL, and download those that are not in the cache."""
    url = source.path
    if url.startswith(("http://", "https://")):
        name = PurePosixPath(_url_path(url)).name
        _check_type(url, name)
        _check_no_split(source)
        _check_hub_options(source)
        return {url: _download_http(url, name)}
    from fsspec.implementations.local import LocalFileSystem

    system, path = _open_file_system(url)
    if isinstance(system, LocalFileSystem):
        return _find_local(source, path)
    with _remote_errors(url):
        if "*" in path:
            _check_no_split(source)
            paths = sorted(name for name in system.glob(path) if file_type(name) in FILE_TYPES)
            if not paths:
                raise DataError(f"{url}: no {', '.join(FILE_TYPES)} file matches this pattern")
        elif file_type(path) in FILE_TYPES:
            _check_no_split(source)
            paths = [path]
        else:
            root = path.rstrip("/") + "/"
            names = [name.removeprefix(root) for name in system.find(path)]
            names = select_files(url, names, source.split, lambda name: bytes(system.cat_file(root + name)))
            paths = [root + name for name in names]
        _check_hub_options(source)
        archives = url.split("::")[1:]
        names = ["::".join([system.unstrip_protocol(path), *archives]) for path in paths]
        return {name: _download(name, system, path) for name, path in zip(names, paths, strict=True)}


def _open_file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path on it."""
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    protocol = url.split("://")[0].split("::")[0]
    try:
        with _remote_errors(url):
            system, path = url_to_fs(url)
    except ImportError as error:
        # A protocol's package is imported on first use. Not every message of fsspec has its name.
        package = str(known_implementations.get(protocol, {}).get("class", "fsspec")).split(".")[0]
        install = "install it" if package == "fsspec" else f"pip install {package}"
        raise DataError(f"{url}: a package for this protocol is missing: {first_line(error)}; {install}") from None
    return system, path


def _download(url: str, system: Any, path: str) -> Path:
    """Return a local copy of a file on one of fsspec's file systems."""
    info = system.info(path)
    is_in_archive = "::" in url  # whose own version is not known here
    version = {key: str(info[key]) for key in VERSIONS if info.get(key) and not is_in_archive}

    def fetch(file: Path) -> None:
        system.get_file(path, str(file))

    return _cache(url, PurePosixPath(path).name, version, info.get("size"), fetch)


def _download_http(url: str, name: str) -> Path:
    """Return a local copy of a file on a web server.

    fsspec's own class for HTTP needs aiohttp, which nothing else here uses, and ends downloads after five minutes.
    """
    from urllib.request import Request, urlopen

    # Without "identity", a server may compress the file once more.
    request = Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "lora-accel"})
    with _remote_errors(url), urlopen(request, timeout=HTTP_TIMEOUT_SECONDS) as response:
        version = {key: response.headers[key] for key in VERSIONS if response.headers[key]}
        length = response.headers["Content-Length"]

        def fetch(file: Path) -> None:
            with file.open("wb") as stream:
                shutil.copyfileobj(response, stream, 1 << 20)

        return _cache(url, name, version, None if length is None else int(length), fetch)


def _cache(url: str, name: str, version: dict[str, str], size: int | None, fetch: Callable[[Path], None]) -> Path:
    """Return the local copy of a version of a file; fetch it if it is not in the cache.

    A copy never changes, so the bytes that are hashed are those that are tokenized, by every process of a machine.

    Args:
        name: file name of the copy, with the file type.
        version: what the server reports about the version; if it is empty, the file is fetched every time.
        size: bytes; None = unknown.
        fetch: downloads to a file.
    """
    from huggingface_hub.constants import HF_HOME

    cache = Path(HF_HOME) / "lora_accel" / "downloads"

    def build(folder: Path) -> None:
        file = folder / name
        with Stage(f"downloading {shorten(url, 60)}"):
            fetch(file)
        if size not in (None, file.stat().st_size):
            raise DataError(f"{url}: the download ended after {file.stat().st_size:,} of {size:,} bytes; run again")

    try:
        if version:
            key = hashlib.sha256(json.dumps([url, version, size]).encode()).hexdigest()[:40]
            return get_or_build(cache, key, build) / name
        with tempfile.TemporaryDirectory() as temporary:
            build(Path(temporary))
            key = hashlib.sha256(f"{stamp_and_hash(Path(temporary) / name, url)[1]} {name}".encode()).hexdigest()[:40]

            def copy(folder: Path) -> None:
                shutil.copyfile(Path(temporary) / name, folder / name)

            return get_or_build(cache, key, copy) / name
    except CacheError as error:
        raise DataError(
            f"{url}: {cache}, the folder for downloads, cannot be written to: {error.reason}; free up space, or set "
            "HF_HOME"
        ) from None


@contextlib.contextmanager
def _remote_errors(url: str) -> Iterator[None]:
    """Convert the exceptions of file systems, which have no common base class, to a DataError."""
    try:
        yield
    except (DataError, ImportError):
        raise
    except Exception as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else first_line(error).strip("<>")
        raise DataError(
            f"{url}: cannot be read: {reason or type(error).__name__}; check the address and your access, or download "
            "the data and set path to the local files"
        ) from None
