"""What a run logs about its data before the model is loaded: shares of the sources, and notes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lora_accel import RunConfig
from lora_accel.config.schema import DataSection
from lora_accel.data.audit import SPLIT, TRUNCATED, USED, SourceLedger
from lora_accel.data.records import Message
from lora_accel.setup.data import end_notes, log_data, prepare_data, raw_notes
from tests.conftest import chat_rows, write_jsonl


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[RunConfig], str]:
    """Return a function that returns what is logged about a config's data."""
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks in tables

    def run(config: RunConfig) -> str:
        capsys.readouterr()
        log_data(config, prepare_data(config))
        return capsys.readouterr().out

    return run


def test_each_source_has_its_own_name_in_the_table_of_an_epoch(
    make_config: Callable[..., RunConfig], tmp_path: Path, log: Callable[[RunConfig], str]
) -> None:
    """Also if all rows of a source are held out."""
    sizes = {"a": (1, 1.0), "b": (3, 2.0), "c": (4, 3.0)}
    sources = [
        {"path": str(write_jsonl(tmp_path / f"{name}.jsonl", chat_rows(size))), "weight": weight}
        for name, (size, weight) in sizes.items()
    ]
    held_out = set()
    for seed in range(20):
        config = make_config(data={"train": sources, "eval_fraction": 0.14}, seed=seed)  # one row of eight
        data = prepare_data(config)
        lines = log(config).split("examples per epoch")[1].split("plan")[0].splitlines()
        for (name, (size, weight)), source in zip(sizes.items(), data.sources, strict=True):
            (line,) = [line for line in lines if f"{name}.jsonl" in line]
            kept = len(source.examples)
            assert Path(source.path).stem == name
            if kept:
                assert f"{kept * weight:g} of {kept} examples (weight {weight:g})" in line
            else:
                assert "0 (data.eval_fraction holds out all its rows)" in line
            held_out.update({name} if kept < size else ())
        assert data.plan.num_examples == sum(len(x.examples) * x.weight for x in data.sources)
        assert all(len(source.examples) for source in data.dataset.sources)
    assert held_out == {"a", "b", "c"}


def test_truncation_is_not_blamed_on_the_template(
    make_config: Callable[..., RunConfig], tmp_path: Path, log: Callable[[RunConfig], str]
) -> None:
    messages = [{"role": "user", "content": "repeat"}, {"role": "assistant", "content": "one two three " * 50}]
    rows = write_jsonl(tmp_path / "long.jsonl", [{"messages": messages}] * 3)
    data: dict[str, Any] = {"train": [{"path": str(rows)}], "max_length": 40}
    output = log(make_config(data=data))
    assert (
        "note: long.jsonl: no example keeps the end of an answer: all are truncated at data.max_length=40; raise it, "
        "or set data.overlong=split\n" in output
    )
    assert "% of the tokens are cut off at data.max_length (raise it, or set data.overlong: split); messages" in output
    assert "special token" not in output
    output = log(make_config(data=data | {"overlong": "split"}))
    assert "all are truncated at data.max_length=40; raise it\n" in output, "one answer cannot be split"
    assert "note: " not in log(make_config(data=data | {"max_length": 1000}))


def test_without_an_end_token_the_note_names_what_lacks_it(
    make_config: Callable[..., RunConfig],
    tiny_model: Callable[..., Path],
    tokenizer_factory: Callable[..., PreTrainedTokenizerFast],
    tmp_path: Path,
    log: Callable[[RunConfig], str],
) -> None:
    shutil.copytree(tiny_model(), tmp_path / "model")
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer_factory(eos_token=None, chat_template=template).save_pretrained(tmp_path / "model")
    model = {"name_or_path": str(tmp_path / "model")}
    output = log(make_config(model=model))
    assert "note: rows.jsonl: the chat template ends a turn without a special token" in output
    assert "max_length" not in output
    rows = write_jsonl(tmp_path / "completions.jsonl", [{"prompt": "one ", "completion": "two"}])
    output = log(make_config(model=model, data={"train": [{"path": str(rows)}]}))
    assert "note: completions.jsonl: the tokenizer has no end token (eos_token)" in output
    assert "note: rows are trained without a chat template" in output


