"""Invalid input gives one error with its location and a fix: exit code 2, no traceback, nothing written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_accel.train import main
from tests.conftest import chat_rows, run_module, write_jsonl

CONFIG = """\
output_dir: run
seed: 0
model:
  name_or_path: MODEL
adapter:
  r: 4
  target_modules: all-linear
data:
  train: [{path: rows.jsonl}]
  max_length: 200
training:
  max_steps: 1
  batch_size: 4
logging: {trackers: [], report: false}
"""

TrainError = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory, with a valid config and valid rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG.replace("MODEL", str(tiny_model())), encoding="utf-8")
    write_jsonl(tmp_path / "rows.jsonl", chat_rows(6))
    return tmp_path


@pytest.fixture
def train_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> TrainError:
    """Return a function that runs the training command, checks that it fails, and returns its error message."""

    def train(*overrides: str, config: str = "run.yaml") -> str:
        before = contents(folder)
        code = main(["--config", config, *overrides])
        message = capsys.readouterr().err
        assert code == 2
        assert message.startswith("error: ")
        assert message.count("error: ") == 1
        assert "Traceback" not in message
        assert not (folder / "run").exists()
        assert contents(folder) == before
        return message

    return train


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def check_message(message: str, fragments: tuple[str, ...]) -> None:
    for fragment in fragments:
        assert fragment in message


def test_valid_input_works(folder: Path) -> None:
    assert main(["--config", "run.yaml"]) == 0
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("old", "new", "fragments"),
    [
        pytest.param(
            "seed: 0", "sed: 0", ("run.yaml, line 2: sed: unknown key", "did you mean seed?"), id="unknown key"
        ),
        pytest.param(
            "  batch_size", "  batchsize", ("run.yaml, line 13: training.batchsize", "did you mean batch_size?"),
            id="unknown nested key",
        ),
        pytest.param(
            "path: rows.jsonl", "pth: rows.jsonl",
            ("line 9: data.train[0].path: is missing", "line 9: data.train[0].pth: unknown key", "did you mean path?"),
            id="unknown key in a list",
        ),
        pytest.param(
            "target_modules: all-linear", "use_rslra: true",
            ("line 7: adapter.use_rslra: unknown key", "did you mean use_rslora?"), id="unknown PEFT field",
        ),
        pytest.param(
            "batch_size: 4", "batch_size: many",
            ("line 13: training.batch_size: should be a valid integer", "not 'many'"), id="wrong type",
        ),
        pytest.param("r: 4", "r: 0", ("line 6: adapter.r: should be greater than or equal to 1, not 0",), id="range"),
        pytest.param(
            "seed: 0", "seed: -1", ("line 2: seed: should be greater than or equal to 0, not -1",), id="negative seed"
        ),
        pytest.param("output_dir: run\n", "", ("run.yaml: output_dir: is missing",), id="missing key"),
        pytest.param(
            "  name_or_path: MODEL", "  dtype: auto", ("run.yaml, line 3: model.name_or_path: is missing",),
            id="missing nested key",
        ),
        pytest.param("seed: 0", "seed: [1, 2", ("run.yaml, line ", "not valid YAML"), id="broken YAML"),
        pytest.param("seed: 0", "\tseed: 0", ("run.yaml, line 2: not valid YAML",), id="tab in YAML"),
        pytest.param("seed: 0", "seed: 0\nseed: 1", ("run.yaml, line 3", "duplicate key", "seed"), id="key twice"),
        pytest.param("seed: 0", "seed: ${nothing}", ("run.yaml, line 2: seed: ", "nothing"), id="interpolation"),
        pytest.param("seed: 0", "seed: ???", ("run.yaml, line 2: seed: ???", "set it"), id="mandatory value"),
        pytest.param(
            "batch_size: 4", "batch_size: 4\n  micro_batch_size: 2",
            ("line 11: training: ", "batch_size, or micro_batch_size", "not both"), id="both batch options",
        ),
        pytest.param(
            "batch_size: 4", "gradient_accumulation_steps: 2",
            ("line 11: training: ", "gradient_accumulation_steps needs micro_batch_size"), id="accumulation only",
        ),
        pytest.param("batch_size: 4", "batch_size: null", ("line 11: training: batch_size is null",), id="no batch"),
        pytest.param(
            "max_length: 200", "eval: [{path: rows.jsonl}]\n  eval_fraction: 0.1",
            ("line 8: data: set eval or eval_fraction, not both",), id="both eval options",
        ),
        pytest.param(
            "seed: 0", "evaluation: {every_steps: 2}",
            ("run.yaml: evaluation.every_steps: there is nothing to evaluate", "set data.eval"), id="nothing to eval",
        ),
        pytest.param(
            "seed: 0", "quantization: {bits: 4}\nmodel.dtype: x", ("line 3: model.dtype: unknown key",), id="dotted key"
        ),
        pytest.param(
            "  max_steps: 1", "  scheduler: cosin",
            ("line 12: training.scheduler: should be 'cosine', 'linear', 'constant', ", ", not 'cosin'"), id="choice",
        ),
        pytest.param("training:\n", "training: 3\nlogging2:\n", ("line 11: training: should be", "not 3"), id="value"),
        pytest.param("all-linear", "'(['", ("line 7: adapter.target_modules: '(['", "list of names"), id="expression"),
        pytest.param("seed: 0", "5: 0", ("run.yaml", "5"), id="number as key"),
        pytest.param("all-linear", "[]", ("line 7: adapter.target_modules: is empty",), id="no names"),
        pytest.param(
            "path: rows.jsonl", "path: ''", ("line 9: data.train[0].path: should have at least 1 character",),
            id="empty path",
        ),
    ],
)  # fmt: skip
def test_config_error_contains_line_and_key(
    folder: Path, train_error: TrainError, old: str, new: str, fragments: tuple[str, ...]
) -> None:
    file = folder / "run.yaml"
    text = file.read_text(encoding="utf-8")
    old = old.replace("MODEL", text.split("name_or_path: ")[1].split("\n")[0])
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    check_message(train_error(), fragments)


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("training.max_steps", ("override 'training.max_steps'", "section.key=value")),
        ("--training.max_steps=3", ("override '--training.max_steps=3'", "section.key=value")),
        ("training.max_step=3", ("override 'training.max_step=3'", "unknown key", "did you mean max_steps?")),
        ("training.learning_rate=fast", ("override 'training.learning_rate=fast'", "valid number, not 'fast'")),
        ("training.max_steps=0", ("override 'training.max_steps=0'", "greater than or equal to 1")),
        ("training={max_steps: 0}", ("override 'training={max_steps: 0}'", "training.max_steps", "not 0")),
        ("adapter.target_modules=[q_proj", ("override 'adapter.target_modules=[q_proj'",)),
        ("data.train=[{path: rows.jsonl, limt: 3}]", ("data.train[0].limt: unknown key", "did you mean limit?")),
        ("data.train[0].path=x.jsonl", ("override 'data.train[0].path=x.jsonl'",)),
        ("data.train=[]", ("override 'data.train=[]': data.train: ", "at least 1 item")),
        ("data.columns={a: b}", ("override 'data.columns={a: b}': data.columns: unknown key",)),
        ("seed=${absent}", ("override 'seed=${absent}': seed: ", "absent")),
        ("data.train=[{limit: 3}]", ("override 'data.train=[{limit: 3}]': data.train[0].path: is missing",)),
    ],
)
def test_override_error_contains_the_override(
    train_error: TrainError, override: str, fragments: tuple[str, ...]
) -> None:
    # An argument that begins with a dash must follow `--`.
    check_message(train_error(*(("--", override) if override.startswith("-") else (override,))), fragments)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        (None, ("absent.yaml: no such file", "--config")),
        ("- a\n- b\n", ("absent.yaml: ", "keys and values", "list")),
        ("output_dir", ("absent.yaml", "output_dir", "model: is missing", "data: is missing")),
        ("", ("output_dir: is missing", "model: is missing", "data: is missing")),
        (b"output_dir: \xff", ("absent.yaml: cannot be read",)),
        ("a: \x00", ("absent.yaml: ", "character")),
        ("#" * 1_000_001, ("absent.yaml: over 1,000,000 bytes",)),
    ],
)
def test_invalid_config_file_is_an_error(
    folder: Path, train_error: TrainError, text: str | bytes | None, fragments: tuple[str, ...]
) -> None:
    if text is not None:
        (folder / "absent.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    check_message(train_error(config="absent.yaml"), fragments)


def test_all_config_errors_are_reported_at_once(train_error: TrainError) -> None:
    message = train_error("adapter.r=0", "training.max_step=3", "data.packing=maybe", "model.dtype=int8")
    check_message(message, ("adapter.r", "training.max_step", "data.packing", "model.dtype"))
    assert len(message.splitlines()) == 4


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("model.name_or_path=./absent", ("model.name_or_path", "./absent", "folder with config.json")),
        ("adapter.target_modules=[no_such]", ("adapter", "no_such", "q_proj", "all-linear")),
        ("output_dir=rows.jsonl", ("output_dir: rows.jsonl is a file", "choose a folder")),
        ("output_dir=.", ("output_dir: . contains other files", "new or empty folder")),
        ("training.mixed_precision=fp8", ("training.mixed_precision", "'auto', 'no', 'bf16' or 'fp16'")),
        ("data.train=[{path: rows.jsonl, format: chat}]", ("format of rows.jsonl: should be", "'sharegpt'")),
        ("model.chat_template=chatmal", ("model.chat_template", "'chatmal'", "did you mean chatml?")),
        ("model.chat_template=absent.jinja", ("model.chat_template: absent.jinja", "no such file")),
        ("model.chat_template=broken.jinja", ("model.chat_template", "line 2", "not valid Jinja")),
        ("model.chat_template=empty.jinja", ("model.chat_template", "empty.jinja", "empty")),
        ("data.eval_fraction=0.95", ("data.eval_fraction=0.95", "no training row")),
        ("checkpoint.resume=absent", ("checkpoint.resume", "absent")),
    ],
)
def test_errors_found_when_the_run_starts(
    folder: Path, train_error: TrainError, override: str, fragments: tuple[str, ...]
) -> None:
    (folder / "broken.jinja").write_text("{% for m in messages %}\n{{ m.content }\n", encoding="utf-8")
    (folder / "empty.jinja").write_text("", encoding="utf-8")
    check_message(train_error(override), fragments)


GOOD_ROW = json.dumps(chat_rows(1)[0])


def turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("row", "fragments"),
    [
        ('{"messages": [', ("rows.jsonl, line 3: not valid JSON", "column ")),
        ('{"messages": []} {}', ("rows.jsonl, line 3: not valid JSON: Extra data at column 18",)),
        ("[1, 2]", ("rows.jsonl, row 3: should be an object, not a list",)),
        ("null", ("rows.jsonl, row 3: should be an object, not null",)),
        ('"text"', ("rows.jsonl, row 3: should be an object, not a str",)),
        ('{"messages": [], "messages": []}', ("rows.jsonl, line 3: key 'messages' appears twice",)),
        ('{"text": "\\ud800"}', ("rows.jsonl, line 3", "surrogate")),
        ("[" * 100_000, ("rows.jsonl, line 3",)),
        (turns(("wizard", "x")), ("rows.jsonl, row 3: messages, message 1: unknown role 'wizard'", "assistant")),
        (turns((["user"], "x")), ("rows.jsonl, row 3: messages, message 1: unknown role ['user']",)),
        (turns((None, "x")), ("row 3: messages, message 1: unknown role None",)),
        ({"messages": [{"from": "human", "value": "x"}]}, ("message 1: key 'role' is missing", "['from', 'value']")),
        (turns(("user", "x"), ("assistant", 7)), ("row 3: messages, message 2: 'content' should be text, not 7",)),
        (turns(("user", None)), ("row 3: messages, message 1: 'content' should be text, not None",)),
        ({"messages": "hello"}, ("rows.jsonl, row 3: key 'messages' should be JSON",)),
        ({"messages": 5}, ("rows.jsonl, row 3: messages should be a list of messages, not a int",)),
        ({"messages": ["hello"]}, ("rows.jsonl, row 3: messages, message 1: should be an object, not a str",)),
        ({"text": "x"}, ("rows.jsonl, row 3: key 'messages' of format messages is missing", "['text']", "columns")),
    ],
)  # fmt: skip
def test_row_error_contains_file_and_line(
    folder: Path, train_error: TrainError, row: Any, fragments: tuple[str, ...]
) -> None:
    # Empty lines count.
    text = row if isinstance(row, str) else json.dumps(row)
    (folder / "rows.jsonl").write_text(f"{GOOD_ROW}\n\n{text}\n{GOOD_ROW}\n", encoding="utf-8")
    check_message(train_error(), fragments)


@pytest.mark.parametrize(
    ("row", "overrides", "fragments"),
    [
        ({"question": "q"}, (), ("row 1: no known format has the keys ['question']", "alpaca: instruction", "columns")),
        ({"text": "x"}, ("format: alpaca",), ("row 1: key 'instruction' of format alpaca is missing", "columns")),
        ({"instruction": 1, "output": "a"}, (), ("row 1: key 'instruction' should be text, not 1",)),
        ({"instruction": "i", "output": "a", "history": 5}, (), ("row 1: ", "history", "not 5")),
        ({"instruction": "i", "output": "a", "history": [["q"]]}, (), ("row 1: history should contain", "not ['q']")),
        ({"prompt": "p", "completion": None}, (), ("row 1: key 'completion' should be text, not None",)),
        ({"text": "x"}, ("columns: {text: body}",), ("row 1: columns maps 'text' to 'body'", "the row has ['text']")),
        ({"messages": []}, (), ("1 of 1 rows cannot be used", "rows.jsonl, row 1: empty conversation")),
        (turns(("user", "x")), (), ("1 of 1 rows", "rows.jsonl, row 1: no assistant turn")),
        (turns(("user", "x"), ("assistant", "  ")), (), ("rows.jsonl, row 1: empty answer",)),
        (turns(("user", "\U00100000"), ("assistant", "a")), (), ("rows.jsonl, row 1", "private use area")),
        ({"text": "   "}, (), ("rows.jsonl, row 1: empty text",)),
        ({"prompt": "p", "completion": ""}, (), ("rows.jsonl, row 1: empty completion",)),
    ],
)  # fmt: skip
def test_unusable_row_is_an_error(
    folder: Path, train_error: TrainError, row: dict[str, Any], overrides: tuple[str, ...], fragments: tuple[str, ...]
) -> None:
    write_jsonl(folder / "rows.jsonl", [row])
    options = ", ".join(("path: rows.jsonl", *overrides))
    check_message(train_error(f"data.train=[{{{options}}}]"), fragments)


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        ("absent.jsonl", None, ("absent.jsonl: no such file", "relative to the working directory")),
        ("a" * 300 + ".jsonl", None, ("aaa.jsonl: cannot be read: File name too long",)),
        ("absent/folder/", None, ("absent/folder/: no such file",)),
        ("rows.md", b"{}", ("rows.md: unknown file type '.md'", ".jsonl", ".parquet")),
        ("empty.jsonl", b"", ("empty.jsonl: has no rows",)),
        ("blank.jsonl", b"\n\n", ("blank.jsonl: has no rows",)),
        ("empty.json", b"", ("empty.json: not valid JSON",)),
        ("none.json", b"[]", ("none.json: has no rows",)),
        ("empty.csv", b"", ("empty.csv: has no rows",)),
        ("rows.json", b'[\n{"text": "a"},\n{"text": \n]', ("rows.json, line 4: not valid JSON", "column 1")),
        ("rows.json", b'[{"text": "a"}, null]', ("rows.json, row 2: should be an object, not null",)),
        ("rows.json", b'{\n"text": "a"\n}', ("rows.json: should be a list of rows, or one object per line",)),
        ("rows.json", b'{"data": {"text": "a"}}', ("rows.json: should be a list of rows",)),
        (
            "latin.jsonl",
            '{"text": "caf\xe9"}'.encode("latin-1"),
            ("latin.jsonl, line 1: not UTF-8 at byte 13", "UTF-8"),
        ),
        ("ragged.csv", b"prompt,completion\na,b\nc\n", ("ragged.csv, row 2", "header", "quotes")),
        ("ragged.csv", b"prompt,completion\na,b,c\n", ("ragged.csv, row 1", "header")),
        ("twice.csv", b"prompt,completion,prompt\na,b,c\n", ("twice.csv", "'prompt'", "twice")),
        ("quote.csv", b'text\n"a\n', ("quote.csv, row 1: not valid CSV",)),
        ("rows.parquet", b"PAR0", ("rows.parquet: not a parquet file",)),
        ("*.ndjson", None, ("*.ndjson: ", "match")),
    ],
)
def test_data_file_error_contains_the_file(
    folder: Path, train_error: TrainError, name: str, content: bytes | None, fragments: tuple[str, ...]
) -> None:
    if content is not None:
        (folder / name).write_bytes(content)
    check_message(train_error(f"data.train=[{{path: '{name}'}}]"), fragments)


def test_parquet_row_error_contains_the_row(folder: Path, train_error: TrainError) -> None:
    pq.write_table(pa.Table.from_pylist([{"text": "a"}, {"text": None}]), folder / "rows.parquet")
    check_message(
        train_error("data.train=[{path: rows.parquet}]"), ("rows.parquet, row 2: key 'text' should be text, not None",)
    )


def test_folder_without_data_files_error_lists_the_known_types(folder: Path, train_error: TrainError) -> None:
    (folder / "nothing").mkdir()
    (folder / "nothing" / "notes.md").write_text("x")
    check_message(train_error("data.train=[{path: nothing}]"), ("nothing: ", ".jsonl", ".parquet"))


def test_invalid_evaluation_data_is_an_error(folder: Path, train_error: TrainError) -> None:
    (folder / "held.jsonl").write_text(f"{GOOD_ROW}\n{{\n", encoding="utf-8")
    check_message(train_error("data.eval=[{path: held.jsonl}]"), ("held.jsonl, line 2: not valid JSON",))


def test_overlong_row_error_contains_its_length_and_the_options(train_error: TrainError) -> None:
    message = train_error("data.overlong=error", "data.max_length=30")
    check_message(message, ("rows.jsonl, row ", " tokens, over data.max_length=30", "data.overlong", "truncate"))


def test_rows_without_supervised_tokens_stop_the_run(train_error: TrainError) -> None:
    message = train_error("data.max_length=4")
    check_message(
        message,
        (
            "6 of 6 rows cannot be used",
            "rows.jsonl, rows 1, 2, 3, 4, 5 and 1 more",
            "no supervised token within data.max_length",
        ),
    )


def test_too_many_dropped_rows_error_lists_rows_and_reasons(folder: Path, train_error: TrainError) -> None:
    write_jsonl(folder / "rows.jsonl", [*chat_rows(17), {"messages": []}, turns(("user", "x")), {"messages": []}])
    message = train_error("data.max_dropped=0.1")
    check_message(message, ("3 of 20 rows cannot be used", "data.max_dropped allows 10.0%"))
    check_message(message, ("rows.jsonl, rows 18, 20: empty conversation", "row 19: no assistant turn"))
    assert main(["--config", "run.yaml", "data.max_dropped=0.15"]) == 0


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (("training.max_step=3",), ("override 'training.max_step=3'", "did you mean max_steps?")),
        (("data.train=[{path: nobody/nothing}]",), ("nobody/nothing: no such file or folder", "Hub")),
        (("model.name_or_path=nobody/nothing",), ("model.name_or_path", "nobody/nothing", "Hub id or a folder")),
    ],
)
def test_process_exits_with_2(folder: Path, overrides: tuple[str, ...], fragments: tuple[str, ...]) -> None:
    run = f"output_dir={folder / 'run'}"
    # In a new process, since huggingface_hub reads HF_HUB_OFFLINE at import.
    process = run_module("lora_accel.train", "--config", folder / "run.yaml", *overrides, run, fresh=True)
    assert process.returncode == 2
    # On a slow machine, progress messages come before it.
    assert len(re.findall("^error: ", process.stderr, re.MULTILINE)) == 1
    assert "Traceback" not in process.stderr
    check_message(process.stderr, fragments)
    assert not (folder / "run").exists()


def test_process_reports_the_line_of_an_invalid_row(folder: Path) -> None:
    (folder / "rows.jsonl").write_text(f"{GOOD_ROW}\n{{\n", encoding="utf-8")
    overrides = (f"data.train=[{{path: {folder / 'rows.jsonl'}}}]", f"output_dir={folder / 'run'}")
    process = run_module("lora_accel.train", "--config", folder / "run.yaml", *overrides)
    assert (process.returncode, process.stderr.count("error: ")) == (2, 1)
    assert "rows.jsonl, line 2: not valid JSON" in process.stderr
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("logging.trackers=[tensorbord]", ("logging.trackers", "tensorbord", "did you mean tensorboard")),
        ("output_dir=rows.jsonl/run", ("output_dir", "rows.jsonl is a file")),
        ("model.attention=nothing", ("model.attention", "nothing", "auto")),
        ("model.name_or_path=./absent", ("model.name_or_path", "./absent", "no such folder")),
    ],
)
def test_library_errors_are_reported_before_anything_is_written(
    train_error: TrainError, override: str, fragments: tuple[str, ...]
) -> None:
    check_message(train_error(override), fragments)


def test_prompt_that_the_template_rejects_is_reported_before_the_model_loads(
    train_error: TrainError, folder: Path
) -> None:
    (folder / "strict.jinja").write_text(
        "{% for m in messages %}{% if loop.first and m['role'] == 'user' %}{{ raise_exception('system first') }}"
        "{% endif %}{{ m['content'] }}{% endfor %}"
    )
    rows = [{"messages": [{"role": "system", "content": "s"}, *row["messages"]]} for row in chat_rows(6)]
    write_jsonl(folder / "rows.jsonl", rows)
    message = train_error("model.chat_template=strict.jinja", "evaluation.prompts=[hello]")
    assert "system first" in message
