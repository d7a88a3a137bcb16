"""metrics.jsonl is truncated when a run resumes; the progress bar and the estimate of the remaining time."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_accel.config.plan import Plan, make_plan
from lora_accel.config.schema import RunConfig
from lora_accel.training import metrics
from lora_accel.training.metrics import (
    Bar,
    Pace,
    format_clock,
    format_step_estimate,
    peak_memory_bytes,
    truncate_log,
)


@pytest.fixture
def plan_of() -> Callable[[int], Plan]:
    """Return a function that makes a plan with a number of steps."""

    def plan(total_steps: int) -> Plan:
        config = RunConfig.model_validate(
            {
                "output_dir": "x",
                "model": {"name_or_path": "x"},
                "data": {"train": [{"path": "x"}]},
                "training": {"max_steps": total_steps},
            }
        )
        return make_plan(config, num_ranks=1, num_examples=16, num_tokens=160, num_supervised_tokens=80)

    return plan


def line(step: int, kind: str = "train", **values: object) -> str:
    return json.dumps({"kind": kind, "step": step, **values}) + "\n"


@pytest.mark.parametrize(
    ("text", "step", "kept"),
    [
        (line(1) + line(2) + line(3), 2, line(1) + line(2)),
        (line(1) + line(2), 9, line(1) + line(2)),
        (line(1) + line(2), 0, ""),
        (line(0, "event") + line(1) + line(1, "eval") + line(2), 1, line(0, "event") + line(1) + line(1, "eval")),
        (line(1) + line(2)[:-9], 5, line(1)),
        (line(1) + line(2).rstrip("\n"), 5, line(1) + line(2)),
        (line(1) + '{"kind"\n' + line(2), 5, line(1) + line(2)),
        (line(1, text="é \u2028 ü") + line(2), 1, line(1, text="é \u2028 ü")),
        ("", 3, ""),
    ],
    ids=["later", "all", "none", "kinds", "incomplete", "no newline", "invalid line", "unicode", "empty"],
)
def test_later_and_incomplete_lines_are_removed(tmp_path: Path, text: str, step: int, kept: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text, encoding="utf-8")
    truncate_log(path, step)
    assert path.read_text(encoding="utf-8") == kept
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_reply_with_a_line_separator_is_one_line(tmp_path: Path) -> None:
    """JSON allows U+2028 in strings, but str.splitlines() would split there."""
    path = tmp_path / "metrics.jsonl"
    text = json.dumps({"kind": "event", "step": 1, "reply": "a\u2028b\x85c"}, ensure_ascii=False) + "\n"
    path.write_text(text + line(2), encoding="utf-8")
    truncate_log(path, 1)
    assert path.read_text(encoding="utf-8") == text


def test_incomplete_character_does_not_prevent_resuming(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((line(1) + '{"kind": "event", "step": 2, "reply": "').encode() + "é".encode()[:1])
    truncate_log(path, 5)
    assert path.read_text(encoding="utf-8") == line(1)


@pytest.mark.parametrize("drop_evaluation", [False, True])
def test_drop_evaluation_removes_only_the_evaluation_of_the_step(tmp_path: Path, drop_evaluation: bool) -> None:
    path = tmp_path / "metrics.jsonl"
    before = [
        line(0, "event", event="start"),
        line(2, "eval"),
        line(2, "event", event="reply"),
        line(3),
        line(4),
        line(4, "event", event="skipped"),
        line(4, "event", event="stopped"),
    ]
    evaluation = [line(4, "eval"), line(4, "event", event="reply"), line(4, "event", event="reply")]
    path.write_text("".join([*before, *evaluation, line(5), line(6, "eval")]))
    truncate_log(path, 4, drop_evaluation=drop_evaluation)
    assert path.read_text() == "".join(before if drop_evaluation else before + evaluation)


@pytest.mark.parametrize(
    "invalid",
    [
        b"3",
        b"[]",
        b"null",
        b"true",
        b'"kind"',
        b"{}",
        b'{"kind": "train"}',
        b'{"step": 1}',
        b'{"kind": "train", "step": "1"}',
        b'{"kind": "train", "step": null}',
        b'{"kind": "train", "step": [1]}',
        b'{"kind": "train", "step": NaN}',
        b"[" * 100_000,
        b'{"kind":' * 100_000,
        b"9" * 5_000,
        bytes(range(128, 256)),
        b"\x00\x00\x00",
        b"\xff\xfe{\x00}\x00",
        b"\r",
        b"",
    ],
    ids=lambda invalid: repr(invalid[:35]),
)
def test_invalid_lines_are_removed(tmp_path: Path, invalid: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1).encode() + invalid + b"\n" + line(2).encode() + invalid)
    truncate_log(path, 5)
    assert path.read_text() == line(1) + line(2)


def test_missing_log_is_not_created(tmp_path: Path) -> None:
    truncate_log(tmp_path / "metrics.jsonl", 3)
    assert not any(tmp_path.iterdir())


def test_peak_memory_is_in_bytes() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    tensor = torch.ones(2**26)  # 256 MiB
    after = peak_memory_bytes(torch.device("cpu"))
    assert after > 2**26, "a process with torch uses more than 64 MiB"
    assert before <= after < 2**44
    assert tensor.numel() == 2**26


# --- progress bar


def test_remaining_time_excludes_the_first_step() -> None:
    pace = Pace(start=10, total_steps=20, now=100.0)
    assert (pace.seconds_per_step, pace.seconds_left(101.0)) == (None, None)
    pace.estimate(30.0)  # from its first micro-batch
    assert pace.seconds_left(100.0) == 300.0
    pace.end_step(11, 160.0)  # the warm-up
    assert pace.seconds_left(160.0) == 9 * 60.0
    pace.end_step(12, 164.0)
    assert (pace.seconds_per_step, pace.seconds_left(164.0)) == (4.0, 8 * 4.0)
    assert pace.seconds_left(166.0) == 8 * 4.0 - 2.0, "counts down within a step"
    assert pace.seconds_left(999.0) == 7 * 4.0, "at least the steps after this one remain"
    pace.end_step(13, 170.0)  # with saving and evaluation
    assert pace.seconds_per_step == 5.0
    pace.end_step(20, 205.0)
    assert pace.seconds_left(205.0) == 0.0


def test_pace_is_the_mean_of_recent_steps() -> None:
    pace = Pace(0, 10_000, 0.0)
    for step in range(1, 101):
        pace.end_step(step, 100.0 * step)
    for step in range(101, 200):
        pace.end_step(step, 10_000.0 + step - 100)
    assert pace.seconds_per_step == 1.0


def test_time_before_the_first_step_does_not_count() -> None:
    pace = Pace(0, 10, 0.0)
    pace.begin_first_step(50.0)  # after an evaluation
    pace.end_step(1, 52.0)
    assert pace.seconds_left(52.0) == 18.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?"), (0.4, "0:00"), (7, "0:07"), (200, "3:20"), (59.7, "1:00"), (4680, "1:18:00"), (360_000, "100:00:00")],
)
def test_clock_shows_hours_only_if_needed(seconds: float | None, text: str) -> None:
    assert format_clock(seconds) == text


def test_step_estimate_from_the_first_micro_batch() -> None:
    assert format_step_estimate(1, 180, 1, 8, 3.2) == (
        "step 1: micro-batch 1 of 8 took 3.2 s; about 26 s per step, 1 h 17 min for 180 steps"
    )
    assert "for 80 steps" in format_step_estimate(101, 180, 1, 8, 3.2), "the remaining steps of a resumed run"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_of(stream: io.StringIO) -> list[str]:
    """Return all states of the bar, in order."""
    return [line.rstrip() for line in re.split(r"[\r\n]", stream.getvalue()) if line.strip()]


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("total", [9, 123_456])
def test_bar_fits_and_shows_step_loss_and_remaining_time(
    monkeypatch: pytest.MonkeyPatch, plan_of: Callable[[int], Plan], columns: int, total: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stderr", Terminal())
    pace = Pace(0, total, time.perf_counter() - 1.0)
    bar = Bar(plan_of(total), 0, pace)
    pace.end_step(1, time.perf_counter())
    bar.loss = 12.3456
    bar.move(1)
    bar.close()
    lines = lines_of(sys.stderr)  # type: ignore[arg-type]
    assert max(map(len, lines)) <= columns - 3, "room for ^C"
    assert lines[-1].startswith(f"step 1/{total:,} |")
    assert re.search(r"\| loss 12\.3456  left [\d:]+$", lines[-1])


def test_bar_is_redrawn_within_a_step(monkeypatch: pytest.MonkeyPatch, plan_of: Callable[[int], Plan]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(metrics, "REFRESH_SECONDS", 0.02)
    pace = Pace(0, 4, time.perf_counter())
    pace.estimate(1000.0)
    bar = Bar(plan_of(4), 0, pace)
    bar.move(0, 0.5)
    stream: io.StringIO = sys.stderr  # type: ignore[assignment]
    lines, deadline = set(lines_of(stream)), time.monotonic() + 60
    while len({line[-5:] for line in lines}) < 3:  # the remaining time counts down
        assert time.monotonic() < deadline, lines
        time.sleep(0.05)
        lines = set(lines_of(stream))
    bar.close()
    blocks = [line.count("#") for line in lines_of(stream)]  # tqdm's character without an encoding
    assert blocks[0] == 0
    assert blocks[-1] > 2, "half of one of four steps"


def test_bar_is_not_shown_without_a_terminal(monkeypatch: pytest.MonkeyPatch, plan_of: Callable[[int], Plan]) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar = Bar(plan_of(4), 0, Pace(0, 4, 0.0))
    bar.move(1)
    bar.close()
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
