"""What is wrong is said once, with its place and the way out: exit 2, no traceback, nothing written."""

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
logging: {trackers: []}
"""

Refuse = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder a run starts in, with a good config and good rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG.replace("MODEL", str(tiny_model())), encoding="utf-8")
    write_jsonl(tmp_path / "rows.jsonl", chat_rows(6))
    return tmp_path


@pytest.fixture
def refuse(folder: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run the training command on what must not work, and return what it says on stderr."""

    def attempt(*overrides: str, config: str = "run.yaml") -> str:
        before = contents(folder)
        code = main(["--config", config, *overrides])
        said = capsys.readouterr().err
        assert code == 2
        assert said.startswith("error: ")
        assert said.count("error: ") == 1
        assert "Traceback" not in said
        assert not (folder / "run").exists()
        assert contents(folder) == before
        return said

    return attempt


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def names_all(said: str, bits: tuple[str, ...]) -> None:
    for bit in bits:
        assert bit in said


def test_the_good_input_works(folder: Path) -> None:
    assert main(["--config", "run.yaml"]) == 0
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("old", "new", "bits"),
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
        pytest.param("seed: 0", "seed: ???", ("run.yaml, line 2: seed: is ???", "give one"), id="mandatory value"),
        pytest.param(
            "batch_size: 4", "batch_size: 4\n  micro_batch_size: 2",
            ("line 11: training: ", "batch_size and micro_batch_size", "keep one"), id="both habits",
        ),
        pytest.param(
            "batch_size: 4", "gradient_accumulation_steps: 2",
            ("line 11: training: ", "gradient_accumulation_steps goes with micro_batch_size"), id="half a habit",
        ),
        pytest.param("batch_size: 4", "batch_size: null", ("line 11: training: batch_size is null",), id="no habit"),
        pytest.param(
            "max_length: 200", "eval: [{path: rows.jsonl}]\n  eval_fraction: 0.1",
            ("line 8: data: give eval or eval_fraction, not both",), id="two ways to evaluate",
        ),
        pytest.param(
            "seed: 0", "evaluation: {every_steps: 2}",
            ("run.yaml: evaluation.every_steps has nothing to evaluate", "add data.eval"), id="nothing to evaluate",
        ),
        pytest.param(
            "seed: 0", "quantization: {bits: 4}\nmodel.dtype: x", ("line 3: model.dtype: unknown key",), id="dotted key"
        ),
        pytest.param(
            "  max_steps: 1", "  scheduler: cosin",
            ("line 12: training.scheduler: should be 'cosine', 'linear' or 'constant', not 'cosin'",), id="word",
        ),
        pytest.param("training:\n", "training: 3\nlogging2:\n", ("line 11: training: should be", "not 3"), id="value"),
        pytest.param("all-linear", "'(['", ("line 7: adapter.target_modules: '(['", "list of names"), id="expression"),
        pytest.param("seed: 0", "5: 0", ("run.yaml", "5"), id="number as key"),
        pytest.param("all-linear", "[]", ("line 7: adapter.target_modules: names no module",), id="no names"),
        pytest.param(
            "path: rows.jsonl", "path: ''", ("line 9: data.train[0].path: should have at least 1 character",),
            id="empty path",
        ),
    ],
)  # fmt: skip
def test_a_wrong_config_names_line_and_key(
    folder: Path, refuse: Refuse, old: str, new: str, bits: tuple[str, ...]
) -> None:
    file = folder / "run.yaml"
    text = file.read_text(encoding="utf-8")
    old = old.replace("MODEL", text.split("name_or_path: ")[1].split("\n")[0])
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    names_all(refuse(), bits)