def ledger_of(rows_by_bucket: dict[str, int], data_format: str = "messages", **counts: Any) -> SourceLedger:
    ledger = SourceLedger("rows.jsonl", data_format, **counts)
    for number, (bucket, num_rows) in enumerate(rows_by_bucket.items()):
        for row in range(num_rows):
            ledger.count(("rows.jsonl", 100 * number + row), bucket, [10], [5])
    return ledger


TRUNCATION, TEMPLATE, TOKENIZER = "truncated at data.max_length=64", "the chat template ends", "no end token"


@pytest.mark.parametrize(
    ("ledger", "reason"),
    [
        (ledger_of({USED: 2}, num_ended=2), None),
        (ledger_of({TRUNCATED: 2}, num_cut_tokens=9), TRUNCATION),
        (ledger_of({TRUNCATED: 2, "dropped:reason": 1}, num_cut_tokens=9), TRUNCATION),
        (ledger_of({SPLIT: 1, TRUNCATED: 1}, num_cut_tokens=9), TRUNCATION),
        (ledger_of({TRUNCATED: 2}, num_cut_tokens=9, num_ended=1), None),
        (ledger_of({SPLIT: 2}), TEMPLATE),
        (ledger_of({USED: 2}), TEMPLATE),
        (ledger_of({USED: 1, TRUNCATED: 5}, num_cut_tokens=9), TEMPLATE),  # a complete row has no end either
        (ledger_of({USED: 2}, "prompt_completion", num_raw=2), TOKENIZER),
        (ledger_of({USED: 2}, "prompt_completion", num_raw=1), TEMPLATE),
        (ledger_of({TRUNCATED: 2}, "prompt_completion", num_raw=2, num_cut_tokens=9), TRUNCATION),
        (ledger_of({USED: 2}, "text", num_raw=2), None),
        (ledger_of({TRUNCATED: 2}, "tokens", num_raw=2, num_cut_tokens=9), None),
    ],
)
def test_the_reason_why_no_end_is_supervised(ledger: SourceLedger, reason: str | None) -> None:
    options = DataSection.model_validate({"train": [{"path": "rows.jsonl"}], "max_length": 64})
    notes = end_notes([ledger_of({USED: 1}, num_ended=1), ledger], options)
    assert len(notes) == (reason is not None)
    if reason is not None:
        assert reason in notes[0]
        assert ("overlong" in notes[0]) == (reason == TRUNCATION and not ledger.num_raw)


@pytest.mark.parametrize(
    ("num_raw", "expected"),
    [
        ((0, 0), []),
        ((2, 3), ["rows are trained without a chat template: generate and chat pass prompts without it too"]),
        ((2, 0), ["2 of 5 examples are trained without a chat template, but generate and chat apply it (--raw"]),
        ((1, 3), ["4 of 5 examples are trained without a chat template"]),
    ],
)
def test_rows_without_a_template_are_noted(num_raw: tuple[int, int], expected: list[str]) -> None:
    notes = raw_notes([ledger_of({USED: 2}, num_raw=num_raw[0]), ledger_of({USED: 3}, num_raw=num_raw[1])])
    assert [note.startswith(text) for note, text in zip(notes, expected, strict=True)] == [True] * len(expected)


def test_prompts_are_passed_as_the_rows_are_trained(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    completions = write_jsonl(tmp_path / "completions.jsonl", [{"prompt": "one ", "completion": "two"}])
    chats = write_jsonl(tmp_path / "chats.jsonl", chat_rows(2))
    for paths, is_raw in (([completions], True), ([completions, chats], False)):
        data = prepare_data(
            make_config(data={"train": [{"path": str(path)} for path in paths]}, evaluation={"prompts": ["one "]})
        )
        template = data.template
        raw, rendered = template.encode_text("one "), template.encode_prompt((Message("user", "one "),))
        assert data.prompts == [raw if is_raw else rendered]
