"""The cache of tokenized examples: keyed by content, built by one process, independent of the number of workers."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from lora_accel.config.files import config_to_yaml
from lora_accel.config.schema import DataSection, RunConfig
from lora_accel.data import dataset, rows
from lora_accel.data.cache import get_or_build
from lora_accel.data.chat import Example
from lora_accel.data.dataset import Dataset, Recipe, load_dataset
from lora_accel.data.store import Examples
from lora_accel.data.template import ChatTemplate
from lora_accel.errors import ConfigError, DataError
from lora_accel.labels import IGNORE_INDEX
from lora_accel.setup.data import prepare_data
from lora_accel.setup.recipe import make_recipe
from tests.conftest import PATIENCE_SECONDS, ROOT, chat_rows, write_jsonl


def section_of(tmp_path: Path, path: Path, **options: Any) -> DataSection:
    values = {"train": [{"path": str(path)}], "cache_dir": str(tmp_path / "cache"), "max_dropped": 1.0} | options
    return DataSection.model_validate(values)


def never() -> NoReturn:
    raise AssertionError("the tokenizer was loaded")


def load(section: DataSection, template: Callable[[], ChatTemplate], fingerprint: str = "tiny") -> Dataset:
    return load_dataset(section.train, Recipe(fingerprint, template), section)


@pytest.fixture
def template(tokenizer: PreTrainedTokenizerFast) -> Callable[[], ChatTemplate]:
    """Returns the tiny tokenizer's own template."""
    chat_template = ChatTemplate(tokenizer)
    return lambda: chat_template


# Examples as arrays.


def test_examples_are_read_back_unchanged() -> None:
    originals = [
        Example([5, 6, 7], [IGNORE_INDEX, 6, IGNORE_INDEX], row=("a.jsonl", 3)),
        Example([8], [IGNORE_INDEX], row=("b.jsonl", 1)),
        Example([9, 2**31 - 1], [IGNORE_INDEX, 2**31 - 1], row=("a.jsonl", 9)),
    ]
    examples = Examples.of(originals)
    assert list(examples) == originals
    assert [examples[-1], examples[1]] == [originals[2], originals[1]]
    assert examples[1:] == originals[1:]
    assert examples.lengths.tolist() == [3, 1, 2]
    assert examples.num_supervised.tolist() == [1, 0, 1]
    with pytest.raises(IndexError):
        examples[3]
    taken = examples.take(np.array([2, 0])).take(np.array([1, 0, 0]))
    assert list(taken) == [originals[0], originals[2], originals[2]]
    assert taken.lengths.tolist() == [3, 2, 2]


# The cache.


def test_cached_examples_need_no_tokenizer(tmp_path: Path, template: Callable[[], ChatTemplate]) -> None:
    mixed_rows = [*chat_rows(30), {"messages": []}]
    section = section_of(tmp_path, write_jsonl(tmp_path / "rows.jsonl", mixed_rows), max_length=60)
    first, second = load(section, template), load(section, never)
    assert second.examples == first.examples
    assert second.ledgers == first.ledgers
    assert first.ledgers[0].num_rows == 31


