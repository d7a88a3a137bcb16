"""Console output: short names, durations, tables and long stages."""

from __future__ import annotations

import io
import sys
import time

import pytest

from lora_accel import console
from lora_accel.console import NAME_WIDTH, Stage, format_seconds, print_table, short_names, shorten


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["rows.jsonl"], ["rows.jsonl"]),
        (["recipes/data/train.jsonl"], ["recipes/data/train.jsonl"]),
        (["/a/very/long/path/to/the/rows/of/this/run/train.jsonl"], ["train.jsonl"]),
        (
            ["/a/very/long/path/to/the/one/train.jsonl", "/a/very/long/path/to/the/two/train.jsonl"],
            ["one/train.jsonl", "two/train.jsonl"],
        ),
        (["/a/very/long/path/to/rows/of/x.jsonl"] * 2, ["x.jsonl"] * 2),
        (["/rows/" + "x" * 40 + "-train.jsonl"], ["x" * 16 + "…" + "xxx-train.jsonl"]),
        ([], []),
    ],
)
def test_short_names_are_short_and_unique(paths: list[str], names: list[str]) -> None:
    assert short_names(paths) == names
    assert all(len(name) <= NAME_WIDTH for name in names)


@pytest.mark.parametrize("width", range(1, 12))
def test_shorten_returns_text_of_the_given_width(width: int) -> None:
    assert len(shorten("abcdefghij", width)) == min(width, 10)


def test_a_name_is_not_wrapped_in_a_table_of_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "x" * NAME_WIDTH
    print_table("data", [(name, "many words " * 20), ("short", "value")])
    lines = capsys.readouterr().out.splitlines()
    assert sum(name in line for line in lines) == 1
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (3.21, "3.2 s"),
        (9.96, "10 s"),
        (59.6, "1 min 0 s"),
        (26, "26 s"),
        (200, "3 min 20 s"),
        (4680, "1 h 18 min"),
        (7199, "2 h 0 min"),
        (183_600, "2 d 3 h"),
    ],
)
def test_durations_have_at_most_two_units(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _short_quiet_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "QUIET_SECONDS", 0.01)


def wait_for(stream: io.StringIO, text: str) -> None:
    """Wait until a stream contains a text."""
    deadline = time.monotonic() + 60
    while text not in stream.getvalue():
        assert time.monotonic() < deadline, stream.getvalue()
        time.sleep(0.01)


def test_a_long_stage_prints_one_line_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Stage("loading a model"):
        wait_for(sys.stderr, "\n")  # type: ignore[arg-type]
    assert sys.stderr.getvalue() == "loading a model\n"  # type: ignore[attr-defined]


def test_a_terminal_shows_a_stage_with_its_count_and_clears_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Stage("tokenizing rows.jsonl") as stage:
        stage.note("12 rows")
        wait_for(sys.stderr, "rows.jsonl 12 rows … ")  # type: ignore[arg-type]
    output = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert output.endswith(console.CLEAR_LINE)
    assert "\n" not in output


def test_a_table_clears_the_line_of_a_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Stage("starting"):
        wait_for(sys.stderr, "starting")  # type: ignore[arg-type]
        before = sys.stderr.getvalue()  # type: ignore[attr-defined]
        print_table("title", [("a", "b")])
        assert console.CLEAR_LINE in sys.stderr.getvalue()[len(before) :]  # type: ignore[attr-defined]


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_an_error_ends_a_stage_at_once(monkeypatch: pytest.MonkeyPatch, enabled: bool, error: BaseException) -> None:
    monkeypatch.setattr(console, "QUIET_SECONDS", 600)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(type(error)), Stage("loading", enabled=enabled):
        raise error
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_a_disabled_stage_prints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Stage("loading", enabled=False):
        time.sleep(0.2)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
