"""The ledger: which rows are too many to drop, and how its lines begin."""

from __future__ import annotations

from collections import Counter

import pytest

from lora_accel.data.audit import DROPPED, SPLIT, TRUNCATED, USED, SourceLedger, ledger_lines
from lora_accel.errors import DataError


def ledger_of(num_dropped: int, num_used: int) -> SourceLedger:
    ledger = SourceLedger("rows.jsonl", "messages")
    for row in range(num_dropped + num_used):
        is_used = row >= num_dropped
        ledger.count(("rows.jsonl", row + 1), USED if is_used else f"{DROPPED}reason", [9] * is_used, [3] * is_used)
    return ledger


def test_the_limit_of_dropped_rows_is_inclusive_for_every_fraction() -> None:
    """0.29 * 100 is 28.999999999999996 in floats."""
    wrong_in_floats: Counter[bool] = Counter()
    for num_dropped in range(1, 100):
        limit = float(f"0.{num_dropped:02}")
        ledger_of(num_dropped, 100 - num_dropped).check(limit)
        if num_dropped < 99:
            with pytest.raises(DataError, match=rf"{num_dropped + 1} of 100 rows cannot be used; data\.max_dropped"):
                ledger_of(num_dropped + 1, 99 - num_dropped).check(limit)
        wrong_in_floats[num_dropped > limit * 100] += 1
    assert wrong_in_floats[True] > 0


def text_ledger(num_tokens: int, num_cut_tokens: int, bucket: str = TRUNCATED) -> SourceLedger:
    ledger = SourceLedger("rows.jsonl", "text", num_cut_tokens=num_cut_tokens)
    ledger.count(("rows.jsonl", 1), bucket, [num_tokens], [num_tokens])
    return ledger


def test_a_summary_begins_with_the_tokens_that_are_cut_off() -> None:
    ((_, line),) = ledger_lines([text_ledger(88, 12)])
    assert line.startswith(
        "12% of the tokens are cut off at data.max_length (raise it, or set data.overlong: split); text, 1 rows: "
    )
    assert "88 tokens (12 more cut off)" in line


@pytest.mark.parametrize(("num_tokens", "num_cut_tokens", "bucket"), [(95, 5, TRUNCATED), (9, 0, USED), (9, 9, SPLIT)])
def test_a_summary_with_few_tokens_cut_off_begins_with_the_format(
    num_tokens: int, num_cut_tokens: int, bucket: str
) -> None:
    ((_, line),) = ledger_lines([text_ledger(num_tokens, num_cut_tokens, bucket)])
    assert line.startswith("text, 1 rows: ")


def test_splitting_is_not_proposed_for_completions() -> None:
    ledger = text_ledger(50, 50)
    ledger.format, ledger.num_raw = "prompt_completion", 1
    ((_, line),) = ledger_lines([ledger])
    assert line.startswith("50% of the tokens are cut off at data.max_length (raise it); prompt_completion")


def test_a_ledger_is_read_back_with_all_its_fields() -> None:
    ledger = ledger_of(2, 5)
    ledger.sha256, ledger.num_raw, ledger.num_ended, ledger.num_cut_tokens = {"rows.jsonl": "0" * 64}, 4, 3, 2
    moved = SourceLedger.from_dict(ledger.as_dict(), "moved.jsonl", {"moved.jsonl": "0" * 64})
    assert moved.path == "moved.jsonl"
    assert moved.as_dict()["buckets"][USED] == {"num_rows": 5, "rows": {"moved.jsonl": "3-7"}}
    assert (moved.num_raw, moved.num_ended, moved.num_cut_tokens) == (4, 3, 2)


@pytest.mark.parametrize(
    ("reasons", "remedy"),
    [
        (["empty answer"], "Fix these rows."),
        (["the chat template rejects it: no"], "Set model.chat_template to a template that supports these rows "),
        (["empty answer", "the chat template rejects it: no"], "Fix these rows, or set model.chat_template to "),
    ],
)
def test_the_template_is_blamed_for_rows_that_it_does_not_support(reasons: list[str], remedy: str) -> None:
    ledger = SourceLedger("rows.jsonl", "messages")
    for number, reason in enumerate(reasons):
        ledger.count(("rows.jsonl", number), DROPPED + reason, [], [])
    with pytest.raises(DataError) as caught:
        ledger.check(0.0)
    assert str(caught.value).splitlines()[-1].startswith(remedy)