def test_a_moved_file_is_found_in_the_cache_and_has_its_new_name(
    tmp_path: Path, template: Callable[[], ChatTemplate]
) -> None:
    section = section_of(tmp_path, write_jsonl(tmp_path / "rows.jsonl", [*chat_rows(5), {"messages": []}]))
    load(section, template)
    moved = tmp_path / "moved.jsonl"
    (tmp_path / "rows.jsonl").rename(moved)
    dataset = load(section_of(tmp_path, moved), never)
    assert {example.row[0] for example in dataset.examples} == {str(moved)}
    assert dataset.ledgers[0].dropped == {"empty conversation": [(str(moved), 6)]}
    assert list(dataset.ledgers[0].sha256) == [str(moved)]


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 61},
        {"overlong": "drop"},
        {"loss_on": "all"},
        {"parse_special_tokens": True},
        {"train": [{"path": "rows.jsonl", "limit": 4}]},
        {"train": [{"path": "rows.jsonl", "format": "messages"}]},
    ],
)
def test_a_changed_option_is_another_cache_entry(
    tmp_path: Path, template: Callable[[], ChatTemplate], change: dict[str, Any]
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", chat_rows(9))
    load(section_of(tmp_path, file, max_length=60), template)
    if "train" in change:
        change = {"train": [change["train"][0] | {"path": str(file)}]}
    with pytest.raises(AssertionError, match="the tokenizer was loaded"):
        load(section_of(tmp_path, file, **({"max_length": 60} | change)), never)


def test_a_changed_tokenizer_or_file_is_another_cache_entry(
    tmp_path: Path, template: Callable[[], ChatTemplate]
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", chat_rows(9))
    section = section_of(tmp_path, file)
    load(section, template)
    with pytest.raises(AssertionError, match="the tokenizer was loaded"):
        load(section, never, fingerprint="other")
    before = file.stat()
    file.write_text(file.read_text().replace("alpha", "omega"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    with pytest.raises(AssertionError, match="the tokenizer was loaded"):
        load(section, never)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"])
def test_a_changed_tokenizer_file_changes_the_fingerprint(
    make_config: Callable[..., RunConfig], tmp_path: Path, name: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(make_config().model.name_or_path, base)
    config = make_config(model={"name_or_path": str(base)})
    before = make_recipe(config).fingerprint
    assert make_recipe(config).fingerprint == before
    (base / name).write_text((base / name).read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert make_recipe(config).fingerprint != before


def test_a_changed_template_changes_the_fingerprint(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages }}", encoding="utf-8")
    names = [None, "chatml", "zephyr", str(file)]
    fingerprints = [make_recipe(make_config(model={"chat_template": name})).fingerprint for name in names]
    file.write_text("{{ messages[0] }}", encoding="utf-8")
    fingerprints.append(make_recipe(make_config(model={"chat_template": str(file)})).fingerprint)
    assert len(set(fingerprints)) == 5


def test_a_cache_that_cannot_be_written_to_is_an_error(tmp_path: Path, template: Callable[[], ChatTemplate]) -> None:
    (tmp_path / "cache").write_text("a file")
    section = section_of(tmp_path, write_jsonl(tmp_path / "rows.jsonl", chat_rows(3)))
    with pytest.raises(ConfigError, match=r"data\.cache_dir: .*cache cannot be written to"):
        load(section, template)


def test_a_failed_build_leaves_no_entry(tmp_path: Path, template: Callable[[], ChatTemplate]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"messages": 5}\n')
    with pytest.raises(DataError):
        load(section_of(tmp_path, file), template)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


KILLED = """
import os, signal, sys, time
from pathlib import Path
from lora_accel.data.cache import get_or_build
def build(folder):
    (folder / "half").write_text("x")
    print("building", flush=True)
    time.sleep(3600)
get_or_build(Path(sys.argv[1]), "key", build)
"""


def test_a_killed_build_is_repeated(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.glob(".key.*"))
    folder = get_or_build(tmp_path, "key", lambda folder: (folder / "complete").touch())
    assert sorted(path.name for path in folder.iterdir()) == ["complete", "entry.json"]
    assert not list(tmp_path.glob(".key.*"))


def _build_slowly(cache: Path, log: Path) -> None:
    def build(folder: Path) -> None:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.5)

    get_or_build(cache, "key", build)


def test_one_process_builds_while_the_others_wait(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "cache", tmp_path / "log")
    processes = [context.Process(target=_build_slowly, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_SECONDS)
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "built\n"


# Workers.


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make many chunks of few rows."""
    monkeypatch.setattr(rows, "MAX_CHUNK_ROWS", 3)


@pytest.mark.launch
@pytest.mark.usefixtures("small_chunks")
def test_the_number_of_workers_changes_nothing(tmp_path: Path, template: Callable[[], ChatTemplate]) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [*chat_rows(60), {"messages": []}, *chat_rows(7)])
    contents = []
    for workers in (1, 2, 3):
        section = section_of(tmp_path, file, num_workers=workers, cache_dir=str(tmp_path / f"cache-{workers}"))
        dataset = load(section, template)
        folder = next(path for path in (tmp_path / f"cache-{workers}").iterdir() if path.is_dir())
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
        assert len(dataset.examples) == 67
    assert contents[0] == contents[1] == contents[2]


@pytest.mark.launch
def test_workers_leave_the_keys_of_a_terminal_to_their_parent() -> None:
    """Ctrl-\\ goes to all processes; each worker used to print a traceback."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), dataset._init_worker, (os.getpid(), len)) as pool:
        keys = signal.SIGINT, signal.SIGQUIT
        assert [pool.submit(signal.getsignal, key).result() for key in keys] == [signal.SIG_IGN] * 2


@pytest.mark.launch
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_malformed_row_is_named_by_workers_too(
    tmp_path: Path, template: Callable[[], ChatTemplate], workers: int
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [*chat_rows(40), {"messages": 5}, *chat_rows(20), {"messages": 6}])
    with pytest.raises(DataError, match=r"rows\.jsonl, row 41: messages should be a list"):
        load(section_of(tmp_path, file, num_workers=workers), template)


@pytest.mark.usefixtures("small_chunks")
def test_a_file_that_changes_while_it_is_read_is_an_error(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", chat_rows(9))

    section = section_of(tmp_path, file)
    original = rows.Input.chunks

    def chunks(self: rows.Input, limit: int | None) -> Any:
        for number, chunk in enumerate(original(self, limit)):
            if number == 1:
                with file.open("a") as stream:
                    stream.write(json.dumps(chat_rows(1)[0]) + "\n")
            yield chunk

    monkeypatch.setattr(rows.Input, "chunks", chunks)
    with pytest.raises(DataError, match="was written to or replaced while it was read"):
        load(section, lambda: ChatTemplate(tokenizer))


# A plan of cached data.

PLAN_WITHOUT_TORCH = """
import sys
from lora_accel.cli import main
sys.argv = ["lora-accel", "plan", "--no-estimate", "--config", sys.argv[1]]
try:
    main()
except SystemExit as error:
    assert not error.code
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def test_a_plan_of_cached_data_needs_no_torch(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config()
    prepare_data(config, 1)
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config), encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, "-c", PLAN_WITHOUT_TORCH, file], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "21 per epoch" in ran.stdout
