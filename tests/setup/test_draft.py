"""`lora-accel init` with options or on a terminal: a config that fits a model and rows."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from lora_accel.config.files import read_config
from lora_accel.setup import dialog
from lora_accel.setup.data import prepare_data
from lora_accel.setup.draft import SAMPLE, SCHEMA_FILE, TEMPLATE_TOKENS, DraftRequest, InputSummary, Rows, choose
from tests.conftest import CommandResult, chat_rows, write_jsonl

Command = Callable[..., CommandResult]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_jsonl(folder / "rows.jsonl", chat_rows(60))
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_draft_fits_the_rows_and_the_model(command: Command, here: Path, tiny_model: Callable[..., Path]) -> None:
    result = command("init", "my.yaml", "--model", tiny_model(), "--data", "rows.jsonl", "--output", "runs/a: b")
    assert (result.returncode, result.stderr) == (0, "")
    for part in ("60, format messages", "tokens (median)", "256 in the model", "lora-accel inspect --config my.yaml"):
        assert part in result.stdout
    assert names(here) == {"rows.jsonl", "my.yaml", SCHEMA_FILE}
    config = read_config("my.yaml")
    assert (config.data.eval_fraction, config.training.batch_size, config.training.epochs) == (0.1, 4, 5)
    assert (config.output_dir, config.quantization.bits) == ("runs/a: b", None)
    assert config.training.learning_rate == 5e-4, "a small model"
    longest = prepare_data(config).dataset.ledgers[0].longest
    assert longest < config.data.max_length <= 256
    assert config.evaluation.every_steps == config.checkpoint.every_steps == 10
    assert config.checkpoint.export == "best"
    assert (here / "my.yaml").read_text().startswith(f"# yaml-language-server: $schema={SCHEMA_FILE}\n")
    schema = json.loads((here / SCHEMA_FILE).read_text())
    assert "max_length" in schema["$defs"]["DataSection"]["properties"]
    assert command("init", "other.yaml", "--model", tiny_model(), "--data", "rows.jsonl").returncode == 0


@pytest.mark.parametrize("name", ["held out.jsonl", "a, b.jsonl", "{a}.jsonl", "a: b.jsonl", "#a.jsonl"])
def test_options_are_in_the_draft(command: Command, here: Path, tiny_model: Callable[..., Path], name: str) -> None:
    write_jsonl(here / name, chat_rows(3))
    rows = ("--data", "rows.jsonl", "--eval", name)
    assert command("init", "my.yaml", "--model", tiny_model(), *rows, "--4bit").returncode == 0
    config = read_config("my.yaml")
    assert [source.path for source in config.data.eval] == [name]
    assert (config.data.eval_fraction, config.quantization.bits) == (0, 4)


def test_a_few_long_rows_do_not_decide_the_length(
    command: Command, here: Path, tiny_model: Callable[..., Path]
) -> None:
    rows = chat_rows(SAMPLE)
    rows[5]["messages"][1]["content"] = "word " * 500
    write_jsonl(here / "rows.jsonl", [*rows, *chat_rows(500)])
    result = command("init", "my.yaml", "--model", tiny_model(), "--data", "rows.jsonl")
    assert "1,500, format messages" in result.stdout
    assert "at most of the first 1,000 rows" in result.stdout
    config = read_config("my.yaml")
    assert config.data.max_length == 192, "not the 256 positions of the model"
    assert config.training.batch_size == 8


@pytest.mark.parametrize(
    ("longest", "positions", "expected"),
    [(90, None, 128), (1500, None, 1536), (50_000, None, 8192), (3000, 2048, 2048)],
)
def test_max_length(longest: int, positions: int | None, expected: int) -> None:
    rows = Rows("text", 10_000, np.full(SAMPLE, longest), is_estimate=False)
    values = choose(DraftRequest("model", "rows.txt"), InputSummary(rows, positions, is_large=True, chat_template=None))
    assert (values.max_length, values.batch_size, values.eval_fraction) == (expected, 16, 0.02)


def test_without_a_tokenizer_lengths_are_estimated(command: Command, here: Path) -> None:
    result = command("init", "my.yaml", "--model", "some/model-7b", "--data", "rows.jsonl")
    assert (result.returncode, result.stderr) == (0, "")
    assert "some/model-7b cannot be loaded now" in result.stdout
    config = read_config("my.yaml")
    assert config.model.name_or_path == "some/model-7b"
    assert config.training.learning_rate == 2e-4, "perhaps a large model"
    longest = max(len(str(row)) for row in chat_rows(60)) // 3
    assert longest + TEMPLATE_TOKENS < config.data.max_length <= 256, "room for the chat template"


def test_a_tokenizer_without_template_gets_one(
    command: Command, here: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_bytes((tiny_model() / "config.json").read_bytes())
    result = command("init", "my.yaml", "--model", tmp_path / "base", "--data", "rows.jsonl")
    assert result.returncode == 0, result.stderr
    assert read_config("my.yaml").model.chat_template == "chatml"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "MODEL", "--data", "absent.jsonl"), "absent.jsonl"),
        (("--model", "MODEL", "--data", "rows.jsonl", "--eval", "absent.jsonl"), "absent.jsonl"),
        (("--model", "models/absent", "--data", "rows.jsonl"), "models/absent"),
        (("--model", "MODEL"), "--data PATH is missing"),
        (("--model", "MODEL", "--data", "bad.jsonl"), "bad.jsonl, row 1"),
        (("--model", "some/model", "--data", "bad.jsonl"), "bad.jsonl, row 1"),
        (("--model", "MODEL", "--data", "empty.jsonl"), "empty.jsonl: has no rows"),
        (("--model", "some/model", "--data", "empty.jsonl"), "empty.jsonl: has no rows"),
    ],
)
def test_bad_requests_write_nothing(
    command: Command, here: Path, tiny_model: Callable[..., Path], arguments: tuple[str, ...], message: str
) -> None:
    write_jsonl(here / "bad.jsonl", [{"question": "a"}])
    write_jsonl(here / "empty.jsonl", [])
    before = names(here)
    options = [str(tiny_model()) if argument == "MODEL" else argument for argument in arguments]
    result = command("init", "my.yaml", *options)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("error: ") == 1
    assert names(here) == before


def test_columns_of_other_names(command: Command, here: Path, tiny_model: Callable[..., Path]) -> None:
    """The error of a csv file names the mapping, which `--columns` takes, also for the evaluation rows."""
    csv = "note: text,category\ngive me my money back,refund\nwhere is my parcel,shipping\n"
    for name in ("rows.csv", "held.csv"):
        (here / name).write_text(csv)
    arguments = ("init", "tickets.yaml", "--model", tiny_model(), "--data", "rows.csv", "--eval", "held.csv")
    result = command(*arguments)
    assert result.returncode == 2
    assert "columns: {instruction: note: text, output: category}, if 'category' is the answer" in result.stderr
    assert "--columns '{instruction: NAME, output: NAME}'" in result.stderr
    result = command(*arguments, "--columns", "{instruction: 'note: text', output: category}")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"wrote tickets.yaml, and {SCHEMA_FILE} for editors" in result.stdout
    assert "lora-accel train --config tickets.yaml" in result.stdout
    config = read_config("tickets.yaml")
    expected = {"instruction": "note: text", "output": "category"}
    assert [source.columns for source in (*config.data.train, *config.data.eval)] == [expected, expected]
    assert config.output_dir == "runs/tickets"
    (here / "held.csv").write_text("a;b\n1;2\n")
    result = command("init", "more.yaml", *arguments[2:])
    assert "held.csv, row 1: the only column is 'a;b': its names are separated by ';'" in result.stderr
    assert "--columns" not in result.stderr


@pytest.mark.parametrize("columns", ["instruction=question", "[question]", "{instruction: 5}", "{instruction"])
def test_columns_that_are_no_mapping(command: Command, here: Path, columns: str) -> None:
    result = command("init", "my.yaml", "--data", "rows.jsonl", "--columns", columns)
    assert result.returncode == 2
    assert "--columns: should be {known name: name in the file}" in result.stderr
    assert names(here) == {"rows.jsonl"}


def test_wrong_rows_are_reported_before_the_next_question(
    command: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialog, "is_terminal", lambda: True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("absent.jsonl\n"))
    result = command("init")
    assert result.returncode == 2
    assert "absent.jsonl: no such file" in result.stderr
    assert "Base model" not in result.stdout
    (here / "my_rows.yaml").write_text("mine")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "my_rows.yaml already exists" in command("init").stderr, "before the first question"


def test_existing_files_stay(command: Command, here: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    arguments = ("--model", tiny_model(), "--data", "rows.jsonl")
    for make in (lambda path: path.write_text('{"title": "mine"}'), os.mkfifo, os.mkdir):
        make(here / SCHEMA_FILE)
        result = command("init", "my.yaml", *arguments)
        assert result.returncode == 2
        assert f"{SCHEMA_FILE} is not a schema of lora-accel" in result.stderr
        (here / SCHEMA_FILE).rename(tmp_path / make.__name__)
    (here / "my.yaml").write_text("mine")
    result = command("init", "my.yaml", *arguments)
    assert result.returncode == 2
    assert "my.yaml already exists" in result.stderr
    assert (here / "my.yaml").read_text() == "mine"
    assert names(here) == {"rows.jsonl", "my.yaml"}


def test_questions_on_a_terminal(
    command: Command, here: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialog, "is_terminal", lambda: True)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"rows.jsonl\n{tiny_model()}\n\ny\n"))
    result = command("init")
    assert result.returncode == 0, result.stderr
    config = read_config("my_rows.yaml")
    assert (config.model.name_or_path, config.quantization.bits) == (str(tiny_model()), 4)
    assert config.data.eval_fraction == 0.1


def test_yes_asks_nothing(command: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialog, "is_terminal", lambda: True)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert command("init", "--yes").returncode == 0
    assert names(here) == {"rows.jsonl", "my_rows.yaml"}