@pytest.mark.parametrize(
    ("override", "bits"),
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
def test_a_wrong_override_is_repeated(refuse: Refuse, override: str, bits: tuple[str, ...]) -> None:
    # argparse wants a word that begins with a dash behind `--`.
    names_all(refuse(*(("--", override) if override.startswith("-") else (override,))), bits)


@pytest.mark.parametrize(
    ("text", "bits"),
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
def test_a_file_that_is_no_config(
    folder: Path, refuse: Refuse, text: str | bytes | None, bits: tuple[str, ...]
) -> None:
    if text is not None:
        (folder / "absent.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    names_all(refuse(config="absent.yaml"), bits)


def test_all_problems_are_reported_at_once(refuse: Refuse) -> None:
    said = refuse("adapter.r=0", "training.max_step=3", "data.packing=maybe", "model.dtype=int8")
    names_all(said, ("adapter.r", "training.max_step", "data.packing", "model.dtype"))
    assert len(said.splitlines()) == 4


@pytest.mark.parametrize(
    ("override", "bits"),
    [
        ("model.name_or_path=./absent", ("model.name_or_path", "./absent", "folder with config.json")),
        ("adapter.target_modules=[no_such]", ("adapter", "no_such", "q_proj", "all-linear")),
        ("output_dir=rows.jsonl", ("output_dir: rows.jsonl is a file", "name a folder")),
        ("output_dir=.", ("output_dir: . holds other things", "new or empty folder")),
        ("training.mixed_precision=fp8", ("training.mixed_precision", "'auto', 'no', 'bf16' or 'fp16'")),
        ("model.chat_template=chatmal", ("model.chat_template", "'chatmal'", "did you mean chatml?")),
        ("model.chat_template=absent.jinja", ("model.chat_template: absent.jinja", "no such file")),
        ("model.chat_template=broken.jinja", ("model.chat_template", "line 2", "not valid Jinja")),
        ("model.chat_template=empty.jinja", ("model.chat_template", "empty.jinja", "empty")),
        ("data.eval_fraction=0.95", ("data.eval_fraction=0.95", "no training example")),
        ("checkpoint.resume=absent", ("checkpoint.resume", "absent")),
    ],
)
def test_what_only_a_run_can_find_out(folder: Path, refuse: Refuse, override: str, bits: tuple[str, ...]) -> None:
    (folder / "broken.jinja").write_text("{% for m in messages %}\n{{ m.content }\n", encoding="utf-8")
    (folder / "empty.jinja").write_text("", encoding="utf-8")
    names_all(refuse(override), bits)


GOOD_ROW = json.dumps(chat_rows(1)[0])


def turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("row", "bits"),
    [
        ('{"messages": [', ("rows.jsonl, line 3: not valid JSON", "column ")),
        ('{"messages": []} {}', ("rows.jsonl, line 3: not valid JSON: Extra data at column 18",)),
        ("[1, 2]", ("rows.jsonl, row 3: should be an object, not a list",)),
        ("null", ("rows.jsonl, row 3: should be an object, not null",)),
        ('"text"', ("rows.jsonl, row 3: should be an object, not a str",)),
        ('{"messages": [], "messages": []}', ("rows.jsonl, line 3: key 'messages' stands twice",)),
        ('{"text": "\\ud800"}', ("rows.jsonl, line 3", "surrogate")),
        ("[" * 100_000, ("rows.jsonl, line 3",)),
        (turns(("wizard", "x")), ("rows.jsonl, row 3: messages, message 1: unknown role 'wizard'", "assistant")),
        (turns((["user"], "x")), ("rows.jsonl, row 3: messages, message 1: unknown role ['user']",)),
        (turns((None, "x")), ("row 3: messages, message 1: unknown role None",)),
        ({"messages": [{"from": "human", "value": "x"}]}, ("message 1: key 'role' is missing", "['from', 'value']")),
        (turns(("user", "x"), ("assistant", 7)), ("row 3: messages, message 2: 'content' should be text, not 7",)),
        (turns(("user", None)), ("row 3: messages, message 1: 'content' should be text, not None",)),
        ({"messages": "hello"}, ("rows.jsonl, row 3: messages should be a list of messages, not a str",)),
        ({"messages": ["hello"]}, ("rows.jsonl, row 3: messages, message 1: should be an object, not a str",)),
        ({"text": "x"}, ("rows.jsonl, row 3: key 'messages' of format messages is missing", "['text']", "columns")),
    ],
)  # fmt: skip
def test_a_wrong_row_names_file_and_line(folder: Path, refuse: Refuse, row: Any, bits: tuple[str, ...]) -> None:
    # An empty line counts as a line.
    text = row if isinstance(row, str) else json.dumps(row)
    (folder / "rows.jsonl").write_text(f"{GOOD_ROW}\n\n{text}\n{GOOD_ROW}\n", encoding="utf-8")
    names_all(refuse(), bits)


@pytest.mark.parametrize(
    ("row", "overrides", "bits"),
    [
        ({"question": "q"}, (), ("row 1: no known format has the keys ['question']", "alpaca: instruction", "columns")),
        ({"text": "x"}, ("format: alpaca",), ("row 1: key 'instruction' of format alpaca is missing", "columns")),
        ({"instruction": 1, "output": "a"}, (), ("row 1: key 'instruction' should be text, not 1",)),
        ({"instruction": "i", "output": "a", "history": 5}, (), ("row 1: ", "history", "not 5")),
        ({"instruction": "i", "output": "a", "history": [["q"]]}, (), ("row 1: history should hold", "not ['q']")),
        ({"prompt": "p", "completion": None}, (), ("row 1: key 'completion' should be text, not None",)),
        ({"text": "x"}, ("columns: {text: body}",), ("row 1: columns maps 'text' to 'body'", "it has ['text']")),
        ({"messages": []}, (), ("1 of 1 rows cannot be used", "rows.jsonl, row 1: empty conversation")),
        (turns(("user", "x")), (), ("1 of 1 rows", "rows.jsonl, row 1: no assistant turn")),
        (turns(("user", "x"), ("assistant", "  ")), (), ("rows.jsonl, row 1: no assistant turn",)),
        (turns(("user", "\U00100000"), ("assistant", "a")), (), ("rows.jsonl, row 1", "private use area")),
        ({"text": "   "}, (), ("rows.jsonl, row 1: empty text",)),
        ({"prompt": "p", "completion": ""}, (), ("rows.jsonl, row 1: empty completion",)),
    ],
)  # fmt: skip
def test_a_row_that_no_format_can_use(
    folder: Path, refuse: Refuse, row: dict[str, Any], overrides: tuple[str, ...], bits: tuple[str, ...]
) -> None:
    write_jsonl(folder / "rows.jsonl", [row])
    options = ", ".join(("path: rows.jsonl", *overrides))
    names_all(refuse(f"data.train=[{{{options}}}]"), bits)


@pytest.mark.parametrize(
    ("name", "content", "bits"),
    [
        ("absent.jsonl", None, ("absent.jsonl: no such file", "the folder the command runs in")),
        ("a" * 300 + ".jsonl", None, ("aaa.jsonl: cannot be read: File name too long",)),
        ("absent/folder/", None, ("absent/folder/: no such file",)),
        ("rows.md", b"{}", ("rows.md: unknown file type '.md'", ".jsonl", ".parquet")),
        ("empty.jsonl", b"", ("empty.jsonl: holds no rows",)),
        ("blank.jsonl", b"\n\n", ("blank.jsonl: holds no rows",)),
        ("empty.json", b"", ("empty.json: not valid JSON",)),
        ("none.json", b"[]", ("none.json: holds no rows",)),
        ("empty.csv", b"", ("empty.csv: holds no rows",)),
        ("rows.json", b'[\n{"text": "a"},\n{"text": \n]', ("rows.json, line 4: not valid JSON", "column 1")),
        ("rows.json", b'[{"text": "a"}, null]', ("rows.json, row 2: should be an object, not null",)),
        ("rows.json", b'{"text": "a"}', ("rows.json: should be a list of rows", ".jsonl")),
        ("rows.json", b'{"data": {"text": "a"}}', ("rows.json: should be a list of rows",)),
        (
            "latin.jsonl",
            '{"text": "caf\xe9"}'.encode("latin-1"),
            ("latin.jsonl, line 1: not UTF-8 at byte 13", "UTF-8"),
        ),
        ("ragged.csv", b"prompt,completion\na,b\nc\n", ("ragged.csv, row 2", "heading", "quotes")),
        ("ragged.csv", b"prompt,completion\na,b,c\n", ("ragged.csv, row 1", "heading")),
        ("twice.csv", b"prompt,completion,prompt\na,b,c\n", ("twice.csv", "'prompt'", "twice")),
        ("quote.csv", b'text\n"a\n', ("quote.csv, row 1: not valid CSV",)),
        ("rows.parquet", b"PAR0", ("rows.parquet: not a parquet file",)),
        ("*.ndjson", None, ("*.ndjson: ", "match")),
    ],
)
def test_a_wrong_file_names_itself(
    folder: Path, refuse: Refuse, name: str, content: bytes | None, bits: tuple[str, ...]
) -> None:
    if content is not None:
        (folder / name).write_bytes(content)
    names_all(refuse(f"data.train=[{{path: '{name}'}}]"), bits)


def test_a_wrong_row_in_parquet_names_the_row(folder: Path, refuse: Refuse) -> None:
    pq.write_table(pa.Table.from_pylist([{"text": "a"}, {"text": None}]), folder / "rows.parquet")
    names_all(
        refuse("data.train=[{path: rows.parquet}]"), ("rows.parquet, row 2: key 'text' should be text, not None",)
    )


def test_an_empty_folder_names_the_types_it_looked_for(folder: Path, refuse: Refuse) -> None:
    (folder / "nothing").mkdir()
    (folder / "nothing" / "notes.md").write_text("x")
    names_all(refuse("data.train=[{path: nothing}]"), ("nothing: ", ".jsonl", ".parquet"))


def test_wrong_evaluation_data_is_refused_too(folder: Path, refuse: Refuse) -> None:
    (folder / "held.jsonl").write_text(f"{GOOD_ROW}\n{{\n", encoding="utf-8")
    names_all(refuse("data.eval=[{path: held.jsonl}]"), ("held.jsonl, line 2: not valid JSON",))


def test_a_row_too_long_says_how_long_and_what_to_do(refuse: Refuse) -> None:
    said = refuse("data.overlong=error", "data.max_length=30")
    names_all(said, ("rows.jsonl, row ", " tokens, over data.max_length=30", "data.overlong", "truncate"))


def test_rows_with_nothing_left_to_learn_stop_the_run(refuse: Refuse) -> None:
    said = refuse("data.max_length=4")
    names_all(
        said,
        (
            "6 of 6 rows cannot be used",
            "rows.jsonl, rows 1, 2, 3, 4, 5 and 1 more",
            "no supervised token within data.max_length",
        ),
    )


def test_more_dropped_than_allowed_names_rows_and_reasons(folder: Path, refuse: Refuse) -> None:
    write_jsonl(folder / "rows.jsonl", [*chat_rows(17), {"messages": []}, turns(("user", "x")), {"messages": []}])
    said = refuse("data.max_dropped=0.1")
    names_all(said, ("3 of 20 rows cannot be used", "data.max_dropped allows 10.0%"))
    names_all(said, ("rows.jsonl, rows 18, 20: empty conversation", "row 19: no assistant turn"))
    assert main(["--config", "run.yaml", "data.max_dropped=0.15"]) == 0


@pytest.mark.parametrize(
    ("words", "bits"),
    [
        (("training.max_step=3",), ("override 'training.max_step=3'", "did you mean max_steps?")),
        (("data.train=[{path: nobody/nothing}]",), ("nobody/nothing: no such file or folder", "Hub")),
        (("model.name_or_path=nobody/nothing",), ("model.name_or_path", "nobody/nothing", "Hub id or a folder")),
    ],
)
def test_the_process_exits_with_2(folder: Path, words: tuple[str, ...], bits: tuple[str, ...]) -> None:
    run = f"output_dir={folder / 'run'}"
    # In a process of its own, since the Hub's library reads at import that it is to stay offline.
    ended = run_module("lora_accel.train", "--config", folder / "run.yaml", *words, run, fresh=True)
    assert ended.returncode == 2
    # On a slow machine lines of stages come before it.
    assert len(re.findall("^error: ", ended.stderr, re.MULTILINE)) == 1
    assert "Traceback" not in ended.stderr
    names_all(ended.stderr, bits)
    assert not (folder / "run").exists()


def test_the_process_names_the_line_of_a_broken_row(folder: Path) -> None:
    (folder / "rows.jsonl").write_text(f"{GOOD_ROW}\n{{\n", encoding="utf-8")
    words = (f"data.train=[{{path: {folder / 'rows.jsonl'}}}]", f"output_dir={folder / 'run'}")
    ended = run_module("lora_accel.train", "--config", folder / "run.yaml", *words)
    assert (ended.returncode, ended.stderr.count("error: ")) == (2, 1)
    assert "rows.jsonl, line 2: not valid JSON" in ended.stderr
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("logging.trackers=[tensorbord]", ["logging.trackers", "tensorbord", "did you mean tensorboard"]),
        ("output_dir=rows.jsonl/run", ["output_dir", "rows.jsonl is a file"]),
        ("model.attention=nothing", ["model.attention", "nothing", "auto"]),
        ("model.name_or_path=./absent", ["model.name_or_path", "./absent", "no such folder"]),
    ],
)
def test_what_only_the_libraries_know_is_said_before_anything_is_written(
    refuse: Refuse, override: str, named: list[str]
) -> None:
    said = refuse(override)
    assert all(bit in said for bit in named), said


def test_a_prompt_that_the_template_refuses_is_said_before_the_model_loads(refuse: Refuse, folder: Path) -> None:
    (folder / "strict.jinja").write_text(
        "{% for m in messages %}{% if loop.first and m['role'] == 'user' %}{{ raise_exception('system first') }}"
        "{% endif %}{{ m['content'] }}{% endfor %}"
    )
    rows = [{"messages": [{"role": "system", "content": "s"}, *row["messages"]]} for row in chat_rows(6)]
    write_jsonl(folder / "rows.jsonl", rows)
    said = refuse("model.chat_template=strict.jinja", "evaluation.prompts=[hello]")
    assert "system first" in said
