"""The neutral text: every token but the first of a window is supervised, and a file that cannot be used is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lora_accel import RunConfig, run_training
from lora_accel.errors import ConfigError
from lora_accel.setup.data import prepare_data
from lora_accel.setup.neutral import MAX_BYTES
from tests.conftest import read_metrics


def test_windows_cover_the_text(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    text = "hello world the answer is one two three " * 60
    (tmp_path / "neutral.txt").write_text(text)
    data = prepare_data(make_config(evaluation={"neutral": str(tmp_path / "neutral.txt")}, data={"max_length": 100}))
    tokenizer = data.template.tokenizer
    assert [len(example.input_ids) for example in data.neutral[:-1]] == [100] * (len(data.neutral) - 1)
    assert tokenizer.decode([token for example in data.neutral for token in example.input_ids]) == text
    assert all(example.labels == [-100, *example.input_ids[1:]] for example in data.neutral)
    built_in = prepare_data(make_config(evaluation={"neutral": "auto"})).neutral
    assert tokenizer.decode(built_in[0].input_ids).startswith("The river rises in a narrow valley")
    assert prepare_data(make_config()).neutral == []


def test_neutral_text_needs_no_evaluation_rows(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    (tmp_path / "neutral.txt").write_text("hello world")
    evaluation = {"neutral": str(tmp_path / "neutral.txt"), "every_steps": 1}
    run_training(make_config(evaluation=evaluation, training={"max_steps": 2}))
    lines = read_metrics(tmp_path / "run", "eval")
    assert [set(line) for line in lines] == [{"kind", "step", "fingerprint", "eval_neutral_loss"}] * len(lines)
    assert lines[-1]["eval_neutral_loss"] != lines[-2]["eval_neutral_loss"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("neutral.json", b"{}", "should be auto, or a .txt file"),
        ("missing.txt", None, "cannot be read: No such file"),
        ("latin.txt", b"abc\xe9", "not UTF-8 at byte 3; save it as UTF-8"),
        ("empty.txt", b"", "has no text; use a longer one"),
        ("large.txt", b"a" * (MAX_BYTES + 1), "over 1,000,000 bytes"),
    ],
)
def test_files_that_cannot_be_used(
    make_config: Callable[..., RunConfig], tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        prepare_data(make_config(evaluation={"neutral": str(path)}))
    assert str(caught.value).startswith(f"evaluation.neutral: {path}: ")
