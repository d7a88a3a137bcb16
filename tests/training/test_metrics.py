"""metrics.jsonl: what is after the step a run goes on from is dropped, and a torn line with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lora_accel.training.metrics import keep_until, peak_memory_bytes


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
    ids=["later", "all", "none", "kinds", "torn", "no newline", "torn within", "unicode", "empty"],
)
def test_later_and_torn_lines_are_dropped(tmp_path: Path, text: str, step: int, kept: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text, encoding="utf-8")
    keep_until(path, step)
    assert path.read_text(encoding="utf-8") == kept
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_reply_with_a_line_separator_is_one_line(tmp_path: Path) -> None:
    """U+2028 may stand in JSON as it is; str.splitlines() would tear the line there."""
    path = tmp_path / "metrics.jsonl"
    text = json.dumps({"kind": "event", "step": 1, "reply": "a\u2028b\x85c"}, ensure_ascii=False) + "\n"
    path.write_text(text + line(2), encoding="utf-8")
    keep_until(path, 1)
    assert path.read_text(encoding="utf-8") == text


def test_a_character_torn_in_half_does_not_stop_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((line(1) + '{"kind": "event", "step": 2, "reply": "').encode() + "é".encode()[:1])
    keep_until(path, 5)
    assert path.read_text(encoding="utf-8") == line(1)


@pytest.mark.parametrize("again", [False, True])
def test_what_will_be_evaluated_again_is_dropped_and_nothing_else(tmp_path: Path, again: bool) -> None:
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
    evaluated = [line(4, "eval"), line(4, "event", event="reply"), line(4, "event", event="reply")]
    path.write_text("".join([*before, *evaluated, line(5), line(6, "eval")]))
    keep_until(path, 4, again=again)
    assert path.read_text() == "".join(before if again else before + evaluated)


@pytest.mark.parametrize(
    "hostile",
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
    ids=lambda hostile: repr(hostile[:35]),
)
def test_a_line_that_is_none_of_ours_goes_and_stops_no_resume(tmp_path: Path, hostile: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1).encode() + hostile + b"\n" + line(2).encode() + hostile)
    keep_until(path, 5)
    assert path.read_text() == line(1) + line(2)


def test_a_log_that_is_not_there_stays_absent(tmp_path: Path) -> None:
    keep_until(tmp_path / "metrics.jsonl", 3)
    assert not any(tmp_path.iterdir())


def test_peak_memory_is_counted_in_bytes() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(2**26)  # 256 MiB
    after = peak_memory_bytes(torch.device("cpu"))
    assert after > 2**26, "a process with torch holds more than 64 MiB"
    assert before <= after < 2**44
    assert held.numel() == 2**26
